"""Text that grows token by token joins to the whole; stop strings cut it at the same place however it is cut."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from treadle.common.errors import ModelError, OptionError
from treadle.engine.tokenization import Detokenizer, StopStrings, completion_ids, prompt_ids

from conftest import byte_tokenizer

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
texts = st.text(max_size=30) | st.text(alphabet="aé€😀漢\u0301\ufffd \n", max_size=20)


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Few pieces, and a byte at a time for everything else, as in Gemma and Mistral."""
    pieces = ["<unk>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "é", "▁a", "ab", "▁ab"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    core = Tokenizer(
        models.BPE(vocabulary, [("▁", "a"), ("a", "b"), ("▁", "ab")], unk_token="<unk>", byte_fallback=True)
    )
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<unk>", "<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", clean_up_tokenization_spaces=False)


TOKENIZERS = {"byte level": byte_tokenizer(), "byte fallback": fallback_tokenizer()}
both = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def streamed(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    text = Detokenizer(tokenizer)
    return [*(text.push(token_id) for token_id in ids), text.flush()]


# Text


@both
@given(texts)
@quick
def test_pieces_join_to_the_text(tokenizer, text):
    ids = completion_ids(tokenizer, text)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == text
    assert len(pieces) == len(ids) + 1


@given(st.lists(st.integers(0, 258), max_size=30))
@quick
def test_pieces_of_any_bytes_join_to_what_decoding_gives(ids):
    tokenizer = TOKENIZERS["byte level"]
    expected = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(streamed(tokenizer, ids)) == expected


@both
@given(st.data())
@quick
def test_text_without_its_last_token_is_a_beginning_with_the_open_character_marked(tokenizer, data):
    text = data.draw(st.text(alphabet="aé€😀", min_size=1, max_size=6))
    whole = "".join(streamed(tokenizer, completion_ids(tokenizer, text)[:-1]))
    kept = whole.rstrip("\ufffd")
    assert text.startswith(kept)
    assert len(text) - len(kept) == 1


@given(st.lists(st.integers(0, len(TOKENIZERS["byte fallback"]) - 1), max_size=12), texts)
@example([2 + 0xE6, 2 + 0xBC, 2 + 0xA2, 2 + 0xBC], "a")  # a character, a byte that belongs to none, a letter
@quick
def test_broken_bytes_do_not_break_what_follows(ids, text):
    tokenizer = TOKENIZERS["byte fallback"]
    follow = completion_ids(tokenizer, "ab" + text)
    broken, healed = "".join(streamed(tokenizer, ids)), "".join(streamed(tokenizer, ids + follow))
    assert healed.endswith("ab" + text)
    assert len(healed) <= len(broken) + len("ab" + text)


def test_a_character_appears_with_its_last_token(tokenizer):
    assert streamed(tokenizer, completion_ids(tokenizer, "aé😀")) == ["a", "", "é", "", "", "", "😀", ""]
    assert streamed(tokenizer, completion_ids(tokenizer, "a😀")[:-1]) == ["a", "", "", "", "\ufffd"]


def test_special_tokens_have_no_text(tokenizer):
    ids = [tokenizer.eos_token_id, *completion_ids(tokenizer, "é"), tokenizer.eos_token_id]
    assert "".join(streamed(tokenizer, ids)) == "é"


def test_flushing_twice_gives_nothing_more(tokenizer):
    text = Detokenizer(tokenizer)
    text.push(completion_ids(tokenizer, "é")[0])
    assert text.flush() == "\ufffd"
    assert text.flush() == ""


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ModelError, match="object is not a fast tokenizer"):
        Detokenizer(object())


# Prompts


def test_a_text_is_a_prompt_as_it_is(tokenizer):
    assert tokenizer.decode(prompt_ids(tokenizer, "a é")) == "a é"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",  # the sandbox
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{{ messages[7]['content'] + 1 }}",
        "{{ messages[0].content | int + 'x' }}",
        "{% for x in 5 %}{% endfor %}",
    ],
)
def test_a_template_that_fails_refuses_the_messages(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(OptionError, match="the chat template refuses these messages: "):
        prompt_ids(tokenizer, [{"role": "user", "content": "hi"}])


def test_messages_are_a_prompt_by_the_chat_template(tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.decode(prompt_ids(tokenizer, messages)) == "user: hi\nassistant:"


def test_prompts_that_cannot_be(tokenizer):
    with pytest.raises(OptionError, match="the prompt is empty"):
        prompt_ids(tokenizer, "")
    plain = byte_tokenizer()
    plain.chat_template = None
    with pytest.raises(ModelError, match="no chat template: give the prompt as one text"):
        prompt_ids(plain, [{"role": "user", "content": "hi"}])


# Stop strings


def stopped(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    """The text that is shown of some pieces, and whether a stop string was found."""
    passing = StopStrings(stops)
    shown = "".join(passing.push(piece) for piece in pieces)
    return shown + passing.flush(), passing.found


def expected(stops: tuple[str, ...], text: str) -> tuple[str, bool]:
    """Read character by character: the first moment at which the text ends in a stop string, the longest one."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


@given(
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple),
    pieces=st.lists(st.text("abc", max_size=4), max_size=10),
)
@example(stops=("abcab", "ca"), pieces=["abca", "b"])  # one inside the other: the first to end
@example(stops=("aab",), pieces=["a", "a", "a", "b"])
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_cut_stops_at_the_same_place(stops, pieces):
    text = "".join(pieces)
    assert stopped(stops, pieces) == stopped(stops, [text]) == stopped(stops, list(text)) == expected(stops, text)


@given(st.lists(st.text("abc", max_size=4), max_size=10), st.text("abc", min_size=1, max_size=4))
@quick
def test_what_was_shown_is_never_taken_back(pieces, stop):
    passing = StopStrings([stop])
    shown = ""
    for number, piece in enumerate(pieces, 1):
        shown += passing.push(piece)
        text = "".join(pieces[:number])
        assert stop not in shown
        assert text.startswith(shown)
        if not passing.found:  # no more is held back than what may become the stop string
            assert stop.startswith(text[len(shown) :])


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        ((), ["a", "b"], ["a", "b"]),
        (("END",), ["a", "EN", "D", "b"], ["a", "", "", ""]),
        (("END",), ["a", "EN", "d"], ["a", "", "ENd"]),
        (("END",), ["aENDb"], ["a"]),
        (("\n\n",), ["a\n", "b\n", "\nc"], ["a", "\nb", ""]),
        (("xyz", "y"), ["x", "yz"], ["", "x"]),
    ],
)
def test_text_is_held_back_only_while_a_stop_string_may_begin(stops, pieces, shown):
    passing = StopStrings(stops)
    assert [passing.push(piece) for piece in pieces] == shown


def test_what_was_held_back_appears_at_the_end_of_the_text():
    assert stopped(("END",), ["aE", "N"]) == ("aEN", False)
