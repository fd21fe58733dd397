"""The bodies of requests, as OpenAI's API has them, and every problem of one in a single message.

Each field's description says what is allowed: it is in the served OpenAPI document and in the refusal alike. Limits
that are the server's options are checked in `treadle.server.requests`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from treadle.errors import unknown_name

Json: TypeAlias = dict[str, Any]
SHOWN = 60
"""Characters of a given value that a message repeats."""


class Body(BaseModel):
    """A JSON object whose fields are all known; numbers are not read from texts."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    EXAMPLE: ClassVar[Json] = {}

    @field_validator("*", mode="after")
    @classmethod
    def _asks_for_nothing_unsupported(cls, value: Any, info: ValidationInfo) -> Any:
        extra = cls.model_fields[info.field_name or ""].json_schema_extra
        if isinstance(extra, dict) and value not in cast(list[Any], extra.get("enum", [value])):
            raise ValueError("unsupported")
        return value


BodyKind = TypeVar("BodyKind", bound=Body)


def unsupported(*neutral: Any) -> Any:
    """Declare a field of OpenAI's API that treadle does not have: it may only have values that ask for nothing."""
    listed = " or ".join([*map(repr, neutral), "null"])
    return Field(
        default=None, description=f"only {listed}: it is not supported", json_schema_extra={"enum": [*neutral, None]}
    )


def _texts(value: Any) -> Any:
    """Return one text or a list of texts as a list."""
    return [value] if isinstance(value, str) else value


def _parts(value: Any) -> Any:
    """Return a message's content as one text; parts of type text are joined."""
    if not isinstance(value, list):
        return value
    parts = cast(list[Any], value)
    texts = [part["text"] for part in parts if _is_text_part(part)]
    return "".join(texts) if parts and len(texts) == len(parts) else value


def _is_text_part(part: Any) -> bool:
    if not isinstance(part, dict) or set(cast(Json, part)) != {"type", "text"}:
        return False
    return part["type"] == "text" and isinstance(part["text"], str)


def _prompts(value: Any) -> list[str | list[int]]:
    """Return prompts, each a text or token ids."""
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if isinstance(value, list) and value:
        each = cast(list[Any], value)
        if all(isinstance(prompt, str) for prompt in each) or all(_is_ids(prompt) for prompt in each):
            return each
    raise ValueError("not prompts")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in cast(list[Any], value))


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
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
        "additionalProperties": False,
    },
}
Stops = Annotated[list[str] | None, BeforeValidator(_texts), WithJsonSchema(STRINGS)]
Samples = Annotated[
    list[str] | None,
    Field(min_length=1, max_length=1000, description="1 to 1000 texts; leave it out where training left a centroid"),
]


class Message(Body):
    """One message of a chat."""

    role: Annotated[
        Literal["system", "user", "assistant"], Field(description="one of 'system', 'user' and 'assistant'")
    ]
    content: Annotated[
        str,
        BeforeValidator(_parts),
        WithJsonSchema({"anyOf": [{"type": "string"}, PARTS]}),
        Field(description="a text, or a list of parts {'type': 'text', 'text': ...}; no images, no sound"),
    ]


class StreamOptions(Body):
    """What a stream carries besides its text."""

    include_usage: Annotated[bool, Field(description="true or false")] = False


class Generating(Body):
    """What /v1/completions and /v1/chat/completions have in common."""

    model: Annotated[str, Field(description="the bundle's name or 'auto' (routed), an adapter's name, or 'base'")]
    n: Annotated[int | None, Field(ge=1, description="a whole number from 1 to --max-n")] = 1
    max_tokens: Annotated[int | None, Field(ge=0, description="a whole number from 1 to --max-tokens")] = None
    temperature: Annotated[
        float | None, Field(ge=0, le=2, description="0 (greedy), or a number from 0.001 to 2; 1 where it is not given")
    ] = None
    top_p: Annotated[float | None, Field(gt=0, le=1, description="a number above 0, at most 1")] = None
    top_k: Annotated[int | None, Field(ge=0, description="a whole number of at least 0 (= all)")] = None
    seed: Annotated[
        int | None, Field(ge=-(2**63), lt=2**63, description="a whole number from -2**63 to below 2**63")
    ] = None
    stop: Annotated[Stops, Field(description="a text, or a list of texts, none of them empty")] = None
    stream: Annotated[bool | None, Field(description="true or false")] = False
    stream_options: Annotated[
        StreamOptions | None, Field(description="{'include_usage': true}, together with 'stream': true")
    ] = None
    treadle: Annotated[
        dict[str, Any] | None,
        Field(description="an object of routing options, 'adapters' (a list of names) and 'trace' (true or false)"),
    ] = None
    user: Annotated[str | None, Field(description="a text; it is not used")] = None
    presence_penalty: Any = unsupported(0)
    frequency_penalty: Any = unsupported(0)
    logit_bias: Any = unsupported({})


