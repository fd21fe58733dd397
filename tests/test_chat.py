"""A chat is routed on what its messages say, whatever its template puts around them, leaves out or alters."""

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from treadle.common.errors import OptionError
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.chat import contents_of, joined, only, pieces_of, prompt_cursor, read_prompt
from treadle.engine.decisions import update_weights
from treadle.engine.engine import Engine
from treadle.engine.prefix_cache import PrefixCache
from treadle.engine.rendered_chats import RenderedChats
from treadle.engine.sequence import TokenSequence
from treadle.routing.router import Router

from conftest import SAMPLES, byte_tokenizer

TURNS = "{% for m in messages %}<unused>{{ m.role }} loop\n{{ CONTENT }}<end>\n{% endfor %}<unused>assistant\n"
DEFAULT = "{% if messages[0].role != 'system' %}<unused>system\nreturn the list of the loop<end>\n{% endif %}"
TEMPLATES = {
    "roles": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
    "default system text": DEFAULT + TURNS.replace("CONTENT", "m.content"),
    "a date": "{{ strftime_now('%d %b %Y') }} def list\n" + TURNS.replace("CONTENT", "m.content"),
    "stripped": TURNS.replace("CONTENT", "m.content | trim"),
    "upper case": TURNS.replace("CONTENT", "m.content | upper"),
    "repeated": TURNS.replace("CONTENT", "m.content ~ ' I repeat: ' ~ m.content"),
    "left out": "def loop return list",
    "moved": "{% for m in messages | reverse %}{{ m.content }} loop {% endfor %}",
}
"""Their own words are all about code."""
KEPT = ("roles", "default system text", "a date", "stripped")
ROUTINGS = {
    "default": RoutingParams(),
    "window": RoutingParams(window=7),
    "without the base": RoutingParams(every=1, fallback=False),
    "once": RoutingParams(every=None),
    "boosted": RoutingParams(score="cosine", rule="boosted"),
    "late": RoutingParams(lag=1),
}
TEXT = "add three plus four, the sum "
every_template = pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)


def templated(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents: str, system: str = "") -> list[dict[str, str]]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [*([{"role": "system", "content": system}] if system else []), *turns]


def row_of(router: Router, tokenizer: Any, prompt: Any, routing: RoutingParams, answer: str = "") -> TokenSequence:
    """A row after its prompt and an answer, with the weights that are due then."""
    row = TokenSequence(read_prompt(tokenizer, prompt), router, routing, SamplingParams(max_tokens=99), tokenizer)
    update_weights([row])
    for token_id in tokenizer(answer).input_ids:
        row.accept(token_id, 0.0, False)
        update_weights([row])
    return row


def trace(router: Router, tokenizer: Any, prompt: Any, routing: RoutingParams) -> np.ndarray:
    return row_of(router, tokenizer, prompt, routing).prompt_weights()


# What counts


@every_template
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_a_message_is_routed_as_its_text(router: Router, template: str, routing: RoutingParams) -> None:
    tokenizer = templated(template)
    expected = row_of(router, tokenizer, TEXT, routing).weights
    np.testing.assert_array_equal(row_of(router, tokenizer, chat(TEXT), routing).weights, expected)
    assert expected.argmax() == 0


@every_template
def test_several_messages_are_routed_as_their_texts_with_blank_lines_between(router: Router, template: str) -> None:
    tokenizer, routing = templated(template), RoutingParams(window=30)
    messages = chat("the atom", "heat the planet", TEXT, system="cell planet")
    text = f"cell planet\n\nthe atom\n\nheat the planet\n\n{TEXT}"
    expected = row_of(router, tokenizer, text, routing).weights
    np.testing.assert_array_equal(row_of(router, tokenizer, messages, routing).weights, expected)


def test_a_chat_that_changes_its_subject_is_decided_by_the_last(router: Router) -> None:
    tokenizer, routing = templated(TEMPLATES["default system text"]), RoutingParams(fallback=False)
    turns = ["the atom heat planet heat cell " * 4, "def loop return list return the list " * 4]
    row = row_of(router, tokenizer, chat(turns[0], "cell", turns[1]), routing)
    assert row.weights.argmax() == list(SAMPLES).index("code")
    back = row_of(router, tokenizer, chat(turns[1], "cell", turns[0]), routing)  # the same words but for their order
    assert back.weights.argmax() == list(SAMPLES).index("science")


def test_an_answer_does_not_continue_the_last_word_of_its_chat(router: Router) -> None:
    tokenizer, routing = templated(TEMPLATES["default system text"]), RoutingParams(every=1)
    row = row_of(router, tokenizer, chat("the plan"), routing, "et")
    expected = row_of(router, tokenizer, "the plan\n\n", routing, "et")
    np.testing.assert_allclose(row.weights, expected.weights, atol=1e-6)
    glued = row_of(router, tokenizer, "the plan", routing, "et")
    assert np.abs(glued.weights - row.weights).max() > 1e-3
    assert "".join(event.text for event in row.events) == "et"


