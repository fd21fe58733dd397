"""API keys: compared in constant time, and each may be limited to some adapters."""

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from treadle.common.documents import read_text
from treadle.common.errors import OptionError, problem_list
from treadle.serving.openai.params import ServeParams

KEY_ID_LENGTH = 8
"""The characters of a key's hash by which the log names the key."""
MAX_KEY_FILE_BYTES = 16 << 20
"""The most bytes of a key file."""
COMMENT = re.compile(r"(^|\s)#.*")


@dataclass(frozen=True)
class Caller:
    """The sender of a request.

    Attributes:
        id: names the caller in logs, and keeps its cached prefixes apart from others'; never the key itself.
        adapters: names of the adapters it may use; None = all.
        is_admin: whether it may add and remove adapters.
    """

    id: str = ""
    adapters: frozenset[str] | None = None
    is_admin: bool = False


class Keyring:
    """The keys of a server; without any, everybody may generate and nobody is an admin."""

    def __init__(self, params: ServeParams) -> None:
        """Read the key file, if there is one; an OptionError lists all its problems."""
        self._callers: list[tuple[bytes, Caller]] = []
        for key in params.api_key:
            self._add(key, None)
        if params.api_key_file is not None:
            taken = dict.fromkeys(params.api_key, "--api-key")
            if params.admin_key is not None:
                taken[params.admin_key] = "--admin-key"
            for key, adapters in read_keys(Path(params.api_key_file), taken):
                self._add(key, adapters)
        self.is_open = not self._callers
        if params.admin_key is not None:
            self._add(params.admin_key, None, is_admin=True)

    @property
    def adapters(self) -> frozenset[str]:
        """The adapters that some key is limited to; they need not be loaded."""
        return frozenset[str]().union(*(caller.adapters or () for _, caller in self._callers))

    def _add(self, key: str, adapters: frozenset[str] | None, is_admin: bool = False) -> None:
        digest = hashlib.sha256(key.encode()).digest()
        self._callers.append((digest, Caller(digest.hex()[:KEY_ID_LENGTH], adapters, is_admin)))

    def caller(self, authorization: str | None) -> Caller | None:
        """Return the caller of the header `Authorization`, None if no key fits; every key is compared."""
        key = re.fullmatch(r"[Bb]earer +(\S+) *", authorization or "")
        found: Caller | None = Caller() if self.is_open else None
        if key:
            digest = hashlib.sha256(key[1].encode("utf-8", "surrogateescape")).digest()
            for expected, caller in self._callers:
                if hmac.compare_digest(digest, expected):
                    found = caller
        return found


def read_keys(file: Path, taken: Mapping[str, str] | None = None) -> list[tuple[str, frozenset[str] | None]]:
    """Return the keys of a file, one a line, each with its adapters or None for all.

    A `#` at the beginning of a line or after a space begins a comment.

    Args:
        file: text in UTF-8.
        taken: keys that another option gives, with the name of that option.

    Raises:
        OptionError: lists the lines that cannot be read, and keys that are given twice.
    """
    taken = taken or {}
    try:
        lines = read_text(file, OptionError, MAX_KEY_FILE_BYTES).splitlines()
    except OptionError as error:
        raise OptionError(f"api_key_file {error}") from error
    entries = [(number, words) for number, line in enumerate(lines, 1) if (words := COMMENT.sub("", line).split())]
    problems = [f"line {number}: expected KEY, or KEY ADAPTER,ADAPTER" for number, words in entries if len(words) > 2]
    keys = [words[0] for _, words in entries]
    problems += [f"line {n}: the key is given twice" for i, (n, words) in enumerate(entries) if words[0] in keys[:i]]
    problems += [f"line {n}: the key is given by {taken[w[0]]} too; give it once" for n, w in entries if w[0] in taken]
    if problems or not keys:
        raise OptionError(problem_list(f"api_key_file {str(file)!r}:", problems or ["it holds no key"]))
    return [(words[0], _names(words[1:])) for _, words in entries]


def _names(words: Sequence[str]) -> frozenset[str] | None:
    return frozenset(name for name in words[0].split(",") if name) if words else None
