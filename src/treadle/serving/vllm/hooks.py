"""The hooks of vLLM's API server, and `install`, which wraps vLLM's functions in every process that vLLM starts.

The functions are named in `treadle.serving.vllm.support`. A wrapped function without a bundle in its configuration does
what it did before. The hooks of the engine are in `treadle.serving.vllm.engine_hooks`.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from treadle.common.errors import ModelError, OptionError, TreadleError, problem_list
from treadle.serving.vllm import engine_hooks
from treadle.serving.vllm.mixture import open_bundle
from treadle.serving.vllm.params import CONTENTS_KEY, KEY, params_of, read_plugin_params
from treadle.serving.vllm.requests import OptionReader, ServedEngine, with_contents
from treadle.serving.vllm.support import (
    HOOK_POINTS,
    START,
    base_problems,
    option_problems,
    tokenizer_of,
    tokenizer_problems,
    version_problems,
)

MODEL_KEY = "treadle_model"
"""The key of a request's extra arguments under which its `model` travels: vLLM tells the engine nothing about it."""


@dataclass
class ServerProcess:
    """The state that the hooks of one process share.

    Attributes:
        has_bundle: whether a bundle is configured here; a chat by itself does not lead to its server.
    """

    has_bundle: bool = False


def install() -> None:
    """Wrap vLLM's functions, once a process."""
    process = ServerProcess()
    problems = version_problems()
    if START.problem() is None:
        START.wrap(partial(checked_start, problems=problems, process=process))
    elif read_plugin_params({}):  # no way to refuse later
        raise ModelError(problem_list("treadle cannot blend in this vLLM:", problems))
    if problems:
        return
    hooks = {
        "scheduler": engine_hooks.blending_scheduler,
        "load": engine_hooks.blended_model,
        "inputs_v1": engine_hooks.gated_inputs_v1,
        "inputs_v2": engine_hooks.gated_inputs_v2,
        "request": engine_hooks.weighed_request,
        "hash": engine_hooks.keyed_blocks,
        "processor": partial(_reading_processor, process=process),
        "validate": _validated_request,
        "render": partial(_rendered_chat, process=process),
        "render_async": partial(_rendered_chat_async, process=process),
        **dict.fromkeys(("completion", "chat", "responses"), _named_model),
        **dict.fromkeys(("completion_beams", "chat_beams"), partial(_refused_beams, process=process)),
    }
    for name, hook in hooks.items():
        HOOK_POINTS[name].wrap(hook)
    core = importlib.import_module("vllm.v1.engine.core").EngineCore
    for function in engine_hooks.CORE_FUNCTIONS:
        setattr(core, function.__name__, function)  # vLLM's clients call functions of the core by name


# What treadle attaches to vLLM's objects


def reader_of(processor: Any) -> OptionReader | None:
    """Return the reader of one of vLLM's input processors; None = there is no bundle."""
    return getattr(processor, KEY, None)


def served_engine(engine_client: Any) -> ServedEngine | None:
    """Take what the routes need from vLLM's client; None = there is no bundle."""
    reader = reader_of(engine_client.input_processor)
    if reader is None:
        return None
    model = engine_client.model_config
    served: str | Sequence[str] | None = model.served_model_name

    async def ask(function: str, *arguments: Any) -> list[dict[str, Any]]:
        return await engine_client.engine_core.call_utility_all_async(function, *arguments)

    return ServedEngine(
        reader=reader,
        tokenizer=tokenizer_of(model),
        max_tokens=int(model.max_model_len),
        vocabulary=int(model.get_vocab_size()),
        model_names=(served,) if isinstance(served, str) else tuple(served or ()),
        ask=ask,
    )


# The start: refuse what cannot be done before any process is started


