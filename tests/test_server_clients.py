"""What real clients send unasked: fields and values that change no answer are taken, and answers may be sent back."""

from collections.abc import Generator
from pathlib import Path
from typing import Any, get_type_hints

import openai
import pytest
from openai.types import completion_create_params as texts
from openai.types.chat import ChatCompletionStreamOptionsParam
from openai.types.chat import completion_create_params as chats
from openai.types.chat.chat_completion_assistant_message_param import ChatCompletionAssistantMessageParam
from openai.types.chat.chat_completion_content_part_text_param import ChatCompletionContentPartTextParam

from treadle.serving.openai.bodies import ChatBody, CompletionBody, Message, StreamOptions
from treadle.serving.openai.failures import Problem, refusal
from treadle.serving.openai.params import ServeParams
from treadle.serving.openai.reading import read_body

from serving import CHAT, Serving, serving

GREEDY: dict[str, Any] = {"model": "auto", "temperature": 0, "max_tokens": 12}
BOTH: dict[str, Any] = {
    # a field -> values that change no answer
    "user": ["u1", ""],
    "store": [True, False],
    "metadata": [{}, {"session": "1"}],
    "service_tier": ["auto", "default", "flex", "priority"],
    "safety_identifier": ["u1"],
    "prompt_cache_key": ["k"],
    "prompt_cache_retention": ["24h"],
    "presence_penalty": [0, 0.0],
    "frequency_penalty": [0, 0.0],
    "logit_bias": [{}],
    "n": [1],
    "stop": [[]],
    "top_k": [-1, 0],
    "repetition_penalty": [1, 1.0],
    "min_p": [0, 0.0],
    "ignore_eos": [False],
    "min_tokens": [0],
    "stop_token_ids": [[]],
    "skip_special_tokens": [True],
    "cache_prompt": [True, False],
    "a_field_of_next_year": [],
}
CHATS_ONLY: dict[str, Any] = {
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "reasoning_effort": ["none", "minimal", "low", "medium", "high"],
    "verbosity": ["medium"],
    "prediction": [{"type": "content", "content": "add"}],
    "audio": [],
    "web_search_options": [],
    "chat_template_kwargs": [{}],
    "logprobs": [False],
    "top_logprobs": [0],
}
MINIMAL = {ChatBody: {"model": "auto", "messages": CHAT}, CompletionBody: {"model": "auto", "prompt": "add"}}


@pytest.fixture(scope="module")
def served(bundle_folder: Path) -> Generator[Serving]:
    with serving(bundle_folder, max_prompt_tokens=200) as each:
        yield each


def problems(kind: Any, **changes: Any) -> list[str]:
    _, found = read_body(kind, {**MINIMAL[kind], **changes}, ServeParams())
    return [problem.message for problem in found]


@pytest.mark.parametrize("kind", [ChatBody, CompletionBody])
def test_values_that_change_no_answer_are_taken(kind: Any) -> None:
    neutral = BOTH if kind is CompletionBody else BOTH | CHATS_ONLY
    for field, values in neutral.items():
        for value in [*values, None]:
            assert problems(kind, **{field: value}) == [], (field, value)


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        (ChatBody, chats.CompletionCreateParamsStreaming),
        (CompletionBody, texts.CompletionCreateParamsStreaming),
        (Message, ChatCompletionAssistantMessageParam),
        (StreamOptions, ChatCompletionStreamOptionsParam),
    ],
)
def test_every_field_of_the_openai_client_is_known(kind: Any, known: Any) -> None:
    assert set(get_type_hints(known)) - set(kind.model_fields) == set()


def test_every_field_of_a_part_that_the_openai_client_has_is_known() -> None:
    part = {**dict.fromkeys(get_type_hints(ChatCompletionContentPartTextParam)), "type": "text", "text": "add"}
    for extra in ({}, {"cache_control": {"type": "ephemeral"}}, {"annotations": None}):
        assert problems(ChatBody, messages=[{"role": "user", "content": [{**part, **extra}]}]) == []


