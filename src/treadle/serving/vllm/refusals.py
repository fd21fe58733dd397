"""What is refused at the start: options of vLLM that would make a blend wrong, and a base that is another."""

from pathlib import Path
from typing import Any

from treadle.common.errors import ModelError
from treadle.serving.vllm.params import KEY, PluginParams
from treadle.serving.vllm.tokens import tokenizer_of

TOKENIZER_MODES = ("auto", "hf")
"""Of vLLM's `--tokenizer-mode`: those in which a token id is the text that tokenizer.json says."""


def refusals(config: Any) -> list[str]:
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


def tokenizer_problems(config: Any) -> list[str]:
    """Return what is wrong with the tokenizer, which would be wrong with each request."""
    if config.model_config.skip_tokenizer_init:
        return []  # refused above
    try:
        tokenizer_of(config.model_config)
    except ModelError as error:
        return [str(error)]
    return []


def base_problems(config: Any, base: str, params: PluginParams) -> list[str]:
    """Return what is wrong where `--model` is not the bundle's base, as far as the names say."""
    from treadle.common.files import locate

    model = config.model_config.model
    names = {model, Path(model).name, Path(model).name.replace("--", "/")}
    if {base, locate(base), params.base_model} & names or Path(locate(base)).name == Path(model).name:
        return []
    return [
        f"the bundle's base is {base!r}, --model is {model!r}; if these are the same weights, say so: "
        f'--additional-config \'{{"{KEY}": {{..., "base_model": "{model}"}}}}\''
    ]
