"""The hooks on stand-ins of vLLM's functions: what goes from a request to the gates of a step. Needs no vLLM."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from treadle.serving.vllm import engine_hooks
from treadle.serving.vllm.engine_hooks import core_of, plan_of, weights_of
from treadle.serving.vllm.params import KEY, PluginParams
from treadle.serving.vllm.support import HookPoint

from conftest import BASE


class Scheduler:
    """vLLM's scheduler, of one request."""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        self.requests: dict[str, Any] = {}

    def schedule(self) -> Any:
        for request in self.requests.values():
            request.num_computed_tokens += 40
        return SimpleNamespace(num_scheduled_tokens=dict.fromkeys(self.requests, 40))


def start(bundle: Path | None) -> Any:
    """Start vLLM's core with a blending scheduler."""
    additional = {} if bundle is None else {KEY: PluginParams(bundle=str(bundle)).document()}
    model = SimpleNamespace(
        tokenizer=str(bundle.parent / BASE) if bundle else "", tokenizer_revision=None, trust_remote_code=False
    )
    config = SimpleNamespace(additional_config=additional, model_config=model)
    scheduler_class = engine_hooks.blending_scheduler(lambda _: Scheduler)(None)
    return SimpleNamespace(scheduler=scheduler_class(config), request_block_hasher=lambda request: "hashes")


def new_request(given: Any = None) -> Any:
    sampling = SimpleNamespace(extra_args=None if given is None else {KEY: given})
    return SimpleNamespace(
        sampling_params=sampling, all_token_ids=list(range(60, 100)), num_prompt_tokens=40, num_computed_tokens=0
    )


def preprocess(core: Any, request: Any) -> tuple[Any, int]:
    """vLLM's own function: the constructor of a request hashes its blocks."""
    core.request_block_hasher(request)
    return request, 0


def test_a_request_gets_its_weights_and_a_step_its_gates(bundle_folder: Path) -> None:
    core = start(bundle_folder)
    add = engine_hooks.weighed_request(preprocess)
    keys = engine_hooks.keyed_blocks(lambda *_: (("salt",), 1))
    for name in ("code", "base"):
        core.scheduler.requests[name], _ = add(core, new_request(name))
    code, base = core.scheduler.requests.values()
    assert core.request_block_hasher(code) == "hashes"  # wrapped once, and vLLM's own answer
    (_, (_, key)), index = keys(code, 0, 16, 0)
    assert (index, type(key)) == (1, bytes)
    assert keys(base, 0, 16, 0) == (("salt",), 1)  # no adapter acts: the base's own block
    plan = plan_of(core.scheduler.schedule())
    assert plan is not None
    rows, counts = plan.in_order(["base", "code"])
    assert counts == [40, 40]
    np.testing.assert_array_equal((rows != 0).tolist(), [[False] * 3, [False, False, True]])


def test_a_hash_decides_what_it_needs(bundle_folder: Path) -> None:
    core = start(bundle_folder)
    request = new_request()
    engine_hooks.open_request(request, core.scheduler.treadle)
    first = weights_of(request)
    engine_hooks.open_request(request, core.scheduler.treadle)
    assert weights_of(request) is first
    assert first is not None
    assert first.weights.decided >= 40


def test_without_a_bundle_the_hooks_do_nothing() -> None:
    core = start(None)
    assert core_of(core.scheduler) is None
    request = new_request()
    assert engine_hooks.weighed_request(preprocess)(core, request) == (request, 0)
    assert weights_of(request) is None
    assert plan_of(core.scheduler.schedule()) is None
    assert engine_hooks.keyed_blocks(lambda *_: (None, 0))(request, 0, 16, 0) == (None, 0)


def test_a_scheduler_of_somebody_else_stays_as_it_is() -> None:
    assert engine_hooks.blending_scheduler(lambda _: SimpleNamespace)(None) is SimpleNamespace


def test_a_function_is_wrapped_once_and_where_it_is_imported_too(monkeypatch: pytest.MonkeyPatch) -> None:
    owner, importer = ModuleType("stand_in"), ModuleType("stand_in_importer")
    owner.double = importer.double = lambda number: 2 * number  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in", owner)
    monkeypatch.setitem(sys.modules, "stand_in_importer", importer)
    point = HookPoint("stand_in:double", ("number",), importers=("stand_in_importer",))
    for _ in range(2):
        point.wrap(lambda original: lambda number: original(number) + 1)
    assert (owner.double(3), importer.double(3)) == (7, 7)
    assert point.problem() is None
    assert HookPoint("stand_in:double", ("size",)).problem() == "stand_in:double: has parameters number; expected size"