class ChatBody(Generating):
    """POST /v1/chat/completions."""

    EXAMPLE: ClassVar[Json] = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}]}

    messages: Annotated[list[Message], Field(min_length=1, description="a list of at least one message")]
    max_completion_tokens: Annotated[int | None, Field(ge=1, description="a whole number from 1 to --max-tokens")] = (
        None
    )
    logprobs: Annotated[bool | None, Field(description="true or false")] = False
    top_logprobs: Annotated[
        int | None, Field(ge=0, description="a whole number from 0 to --max-logprobs, together with 'logprobs': true")
    ] = None
    tools: Any = unsupported([])
    tool_choice: Any = unsupported("none", "auto")
    parallel_tool_calls: Any = unsupported(True, False)
    functions: Any = unsupported([])
    function_call: Any = unsupported("none", "auto")
    response_format: Any = unsupported({"type": "text"})
    modalities: Any = unsupported(["text"])
    store: Any = unsupported(False)
    metadata: Any = unsupported({})
    service_tier: Any = unsupported("auto", "default")


class CompletionBody(Generating):
    """POST /v1/completions."""

    EXAMPLE: ClassVar[Json] = {"model": "auto", "prompt": "Hello"}

    prompt: Annotated[
        Any,
        AfterValidator(_prompts),
        WithJsonSchema(PROMPT),
        Field(description="a text, token ids, or a list of these, none of them empty"),
    ]
    logprobs: Annotated[int | None, Field(ge=0, description="a whole number from 0 to --max-logprobs")] = None
    echo: Annotated[bool | None, Field(description="true or false")] = False
    suffix: Any = unsupported("")
    best_of: Annotated[int | None, Field(ge=1, description="the same as n: choices are not ranked")] = None


class RouteBody(Body):
    """POST /v1/route."""

    EXAMPLE: ClassVar[Json] = {"text": "Hello"}

    text: Annotated[str, Field(description="the text to weigh")]
    model: Annotated[str, Field(description="the bundle's name or 'auto'")] = "auto"
    treadle: Annotated[
        dict[str, Any] | None, Field(description="an object of routing options; also 'adapters' (a list of names)")
    ] = None


class AdapterBody(Body):
    """POST /v1/adapters."""

    EXAMPLE: ClassVar[Json] = {"name": "name", "path": "folder"}

    name: Annotated[str, Field(description="letters, digits, '.', '_' and '-'; not 'base' or 'auto'")]
    path: Annotated[str, Field(description="a PEFT folder below --adapter-dir")]
    samples: Samples = None


class LoadBody(Body):
    """POST /v1/load_lora_adapter, as vLLM has it; `samples` is treadle's."""

    EXAMPLE: ClassVar[Json] = {"lora_name": "name", "lora_path": "folder"}

    lora_name: Annotated[str, Field(description="letters, digits, '.', '_' and '-'; not 'base' or 'auto'")]
    lora_path: Annotated[str, Field(description="a PEFT folder below --adapter-dir")]
    load_inplace: Any = unsupported(False)
    samples: Samples = None


class UnloadBody(Body):
    """POST /v1/unload_lora_adapter, as vLLM has it."""

    EXAMPLE: ClassVar[Json] = {"lora_name": "name"}

    lora_name: Annotated[str, Field(description="an adapter's name")]
    lora_int_id: Annotated[int | None, Field(description="a whole number; it is not used")] = None


def read_body(kind: type[BodyKind], given: Json) -> tuple[BodyKind, list[tuple[str, str]]]:
    """Return the body and its problems, each (field, message); where a field is wrong, the body has an example's.

    So what is right in it can be checked further, and one message can list everything.
    """
    try:
        return kind.model_validate(given), []
    except ValidationError as error:
        schema = kind.model_json_schema()
        found = {_place(entry["loc"]): entry for entry in reversed(error.errors(include_url=False))}
        problems = [(place, _message(kind, entry, schema)) for place, entry in reversed(found.items())]
        wrong = {str(entry["loc"][0]) for entry in error.errors(include_url=False) if entry["loc"]}
        right = {name: value for name, value in given.items() if name not in wrong}
        return kind.model_validate({**kind.EXAMPLE, **right}), problems


def shown(value: Any) -> str:
    """Return a given value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 4] + " ..."


def _place(loc: tuple[int | str, ...]) -> str:
    """Return where in a body something is: messages[0].role."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _message(kind: type[Body], entry: Mapping[str, Any], schema: Json) -> str:
    loc, place = entry["loc"], _place(entry["loc"])
    node, known = _describe(schema, loc)
    allowed = node.get("description", "")
    if entry["type"] == "extra_forbidden":
        return f"{place}: {unknown_name('field', str(loc[-1]), known)}"
    if entry["type"] == "missing":
        return f"{place} is missing; give {allowed}"
    return f"{place}: got {shown(entry['input'])}; allowed: {allowed or f'an object like {kind.EXAMPLE}'}"


def _describe(schema: Json, loc: tuple[int | str, ...]) -> tuple[Json, list[str]]:
    """Return the schema of a place in a body, and the fields of the object that it is in."""
    node, known = schema, list[str]()
    for part in loc:
        inner = _resolved(schema, node)
        if isinstance(part, int):
            following = inner.get("items", node)
        else:
            known = list(inner.get("properties", {}))
            following = inner.get("properties", {}).get(part, node)
        node = following if "description" in following or isinstance(part, int) else {**following}
    return node, known


def _resolved(schema: Json, node: Json) -> Json:
    """Return the object or list that a schema means, behind references and beside null."""
    for choice in node.get("anyOf", ()):
        if choice.get("type") != "null":
            node = choice
            break
    return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
