"""Bad requests: each refusal has OpenAI's shape, names the field, the given value and what is allowed."""

import concurrent.futures
import gzip
import json
from collections.abc import Generator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from jsonschema_rs import Draft202012Validator  # schemathesis brings it

from treadle.common.params import RoutingParams
from treadle.serving.openai.failures import Failure
from treadle.serving.openai.reading import read_object

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
    "max_values": 1500,
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
    (CHATS, {"top_k": -2}, "top_k", ["top_k: got -2", "at least 1; 0 or -1 = all"]),
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
    (CHATS, {"stop": ""}, "stop", ["stop[0]: got ''", "1 to 256 characters"]),
    (CHATS, {"stop": ["a", ""]}, "stop", ["stop[1]: got ''"]),
    (CHATS, {"stop": ["a", 7]}, "stop", ["stop[1]: got 7", "a list of at most 2 texts"]),
    (CHATS, {"stop": ["a", "b", "c"]}, "stop", ["stop: got a list of 3", "at most 2 texts"]),
    (CHATS, {"stop": "x" * 257}, "stop", ["stop[0]: got 'xxx", "256 characters"]),
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
        [
            'tools: got [{"type": "function"}]',
            'only [] or null, or any with "tool_choice": "none": it is not supported',
        ],
    ),
    (CHATS, {"functions": [{"name": "f"}], "function_call": "auto"}, "functions", ['"function_call": "none"']),
    (CHATS, {"tools": {}, "tool_choice": "none"}, "tools", ["tools: got {}", "a list"]),
    (CHATS, {"verbosity": "low"}, "verbosity", ["got 'low'", "only 'medium' or null: it is not supported"]),
    (CHATS, {"web_search_options": {}}, "web_search_options", ["web_search_options: got {}; allowed: only null"]),
    (CHATS, {"audio": {"voice": "x"}}, "audio", ['audio: got {"voice": "x"}; allowed: only null']),
    (CHATS, {"repetition_penalty": 1.1}, "repetition_penalty", ["got 1.1", "only 1 or null"]),
    (CHATS, {"min_p": 0.05}, "min_p", ["got 0.05", "only 0 or null"]),
    (CHATS, {"ignore_eos": True}, "ignore_eos", ["got true", "only false or null"]),
    (CHATS, {"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs", ["only {} or null"]),
    (CHATS, {"store": "yes"}, "store", ["store: got 'yes'; allowed: true or false"]),
    (
        CHATS,
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        "messages",
        ['messages[0].tool_calls: got [{"id": "1"}]; allowed: only [] or null'],
    ),
    (CHATS, {"messages": [{**CHAT[0], "refusal": "no"}]}, "messages", ["messages[0].refusal: got 'no'", "only null"]),
    (CHATS, {"messages": [{**CHAT[0], "name": 7}]}, "messages", ["messages[0].name: got 7"]),
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
    (TEXTS, {"prompt": "x" * 101}, "prompt", ["prompt: got at least 101 tokens", "at most 100"]),
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
        ["treadle.temperature: got -1; allowed: a finite number from 1e-06 to 1000000, or null"],
    ),
    (
        TEXTS,
        {"treadle": {"fixed": {"math": -1}}},
        "treadle",
        ["treadle.fixed.math: got -1; allowed: a finite number of at least 0"],
    ),
    (TEXTS, {"treadle": {"fixed": {"maths": 1}}}, "treadle", ["unknown adapter 'maths'. Did you mean 'math'?"]),
    (
        TEXTS,
        {"treadle": {"fixed": "heavy"}},
        "treadle",
        ["treadle.fixed: got 'heavy'; allowed: an object like {\"math\": 0.7}"],
    ),
    (TEXTS, {"treadle": {"fixed": {"math": 1e30}}}, "treadle", ["treadle.fixed.math: got 1e+30", "at most 100"]),
    (TEXTS, {"stop_token_ids": [-1]}, "stop_token_ids", ["stop_token_ids[0]: got -1; allowed: a token id"]),
    (TEXTS, {"stop_token_ids": [7, 10**6]}, "stop_token_ids", ["stop_token_ids: got 1000000; allowed: 0 to 258"]),
    (TEXTS, {"stop": ["x<end>"]}, "stop", ["stop: 'x<end>' holds the special token '<end>'"]),
    (TEXTS, {"treadle": {"window": 10**30}}, "treadle", ["treadle.window: got 1000", "at most 1000000"]),
    (TEXTS, {"treadle": {"boost": 1e300}}, "treadle", ["treadle.boost: got 1e+300", "from 1e-06 to 1000"]),
    (TEXTS, {"treadle": {"trace": "yes"}}, "treadle", ["treadle.trace: got 'yes'", "true or false"]),
    (TEXTS, {"treadle": {"score": None}}, "treadle", ["score: got null; allowed: 'cosine', 'centred' or 'lda'"]),
    (TEXTS, {"treadle": {"floor": -1}}, "treadle", ["treadle.floor: unknown option 'floor'"]),
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
    (ROUTE, {"messages": CHAT}, "messages", ["messages: got messages and a text; allowed: one of them"]),
    (ROUTE, {"text": MISSING, "messages": []}, "messages", ["messages: got []", "a list of 1 to 5 messages"]),
    (ROUTE, {"text": MISSING, "messages": CHAT * 6}, "messages", ["got a list of 6; allowed: a list of 1 to 5"]),
    (ROUTE, {"text": MISSING, "messages": [{}]}, "messages", ["messages[0].role is missing"]),
    (ROUTE, {"txt": "x"}, "txt", ["unknown field 'txt'. Did you mean 'text'?"]),
    (ROUTE, {"model": "math"}, "model", ["model: got 'math', which is not routed; allowed: 'auto' or 'bundle'"]),
    (ROUTE, {"treadle": {"score": "l2"}}, "treadle", ["unknown score 'l2'", "cosine, centred, lda"]),
    (
        CHATS,
        {"n": 2, "max_tokens": 50, "logprobs": True, "top_logprobs": 7, "treadle": {"trace": True}},
        "logprobs",
        [
            "logprobs and treadle: got 100 tokens of all choices with 17 values each",
            "at most 1500 values (--max-values)",
        ],
    ),
    (
        TEXTS,
        {"prompt": ["x" * 30, "x" * 10], "echo": True, "max_tokens": 50, "treadle": {"trace": True}, "n": 2},
        "treadle",
        ["treadle: got 280 tokens of all choices with 10 values each"],
    ),
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


