"""Adapters without samples: no text chooses them, fixed weights do, and where none has samples nothing is routed."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treadle.bundle.bundle import save_bundle
from treadle.common.errors import AdapterError, BundleError, OptionError
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.lora.adapter import read_adapter
from treadle.routing.explain import explain
from treadle.routing.fitting import centroid_of, fit
from treadle.routing.router import Router

from conftest import SAMPLES

TEXTS = ["add the sum", "def loop", "the", ""]
PARAMS = (RoutingParams(), RoutingParams(score="cosine"), RoutingParams(rule="top_k", fallback=False))


@pytest.fixture
def routed(embedder: Any) -> Router:
    return fit({name: SAMPLES[name] for name in ("math", "code")}, embedder)


@pytest.mark.parametrize("params", PARAMS)
def test_the_others_are_weighed_as_without_it(routed: Router, params: RoutingParams) -> None:
    both = replace(routed, unrouted=("science",))
    assert both.names == ("math", "code", "science")
    weights = both.weights(TEXTS, params)
    np.testing.assert_array_equal(weights[:, :2], routed.weights(TEXTS, params))
    assert not weights[:, 2].any()
    pieces = ["add", " the", " sum", " def", " loop"]
    np.testing.assert_array_equal(both.trace(pieces, 2, params)[:, :2], routed.trace(pieces, 2, params))


def test_fixed_weights_choose_it(routed: Router) -> None:
    both = replace(routed, unrouted=("science",))
    np.testing.assert_allclose(both.weights(["add"], RoutingParams.one("science")), [[0, 0, 1]])
    assert both.among(["science", "code"]).names == ("code", "science")
    np.testing.assert_array_equal(both.remove("science").weights(TEXTS), routed.weights(TEXTS))
    with pytest.raises(AdapterError, match="same name"):
        replace(routed, unrouted=("math",))


def test_nothing_is_routed_without_any_samples(routed: Router) -> None:
    alone = replace(routed.among([]), unrouted=("science", "math"))
    for params in PARAMS:
        asks = (alone.check, partial(alone.weights, ["add"]), partial(alone.trace, ["a"], 1))
        for ask in asks:
            with pytest.raises(OptionError, match=r"no adapter has sample texts.*such as science=1.*samples\.txt"):
                ask(params)
    alone.check(RoutingParams.uniform(alone.names))
    assert not routed.among([]).weights(["add"]).any()  # without an adapter at all, the base answers


def test_an_explanation_has_no_number_where_there_are_no_samples(routed: Router) -> None:
    told = explain(replace(routed, unrouted=("science",)), "add the sum")
    assert told.cosines[2] is told.scores[2] is None
    assert told.weights[2] == 0
    assert asdict(told) | {"names": (), "cosines": (), "scores": (), "weights": ()} == asdict(
        explain(routed, "add the sum")
    ) | {"names": (), "cosines": (), "scores": (), "weights": ()}
    json.dumps(asdict(told), allow_nan=False)


def test_an_engine_blends_it_by_name_and_takes_samples_later(
    model: Any, tokenizer: Any, adapter_folders: dict[str, Path], routed: Router, embedder: Any
) -> None:
    adapters = {name: read_adapter(folder, name) for name, folder in adapter_folders.items()}
    sampling = SamplingParams(max_tokens=6)
    engine = Engine(model, tokenizer, list(adapters.values()), replace(routed, unrouted=("science",)))
    mine = engine.generate("add three", sampling=sampling, routing=RoutingParams.one("science"))
    auto = engine.generate("add three", sampling=sampling)
    assert auto.adapter_names == ("math", "code", "science")
    assert not auto.weights[:, 2].any()
    engine.adapters.retire("code")
    engine.adapters.join(adapters["code"], centroid_of("code", SAMPLES["code"], embedder, tails=embedder.tails))
    assert engine.adapter_names == ("math", "code", "science")
    again = engine.generate("add three", sampling=sampling, routing=RoutingParams.one("science"))
    assert again.token_ids == mine.token_ids
    engine.detach()
    alone = Engine(model, tokenizer, [adapters["science"]], replace(routed.among([]), unrouted=("science",)))
    assert (
        alone.generate("add three", sampling=sampling, routing=RoutingParams.one("science")).token_ids == mine.token_ids
    )
    with pytest.raises(OptionError, match="no adapter has sample texts"):
        alone.generate("add three", sampling=sampling)


def test_a_bundle_on_disk_has_samples_of_every_adapter(
    routed: Router, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    both = replace(routed, unrouted=("science",))
    with pytest.raises(BundleError, match="'science' has no samples"):
        save_bundle(tmp_path / "new", base="tiny-llama", adapters=adapter_folders, router=both)