def test_tokens_that_end_a_turn_say_nothing(router: Router) -> None:
    tokenizer, routing = templated(TEMPLATES["roles"]), RoutingParams(every=1)
    row = row_of(router, tokenizer, chat("heat"), routing, "<unused>cell<end>")
    np.testing.assert_allclose(row.weights, row_of(router, tokenizer, "heat\n\n", routing, "cell").weights, atol=1e-6)


def test_contents_are_texts_or_parts() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": "two"}]
    assert contents_of([{"content": parts}, {"content": None}, {}, {"content": ""}]) == ["one two", "", "", ""]
    with pytest.raises(OptionError) as caught:
        contents_of([{"content": 7}, {"content": "x"}, {"content": [{"text": 7}]}])
    assert "message 0: content is 7; allowed: a text, or a list of parts" in str(caught.value)
    assert "message 2" in str(caught.value)
    assert joined(["", "a", " \n", "b "]) == "a\n\nb "


def test_a_chat_that_says_nothing_is_no_error(router: Router) -> None:
    tokenizer = templated(TEMPLATES["roles"])
    for routing in (RoutingParams(), RoutingParams(prefill="causal")):
        assert np.isfinite(row_of(router, tokenizer, chat(" "), routing, "add").weights).all()


# Where it stands: with prefill="causal" a token is read under what has been said so far


@every_template
def test_each_token_is_read_under_what_was_said_up_to_it(router: Router, template: str) -> None:
    tokenizer, routing = templated(template), RoutingParams(every=1, prefill="causal")
    contents = ["heat the planet", "assistant", "add three"]
    prompt = read_prompt(tokenizer, chat(*contents))
    assert prompt.chat is not None
    own = pieces_of(tokenizer, prompt.ids)
    ends = prompt.chat.ends(own, routing)
    assert len(ends) == len(own)
    assert ends == sorted(ends)
    assert ends[-1] == len(prompt.chat.pieces) == len(joined(contents))
    text = "".join(own)
    for length, end in enumerate(ends[:-1], 1):
        said = joined(contents)[:end].split("\n\n")
        if template != TEMPLATES["upper case"]:
            assert all(content in "".join(own[:length]) for content in said), "text counts before it is read"
    if template in [TEMPLATES[name] for name in KEPT]:  # and it counts as soon as it is read
        place = text.index("heat the planet")
        read = [sum(map(len, own[: i + 1])) for i in range(len(own))]
        assert ends[read.index(place + 4)] == 4
        assert ends[read.index(text.rindex("add three") + 3)] == len("heat the planet\n\nassistant\n\nadd")
    weights = trace(router, tokenizer, chat(*contents), routing)
    np.testing.assert_array_equal(weights[-1], trace(router, tokenizer, joined(contents), routing)[-1])


def test_weights_of_a_beginning_do_not_depend_on_what_follows(router: Router) -> None:
    tokenizer, routing = templated(TEMPLATES["default system text"]), RoutingParams(every=3, prefill="causal")
    short, long = chat("heat the planet", "cell", "add"), chat("heat the planet", "cell", "add", "user", "assistant")
    first, second = (trace(router, tokenizer, messages, routing) for messages in (short, long))
    same = len(read_prompt(tokenizer, short[:2]).ids) - len("assistant\n") - 1
    np.testing.assert_array_equal(first[:same], second[:same])


def test_special_tokens_in_a_content_are_no_text(router: Router) -> None:
    tokenizer = templated(TEMPLATES["default system text"])
    for routing in (RoutingParams(), RoutingParams(every=1, prefill="causal")):
        weights = trace(router, tokenizer, chat("heat<end>\n<unused> planet"), routing)
        np.testing.assert_array_equal(weights[-1], trace(router, tokenizer, "heat<end>\n<unused> planet", routing)[-1])


# The engine's laws hold for chats


CHATS = [chat("add three plus four"), chat("the planet", "heat", "the cell", system="atom"), chat("def loop " * 6)]
LAWS = {
    "default": RoutingParams(every=2, temperature=5.0),
    "causal": RoutingParams(every=3, prefill="causal", temperature=5.0),
    "causal window": RoutingParams(every=1, prefill="causal", window=5, temperature=5.0),
    "recompute": RoutingParams(every=3, past="recompute", window=8, temperature=5.0),
}
GREEDY = SamplingParams(max_tokens=6)


