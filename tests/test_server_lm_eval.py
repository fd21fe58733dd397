"""lm-eval's own client for completions, against the server."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from treadle.common.params import RoutingParams, SamplingParams

from conftest import BASE
from serving import Serving, serving

PAIRS = [("add three plus", " four"), ("the planet", " heat"), ("def loop", " return list"), ("\u00e9t\u00e9", " x")]


@pytest.fixture(scope="module")
def served(bundle_folder: Path) -> Generator[Serving]:
    with serving(bundle_folder) as each:
        yield each


def client(served: Serving, bundle_folder: Path, model: str) -> Any:
    return LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions",
        model=model,
        tokenizer_backend="huggingface",
        tokenizer=str(bundle_folder.parent / BASE),
        max_length=400,
        batch_size=2,
    )


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@pytest.mark.parametrize("model", ["math", "base"])
def test_likelihoods_are_those_of_the_engine(served: Serving, bundle_folder: Path, model: str) -> None:
    routing = RoutingParams.base() if model == "base" else RoutingParams.one(model)
    engine = served.engine
    greedy = [
        engine.generate(prompt, sampling=SamplingParams(max_tokens=1), routing=routing).text for prompt, _ in PAIRS
    ]
    pairs = [*PAIRS, *((prompt, text) for (prompt, _), text in zip(PAIRS, greedy, strict=True) if "\ufffd" not in text)]
    answers = client(served, bundle_folder, model).loglikelihood(requests("loglikelihood", pairs))
    scores = engine.score(*map(list, zip(*pairs, strict=True)), routing=routing)
    np.testing.assert_allclose([logprob for logprob, _ in answers], [each.sum() for each in scores], atol=1e-3)
    assert [is_greedy for _, is_greedy in answers] == [False] * len(PAIRS) + [True] * (len(pairs) - len(PAIRS))
    assert len(pairs) > len(PAIRS)


def test_texts_are_those_of_the_engine(served: Serving, bundle_folder: Path) -> None:
    asked = [(prompt, {"until": ["\n\n"], "max_gen_toks": 9, "temperature": 0}) for prompt, _ in PAIRS]
    texts = client(served, bundle_folder, "auto").generate_until(requests("generate_until", asked))
    sampling = SamplingParams(max_tokens=9, stop=("\n\n", "<end>"))
    done = served.engine.generate([prompt for prompt, _ in PAIRS], sampling=sampling)
    assert texts == [each.text for each in done]