NO_CAUSE_TWICE: list[tuple[str, dict[str, Any], str]] = [
    # route, changes, the whole message
    (TEXTS, {"treadle": {"every": 1.5}}, "treadle.every: got 1.5; allowed: a whole number of at least 1, or null"),
    (
        TEXTS,
        {"treadle": {"fixed": {"math": None}}},
        "treadle.fixed.math: got null; allowed: a finite number of at least 0",
    ),
    (
        TEXTS,
        {"treadle": {"fixed": {"math": 0.5}, "rule": "softmax"}},
        "treadle.rule: got 'softmax' with treadle.fixed; allowed: 'fixed', or leave it out",
    ),
    (
        TEXTS,
        {"treadle": {"rule": "fixed"}},
        "treadle.fixed: got null with treadle.rule; allowed: an object like {\"math\": 0.7} with rule 'fixed'",
    ),
    (
        TEXTS,
        {"treadle": {"combine": "linear"}},
        "treadle.combine: got 'linear'; allowed: 'sum'; 'linear' with adapters of equal ranks and target modules "
        "(science, code differ from math)",
    ),
    (
        TEXTS,
        {"treadle": {"adapters": ["cod", "cod", "cod"]}},
        "treadle.adapters: unknown adapter 'cod'. Did you mean 'code'? Allowed: math, science, code.",
    ),
    (
        TEXTS,
        {"model": "math", "treadle": {"every": 2, "rule": "x"}},
        "treadle.every, treadle.rule: model 'math' is not routed; allowed: 'trace', or model 'auto'",
    ),
    (
        CHATS,
        {"max_tokens": 3, "max_completion_tokens": 9999},
        "max_completion_tokens: got 9999; allowed: a whole number from 1 to 50",
    ),
    (
        ROUTE,
        {"model": "math", "treadle": {"every": 4}},
        "model: got 'math', which is not routed; allowed: 'auto' or 'bundle'",
    ),
]


@pytest.mark.parametrize(("path", "changes", "message"), NO_CAUSE_TWICE)
def test_one_cause_is_one_problem(served: Serving, path: str, changes: dict[str, Any], message: str) -> None:
    assert served.post(path, {**MINIMAL[path], **changes}).json()["error"]["message"] == message


