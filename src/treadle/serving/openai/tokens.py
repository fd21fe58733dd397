"""Single tokens as the log-probabilities of OpenAI's API show them: a text, and the bytes behind it."""

import re
from functools import cache
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How sentencepiece writes a token that is one byte."""


class TokenTexts:
    """Texts and bytes of a tokenizer's tokens; no two tokens of a place have the same text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        decoder = str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
        self._has_byte_letters = "ByteLevel" in decoder

    def bytes_of(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that a token stands for, which may be a part of a character.

        Models have more rows in their vocabulary than the tokenizer has tokens: such an id stands for no bytes.
        """
        symbol = cast(str | None, self._tokenizer.convert_ids_to_tokens(token_id))
        return b"" if symbol is None else self.bytes_of_symbol(symbol)

    def bytes_of_symbol(self, symbol: str) -> bytes:
        """Return the bytes of a token as the vocabulary writes it."""
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
    """Return which byte each letter of a byte-level vocabulary stands for.

    Printable bytes stand for themselves; the others, in order, are the letters from U+0100 on (GPT-2's table).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
