"""The weights of one request's tokens: its text so far, and every decision that has been made on it.

A pure function of text and options: a decision is remembered with the position from which it holds. Nothing here
imports vLLM.
"""

import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np

from treadle.common.params import RoutingParams
from treadle.engine.chat import ChatText, prompt_cursor
from treadle.engine.tokenization import Detokenizer
from treadle.routing.centroids import Floats
from treadle.routing.running_sum import Tails
from treadle.routing.schedule import Decision, DecisionCursor, next_decision
from treadle.serving.vllm.mixture import Mixture
from treadle.serving.vllm.text_pool import TextPool


def keys_of(weights: Floats) -> list[bytes]:
    """Return a key of each of the weights (P, N); b"" = no adapter acts."""
    whole, size = weights.tobytes(), weights.itemsize * weights.shape[1]
    acting = cast(list[bool], weights.any(1).tolist())
    return [whole[index * size : (index + 1) * size] if acting[index] else b"" for index in range(len(weights))]


@dataclass(frozen=True, eq=False)
class RoutingGroup:
    """Requests that are decided together: the same adapters, the same params."""

    mixture: Mixture
    params: RoutingParams

    def weights_of(self, keys: Sequence[bytes]) -> Floats:
        """Return the weights (P, N) that keys stand for."""
        none = bytes(4 * len(self.mixture.names))
        return np.frombuffer(b"".join(key or none for key in keys), np.float32).reshape(len(keys), -1)

    def gates_of(self, keys: Sequence[bytes]) -> Floats:
        """Return the gates (P, slots) of the weights that keys stand for."""
        return self.mixture.gates(self.weights_of(keys))


class RequestWeights:
    """One request: its text so far, and every decision that has been made on it.

    A cursor follows the text through the prompt; then a pool of texts does, unless the text is seen in a window.

    Attributes:
        group: the adapters that there were when it was opened, and the params.
        decided: positions that have weights.
        pool: where the text is followed together with others, in `row`; None = its cursor follows it alone.
    """

    def __init__(
        self, group: RoutingGroup, prompt_tokens: int, detokenizer: Detokenizer, chat: ChatText | None = None
    ) -> None:
        self.group = group
        self.decided = 0
        self.pool: TextPool | None = None
        self.row = -1
        self._prompt_tokens = prompt_tokens
        self._push = detokenizer.push
        self._pushed = 0  # tokens that the detokenizer has seen
        self._chat = chat
        self._cursor: DecisionCursor | None = None  # from the first tokens to the first of the answer in a pool
        self._walk: Iterator[tuple[int, int, int]] = iter(())  # the decisions to come, in a pool
        self._starts: list[int] = []  # the first position of each decision
        self._keys: list[bytes] = []  # of each decision (`keys_of`)
        self._newest: Floats = np.zeros(0, np.float32)  # (slots,) of the newest decision
        if group.params.rule == "fixed":
            weights = group.mixture.router.fixed_weights(group.params)[None]
            self.settle(0, keys_of(weights)[0], group.mixture.gates(weights)[0])
            self.decided = next_decision(0, prompt_tokens, group.params)

    @property
    def mixture(self) -> Mixture:
        """The adapters that there were when it was opened."""
        return self.group.mixture

    @property
    def pool_tails(self) -> Tails | None:
        """The tails of a text in a pool; None = it is followed alone, like a prompt or window."""
        is_alone = self.decided < self._prompt_tokens or self.group.params.window is not None
        return None if is_alone else self.mixture.router.tails

    def due(self, token_ids: Sequence[int], end: int) -> list[Decision]:
        """Read on and return the decisions that the positions below `end` still need.

        Args:
            token_ids: of the request so far, at least `end`, and all of the prompt.
            end: the position after the last one that needs weights.
        """
        if self.decided >= end:
            return []
        if self._cursor is None:
            own, chat = self._read(token_ids, self._prompt_tokens), self._chat
            self._cursor = prompt_cursor(self.mixture.router, self.group.params, own, chat)
            self._chat = None
        cursor = self._cursor
        cursor.add(self._read(token_ids, cursor.tokens_needed(end)))
        found = cursor.decide(end)
        self.decided = cursor.decided
        return found

    def _read(self, token_ids: Sequence[int], length: int) -> list[str]:
        """Return the texts of the tokens up to `length` that have not been read."""
        if len(token_ids) < length:
            raise RuntimeError(f"weights need the text of {length} tokens, but only {len(token_ids)} tokens are known")
        known = self._pushed
        if length == known + 1:  # almost always
            self._pushed = length
            return [self._push(token_ids[known])]
        self._pushed = max(known, length)
        return [self._push(each) for each in token_ids[known:length]]

    def join(self, pool: TextPool) -> None:
        """Be followed together with others from now on."""
        assert self._cursor is not None
        text = self._cursor.sum
        assert text is not None  # the bundle's embedder was checked
        self.pool, self.row = pool, pool.adopt(text)
        self._walk = self._cursor.walk
        weakref.finalize(self, pool.release, self.row).atexit = False

    def next_in_pool(self, token_ids: Sequence[int]) -> tuple[int, list[str]]:
        """Count the next decision as made; return its first position, and the new text that it reads."""
        position, length, self.decided = next(self._walk)
        pieces = self._read(token_ids, length)
        if self._cursor is not None and pieces:  # the first of the answer: the cursor knows what the pool has not read
            self._cursor.add(pieces)
            pieces, self._cursor = self._cursor.unread(), None
        return position, pieces

    def settle(self, start: int, key: bytes, gates: Floats) -> None:
        """Take a decision: its first position, its key and its gates (slots,)."""
        self._starts.append(start)
        self._keys.append(key)
        self._newest = gates

    def _runs(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return (decision, tokens) of each run of positions under one decision."""
        first = bisect_right(self._starts, start) - 1
        if first == len(self._starts) - 1 or self._starts[first + 1] >= end:
            return [(first, end - start)]
        last = bisect_right(self._starts, end - 1) - 1
        edges = [start, *self._starts[first + 1 : last + 1], end]
        return [(first + index, after - before) for index, (before, after) in enumerate(pairwise(edges))]

    def gates(self, start: int, end: int) -> tuple[Sequence[Floats], tuple[int, ...]]:
        """Return the gates (slots,) of each run of some positions, and how many tokens each run has."""
        if start >= self._starts[-1]:
            return (self._newest,), (end - start,)
        runs = self._runs(start, end)
        return list(self.group.gates_of([self._keys[index] for index, _ in runs])), tuple(count for _, count in runs)

    def weights(self, start: int, end: int) -> Floats:
        """Return the weights (T, N) of some positions."""
        runs = self._runs(start, end)
        made = self.group.weights_of([self._keys[index] for index, _ in runs])
        return np.repeat(made, [count for _, count in runs], 0)

    @property
    def newest_key(self) -> bytes:
        """Return the key of the newest weights; b"" = no adapter acts."""
        return self._keys[-1]

    def key(self, start: int, end: int) -> bytes | None:
        """Return a block's part of the hash besides its tokens; None where no adapter acts."""
        runs = [(self._keys[index], count) for index, count in self._runs(start, end)]
        if not any(key for key, _ in runs):
            return None
        fingerprint = self.mixture.fingerprint.encode()
        return b"|".join([fingerprint, *(b"%d:%b" % (count, key) for key, count in runs)])
