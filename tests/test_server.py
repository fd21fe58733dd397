"""The server as its clients see it: the real `openai` client against a real server on a free port."""

import concurrent.futures
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from treadle.common.params import RoutingParams, SamplingParams
from treadle.routing.rules import apply_rule

from serving import CHAT, Serving, serving

PROMPT = "add three plus four"
GREEDY = {"temperature": 0, "max_tokens": 12}
MODELS = {
    "auto": None,
    "bundle": None,
    "math": RoutingParams.one("math"),
    "base": RoutingParams.base(),
}


@pytest.fixture(scope="module")
def served(bundle_folder: Path) -> Generator[Serving]:
    with serving(bundle_folder) as each:
        yield each


@pytest.fixture(scope="module")
def expected(bundle_folder: Path) -> Any:
    """What the engine itself generates."""
    import treadle

    engine = treadle.load(bundle_folder)

    def generate(prompt: Any, routing: RoutingParams | None = None, **sampling: Any) -> Any:
        return engine.generate(prompt, sampling=SamplingParams(**sampling), routing=routing)

    return generate


@pytest.mark.parametrize("model", MODELS)
def test_a_completion_is_what_the_engine_generates(served: Serving, expected: Any, model: str) -> None:
    done = expected(PROMPT, MODELS[model], max_tokens=12)
    answer = served.client().completions.create(model=model, prompt=PROMPT, **GREEDY)
    assert answer.choices[0].text == done.text
    assert answer.choices[0].finish_reason == done.finish_reason
    assert answer.object == "text_completion"
    assert answer.model == model
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), len(done.token_ids))
    assert answer.id.startswith("cmpl-")


@pytest.mark.parametrize("model", MODELS)
def test_a_chat_is_what_the_engine_generates(served: Serving, expected: Any, model: str) -> None:
    done = expected(CHAT, MODELS[model], max_tokens=12)
    answer = served.client().chat.completions.create(model=model, messages=CHAT, **GREEDY)
    assert answer.choices[0].message.content == done.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion"
    assert answer.usage.total_tokens == done.prompt_tokens + len(done.token_ids)


def test_a_stream_joins_to_the_whole_answer(served: Serving, expected: Any) -> None:
    done = expected(CHAT, max_tokens=30)
    chunks = list(
        served.client().chat.completions.create(
            model="auto",
            messages=CHAT,
            temperature=0,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == done.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == done.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(done.token_ids)
    assert len({chunk.id for chunk in chunks}) == 1
    text = served.client().completions.create(model="auto", prompt=PROMPT, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in text) == expected(PROMPT, max_tokens=12).text


def test_a_stream_is_server_sent_events_that_end_with_done(served: Serving) -> None:
    body = {"model": "auto", "prompt": PROMPT, "stream": True, **GREEDY}
    answer = served.post("/v1/completions", body)
    events = answer.text.split("\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert events[-2:] == ["data: [DONE]", ""]
    documents = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {document["object"] for document in documents} == {"text_completion"}
    assert all("usage" not in document for document in documents)


def test_requests_with_different_models_share_batches_and_are_as_alone(served: Serving, expected: Any) -> None:
    asked = [(model, f"{PROMPT} {number}" * (1 + number % 3)) for number in range(6) for model in MODELS]

    def ask(request: tuple[str, str]) -> str:
        model, prompt = request
        return served.client().completions.create(model=model, prompt=prompt, **GREEDY).choices[0].text

    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        texts = list(pool.map(ask, asked))
    assert texts == [expected(prompt, MODELS[model], max_tokens=12).text for model, prompt in asked]


def test_the_models_are_the_routed_one_its_adapters_and_the_base(served: Serving) -> None:
    models = {model.id: model for model in served.client().models.list()}
    assert list(models) == ["auto", "bundle", "math", "science", "code", "base"]
    assert models["math"].model_extra["parent"] == "base"
    assert all(model.model_extra["has_chat_template"] for model in models.values())
    assert served.client().models.retrieve("code").id == "code"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'code'"):
        served.client().models.retrieve("cod")


def test_errors_are_the_clients_typed_exceptions(served: Serving) -> None:
    client = served.client()
    with pytest.raises(openai.NotFoundError, match=r"unknown model 'maths'\. Did you mean 'math'") as missing:
        client.chat.completions.create(model="maths", messages=CHAT)
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match=r"temperature: got 3; allowed: 0 \(greedy\)") as refused:
        client.chat.completions.create(model="auto", messages=CHAT, temperature=3)
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="auto", messages=CHAT, temperature=3, stream=True)


def test_routing_options_of_a_request_act(served: Serving, expected: Any) -> None:
    options = {"rule": "fixed", "fixed": {"math": 0.7, "science": 0.4}}
    done = expected(PROMPT, RoutingParams(**options), max_tokens=12)
    client = served.client()
    extra = {"treadle": {"fixed": options["fixed"], "trace": True}}
    answer = client.completions.create(model="auto", prompt=PROMPT, extra_body=extra, **GREEDY)
    assert answer.choices[0].text == done.text
    trace = answer.choices[0].model_extra["treadle"]
    assert trace["adapters"] == ["math", "science", "code"]
    np.testing.assert_allclose(trace["weights"], done.weights, atol=1e-5)
    assert "".join(trace["tokens"]) == done.text
    routed = expected(PROMPT, RoutingParams(every=1, temperature=5.0), max_tokens=12)
    extra = {"treadle": {"every": 1, "temperature": 5, "trace": True}}
    chunks = client.completions.create(model="auto", prompt=PROMPT, stream=True, extra_body=extra, **GREEDY)
    weights = [chunk.choices[0].model_extra["treadle"]["weights"][0] for chunk in chunks]
    np.testing.assert_allclose(weights, routed.weights, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"prefill": "causal", "every": 1}])
