"""The bodies of requests, as OpenAI's API has them.

A field's description says what is allowed. The OpenAPI document and the refusals show it, with the server's limits in
place of the names of its options.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, WithJsonSchema

from treadle.common.errors import LONGEST_NAME
from treadle.serving.openai.neutral import (
    Body,
    Json,
    NeutralChatFields,
    NeutralFields,
    NeutralMessageFields,
    unsupported,
)
from treadle.serving.openai.params import ServeParams

BodyKind = TypeVar("BodyKind", bound=Body)
MAX_STOP_CHARACTERS = 256
MIN_TEMPERATURE = 0.001
NAMING = f"letters, digits, '.', '_' and '-', beginning with a letter or digit, at most {LONGEST_NAME} characters"


@dataclass(frozen=True)
class AtMost:
    """Bounds a number, or the length of a list, by an option of the server."""

    option: str

    def __call__(self, value: Any, info: ValidationInfo) -> Any:
        """Refuse a value that is too large, before the entries of a list are checked."""
        size = len(cast(list[Any], value)) if isinstance(value, list) else value
        if isinstance(size, int) and info.context is not None and size > getattr(info.context, self.option):
            raise ValueError("too many")
        return value


def with_limits(description: str, limits: ServeParams) -> str:
    """Return a field's description with the server's limits in place of its options' names."""
    return re.sub("--max-[a-z]+", lambda found: str(getattr(limits, found[0][2:].replace("-", "_"))), description)


def _texts(value: Any) -> Any:
    """Return one text or a list of texts as a list."""
    return [value] if isinstance(value, str) else value


def _no_tiny_temperature(value: float | None) -> float | None:
    """Refuse a temperature so near 0 that logits overflow."""
    if value and value < MIN_TEMPERATURE:
        raise ValueError("too small")
    return value


def _parts(value: Any) -> Any:
    """Return a message's content as one text: join its parts of type text."""
    if not isinstance(value, list):
        return value
    parts = cast(list[Any], value)
    texts = [part["text"] for part in parts if _is_text_part(part)]
    return "".join(texts) if parts and len(texts) == len(parts) else value


def _is_text_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    given = {name: value for name, value in cast(Json, part).items() if value is not None and name not in CACHE_HINTS}
    return given.keys() == {"type", "text"} and given["type"] == "text" and isinstance(given["text"], str)


def _prompts(value: Any) -> list[str | list[int]]:
    """Return a list of prompts; each is a text or token ids."""
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if isinstance(value, list) and value:
        each = cast(list[Any], value)
        if all(isinstance(prompt, str) for prompt in each) or all(_is_ids(prompt) for prompt in each):
            return each
    raise ValueError("not prompts")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in cast(list[Any], value))


CACHE_HINTS = ("cache_control", "prompt_cache_breakpoint")
"""Fields of a part that are hints for a provider's cache; they change no answer."""
STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
IDS: Json = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
PROMPT: Json = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        IDS,
        {"type": "array", "items": IDS, "minItems": 1},
    ]
}
PARTS: Json = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "type": {"const": "text"},
            "text": {"type": "string"},
            **{name: {"type": ["object", "null"]} for name in CACHE_HINTS},
        },
        "required": ["type", "text"],
        "additionalProperties": False,
    },
}
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]] | None,
    BeforeValidator(AtMost("max_stops")),
    BeforeValidator(_texts),
    WithJsonSchema(STRINGS),
]
Samples = Annotated[
    list[Annotated[str, Field(description="a text")]] | None,
    Field(min_length=1, max_length=1000, description="1 to 1000 texts; leave it out where training left a centroid"),
]
MaxTokens = Annotated[
    int | None,
    Field(ge=1, description="a whole number from 1 to --max-tokens"),
    BeforeValidator(AtMost("max_tokens")),
]