def test_an_unknown_model_hides_no_other_problem(served: Serving) -> None:
    body = {**MINIMAL[TEXTS], "model": "nix", "temperature": 9, "n": 0, "treadle": {"evry": 1}}
    answer = served.post(TEXTS, body)
    parts = ["unknown model 'nix'", "temperature: got 9", "n: got 0", "'every'"]
    assert_refused(answer, 404, "model", parts)
    assert answer.json()["error"]["code"] == "model_not_found"
    assert_refused(served.post(ROUTE, {"model": "nix", "text": 7}), 404, "model", ["'nix'", "text: got 7"])


MANY: list[tuple[str, dict[str, Any], str, str]] = [
    # route, changes with many problems or long names, field, how the message ends
    (CHATS, {"messages": [{}] * 5}, "messages", "messages[4].content is missing"),
    (CHATS, {"messages": [{}] * 900}, "messages", "messages: got a list of 900; allowed: a list of 1 to 5 messages"),
    (CHATS, {"messages": [{f"m{n}": n for n in range(200)}] * 5}, "messages", "... and 990 more"),
    (TEXTS, {f"field{n}": n for n in range(200)}, "field0", "... and 180 more"),
    (TEXTS, {"stop": [7] * 900}, "stop", "at most 2 texts, of 1 to 256 characters each"),
    (TEXTS, {"treadle": {f"option{n}": n for n in range(200)}}, "treadle", "... and 180 more"),
    (TEXTS, {"treadle": {"adapters": [f"name{n}" for n in range(900)]}}, "treadle", "... and 880 more"),
    (TEXTS, {"treadle": {"fixed": {f"name{n}": 1 for n in range(200)}}}, "treadle", "... and 180 more"),
    (TEXTS, {"treadle": {"fixed": {f"name{n}": -1 for n in range(200)}}}, "treadle", "... and 180 more"),
    (TEXTS, {"model": "m" * 9000}, "model", "Allowed: auto, bundle, math, science, code, base."),
    (TEXTS, {"q" * 9000: 1}, "q" * 56 + " ...", "treadle, prompt, logprobs, echo, best_of."),
    (TEXTS, {"treadle": {"q" * 9000: 1}}, "treadle", "adapters, trace."),
    (TEXTS, {"treadle": {"rule": "q" * 9000}}, "treadle", "Allowed: boosted, softmax, top_k, fixed."),
    (TEXTS, {"treadle": {"fixed": {"q" * 9000: -1}}}, "treadle", "got -1; allowed: a finite number of at least 0"),
    (TEXTS, {"treadle": {"adapters": ["q" * 9000]}}, "treadle", "Allowed: math, science, code."),
    (TEXTS, {"treadle": {"every": ["q" * 9000]}}, "treadle", "allowed: a whole number of at least 1, or null"),
]


@pytest.mark.parametrize(("path", "changes", "field", "end"), MANY)
def test_a_refusal_is_short_whatever_the_request(
    served: Serving, path: str, changes: dict[str, Any], field: str, end: str
) -> None:
    answer = served.post(path, {**MINIMAL[path], **changes})
    message = answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == field
    assert message.count("\n  - ") <= 21
    assert len(message) < 7000
    assert end in message.splitlines()[-1]


def test_a_body_with_too_much_in_it_is_refused_before_it_is_read() -> None:
    refused = [
        (b'{"prompt": [' + b"[]," * 30_000 + b"[]]}", "got 30003 lists and objects; allowed: at most 20000"),
        (b'{"prompt": [' + b"1," * 500_000 + b"1]}", "got 500001 values; allowed: at most 500000"),
        (json.dumps(dict.fromkeys(map(str, range(257)))).encode(), "an object of 257 fields; allowed: at most 256"),
    ]
    for raw, message in refused:
        with pytest.raises(Failure, match=message) as caught:
            read_object(raw)
        assert caught.value.status == 400
    for text in ('[{\\"' * 30_000, '\\\\"[' * 30_000, "," * 600_000):  # in a text these are no lists and no values
        assert read_object(json.dumps({"prompt": text}).encode()) == {"prompt": text}


@pytest.mark.parametrize("path", [CHATS, TEXTS, ROUTE])
def test_bodies_are_read_beside_the_event_loop(served: Serving, path: str) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with served.blocked(served.state.preparing):
            answer = pool.submit(served.post, path, MINIMAL[path])
            served.wait_until(lambda: served.state.preparing.num_waiting == 1)
            assert served.request("GET", "/live").status_code == 200
            assert not answer.done()
        assert answer.result().status_code == 200


@pytest.mark.parametrize("headers", [{}, {"Content-Encoding": "gzip"}])
def test_a_compressed_body_is_refused_by_the_name_of_its_encoding(served: Serving, headers: dict[str, str]) -> None:
    raw = gzip.compress(json.dumps(MINIMAL[TEXTS]).encode())
    answer = served.request("POST", TEXTS, content=raw, headers=headers)
    assert_refused(answer, 415, None, ["Content-Encoding: got 'gzip'; allowed: none"])