def checked_start(original: Any, problems: Sequence[str], process: ServerProcess) -> Any:
    """Make `EngineArgs.create_engine_config` refuse what cannot be blended.

    Args:
        original: vLLM's function.
        problems: why this vLLM cannot be hooked; empty = it can.
        process: the state that the hooks of this process share.
    """

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = read_plugin_params(self.additional_config)
        if params is None:
            return original(self, *args, **kwargs)
        if problems:
            raise ModelError(problem_list("treadle cannot blend in this vLLM:", problems))
        params = replace(params, bundle=str(Path(params.bundle).expanduser().resolve()))
        bundle, mixture = open_bundle(params)
        config = original(self, *args, **kwargs)
        problems_here = [*option_problems(config), *tokenizer_problems(config)]
        if refused := [*problems_here, *base_problems(config, bundle.base_model, params)]:
            raise OptionError(problem_list("treadle cannot blend with these options of vLLM:", refused))
        # the bundle's own digest: compiled code is cached under the configuration
        own = {KEY: params.document(), "treadle_fingerprint": mixture.fingerprint}
        config.additional_config = {**(config.additional_config or {}), **own}
        process.has_bundle = True
        return config

    return create_engine_config


# Requests: read what they ask for, or answer 400


def _named_model(original: Any) -> Any:
    """Make `to_sampling_params` pass the request's `model` on."""

    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = original(self, *args, **kwargs)
        extra = params.extra_args or {}
        if self.model and KEY not in extra:
            params.extra_args = {**extra, MODEL_KEY: self.model}
        return params

    return to_sampling_params


def _rendered_chat(original: Any, process: ServerProcess) -> Any:
    """Make `render_chat` keep the contents of a chat's messages."""

    def render_chat(self: Any, *args: Any, **kwargs: Any) -> Any:
        rendered = original(self, *args, **kwargs)
        return with_contents(*rendered) if process.has_bundle else rendered

    return render_chat


def _rendered_chat_async(original: Any, process: ServerProcess) -> Any:
    """Make `render_chat_async` keep the contents of a chat's messages."""

    async def render_chat_async(self: Any, *args: Any, **kwargs: Any) -> Any:
        rendered = await original(self, *args, **kwargs)
        return with_contents(*rendered) if process.has_bundle else rendered

    return render_chat_async


def _refused_beams(original: Any, process: ServerProcess) -> Any:
    """Make `to_beam_search_params` refuse: vLLM asks for each step of a beam without the request's options."""

    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = original(self, *args, **kwargs)
        if process.has_bundle:
            raise _client_error("beam search would lose the weights of its own tokens: use_beam_search must be false")
        return params

    return to_beam_search_params


def _reading_processor(original: Any, process: ServerProcess) -> Any:
    """Make `InputProcessor.__init__` read the bundle; with the first request, all others would wait for it."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        params = params_of(self.vllm_config)
        self.treadle = None if params is None else OptionReader.open(params)
        process.has_bundle = process.has_bundle or params is not None

    return __init__


def _validated_request(original: Any) -> Any:
    """Make `InputProcessor.process_inputs` read a request's options, or raise vLLM's error for a 400."""

    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        reader = reader_of(self)
        if getattr(params, "extra_args", None) or (reader is not None and hasattr(params, "extra_args")):
            contents = prompt.get(CONTENTS_KEY) if isinstance(prompt, dict) else None
            params = checked_params(reader, params, contents, is_resumable=bool(kwargs.get("resumable")))
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if reader is not None and request.prompt_embeds is not None:
            raise _client_error("prompt embeddings have no text to route on; give text or token ids")
        return request

    return process_inputs


def checked_params(
    reader: OptionReader | None, params: Any, contents: list[str] | None, *, is_resumable: bool = False
) -> Any:
    """Return sampling params whose treadle options have been read, or raise vLLM's error for a 400.

    Args:
        reader: reads the options; None = there is no bundle.
        params: vLLM's sampling params.
        contents: the contents of a chat's messages, which go along; None = the prompt is no chat.
        is_resumable: whether the request is a session that goes on.
    """
    extra = dict(params.extra_args or {})
    model = extra.pop(MODEL_KEY, None)
    extra.pop(CONTENTS_KEY, None)  # only the renderer may give it
    params = params.clone()
    params.extra_args = extra or None
    if reader is None:
        return params
    try:
        given = reader.choice(extra.get(KEY), model)
    except TreadleError as error:
        raise _client_error(str(error)) from error
    if is_resumable:
        raise _client_error("a resumable session changes its prompt, and the weights with it: not with treadle")
    said = {} if contents is None else {CONTENTS_KEY: contents}
    params.extra_args = {**extra, KEY: given, **said}
    return params


def _client_error(message: str) -> Exception:
    return importlib.import_module("vllm.exceptions").VLLMValidationError(message, parameter=f"vllm_xargs.{KEY}")