@pytest.mark.parametrize("routing", LAWS.values(), ids=LAWS)
def test_a_batch_of_chats_is_each_alone_and_scores_are_those_of_generation(
    engine: Engine, routing: RoutingParams
) -> None:
    engine.tokenizer.chat_template = TEMPLATES["default system text"]
    try:
        together = engine.generate(CHATS, sampling=GREEDY, routing=routing)
        for messages, done in zip(CHATS, together, strict=True):
            events = list(engine.stream(messages, sampling=GREEDY, routing=routing))
            assert [event.token_id for event in events] == list(done.token_ids)
            np.testing.assert_allclose([event.weights for event in events], done.weights, atol=2e-5)
        answers = [engine.tokenizer.decode(done.token_ids) for done in together]
        for index, scores in enumerate(engine.score(CHATS, answers, routing=routing)):
            if engine.tokenizer(answers[index]).input_ids == list(together[index].token_ids):
                np.testing.assert_allclose(scores, together[index].logprobs, atol=2e-4)
    finally:
        engine.tokenizer.chat_template = byte_tokenizer().chat_template


def test_a_shared_beginning_is_read_once_and_changes_nothing(engine: Engine) -> None:
    routing = LAWS["causal"]
    tokenizer = templated(TEMPLATES["default system text"])
    prompts = [read_prompt(tokenizer, each) for each in (CHATS[1], [*CHATS[1], *chat("atom", "add")])]
    alone = engine.generate_ids(prompts, sampling=GREEDY, routing=routing)
    prefixes, reused = PrefixCache(1 << 24), list[int]()
    for prompt, expected in zip(prompts, alone, strict=True):
        (row,) = engine.new_rows([prompt], sampling=GREEDY, routing=routing)
        batch = engine.new_batch(prefixes=prefixes)
        reading = batch.begin([row])
        while not reading.is_finished:
            batch.read(reading, 20)
        while batch.rows:
            batch.step()
        reused.append(row.reused)
        assert [event.token_id for event in row.events] == list(expected.token_ids)
        np.testing.assert_allclose([event.weights for event in row.events], expected.weights, atol=2e-5)
    assert reused[1] > 60


# From tokens alone


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize(
    "messages",
    [chat("hi"), chat("heat", "cell", "add\n\nthree"), chat("heat", system="an atom"), chat("<b>", "", "assistant")],
    ids=["one", "turns", "system", "odd"],
)
def test_a_rendered_chat_is_found_in_its_tokens(name: str, messages: list[dict[str, str]]) -> None:
    tokenizer = templated(TEMPLATES[name])
    prompt = read_prompt(tokenizer, messages)
    assert RenderedChats(tokenizer).read(prompt.ids) == prompt.chat
    begun = [*prompt.ids, *tokenizer(" heat the").input_ids]
    assert joined(RenderedChats(tokenizer).contents(begun) or []).endswith("heat the")


def test_what_is_no_rendered_chat_is_a_text() -> None:
    tokenizer = templated(TEMPLATES["default system text"])
    chats = RenderedChats(tokenizer)
    ids = read_prompt(tokenizer, chat("heat", "cell", "add")).ids
    for other in (tokenizer("add three").input_ids, ids[3:], tokenizer("user: heat").input_ids):
        assert chats.read(other) is None
    for template in (None, "{{ raise_exception('no') }}", TEMPLATES["repeated"], TEMPLATES["left out"]):
        unknown = templated(template or "")
        unknown.chat_template = template
        assert RenderedChats(unknown).read(ids) is None


def test_what_follows_in_a_chat_says_what_its_messages_do() -> None:
    own = [*"<end>\nuser\nadd the user\nassistant\n"]
    said = only(own, ["hi", "answer", "add the user"])
    assert "".join(said) == "\n\nadd the user"
    assert len(said) == len(own)
    assert "".join(only(own, ["no such thing"])) == ""


def test_a_text_copied_up_to_a_token_goes_on_alike(router: Router) -> None:
    tokenizer = templated(TEMPLATES["roles"])
    prompt = read_prompt(tokenizer, chat("add"))
    text = prompt_cursor(router, RoutingParams(every=2), pieces_of(tokenizer, prompt.ids), prompt.chat)
    text.add([*"xyz"])
    text.decide(text.num_tokens)
    assert text.pieces == ["a", "d", "d", "\n\nx", "y", "z"]
    for more, expected in ((0, ["a", "d", "d"]), (1, ["a", "d", "d", "\n\nx"])):
        other = text.first(len(prompt.ids) + more)
        assert other.pieces == expected
        other.add(["w"])
        assert other.pieces[-1] == ("w" if more else "\n\nw")
        assert other.decide(other.num_tokens)[0][0] == len(prompt.ids) + more  # decided anew, where it goes on
    assert text.pieces[-1] == "z"