def test_a_chat_is_weighed_as_its_text(served: Serving, options: dict[str, Any]) -> None:
    extra = {"treadle": {**options, "trace": True}}
    answer = served.client().chat.completions.create(model="auto", messages=CHAT, extra_body=extra, **GREEDY)
    weights = answer.choices[0].model_extra["treadle"]["weights"][0]
    text = served.client().completions.create(model="auto", prompt=CHAT[0]["content"], extra_body=extra, **GREEDY)
    assert weights == text.choices[0].model_extra["treadle"]["weights"][0]
    routed = [served.post("/v1/route", {**given, "treadle": options}).json() for given in (
        {"messages": CHAT}, {"text": CHAT[0]["content"]}
    )]  # fmt: skip
    assert routed[0] == routed[1]
    if "window" not in options:
        np.testing.assert_allclose(routed[0]["weights"], weights, atol=1e-5)


def test_messages_are_weighed_as_their_contents(served: Serving) -> None:
    messages = [{"role": "system", "content": "the atom"}, *CHAT, {"role": "assistant", "content": "def loop"}]
    text = f"the atom\n\n{CHAT[0]['content']}\n\ndef loop"
    routed = [served.post("/v1/route", given).json() for given in ({"messages": messages}, {"text": text})]
    assert routed[0] == routed[1]


