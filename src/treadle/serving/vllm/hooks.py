"""The hooks: what is done at the places of vLLM that `treadle.serving.vllm.places` names.

`install` wraps them in every process that vLLM starts; a wrapped place without a bundle in its configuration does what
it did before.
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from treadle.common.errors import ModelError, OptionError, TreadleError, problem_list
from treadle.serving.vllm.chats import with_contents
from treadle.serving.vllm.params import CONTENTS, KEY, PluginParams, read_plugin_params
from treadle.serving.vllm.places import PLACES, START, Place, version_problems
from treadle.serving.vllm.refusals import base_problems, refusals, tokenizer_problems

logger = logging.getLogger("vllm.treadle")

MARK = "__treadle__"
"""Of a wrapped place: vLLM may load plugins more than once in a process."""


def install() -> None:
    """Wrap vLLM's functions, once a process."""
    problems = version_problems()
    if START.problem() is None:
        _wrap(START, lambda original: _start(original, problems))
    elif read_plugin_params({}):  # no way to refuse later
        raise ModelError(problem_list("treadle cannot blend in this vLLM:", problems))
    if problems:
        return
    _wrap(PLACES["scheduler"], _scheduler)
    _wrap(PLACES["load"], _load)
    _wrap(PLACES["inputs_v1"], _inputs_v1)
    _wrap(PLACES["inputs_v2"], _inputs_v2)
    _wrap(PLACES["request"], _request)
    _wrap(PLACES["hash"], _hash)
    _wrap(PLACES["processor"], _processor)
    _wrap(PLACES["validate"], _validate)
    _wrap(PLACES["render"], _render)
    _wrap(PLACES["render_async"], _render_async)
    for name in ("completion", "chat", "responses"):
        _wrap(PLACES[name], _sampling)
    for name in ("completion_beams", "chat_beams"):
        _wrap(PLACES[name], _beams)
    core = importlib.import_module("vllm.v1.engine.core").EngineCore
    from treadle.serving.vllm import live

    for function in live.FUNCTIONS:
        setattr(core, function.__name__, function)  # vLLM's clients call functions of the core by name


def _wrap(place: Place, make: Callable[[Any], Any]) -> None:
    holder, name = place.find()
    original = getattr(holder, name)
    if hasattr(original, MARK):
        return
    wrapped = wraps(original)(make(original))
    setattr(wrapped, MARK, True)
    setattr(holder, name, wrapped)
    if name == "generate_block_hash_extra_keys":  # imported by name there, for the events of the cache
        setattr(importlib.import_module("vllm.v1.core.block_pool"), name, wrapped)


def params_of(vllm_config: Any) -> PluginParams | None:
    """Return the plugin's options in a configuration that has been through `_start`."""
    additional = vllm_config.additional_config
    return read_plugin_params(additional, {}) if isinstance(additional, dict) else None


# The API server, or `LLM`: refuse what cannot be done before any process is started


def _start(original: Any, problems: Sequence[str]) -> Any:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = read_plugin_params(self.additional_config)
        if params is None:
            return original(self, *args, **kwargs)
        if problems:
            raise ModelError(problem_list("treadle cannot blend in this vLLM:", problems))
        params = replace(params, bundle=str(Path(params.bundle).expanduser().resolve()))
        from treadle.serving.vllm.mixture import open_bundle

        bundle, mixture = open_bundle(params)
        config = original(self, *args, **kwargs)
        problems_here = [*refusals(config), *tokenizer_problems(config)]
        if refused := [*problems_here, *base_problems(config, bundle.base_model, params)]:
            raise OptionError(problem_list("treadle cannot blend with these options of vLLM:", refused))
        # the bundle's own digest: compiled code is cached under the configuration
        own = {KEY: params.document(), "treadle_fingerprint": mixture.fingerprint}
        config.additional_config = {**(config.additional_config or {}), **own}
        blending.append(params.bundle)
        return config

    return create_engine_config


def _sampling(original: Any) -> Any:
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = original(self, *args, **kwargs)
        extra = params.extra_args or {}
        if self.model and KEY not in extra:
            params.extra_args = {**extra, NAMED: self.model}
        return params

    return to_sampling_params


def _render(original: Any) -> Any:
    def render_chat(self: Any, *args: Any, **kwargs: Any) -> Any:
        rendered = original(self, *args, **kwargs)
        return with_contents(*rendered) if blending else rendered

    return render_chat


def _render_async(original: Any) -> Any:
    async def render_chat_async(self: Any, *args: Any, **kwargs: Any) -> Any:
        rendered = await original(self, *args, **kwargs)
        return with_contents(*rendered) if blending else rendered

    return render_chat_async


def _beams(original: Any) -> Any:
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = original(self, *args, **kwargs)
        if blending:  # vLLM asks for each step of a beam anew, as a prompt, without the request's options
            raise _client_error("beam search would lose the weights of its own tokens: use_beam_search must be false")
        return params

    return to_beam_search_params


blending: list[str] = []
"""Bundles that this process has been configured with: a request by itself does not lead to its server."""
NAMED = "treadle_model"
"""In a request's extra arguments: what it calls the model, which vLLM tells the engine nothing about."""


