"""The cache has one name in each model, and our own calls use it: no release of transformers has anything to say."""

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache

from benchmarks.peers.peers import cached_step
from treadle.common.params import SamplingParams
from treadle.common.transformers_names import CACHE_NAMES, cache_argument, find_cache
from treadle.engine.hf import routed
from treadle.engine.runners.runner import Runner

from conftest import tiny_llama

IDS = torch.arange(12).reshape(2, 6)


class NewModel(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None) -> Any: ...


class OldModel(nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> Any: ...


class Wrapper(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


class Catcher(logging.Handler):
    """Keeps the lines that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def said() -> Iterator[Callable[[], list[str]]]:
    """Return what tells which warnings, and lines that transformers logs, were about the cache so far."""
    root = logging.getLogger("transformers")
    catcher = Catcher()
    lines = catcher.lines
    logging.Logger.warning_once.cache_clear()  # it forgets that it has spoken
    root.addHandler(catcher)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [
            line
            for line in (*lines, *(str(each.message) for each in caught))
            if "cache" in line or "past_key_values" in line
        ]
    root.removeHandler(catcher)


def test_the_argument_is_read_off_the_model() -> None:
    assert cache_argument(NewModel()) == "cache"
    assert cache_argument(OldModel()) == "past_key_values"
    assert cache_argument(Wrapper()) == cache_argument(tiny_llama())  # the library's own


def test_a_cache_is_found_under_each_name() -> None:
    cache = DynamicCache()
    for name in CACHE_NAMES:
        assert find_cache({"input_ids": 1, name: cache}) is cache
    assert find_cache({"input_ids": 1}) is None


@torch.inference_mode()
def test_reading_outputs_and_passing_caches_is_silent(said: Callable[[], list[str]]) -> None:
    model = tiny_llama()
    for use_cache in (True, False):
        cache = find_cache(model(IDS, use_cache=use_cache))
        assert (cache is not None) == use_cache
    model(IDS, **{cache_argument(model): DynamicCache()})
    model.generate(IDS, max_new_tokens=2, pad_token_id=0, **{cache_argument(model): DynamicCache()})
    cached_step(model, IDS.tolist())()
    assert said() == []


def test_the_engine_is_silent(said: Callable[[], list[str]], engine: Any) -> None:
    engine.runner = Runner(engine.model, engine.blend)  # the model's own forward
    done = engine.generate(["add three", "the plane orbits"], sampling=SamplingParams(max_tokens=3))
    assert [len(each.token_ids) for each in done] == [3, 3]
    assert said() == []


def test_what_is_said_of_the_cache_is_heard(said: Callable[[], list[str]]) -> None:
    logging.getLogger("transformers.models").warning("`past_key_values` is old")
    warnings.warn("the cache moves", FutureWarning, stacklevel=1)
    assert said() == ["`past_key_values` is old", "the cache moves"]


@torch.inference_mode()
def test_calls_of_other_code_are_followed_under_both_names(bundle: Any, tokenizer: Any) -> None:
    model = tiny_llama()

    def weights_after(name: str) -> np.ndarray:
        cache = DynamicCache()
        with warnings.catch_warnings(), routed(model, bundle, tokenizer=tokenizer) as handle:
            warnings.simplefilter("ignore")  # the name is the caller's, and may be an old one
            for token in IDS[0].tolist():
                model(torch.tensor([[token]]), use_cache=True, **{name: cache})
        if not cache.get_seq_length():
            pytest.skip(f"this transformers ignores {name}=")
        return handle.weights

    first, *others = [weights_after(name) for name in (cache_argument(model), *CACHE_NAMES)]
    for other in others:
        np.testing.assert_array_equal(first, other)
