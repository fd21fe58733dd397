"""Texts and bytes of single tokens."""

from treadle.serving.openai.tokens import TokenTexts

from conftest import TINY, byte_tokenizer


def test_a_token_is_its_bytes() -> None:
    texts = TokenTexts(byte_tokenizer())
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé€ ").input_ids
    assert b"".join(texts.bytes_of(each) for each in ids).decode() == "aé€ "
    assert texts.text_of(ids[0]) == "a"
    assert texts.text_of(ids[1]) == r"bytes:\xc3"
    assert texts.text_of(tokenizer.eos_token_id) == "<end>"


def test_an_id_beyond_the_tokenizers_vocabulary_has_no_text() -> None:
    """Models round their vocabulary up: 260 rows here, for 259 tokens."""
    tokenizer = byte_tokenizer()
    last = TINY["vocab_size"] - 1
    assert len(tokenizer) == last
    assert TokenTexts(tokenizer).bytes_of(last) == b""
    assert TokenTexts(tokenizer).text_of(last) == ""