class Message(NeutralMessageFields):
    """One message of a chat."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        Field(description="'system', 'developer', 'user' or 'assistant'"),
    ]
    content: Annotated[
        str,
        BeforeValidator(_parts),
        WithJsonSchema({"anyOf": [{"type": "string"}, PARTS]}),
        Field(description='a text, or a list of parts like {"type": "text", "text": "Hello"}; no images, no sound'),
    ]
    name: Annotated[str | None, Field(description="a text, which the chat template may show")] = None

    def turn(self, *, has_developers: bool) -> dict[str, str]:
        """Return the message for a chat template; without developers in the template, a developer is the system."""
        role = "system" if self.role == "developer" and not has_developers else self.role
        turn = {"role": role, "content": self.content}
        return turn if self.name is None else {**turn, "name": self.name}


Messages = Annotated[
    list[Annotated[Message, Field(description='an object like {"role": "user", "content": "Hello"}')]],
    Field(min_length=1),
    BeforeValidator(AtMost("max_messages")),
]


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: Annotated[bool | None, Field(description="true or false")] = False
    include_obfuscation: Annotated[bool | None, Field(description="true or false; it is not used")] = None
    continuous_usage_stats: Any = unsupported(False)


class GenerationBody(NeutralFields):
    """The fields that /v1/completions and /v1/chat/completions share."""

    model: Annotated[str, Field(description="the bundle's name or 'auto' (routed), an adapter's name, or 'base'")]
    n: Annotated[
        int | None, Field(ge=1, description="a whole number from 1 to --max-n"), BeforeValidator(AtMost("max_n"))
    ] = 1
    max_tokens: MaxTokens = None
    temperature: Annotated[
        float | None,
        Field(ge=0, le=2, description="0 (greedy), or a number from 0.001 to 2; 1 where it is not given"),
        AfterValidator(_no_tiny_temperature),
    ] = None
    top_p: Annotated[float | None, Field(gt=0, le=1, description="a number above 0, at most 1")] = None
    top_k: Annotated[int | None, Field(ge=-1, description="a whole number of at least 1; 0 or -1 = all")] = None
    seed: Annotated[
        int | None, Field(ge=-(2**63), lt=2**63, description="a whole number from -2**63 to below 2**63")
    ] = None
    stop: Annotated[
        Stops, Field(description="a text, or a list of at most --max-stops texts, of 1 to 256 characters each")
    ] = None
    stop_token_ids: Annotated[
        list[Annotated[int, Field(ge=0, description="a token id")]] | None,
        BeforeValidator(AtMost("max_stops")),
        Field(description="a list of at most --max-stops token ids"),
    ] = None
    stream: Annotated[bool | None, Field(description="true or false")] = False
    stream_options: Annotated[
        StreamOptions | None, Field(description='{"include_usage": true}, only with "stream": true')
    ] = None
    treadle: Annotated[
        dict[str, Any] | None,
        Field(description="an object of routing options, 'adapters' (a list of names) and 'trace' (true or false)"),
    ] = None


class ChatBody(NeutralChatFields, GenerationBody):
    """POST /v1/chat/completions."""

    EXAMPLE: ClassVar[Json] = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}]}

    messages: Annotated[Messages, Field(description="a list of 1 to --max-messages messages")]
    max_completion_tokens: MaxTokens = None
    logprobs: Annotated[bool | None, Field(description="true or false")] = False
    top_logprobs: Annotated[
        int | None,
        Field(ge=0, description='a whole number from 0 to --max-logprobs, only with "logprobs": true'),
        BeforeValidator(AtMost("max_logprobs")),
    ] = None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    EXAMPLE: ClassVar[Json] = {"model": "auto", "prompt": "Hello"}

    prompt: Annotated[
        Any,
        AfterValidator(_prompts),
        AfterValidator(AtMost("max_prompts")),
        WithJsonSchema(PROMPT),
        Field(description="a text, token ids, or a list of at most --max-prompts of these, none of them empty"),
    ]
    max_tokens: Annotated[
        int | None,
        Field(ge=0, description='a whole number from 1 to --max-tokens; 0 only together with "echo": true'),
        BeforeValidator(AtMost("max_tokens")),
    ] = None
    logprobs: Annotated[
        int | None,
        Field(ge=0, description="a whole number from 0 to --max-logprobs"),
        BeforeValidator(AtMost("max_logprobs")),
    ] = None
    echo: Annotated[bool | None, Field(description="true or false")] = False
    suffix: Any = unsupported("")
    best_of: Annotated[int | None, Field(ge=1, description="the same as n: choices are not ranked")] = None


class RouteBody(Body):
    """POST /v1/route."""

    EXAMPLE: ClassVar[Json] = {"text": "Hello"}

    text: Annotated[str | None, Field(description="a text, or messages instead")] = None
    messages: Annotated[
        Messages | None, Field(description="a list of 1 to --max-messages messages, or a text instead")
    ] = None
    model: Annotated[str, Field(description="'auto' or the bundle's name")] = "auto"
    treadle: Annotated[
        dict[str, Any] | None, Field(description="an object of routing options; also 'adapters' (a list of names)")
    ] = None


class AdapterBody(Body):
    """POST /v1/adapters."""

    EXAMPLE: ClassVar[Json] = {"name": "name", "path": "folder", "samples": ["a text", "another"]}

    name: Annotated[str, Field(description=NAMING)]
    path: Annotated[str, Field(description="a PEFT folder below --adapter-dir")]
    samples: Samples = None


class LoadBody(Body):
    """POST /v1/load_lora_adapter, as vLLM has it; `samples` is treadle's."""

    EXAMPLE: ClassVar[Json] = {"lora_name": "name", "lora_path": "folder", "samples": ["a text", "another"]}

    lora_name: Annotated[str, Field(description=NAMING)]
    lora_path: Annotated[str, Field(description="a PEFT folder below --adapter-dir")]
    load_inplace: Any = unsupported(False)
    samples: Samples = None


class UnloadBody(Body):
    """POST /v1/unload_lora_adapter, as vLLM has it."""

    EXAMPLE: ClassVar[Json] = {"lora_name": "name"}

    lora_name: Annotated[str, Field(description="an adapter's name")]
    lora_int_id: Annotated[int | None, Field(description="a whole number; it is not used")] = None
