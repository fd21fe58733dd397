import numpy as np
import pytest
import torch

from treadle.routing import RoutingParams
from treadle.sampling import SamplingParams

PROMPTS = ["add three plus four", "the planet", "def loop return list of the cell"]
GREEDY = SamplingParams(max_tokens=24)


def test_smoke(engine):
    done = engine.generate(PROMPTS, sampling=GREEDY)
    for x in done:
        print(repr(x.text), x.finish_reason, x.weights[0], x.weights[-1])
    assert 0
