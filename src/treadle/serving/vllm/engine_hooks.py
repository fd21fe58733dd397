"""The hooks of vLLM's engine: weights for every scheduled token, keys of cached blocks, and gates in the workers.

`treadle.serving.vllm.hooks.install` puts them in their places. This module and `hooks` alone touch vLLM's requests,
schedulers, cores and workers; what treadle attaches to them is read by `core_of`, `weights_of`, `plan_of` and
`stacks_of`.
"""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from treadle.common.errors import AdapterError, ModelError, TreadleError
from treadle.lora.adapter import read_adapter
from treadle.serving.vllm.attach import AttachContext, attach
from treadle.serving.vllm.cpu import cpu_product, is_cpu
from treadle.serving.vllm.live import Core, HashedWeights
from treadle.serving.vllm.mixture import open_bundle
from treadle.serving.vllm.params import CONTENTS_KEY, KEY, PluginParams, params_of
from treadle.serving.vllm.request_weights import RequestWeights
from treadle.serving.vllm.schedule import Plan
from treadle.serving.vllm.stacks import ModelStacks
from treadle.serving.vllm.support import MARK

logger = logging.getLogger("vllm.treadle")

ScheduledTokens = tuple[str, RequestWeights, Sequence[int], int, int]
"""Request id, its weights and token ids, and the positions from which to which its tokens are scheduled."""


# What treadle attaches to vLLM's objects


def core_of(scheduler: Any) -> Core | None:
    """Return the blending state of vLLM's scheduler; None = there is no bundle."""
    return getattr(scheduler, KEY, None)


def weights_of(request: Any) -> HashedWeights | None:
    """Return the weights of vLLM's request; None = it has none (yet)."""
    return getattr(request, KEY, None)


def plan_of(scheduler_output: Any) -> Plan | None:
    """Return the gates that travel with the scheduler's output; None = there are none."""
    return getattr(scheduler_output, KEY, None)


def stacks_of(runner: Any) -> ModelStacks | None:
    """Return the stacks beside the model of a worker's runner; None = there is no bundle."""
    return getattr(runner.get_model(), KEY, None)


# The engine's core: weights for every token, and blocks that are known by them


def blending_scheduler(original: Any) -> Any:
    """Make `SchedulerConfig.get_scheduler_cls` return a scheduler that plans gates."""

    def get_scheduler_cls(self: Any) -> Any:
        chosen = original(self)
        if chosen.__name__ not in ("Scheduler", "AsyncScheduler"):
            return chosen  # with a bundle, refused at the start
        return _scheduler_class(chosen)

    return get_scheduler_cls


def _scheduler_class(parent: Any) -> Any:
    class BlendingScheduler(parent):
        """vLLM's scheduler, whose output carries the gates of the tokens that it schedules."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            params = params_of(self.vllm_config)
            self.treadle = None if params is None else Core.open(params, self.vllm_config.model_config)

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            output = super().schedule(*args, **kwargs)
            if self.treadle is not None:
                scheduled = scheduled_tokens(output.num_scheduled_tokens, self.requests)
                output.treadle = self.treadle.schedule.plan(scheduled)
            return output

    return BlendingScheduler


def scheduled_tokens(counts: Mapping[str, int], requests: Mapping[str, Any]) -> list[ScheduledTokens]:
    """Return the tokens that vLLM has just scheduled, and counts as computed already.

    Args:
        counts: request id -> how many tokens.
        requests: request id -> vLLM's request.
    """
    entries = [(name, requests[name], count) for name, count in counts.items()]
    return [
        (name, each.treadle.weights, each.all_token_ids, each.num_computed_tokens - count, each.num_computed_tokens)
        for name, each, count in entries
    ]


def weighed_request(original: Any) -> Any:
    """Make `EngineCore.preprocess_add_request` give each request its weights."""

    def preprocess_add_request(self: Any, request: Any) -> Any:
        core = core_of(self.scheduler)
        if core is None:
            return original(self, request)
        hasher = self.request_block_hasher
        if hasher is not None and not hasattr(hasher, MARK):
            self.request_block_hasher = _opening(hasher, core)
        made, wave = original(self, request)
        open_request(made, core)  # an error here ends this request alone
        return made, wave

    return preprocess_add_request


def _opening(hasher: Any, core: Core) -> Callable[[Any], Any]:
    """Return a block hasher before which a request gets its weights: vLLM hashes in the request's constructor."""

    def hash_blocks(request: Any) -> Any:
        open_request(request, core)
        return hasher(request)

    setattr(hash_blocks, MARK, True)
    return hash_blocks


def open_request(request: Any, core: Core) -> None:
    """Give vLLM's request its weights and decide those of its prompt, unless it has them."""
    if weights_of(request) is not None:
        return
    extra = (request.sampling_params.extra_args or {}) if request.sampling_params else {}
    weights = core.schedule.open(extra.get(KEY), request.num_prompt_tokens, extra.get(CONTENTS_KEY))
    request.treadle = HashedWeights(core.schedule, weights)
    core.schedule.decide([(weights, request.all_token_ids, request.num_prompt_tokens)])


def keyed_blocks(original: Any) -> Any:
    """Make `generate_block_hash_extra_keys` add what the weights of a block's tokens are known by."""

    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> Any:
        keys, index = original(request, start_token_idx, end_token_idx, start_mm_idx)
        hashed = weights_of(request)
        key = hashed.block_key(request.all_token_ids, start_token_idx, end_token_idx) if hashed is not None else None
        return (keys if key is None else (*(keys or ()), (KEY, key))), index

    return generate_block_hash_extra_keys


# Functions of vLLM's EngineCore (`self`), which its clients call by name; they run between two steps