def test_another_method_or_route_is_answered_with_what_there_is(served: Serving) -> None:
    wrong = served.request("PUT", "/v1/adapters")
    assert_refused(wrong, 405, None, ["got PUT /v1/adapters; allowed: GET, HEAD, POST"])
    assert wrong.headers["allow"] == "GET, HEAD, POST"
    missing = served.request("GET", "/v1/embeddings")
    assert_refused(missing, 404, None, ["/v1/models/{name}", "/v1/adapters/{name}"])
    assert ":path" not in missing.text


ADAPTER_REFUSALS: list[tuple[str, dict[str, Any], int, str, list[str]]] = [
    # route, body, status, field, what the message says
    (
        "adapters",
        {"name": "x y", "path": "../x", "sample": []},
        400,
        "sample",
        ["unknown field 'sample'", "name: got 'x y'", "path: got '../x'"],
    ),
    ("adapters", {"name": ".x", "path": "math"}, 400, "name", ["beginning with a letter", "(base, auto, bundle, math"]),
    ("adapters", {"name": "auto", "path": "math"}, 400, "name", ["name: got 'auto'; allowed: letters, digits"]),
    ("adapters", {"name": "math", "path": "math"}, 400, "name", ["name: got 'math', which exists already"]),
    ("adapters", {"name": "n" * 900, "path": "math"}, 400, "name", ["name: got 'nnn", "at most 100 characters"]),
    ("adapters", {"name": "x", "path": "p" * 900}, 400, "path", ["path: got 'ppp", "a folder below --adapter-dir"]),
    ("adapters", {"name": "x", "path": "empty"}, 400, "path", ["not a PEFT folder"]),
    (
        "adapters",
        {"name": "x", "path": "math", "samples": ["a", 7]},
        400,
        "samples",
        ["samples[1]: got 7; allowed: a text"],
    ),
    ("load_lora_adapter", {"lora_name": "x", "lora_path": "../x"}, 400, "lora_path", ["lora_path: got '../x'"]),
    ("load_lora_adapter", {"lora_name": "x y", "lora_path": "math"}, 400, "lora_name", ["lora_name: got 'x y'"]),
    ("load_lora_adapter", {"lora_name": "x", "lora_path": "empty"}, 400, "lora_path", ["not a PEFT folder"]),
    ("unload_lora_adapter", {"lora_name": "maths"}, 404, "lora_name", ["'maths'. Did you mean 'math'?"]),
]


@pytest.fixture(scope="module")
def admin(bundle_folder: Path, adapter_folders: dict[str, Path]) -> Generator[Serving]:
    shelf = adapter_folders["math"].parent
    (shelf / "empty").mkdir(exist_ok=True)
    with serving(bundle_folder, admin_key="root", adapter_dir=str(shelf)) as each:
        yield each


@pytest.mark.parametrize(("route", "body", "status", "field", "parts"), ADAPTER_REFUSALS)
def test_a_bad_adapter_is_refused_by_the_field_that_the_request_has(
    admin: Serving, route: str, body: dict[str, Any], status: int, field: str, parts: list[str]
) -> None:
    answer = admin.post(f"/v1/{route}", body, headers={"Authorization": "Bearer root"})
    assert_refused(answer, status, field, parts)


def test_the_document_of_the_routes_is_valid_and_has_every_option_of_routing(served: Serving) -> None:
    document = served.request("GET", "/openapi.json").json()
    schemas = document["components"]["schemas"]
    for name in ("ChatBody", "CompletionBody", "RouteBody"):
        assert {"$ref": "#/components/schemas/Treadle"} in schemas[name]["properties"]["treadle"]["anyOf"]
    routing = {entry.name for entry in fields(RoutingParams)}
    assert set(schemas["RoutingParams"]["properties"]) == routing  # the page makes its fields from these
    assert set(schemas["Treadle"]["properties"]) == routing | {"adapters", "trace"}
    checker = Draft202012Validator({"$ref": "#/components/schemas/ChatBody", "components": document["components"]})
    assert checker.is_valid({**MINIMAL[CHATS], "treadle": {"every": 4, "adapters": ["math"], "trace": True}})
    assert not checker.is_valid({**MINIMAL[CHATS], "treadle": {"evry": 4}})
    schemathesis.openapi.from_dict(document).validate()


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