def test_tools_that_are_not_to_be_used_are_taken(served: Serving) -> None:
    plain = served.client().chat.completions.create(messages=CHAT, **GREEDY).choices[0].message.content
    tools: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    client = served.client().chat.completions
    answer = client.create(messages=CHAT, tools=tools, tool_choice="none", **GREEDY)
    assert answer.choices[0].message.content == plain
    for choice in ({}, {"tool_choice": "auto"}):
        with pytest.raises(openai.BadRequestError, match='"tool_choice": "none"') as refused:
            client.create(messages=CHAT, tools=tools, **choice, **GREEDY)
        assert refused.value.param == "tools"


def test_all_of_them_at_once_give_the_same_answer(served: Serving) -> None:
    asked = {field: values[0] for field, values in (BOTH | CHATS_ONLY).items() if values}
    whole = [served.post("/v1/chat/completions", {**GREEDY, "messages": CHAT, **more}).json() for more in ({}, asked)]
    assert whole[0]["choices"] == whole[1]["choices"]


def test_an_answer_can_be_sent_back(served: Serving) -> None:
    client = served.client()
    first = client.chat.completions.create(messages=CHAT, **GREEDY).choices[0].message
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(messages=CHAT, stream=True, **GREEDY)]
    streamed = {**deltas[0].model_dump(), "content": "".join(delta.content or "" for delta in deltas)}
    turns: list[Any] = [{"role": "assistant", "content": first.content}, first, first.model_dump(), streamed]
    more = {"role": "user", "content": "the sum"}
    answers = [client.chat.completions.create(messages=[*CHAT, turn, more], **GREEDY) for turn in turns]
    assert len({answer.choices[0].message.content for answer in answers}) == 1


@pytest.mark.parametrize(
    ("message", "has_developers", "turn"),
    [
        ({"role": "developer", "content": "x"}, False, {"role": "system", "content": "x"}),
        ({"role": "developer", "content": "x"}, True, {"role": "developer", "content": "x"}),
        ({"role": "user", "content": "x", "name": "Ann"}, False, {"role": "user", "content": "x", "name": "Ann"}),
        ({"role": "user", "content": [{"type": "text", "text": "x"}] * 2}, False, {"role": "user", "content": "xx"}),
    ],
)
def test_what_a_chat_template_gets(message: Any, has_developers: bool, turn: Any) -> None:
    assert Message.model_validate(message).turn(has_developers=has_developers) == turn


def test_a_developer_is_the_system_where_the_template_knows_none(served: Serving) -> None:
    def answer(role: str) -> str | None:
        messages: Any = [{"role": role, "content": "be short"}, *CHAT]
        return served.client().chat.completions.create(messages=messages, **GREEDY).choices[0].message.content

    assert answer("developer") == answer("system") != answer("user")


@pytest.mark.parametrize("length", [201, 30_000])
def test_a_prompt_that_is_too_long_has_the_code_that_clients_look_for(served: Serving, length: int) -> None:
    messages: Any = [{"role": "user", "content": "x" * length}]
    with pytest.raises(openai.BadRequestError, match="allowed: at most 200 tokens") as refused:
        served.client().chat.completions.create(messages=messages, **GREEDY)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as refused:
        served.client().completions.create(prompt=["x", "x" * length], **GREEDY)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")


def test_a_code_is_found_among_problems_without_one() -> None:
    plain, coded = Problem("n", "n: got 0"), Problem("messages", "too long", code="context_length_exceeded")
    for found in ([plain, coded], [coded, plain]):
        assert (refusal(found).code, refusal(found).param) == ("context_length_exceeded", "messages")
    unknown = Problem("model", "unknown model", status=404, code="model_not_found")
    assert refusal([coded, unknown]).code == "model_not_found"
