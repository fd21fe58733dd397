"""Bad requests: each refusal has OpenAI's shape, names the field, the given value and what is allowed."""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from serving import CHAT, Serving, serving

CHATS, TEXTS, ROUTE = "/v1/chat/completions", "/v1/completions", "/v1/route"
MINIMAL: dict[str, dict[str, Any]] = {
    CHATS: {"model": "auto", "messages": CHAT, "max_tokens": 1},
    TEXTS: {"model": "auto", "prompt": "add", "max_tokens": 1},
    ROUTE: {"text": "add"},
}
LIMITS = {
    "max_tokens": 50,
    "max_n": 4,
    "max_prompts": 3,
    "max_messages": 5,
    "max_logprobs": 7,
    "max_stops": 2,
    "max_prompt_tokens": 100,
    "max_recompute_tokens": 60,
    "max_body": 20_000,
}
MISSING = object()

REFUSALS: list[tuple[str, dict[str, Any], str, list[str]]] = [
    # route, changes of a minimal body, field, what the message says
    (CHATS, {"model": MISSING}, "model", ["model is missing", "'auto' (routed), an adapter's name, or 'base'"]),
    (CHATS, {"model": None}, "model", ["model: got null"]),
    (CHATS, {"model": 7}, "model", ["model: got 7"]),
    (CHATS, {"messages": MISSING}, "messages", ["messages is missing", "a list of 1 to 5 messages"]),
    (CHATS, {"messages": []}, "messages", ["messages: got []", "a list of 1 to 5 messages"]),
    (CHATS, {"messages": "hello"}, "messages", ["messages: got 'hello'", "a list"]),
    (
        CHATS,
        {"messages": [7]},
        "messages",
        ['messages[0]: got 7; allowed: an object like {"role": "user", "content": "Hello"}'],
    ),
    (CHATS, {"messages": [{}]}, "messages", ["messages[0].role is missing", "messages[0].content is missing"]),
    (CHATS, {"messages": [{"role": "usr", "content": "x"}]}, "messages", ["messages[0].role: got 'usr'", "'user'"]),
    (CHATS, {"messages": [{"role": "tool", "content": "x"}]}, "messages", ["got 'tool'", "'assistant'"]),
    (CHATS, {"messages": [{"role": "user", "content": None}]}, "messages", ["messages[0].content: got null", "a text"]),
    (CHATS, {"messages": [{"role": "user", "content": []}]}, "messages", ["messages[0].content: got []"]),
    (
        CHATS,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages",
        ['messages[0].content: got [{"type": "image_url"', "no images"],
    ),
    (
        CHATS,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": {}}]}]},
        "messages",
        ['messages[0].content: got [{"type": "text", "text": {}}]'],
    ),
    (CHATS, {"messages": [{**CHAT[0], "contents": "x"}]}, "messages", ["unknown field 'contents'", "'content'"]),
    (CHATS, {"messages": CHAT * 6}, "messages", ["messages: got a list of 6; allowed: a list of 1 to 5 messages"]),
    (CHATS, {"messages": [{"role": "user", "content": "x" * 300}]}, "messages", ["tokens; allowed: at most 100"]),
    (CHATS, {"temperatur": 1}, "temperatur", ["unknown field 'temperatur'", "Did you mean 'temperature'?"]),
    (CHATS, {"temperature": -0.1}, "temperature", ["temperature: got -0.1", "0.001 to 2"]),
    (CHATS, {"temperature": 2.1}, "temperature", ["temperature: got 2.1", "0.001 to 2"]),
    (CHATS, {"temperature": 0.0001}, "temperature", ["temperature: got 0.0001", "0.001 to 2"]),
    (CHATS, {"temperature": "hot"}, "temperature", ["temperature: got 'hot'"]),
    (CHATS, {"temperature": True}, "temperature", ["temperature: got true"]),
    (CHATS, {"top_p": 0}, "top_p", ["top_p: got 0", "above 0, at most 1"]),
    (CHATS, {"top_p": 1.01}, "top_p", ["top_p: got 1.01", "above 0, at most 1"]),
    (CHATS, {"top_k": -1}, "top_k", ["top_k: got -1", "at least 0"]),
    (CHATS, {"top_k": 1.5}, "top_k", ["top_k: got 1.5"]),
    (CHATS, {"seed": 2**63}, "seed", ["seed: got 9223372036854775808", "below 2**63"]),
    (CHATS, {"seed": "x"}, "seed", ["seed: got 'x'"]),
    (CHATS, {"n": 0}, "n", ["n: got 0; allowed: a whole number from 1 to 4"]),
    (CHATS, {"n": 5}, "n", ["n: got 5", "from 1 to 4"]),
    (CHATS, {"n": 10**30}, "n", ["n: got 1000000000000000000000000000000", "from 1 to 4"]),
    (CHATS, {"n": 1.0}, "n", ["n: got 1.0; allowed: a whole number from 1 to 4"]),
    (CHATS, {"max_tokens": 0}, "max_tokens", ["max_tokens: got 0; allowed: a whole number from 1 to 50"]),
    (CHATS, {"max_tokens": 51}, "max_tokens", ["max_tokens: got 51", "from 1 to 50"]),
    (CHATS, {"max_tokens": -3}, "max_tokens", ["max_tokens: got -3; allowed: a whole number from 1 to 50"]),
    (CHATS, {"max_tokens": "many"}, "max_tokens", ["max_tokens: got 'many'; allowed: a whole number from 1 to 50"]),
    (CHATS, {"stop": None, "n": None, "max_tokens": None, "temperature": 9}, "temperature", ["got 9"]),
    (CHATS, {"max_tokens": MISSING, "max_completion_tokens": 99}, "max_completion_tokens", ["got 99", "1 to 50"]),
    (CHATS, {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", ["got 3, max_completion_tokens: got 4"]),
    (CHATS, {"stop": ""}, "stop", ["stop: got ''", "1 to 256 characters"]),
    (CHATS, {"stop": ["a", ""]}, "stop", ["stop: got ''"]),
    (CHATS, {"stop": ["a", 7]}, "stop", ["stop[1]: got 7", "a list of at most 2 texts"]),
    (CHATS, {"stop": ["a", "b", "c"]}, "stop", ["stop: got a list of 3", "at most 2 texts"]),
    (CHATS, {"stop": "x" * 257}, "stop", ["stop: got 'xxx", "256 characters"]),
    (CHATS, {"stream": "yes"}, "stream", ["stream: got 'yes'", "true or false"]),
    (
        CHATS,
        {"stream_options": {"include_usage": True}},
        "stream_options",
        ['stream_options: got {"include_usage": true}; allowed: only with "stream": true'],
    ),
    (CHATS, {"stream": True, "stream_options": {"include_usages": True}}, "stream_options", ["'include_usage'?"]),
    (CHATS, {"logprobs": 3}, "logprobs", ["logprobs: got 3", "true or false"]),
    (CHATS, {"top_logprobs": 3}, "top_logprobs", ["top_logprobs: got 3", 'only with "logprobs": true']),
    (CHATS, {"logprobs": True, "top_logprobs": 8}, "top_logprobs", ["top_logprobs: got 8", "from 0 to 7"]),
    (
        CHATS,
        {"tools": [{"type": "function"}]},
        "tools",
        ['tools: got [{"type": "function"}]', "only [] or null: it is not supported"],
    ),
    (CHATS, {"tool_choice": "required"}, "tool_choice", ["got 'required'", "only 'none', 'auto' or null"]),
    (
        CHATS,
        {"response_format": {"type": "json_object"}},
        "response_format",
        ["json_object", 'only {"type": "text"} or null'],
    ),
    (CHATS, {"presence_penalty": 0.5}, "presence_penalty", ["presence_penalty: got 0.5", "only 0"]),
    (CHATS, {"frequency_penalty": 1}, "frequency_penalty", ["frequency_penalty: got 1", "only 0"]),
    (CHATS, {"logit_bias": {"5": 3}}, "logit_bias", ['logit_bias: got {"5": 3}', "only {}"]),
    (CHATS, {"chat_template": "{{ x }}"}, "chat_template", ["unknown field 'chat_template'"]),
    (TEXTS, {"prompt": MISSING}, "prompt", ["prompt is missing", "a text, token ids"]),
    (TEXTS, {"prompt": None}, "prompt", ["prompt: got null"]),
    (TEXTS, {"prompt": ""}, "prompt", ["prompt: the prompt is empty"]),
    (TEXTS, {"prompt": []}, "prompt", ["prompt: got []", "none of them empty"]),
    (TEXTS, {"prompt": ["a", ""]}, "prompt", ["prompt[1]: the prompt is empty"]),
    (TEXTS, {"prompt": ["a", 1]}, "prompt", ['prompt: got ["a", 1]']),
    (TEXTS, {"prompt": [[]]}, "prompt", ["prompt: got [[]]"]),
    (TEXTS, {"prompt": [1, True]}, "prompt", ["prompt: got [1, true]"]),
    (TEXTS, {"prompt": [5, 260]}, "prompt", ["prompt: got token id 260", "0 to 258"]),
    (TEXTS, {"prompt": [-1]}, "prompt", ["prompt: got token id -1"]),
    (TEXTS, {"prompt": "x" * 101}, "prompt", ["prompt: got 101 tokens", "at most 100"]),
    (TEXTS, {"prompt": "x" * 13_000}, "prompt", ["prompt: got 13000 characters", "at most 100 tokens"]),
    (TEXTS, {"prompt": ["a"] * 4}, "prompt", ["prompt: got a list of 4", "a list of at most 3"]),
    (TEXTS, {"logprobs": 8}, "logprobs", ["logprobs: got 8", "from 0 to 7"]),
    (TEXTS, {"logprobs": True}, "logprobs", ["logprobs: got true", "a whole number from 0 to 7"]),
    (
        TEXTS,
        {"max_tokens": 0},
        "max_tokens",
        ['max_tokens: got 0; allowed: a whole number from 1 to 50; 0 only together with "echo": true'],
    ),
    (TEXTS, {"echo": 1}, "echo", ["echo: got 1", "true or false"]),
    (TEXTS, {"suffix": "x"}, "suffix", ["suffix: got 'x'", "not supported"]),
    (TEXTS, {"best_of": 2}, "best_of", ["best_of: got 2", "the same as n (1)"]),
    (TEXTS, {"messages": CHAT}, "messages", ["unknown field 'messages'"]),
    (TEXTS, {"treadle": []}, "treadle", ["treadle: got []", "routing options"]),
    (
        TEXTS,
        {"treadle": {"evry": 2}},
        "treadle",
        ["treadle.evry: unknown option 'evry'. Did you mean 'every'?", "combine, adapters, trace."],
    ),
    (
        TEXTS,
        {"treadle": {"every": 0}},
        "treadle",
        ["treadle.every: got 0; allowed: a whole number of at least 1, or null"],
    ),
    (
        TEXTS,
        {"treadle": {"every": "often"}},
        "treadle",
        ["treadle.every: got 'often'; allowed: a whole number of at least 1, or null"],
    ),
    (TEXTS, {"treadle": {"rule": "sofmax"}}, "treadle", ["unknown rule 'sofmax'. Did you mean 'softmax'?"]),
    (
        TEXTS,
        {"treadle": {"rule": "boosted"}},
        "treadle",
        ["treadle.rule: got 'boosted' with treadle.score; allowed: 'softmax' or 'top_k' with score 'lda'"],
    ),
    (
        TEXTS,
        {"treadle": {"temperature": -1}},
        "treadle",
        ["treadle.temperature: got -1; allowed: a finite number of at least 1e-06, or null"],
    ),
    (
        TEXTS,
        {"treadle": {"fixed": {"math": -1}}},
        "treadle",
        ["treadle.fixed.math: got -1.0; allowed: a finite number of at least 0"],
    ),
    (TEXTS, {"treadle": {"fixed": {"maths": 1}}}, "treadle", ["unknown adapter 'maths'. Did you mean 'math'?"]),
    (
        TEXTS,
        {"treadle": {"fixed": "heavy"}},
        "treadle",
        ["treadle.fixed: got 'heavy'; allowed: an object like {\"math\": 0.7}"],
    ),
    (TEXTS, {"treadle": {"fixed": {"math": 1e30}}}, "treadle", ["treadle.fixed.math: got 1e+30", "at most 100"]),
    (TEXTS, {"treadle": {"window": 10**30}}, "treadle", ["treadle.window: got 1000", "at most 1000000"]),
    (TEXTS, {"treadle": {"boost": 1e300}}, "treadle", ["treadle.boost: got 1e+300", "at most 1000"]),
    (TEXTS, {"treadle": {"combine": "linear"}}, "treadle", ["equal ranks and target modules", "combine='sum'"]),
    (TEXTS, {"treadle": {"trace": "yes"}}, "treadle", ["treadle.trace: got 'yes'", "true or false"]),
    (TEXTS, {"treadle": {"score": None}}, "treadle", ["score: got null; allowed: 'cosine', 'centred' or 'lda'"]),
    (TEXTS, {"treadle": {"unit_scale": None}}, "treadle", ["treadle.unit_scale: got null; allowed: true or false"]),
    (TEXTS, {"treadle": {"adapters": "math"}}, "treadle", ["treadle.adapters: got 'math'", "math, science, code"]),
    (TEXTS, {"treadle": {"adapters": ["cod"]}}, "treadle", ["unknown adapter 'cod'. Did you mean 'code'?"]),
    (TEXTS, {"treadle": {"past": "recompute"}, "max_tokens": 50, "prompt": "x" * 20}, "treadle", ["at most 60 tokens"]),
    (
        TEXTS,
        {"model": "math", "treadle": {"every": 2}},
        "treadle",
        ["treadle.every: model 'math' is not routed", "model 'auto'"],
    ),
    (TEXTS, {"model": "base", "treadle": {"adapters": []}}, "treadle", ["treadle.adapters: model 'base'"]),
    (ROUTE, {"text": MISSING}, "text", ["text is missing"]),
    (ROUTE, {"text": 7}, "text", ["text: got 7; allowed: a text"]),
    (ROUTE, {"txt": "x"}, "txt", ["unknown field 'txt'. Did you mean 'text'?"]),
    (ROUTE, {"model": "math"}, "model", ["model: got 'math', which is not routed; allowed: 'auto' or 'bundle'"]),
    (ROUTE, {"treadle": {"score": "l2"}}, "treadle", ["unknown score 'l2'", "cosine, centred, lda"]),
]


@pytest.fixture(scope="module")
def served(bundle_folder: Path) -> Generator[Serving]:
    with serving(bundle_folder, **LIMITS) as each:
        yield each


def assert_refused(answer: Any, status: int, field: str | None, parts: list[str]) -> None:
    document = answer.json()
    assert answer.status_code == status, document
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert document["error"]["param"] == field
    assert document["error"]["type"] != "server_error"
    for part in parts:
        assert part in document["error"]["message"]


def test_the_minimal_bodies_are_fine(served: Serving) -> None:
    for path, body in MINIMAL.items():
        assert served.post(path, body).status_code == 200
    assert len(REFUSALS) >= 60


@pytest.mark.parametrize(("path", "changes", "field", "parts"), REFUSALS)
def test_a_bad_field_is_refused_by_name(
    served: Serving, path: str, changes: dict[str, Any], field: str, parts: list[str]
) -> None:
    body = {name: value for name, value in {**MINIMAL[path], **changes}.items() if value is not MISSING}
    assert_refused(served.post(path, body), 400, field, parts)
    assert served.scheduler.num_unfinished == 0


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        (b"", ["the body is not JSON"]),
        (b"{", ["the body is not JSON"]),
        (b"[]", ["the body: got []; allowed: a JSON object"]),
        (b'"x"', ["the body: got 'x'"]),
        (b"\xff\xfe", ["the body is not JSON"]),
        (b'{"model": "auto", "prompt": "\\ud800"}', ["the body is not JSON"]),
        (b'{"model": "auto", "prompt": "x", "temperature": NaN}', ["temperature: got NaN"]),
        (b'{"model": "auto", "prompt": "x", "top_p": Infinity}', ["top_p: got Infinity"]),
        (b'{"model": "auto", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", ["the body is not JSON"]),
        (b'{"model": "auto", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", ["the body is not JSON"]),
    ],
)
def test_a_body_that_is_no_object_is_refused(served: Serving, raw: bytes, parts: list[str]) -> None:
    answer = served.request("POST", TEXTS, content=raw)
    assert_refused(answer, 400, answer.json()["error"]["param"], parts)


def test_all_problems_are_in_one_message(served: Serving) -> None:
    body = {
        "model": "auto",
        "messages": [{"role": "usr", "content": "x"}],
        "temperature": 9,
        "n": 99,
        "stop": ["", "b", "c"],
        "max_tokens": 1000,
        "treadle": {"evry": 1},
        "colour": "red",
    }
    message = served.post(CHATS, body).json()["error"]["message"]
    for part in (
        "messages[0].role",
        "temperature: got 9",
        "n: got 99",
        "stop: got a list of 3",
        "1000",
        "'evry'",
        "'colour'",
    ):
        assert part in message


def test_an_unknown_model_is_404_and_lists_the_names(served: Serving) -> None:
    answer = served.post(TEXTS, {**MINIMAL[TEXTS], "model": "scince"})
    assert_refused(
        answer, 404, "model", ["'scince'. Did you mean 'science'?", "auto, bundle, math, science, code, base"]
    )
    assert answer.json()["error"]["code"] == "model_not_found"


def test_a_body_that_is_too_long_is_refused_whether_its_length_is_announced_or_not(served: Serving) -> None:
    body = json.dumps({**MINIMAL[TEXTS], "prompt": "x" * 30_000}).encode()
    assert_refused(served.request("POST", TEXTS, content=body), 413, None, ["longer than 20000 bytes"])
    parts = (body[start : start + 1000] for start in range(0, len(body), 1000))
    assert_refused(served.request("POST", TEXTS, content=parts), 413, None, ["longer than 20000 bytes"])


def test_a_huge_header_is_refused(served: Serving) -> None:
    assert served.request("GET", "/live", headers={"X-Long": "x" * 100_000}).status_code == 431