def treadle_adapters(self: Any) -> dict[str, Any]:
    """Return the adapters, their slots and what the router has decided."""
    return _core(self).adapters()


def treadle_figures(self: Any) -> dict[str, Any]:
    """Return the numbers of decisions and generated tokens of one engine."""
    return _core(self).figures()


def treadle_check_adapter(self: Any, name: str, path: str, samples: Sequence[str] | None = None) -> dict[str, Any]:
    """Return {} if an adapter can join, else {"error": message}; nothing changes."""
    return _core(self).check_adapter(name, path, samples, _busy_slots(self), partial(_put_in_workers, self))


def treadle_add_adapter(self: Any, name: str, path: str, samples: Sequence[str] | None = None) -> dict[str, Any]:
    """Let an adapter take part in the requests that begin from now on; return the adapters or {"error": message}."""
    return _core(self).add_adapter(name, path, samples, _busy_slots(self), partial(_put_in_workers, self))


def treadle_remove_adapter(self: Any, name: str) -> dict[str, Any]:
    """Take an adapter out of the requests that begin from now on; return the adapters or {"error": message}."""
    return _core(self).remove_adapter(name)


CORE_FUNCTIONS = (
    treadle_check_adapter,
    treadle_add_adapter,
    treadle_remove_adapter,
    treadle_adapters,
    treadle_figures,
)
"""The functions that vLLM's EngineCore gets, by name."""


def _core(engine_core: Any) -> Core:
    return engine_core.scheduler.treadle


def _busy_slots(engine_core: Any) -> set[int]:
    """Return the slots of the mixtures that running requests began with."""
    found = [weights_of(each) for each in engine_core.scheduler.requests.values()]
    return {slot for each in found if each is not None for slot in each.weights.mixture.slots}


def _put_in_workers(engine_core: Any, slot: int | None, name: str, path: str) -> None:
    """Call `put_adapter` in every worker; raise an AdapterError with the first problem."""
    problems = [each for each in engine_core.collective_rpc(put_adapter, args=(slot, name, path)) if each]
    if problems:
        raise AdapterError(problems[0])


# The workers: stacks beside the layers, and gates before each step


def put_adapter(worker: Any, slot: int | None, name: str, path: str) -> str | None:
    """Copy an adapter's factors into a slot of a worker's model; return what is wrong instead of raising.

    Without a slot nothing is copied: only the fit is checked.
    """
    stacks = worker.model_runner.get_model().treadle
    try:
        adapter = read_adapter(path, name)
        stacks.check_room(adapter)
    except TreadleError as error:
        return str(error)
    if slot is not None:
        stacks.put(slot, adapter)
    return None


def blended_model(original: Any) -> Any:
    """Make `BaseModelLoader.load_model` lay the stacks beside the model's layers."""

    def load_model(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        model = original(self, vllm_config, model_config, prefix)
        params = params_of(vllm_config)
        if params is not None and model_config is vllm_config.model_config:
            model.treadle = stacks = _attach_stacks(model, vllm_config, params)
            model.treadle_board = stacks.board  # a module's buffers survive vLLM's sleep
        return model

    return load_model


def _attach_stacks(model: Any, vllm_config: Any, params: PluginParams) -> ModelStacks:
    linear = importlib.import_module("vllm.model_executor.layers.linear")
    missing = importlib.import_module("vllm.model_executor.models.utils").PPMissingLayer
    bundle, mixture = open_bundle(params)
    context = AttachContext(
        num_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        device=torch.device(vllm_config.device_config.device),
        dtype=vllm_config.model_config.dtype,
        linear=linear.LinearBase,
        forwards=tuple(
            each.forward for each in (linear.ReplicatedLinear, linear.ColumnParallelLinear, linear.RowParallelLinear)
        ),
        unpacked=frozenset(["kv_b_proj"] if vllm_config.model_config.use_mla else []),
        linear_method=linear.LinearMethodBase,
        missing=missing,
        pack=cpu_product if is_cpu() and vllm_config.model_config.dtype.itemsize < 4 else None,
    )
    stacks = attach(model, bundle, mixture, params, context)
    logger.info(
        "treadle blends %s beside %d of %d linear layers (%.1f MiB)",
        ", ".join(mixture.names), len(stacks.stacks), stacks.num_layers, stacks.num_bytes() / 2**20,
    )  # fmt: skip
    return stacks


def fill_gates(runner: Any, scheduler_output: Any, request_ids: Sequence[str]) -> None:
    """Set the gates of a step's tokens, in the order of the worker's batch."""
    plan, stacks = plan_of(scheduler_output), stacks_of(runner)
    if plan is None:
        if stacks is not None and not all(map(_is_warm_up, request_ids)):
            raise ModelError("a step came without its weights, from a scheduler that is not treadle's")
    elif stacks is None:
        raise ModelError(f"the loader {runner.load_config.load_format!r} did not lay the adapters beside the model")
    else:
        stacks.board.fill(*plan.in_order(request_ids))


def _is_warm_up(request_id: str) -> bool:
    """Return whether vLLM's worker has made a request up, to warm up its kernels: no scheduler knows it."""
    return request_id.startswith("_") and "warmup_" in request_id


def gated_inputs_v1(original: Any) -> Any:
    """Make `GPUModelRunner._prepare_inputs` fill the gates."""

    def _prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(self, scheduler_output, *args, **kwargs)
        fill_gates(self, scheduler_output, self.input_batch.req_ids)
        return made

    return _prepare_inputs


def gated_inputs_v2(original: Any) -> Any:
    """Make the second runner's `prepare_inputs` fill the gates."""

    def prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(self, scheduler_output, *args, **kwargs)
        fill_gates(self, scheduler_output, batch.req_ids)
        return batch

    return prepare_inputs
