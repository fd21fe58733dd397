"""The texts and bytes of single tokens, and the fewest tokens that a text can have.

A token covers the bytes that it stands for. So each byte of a text needs at least 1/n of a token, where n is the length
of the longest token with this byte. This holds for tokenizers that keep every byte of a text.
"""

import json
import re
from functools import cache
from math import ceil
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How sentencepiece writes a token of one byte."""
MAX_COMPOSED_BYTES = 4
"""The most bytes that NFC joins into one: three letters of Hangul, nine bytes, become three bytes."""


class TokenTexts:
    """Returns texts and bytes of a tokenizer's tokens; two tokens never have the same text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        decoder = str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
        self._has_byte_letters = "ByteLevel" in decoder

    def bytes_of(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of a token; they may be a part of a character.

        A model may have more ids than its tokenizer has tokens; the other ids have no bytes.
        """
        symbol = cast(str | None, self._tokenizer.convert_ids_to_tokens(token_id))
        return b"" if symbol is None else self.bytes_of_symbol(symbol)

    def bytes_of_symbol(self, symbol: str) -> bytes:
        """Return the bytes of a token, given as the vocabulary writes it."""
        if found := BYTE.fullmatch(symbol):
            return bytes([int(found[1], 16)])
        letters = byte_letters()
        if self._has_byte_letters and all(letter in letters for letter in symbol):
            return bytes(letters[letter] for letter in symbol)
        return symbol.replace("\u2581", " ").encode()

    def text_of(self, token_id: int) -> str:
        r"""Return a token's text; a part of a character as OpenAI's API writes it: bytes:\xe2\x82."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@cache
def byte_letters() -> dict[str, int]:
    """Return the byte of each letter of a byte-level vocabulary.

    Printable bytes stand for themselves; the others, in order, are the letters from U+0100 on (GPT-2's table).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


class MinTokenCount:
    """Bounds the token count of texts from below, for one tokenizer; 0 if that may drop or join unknown characters."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._shares = np.zeros(256)  # of a token, that each byte needs at least
        composed = _composed(getattr(tokenizer, "backend_tokenizer", None))
        if composed is None or any(each.lstrip or each.rstrip for each in tokenizer.added_tokens_decoder.values()):
            return
        texts = TokenTexts(tokenizer)
        forms = {texts.bytes_of_symbol(symbol) for symbol in tokenizer.get_vocab()}
        forms |= {each.content.encode() for each in tokenizer.added_tokens_decoder.values()}
        left = set(range(256))
        for form in sorted(forms, key=len, reverse=True):
            found = left.intersection(form)
            self._shares[list(found)] = 1 / (composed * len(form)) if form else 0.0
            left -= found
        if unknown := _unknown_bytes(tokenizer):
            self._shares[unknown] = 0.0  # dropped, or all of them one token

    def __call__(self, text: str) -> int:
        """Return a lower bound of a text's tokens."""
        counts = np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256)  # (256,)
        return ceil(counts @ self._shares * (1 - 1e-9))


def _composed(backend: Any) -> int | None:
    """Return how many bytes of a text become at most one byte of tokens; None = any number."""
    if backend is None or type(backend.model).__name__ != "BPE":
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    steps = _steps(backend.pre_tokenizer, "pretokenizers")
    is_by_bytes = any(step["type"] == "ByteLevel" for step in steps)
    falls_back = backend.model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    if not (is_by_bytes or falls_back) or not all(map(_keeps_all, steps)):
        return None
    normalizers = _steps(backend.normalizer, "normalizers")
    if not all(_keeps_all(step) or step["type"] == "NFC" for step in normalizers):
        return None
    return MAX_COMPOSED_BYTES if any(step["type"] == "NFC" for step in normalizers) else 1


def _unknown_bytes(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the bytes that a byte-level vocabulary lacks; none if all fall back to bytes."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend.model.byte_fallback:
        return []
    vocabulary = tokenizer.get_vocab()
    return [byte for letter, byte in byte_letters().items() if letter not in vocabulary]


def _steps(component: Any, inner: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or a pre-tokenizer, as tokenizer.json has them."""
    if component is None:
        return []
    found = json.loads(component.__getstate__())
    return found[inner] if found["type"] == "Sequence" else [found]


def _keeps_all(step: dict[str, Any]) -> bool:
    """Return whether a step keeps every byte of a text; it may write a space as another letter."""
    kind = step["type"]
    if kind == "Replace":
        return step["pattern"] == {"String": " "} and step["content"] == "\u2581"
    if kind in ("Split", "Punctuation"):
        return step["behavior"] != "Removed"
    return kind in ("ByteLevel", "Metaspace", "Digits", "Prepend")