def _processor(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from treadle.serving.vllm.asked import Asked

        original(self, *args, **kwargs)
        Asked.of(self)  # reads the bundle now: with the first request, all others would wait for it

    return __init__


def _validate(original: Any) -> Any:
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        from treadle.serving.vllm.asked import Asked

        asked = Asked.of(self)
        if getattr(params, "extra_args", None) or (asked is not None and hasattr(params, "extra_args")):
            params = _checked(asked, params, kwargs, prompt.get(CONTENTS) if isinstance(prompt, dict) else None)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if asked is not None and request.prompt_embeds is not None:
            raise _client_error("prompt embeddings have no text to route on; give text or token ids")
        return request

    return process_inputs


def _checked(asked: Any, params: Any, options: dict[str, Any], contents: list[str] | None) -> Any:
    """Return sampling params whose treadle options have been read, or raise vLLM's error for a 400.

    With them go the contents of a chat's messages; None = the prompt is no chat.
    """
    extra = dict(params.extra_args or {})
    named = extra.pop(NAMED, None)
    extra.pop(CONTENTS, None)  # nobody's to give but the renderer's
    params = params.clone()
    params.extra_args = extra or None
    if asked is None:
        return params
    try:
        given = asked.choice(extra.get(KEY), named)
    except TreadleError as error:
        raise _client_error(str(error)) from error
    if options.get("resumable"):
        raise _client_error("a resumable session changes its prompt, and the weights with it: not with treadle")
    said = {} if contents is None else {CONTENTS: contents}
    params.extra_args = {**extra, KEY: given, **said}
    return params


def _client_error(message: str) -> Exception:
    return importlib.import_module("vllm.exceptions").VLLMValidationError(message, parameter=f"vllm_xargs.{KEY}")


# The engine's core: weights for every token, and blocks that are known by them


def _scheduler(original: Any) -> Any:
    def get_scheduler_cls(self: Any) -> Any:
        chosen = original(self)
        if chosen.__name__ not in ("Scheduler", "AsyncScheduler"):
            return chosen  # with a bundle, refused at the start
        return _blending(chosen)

    return get_scheduler_cls


def _blending(parent: Any) -> Any:
    class BlendingScheduler(parent):
        """vLLM's scheduler, whose output carries the gates of the tokens that it schedules."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            params = params_of(self.vllm_config)
            self.treadle: Any = None
            if params is not None:
                from treadle.serving.vllm.live import Core

                self.treadle = Core.open(params, self.vllm_config.model_config)

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            output = super().schedule(*args, **kwargs)
            if self.treadle is not None:
                output.treadle = self.treadle.plan(output.num_scheduled_tokens, self.requests)
            return output

    return BlendingScheduler


def _request(original: Any) -> Any:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        core = self.scheduler.treadle if hasattr(self.scheduler, "treadle") else None
        if core is None:
            return original(self, request)
        hasher = self.request_block_hasher
        if hasher is not None and not hasattr(hasher, MARK):
            self.request_block_hasher = _opening(hasher, core)
        made, wave = original(self, request)
        core.open_request(made)  # an error here ends this request alone
        return made, wave

    return preprocess_add_request


def _opening(hasher: Any, core: Any) -> Any:
    """Return a block hasher before which a request gets its weights: vLLM hashes in the request's constructor."""

    def hash_blocks(request: Any) -> Any:
        core.open_request(request)
        return hasher(request)

    setattr(hash_blocks, MARK, True)
    return hash_blocks


def _hash(original: Any) -> Any:
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> Any:
        keys, index = original(request, start_token_idx, end_token_idx, start_mm_idx)
        hashed = getattr(request, "treadle", None)
        key = hashed.block_key(request.all_token_ids, start_token_idx, end_token_idx) if hashed is not None else None
        return (keys if key is None else (*(keys or ()), (KEY, key))), index

    return generate_block_hash_extra_keys


# The workers: stacks beside the layers, and gates before each step


def _load(original: Any) -> Any:
    def load_model(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        model = original(self, vllm_config, model_config, prefix)
        params = params_of(vllm_config)
        if params is not None and model_config is vllm_config.model_config:
            model.treadle = stacks = _stacks(model, vllm_config, params)
            model.treadle_board = stacks.board  # a module's buffers survive vLLM's sleep
        return model

    return load_model


def _stacks(model: Any, vllm_config: Any, params: PluginParams) -> Any:
    import torch

    from treadle.serving.vllm.attach import AttachContext, attach
    from treadle.serving.vllm.cpu import cpu_product, is_cpu
    from treadle.serving.vllm.mixture import open_bundle

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


def _fill(runner: Any, scheduler_output: Any, request_ids: Sequence[str]) -> None:
    plan = getattr(scheduler_output, "treadle", None)
    stacks = getattr(runner.get_model(), KEY, None)
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


def _inputs_v1(original: Any) -> Any:
    def _prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(self, scheduler_output, *args, **kwargs)
        _fill(self, scheduler_output, self.input_batch.req_ids)
        return made

    return _prepare_inputs


def _inputs_v2(original: Any) -> Any:
    def prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(self, scheduler_output, *args, **kwargs)
        _fill(self, scheduler_output, batch.req_ids)
        return batch

    return prepare_inputs