@pytest.mark.parametrize("score", ["lda", "cosine", "centred"])
def test_a_trace_says_what_the_weights_were_made_from(served: Serving, score: Any) -> None:
    options = {"score": score, "every": 1, "temperature": 2, "fallback": False}
    extra = {"treadle": {**options, "trace": True}}
    answer = served.client().completions.create(model="auto", prompt=PROMPT, extra_body=extra, **GREEDY)
    trace = answer.choices[0].model_extra["treadle"]
    params = RoutingParams(**options)
    made = apply_rule(np.array(trace["scores"], np.float32), params)
    np.testing.assert_allclose(made, trace["weights"], atol=1e-4)
    router = served.engine.router
    for compared, kind in (("cosines", "cosine"), ("scores", score)):
        whole = router.scores([PROMPT], RoutingParams(score=kind))[0]  # the first token's weights are the prompt's
        np.testing.assert_allclose(trace[compared][0], whole, atol=1e-4)
    assert trace["cosines"][0] != trace["cosines"][-1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prefill", ["prompt", "causal"])
def test_an_echoed_prompt_is_traced_as_it_was_read(served: Serving, prefill: Any, stream: bool) -> None:
    options = {"every": 2, "window": 8, "prefill": prefill, "temperature": 2, "fallback": False}
    asked = {"model": "auto", "prompt": PROMPT, "echo": True, "extra_body": {"treadle": {**options, "trace": True}}}
    if stream:
        chunks = list(served.client().completions.create(**asked, stream=True, **GREEDY))
        parts = [chunk.choices[0].model_extra["treadle"] for chunk in chunks]
        trace = {field: [each for part in parts for each in part[field]] for field in ("tokens", "weights", "scores")}
        counts = [part["prompt_tokens"] for part in parts]
        assert (counts[0], set(counts[1:])) == (len(PROMPT), {0})
        text = "".join(chunk.choices[0].text for chunk in chunks)
    else:
        choice = served.client().completions.create(**asked, **GREEDY).choices[0]
        trace, text = choice.model_extra["treadle"], choice.text
    assert "".join(trace["tokens"]) == text
    params = RoutingParams(**options)
    weights = served.engine.router.trace([*PROMPT], len(PROMPT), params)
    np.testing.assert_allclose(trace["weights"][: len(PROMPT)], weights, atol=1e-5)
    np.testing.assert_allclose(apply_rule(np.array(trace["scores"]), params), trace["weights"], atol=1e-4)


def test_a_text_is_traced_without_an_answer(served: Serving) -> None:
    extra = {"treadle": {"prefill": "causal", "trace": True}}
    answer = served.client().completions.create(model="auto", prompt=PROMPT, echo=True, max_tokens=0, extra_body=extra)
    trace = answer.choices[0].model_extra["treadle"]
    assert trace["tokens"] == [*PROMPT]
    assert {len(trace[field]) for field in ("weights", "cosines", "scores")} == {len(PROMPT)}


@pytest.mark.parametrize(("model", "options"), [("base", {}), ("math", {}), ("auto", {"fixed": {"code": 1}})])
def test_fixed_weights_were_made_from_nothing(served: Serving, model: str, options: Any) -> None:
    extra = {"treadle": {**options, "trace": True}}
    answer = served.client().completions.create(model=model, prompt=PROMPT, extra_body=extra, **GREEDY)
    trace = answer.choices[0].model_extra["treadle"]
    assert set(trace["cosines"]) == set(trace["scores"]) == {None}
    assert len(trace["cosines"]) == len(trace["weights"]) == 12


def test_only_the_named_adapters_take_part(served: Serving) -> None:
    for fallback in (False, True):
        extra = {"treadle": {"adapters": ["code", "math"], "trace": True, "fallback": fallback}}
        answer = served.client().completions.create(model="auto", prompt=PROMPT, extra_body=extra, **GREEDY)
        trace = answer.choices[0].model_extra["treadle"]
        assert trace["adapters"] == ["math", "code"]
        sums = np.sum(trace["weights"], -1)
        if fallback:  # the base has the rest
            assert (sums < 1).all()
        else:
            np.testing.assert_allclose(sums, 1, atol=1e-5)


def test_choices_and_prompts_come_in_order(served: Serving, expected: Any) -> None:
    prompts = [PROMPT, "def loop return"]
    answer = served.client().completions.create(model="auto", prompt=prompts, n=2, **GREEDY)
    texts = [expected(prompt, max_tokens=12).text for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    ids = [list(prompt.encode()) for prompt in prompts]
    tokenizer = served.engine.tokenizer
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    by_ids = served.client().completions.create(model="auto", prompt=ids, **GREEDY)
    assert [choice.text for choice in by_ids.choices] == texts[::2]


def test_a_seed_repeats_its_choices_which_differ(served: Serving) -> None:
    def texts(seed: int) -> list[str]:
        options: dict[str, Any] = {"temperature": 1.5, "max_tokens": 20, "n": 3, "seed": seed}
        answer = served.client().completions.create(model="auto", prompt=PROMPT, **options)
        return [choice.text for choice in answer.choices]

    assert texts(1) == texts(1)
    assert len(set(texts(1))) == 3
    assert texts(1) != texts(2)


def test_a_stop_string_ends_the_text_before_it(served: Serving, expected: Any) -> None:
    free = expected(PROMPT, max_tokens=60)
    stop = next(free.text[i : i + 2] for i in range(5, 50) if "\ufffd" not in free.text[i : i + 2])
    body: dict[str, Any] = {"model": "auto", "prompt": PROMPT, "temperature": 0, "max_tokens": 60, "stop": stop}
    answer = served.client().completions.create(**body)
    assert answer.choices[0].text == free.text[: free.text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    chunks = served.client().completions.create(**body, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_log_probabilities_of_a_chat(served: Serving, expected: Any) -> None:
    done = expected(CHAT, max_tokens=12)
    asked: dict[str, Any] = {"model": "auto", "messages": CHAT, "logprobs": True, "top_logprobs": 3, **GREEDY}
    content = served.client().chat.completions.create(**asked).choices[0].logprobs.content
    np.testing.assert_allclose([token.logprob for token in content], done.logprobs, atol=1e-4)
    assert all(len(token.top_logprobs) == 3 for token in content)
    assert all(token.top_logprobs[0].token == token.token for token in content)  # greedy
    ends = done.finish_reason == "stop"
    joined = b"".join(bytes(token.bytes) for token in content[: len(content) - ends])
    assert joined.decode(errors="replace") == done.text
    chunks = list(served.client().chat.completions.create(**asked, stream=True))
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_scores_the_prompt(served: Serving, expected: Any, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "math", "prompt": PROMPT, "echo": True, "logprobs": 2, **GREEDY}
    if stream:
        parts = [chunk.choices[0] for chunk in served.client().completions.create(**asked, stream=True)]
        text = "".join(part.text for part in parts)
        logprobs = {
            name: [value for part in parts for value in getattr(part.logprobs, name)]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
    else:
        choice = served.client().completions.create(**asked).choices[0]
        text, logprobs = choice.text, choice.logprobs.model_dump()
    done = expected(PROMPT, RoutingParams.one("math"), max_tokens=12)
    assert text == PROMPT + done.text
    assert logprobs["tokens"][: len(PROMPT)] == list(PROMPT)
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    np.testing.assert_allclose(logprobs["token_logprobs"][len(PROMPT) :], done.logprobs, atol=1e-4)
    assert logprobs["text_offset"][: len(PROMPT) + 1] == list(range(len(PROMPT) + 1))
    assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])


def test_an_echo_without_an_answer_is_the_prompts_score(served: Serving) -> None:
    prompt, continued = "add three", " plus four"
    asked: dict[str, Any] = {"model": "code", "prompt": prompt + continued, "echo": True, "logprobs": 0}
    answer = served.client().completions.create(**asked, max_tokens=0)
    choice = answer.choices[0]
    (scores,) = served.engine.score([prompt], [continued], routing=RoutingParams.one("code"))
    np.testing.assert_allclose(choice.logprobs.token_logprobs[len(prompt) :], scores, atol=1e-4)
    assert choice.text == prompt + continued
    assert answer.usage.completion_tokens == 0


def test_route_explains_a_text(served: Serving) -> None:
    from treadle.routing.explain import explain

    answer = served.post("/v1/route", {"text": PROMPT, "treadle": {"every": 4}}).json()
    explanation = explain(served.engine.router, PROMPT)
    np.testing.assert_allclose(answer["weights"], explanation.weights, atol=1e-6)
    assert answer["names"] == ["math", "science", "code"]
    assert [word for word, _ in answer["words"]] == [word for word, _ in explanation.words]
    assert answer["routing"]["every"] == 4
    assert answer["base"] == pytest.approx(1 - sum(answer["weights"]), abs=1e-6)
    assert answer["base"] > 0.01
    some = served.post("/v1/route", {"text": PROMPT, "treadle": {"adapters": ["code"], "fallback": False}}).json()
    assert (some["names"], some["weights"], some["base"]) == (["code"], [1.0], 0.0)


def test_what_needs_no_model_answers(served: Serving) -> None:
    assert served.request("GET", "/live").json() == {"status": "live"}
    assert served.request("GET", "/health").json() == {"status": "ready"}
    document = served.request("GET", "/openapi.json").json()
    assert "ChatBody" in document["components"]["schemas"]
    missing = served.request("GET", "/v2/models")
    assert missing.status_code == 404
    assert "/v1/models" in missing.json()["error"]["message"]
    wrong = served.request("GET", "/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert "allowed: POST" in wrong.json()["error"]["message"]


def test_a_request_id_is_given_back(served: Serving) -> None:
    assert served.request("GET", "/live", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert len(served.request("GET", "/live", headers={"X-Request-Id": "a b"}).headers["x-request-id"]) == 32
