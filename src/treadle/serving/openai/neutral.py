"""Fields of other servers' APIs that treadle does not support, and their values that change no answer.

Clients send many of them by default, so these values are taken. Any other value is refused by the field's
name. An unknown field that is null counts as absent, as in OpenAI's API.
"""

from typing import Any, ClassVar, TypeAlias, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from treadle.common.errors import listed

Json: TypeAlias = dict[str, Any]
NEUTRAL = "x-neutral"
"""Marks the schema of a field that changes no answer; messages about unknown fields do not suggest it."""


class Body(BaseModel):
    """A JSON object that allows no unknown fields; a text is not read as a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    EXAMPLE: ClassVar[Json] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_unknown_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = cls.model_fields
        return {name: value for name, value in cast(Json, given).items() if value is not None or name in known}

    @field_validator("*", mode="after")
    @classmethod
    def _asks_for_nothing_unsupported(cls, value: Any, info: ValidationInfo) -> Any:
        extra = cls.model_fields[info.field_name or ""].json_schema_extra
        if isinstance(extra, dict) and value not in cast(list[Any], extra.get("enum", [value])):
            raise ValueError("unsupported")
        return value


def unsupported(*neutral: Any) -> Any:
    """Declare a field that treadle does not support: it may only have values that change nothing."""
    values = [*neutral, None]
    return Field(
        default=None,
        description=f"only {listed(values)}: it is not supported",
        json_schema_extra={"enum": values, NEUTRAL: True},
    )


def unused(kind: str) -> Any:
    """Declare a field that changes no answer; any value of its type is taken."""
    return Field(default=None, description=f"{kind}; it is not used", json_schema_extra={NEUTRAL: True})


class NeutralMessageFields(Body):
    """Fields of messages that clients send back as they got them."""

    refusal: Any = unsupported()
    annotations: list[Any] | None = unused("a list")
    audio: Any = unsupported()
    function_call: Any = unsupported()
    tool_calls: Any = unsupported([])
    cache_control: Json | None = unused("an object")


class NeutralFields(Body):
    """Fields of both endpoints that generate: OpenAI's, then vLLM's and llama.cpp's."""

    user: str | None = unused("a text")
    store: bool | None = unused("true or false")
    metadata: Json | None = unused("an object")
    service_tier: str | None = unused("a text")
    safety_identifier: str | None = unused("a text")
    prompt_cache_key: str | None = unused("a text")
    prompt_cache_retention: str | None = unused("a text")
    prompt_cache_options: Json | None = unused("an object")
    presence_penalty: Any = unsupported(0)
    frequency_penalty: Any = unsupported(0)
    logit_bias: Any = unsupported({})
    repetition_penalty: Any = unsupported(1)
    length_penalty: Any = unsupported(1)
    min_p: Any = unsupported(0)
    min_tokens: Any = unsupported(0)
    ignore_eos: Any = unsupported(False)
    bad_words: Any = unsupported([])
    skip_special_tokens: Any = unsupported(True)
    spaces_between_special_tokens: Any = unsupported(True)
    include_stop_str_in_output: Any = unsupported(False)
    use_beam_search: Any = unsupported(False)
    return_token_ids: Any = unsupported(False)
    return_tokens_as_token_ids: Any = unsupported(False)
    priority: int | None = unused("a whole number")
    cache_prompt: bool | None = unused("true or false")
    repeat_penalty: Any = unsupported(1)
    typical_p: Any = unsupported(1)
    tfs_z: Any = unsupported(1)
    mirostat: Any = unsupported(0)
    grammar: Any = unsupported("")


class NeutralChatFields(Body):
    """Fields of /v1/chat/completions: OpenAI's, then vLLM's. `RequestReader` checks tools with their choice."""

    tools: list[Any] | None = unused("a list")
    tool_choice: Any = unsupported("none", "auto")
    parallel_tool_calls: bool | None = unused("true or false")
    functions: list[Any] | None = unused("a list")
    function_call: Any = unsupported("none", "auto")
    response_format: Any = unsupported({"type": "text"})
    modalities: Any = unsupported(["text"])
    audio: Any = unsupported()
    moderation: Any = unsupported()
    web_search_options: Any = unsupported()
    reasoning_effort: str | None = unused("a text")
    verbosity: Any = unsupported("medium")
    prediction: Json | None = unused("an object")
    echo: Any = unsupported(False)
    add_generation_prompt: Any = unsupported(True)
    continue_final_message: Any = unsupported(False)
    add_special_tokens: Any = unsupported(False)
    chat_template_kwargs: Any = unsupported({})
    documents: Any = unsupported([])
