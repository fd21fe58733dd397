"""The weights of one request's tokens: its text so far, and every decision that has been made on it.

A pure function of text and options: a decision is remembered with the position from which it holds. Nothing here
imports vLLM.
"""

import weakref
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np

from treadle.common.params import RoutingParams
from treadle.engine.chat import BLANK_LINE, ChatText
from treadle.engine.tokenization import Detokenizer
from treadle.routing.centroids import Floats
from treadle.routing.embedder import StaticTrack
from treadle.routing.router import RunningText, decision_length, next_decision, num_pieces
from treadle.serving.vllm.mixture import Mixture
from treadle.serving.vllm.texts import MOST_ROOM, Texts


def keys_of(weights: Floats) -> list[bytes]:
    """Return what tells each of the weights (P, N) apart; b"" = no adapter acts."""
    whole, size = weights.tobytes(), weights.itemsize * weights.shape[1]
    acting = cast(list[bool], weights.any(1).tolist())
    return [whole[index * size : (index + 1) * size] if acting[index] else b"" for index in range(len(weights))]


@dataclass(frozen=True, eq=False)
class RoutingGroup:
    """Streams that are decided together: the same adapters, the same params."""

    mixture: Mixture
    params: RoutingParams

    def weights_of(self, keys: Sequence[bytes]) -> Floats:
        """Return the weights (P, N) that keys stand for."""
        none = bytes(4 * len(self.mixture.names))
        return np.frombuffer(b"".join(key or none for key in keys), np.float32).reshape(len(keys), -1)

    def gates_of(self, keys: Sequence[bytes]) -> Floats:
        """Return the gates (P, slots) of the weights that keys stand for."""
        return self.mixture.gates(self.weights_of(keys))


class Stream:
    """One request: its text so far, and every decision that has been made on it."""

    def __init__(
        self, group: RoutingGroup, prompt_tokens: int, detokenizer: Detokenizer, chat: ChatText | None = None
    ) -> None:
        self.group = group
        self.decided = 0  # positions that have weights
        self.texts: Texts | None = None  # where it is followed together with others, in `row`
        self.row = -1
        self._prompt_tokens = prompt_tokens
        self._push = detokenizer.push
        self._every = group.params.every or 0  # tokens between two decisions; 0 = the prompt's is the only one
        self._behind = group.params.lag * self._every  # tokens that a decision comes late
        self._pieces: list[str] = []
        self._length = 0  # tokens that have been read
        self._pushed = 0  # tokens that the detokenizer has seen: at once all of a chat's prompt
        self._chat = chat
        self._ends: list[int] | None = None  # of a chat, how many pieces each token of its prompt has read
        self._between = "" if chat is None else BLANK_LINE  # before the answer
        self._starts: list[int] = []  # the first position of each decision
        self._keys: list[bytes] = []  # of each decision (`keys_of`)
        self._newest: Floats = np.zeros(0, np.float32)  # (slots,) of the newest decision
        self._running: RunningText | None = None
        if group.params.rule == "fixed":
            weights = group.mixture.router.fixed_weights(group.params)[None]
            self.settle(0, keys_of(weights)[0], group.mixture.gates(weights)[0])
            self.decided = next_decision(0, prompt_tokens, group.params)
        else:
            self._running = RunningText(group.mixture.router, group.params)

    @property
    def mixture(self) -> Mixture:
        """The adapters that there were when it was opened."""
        return self.group.mixture

    def pending(self, token_ids: Sequence[int], end: int) -> tuple[list[int], list[tuple[Any, ...]]]:
        """Read on to position `end` and return the decisions that are due, as first positions and views.

        Args:
            token_ids: of the request so far, at least `end`.
            end: the position behind the last one that needs weights.
        """
        starts: list[int] = []
        views: list[tuple[Any, ...]] = []
        while self._running is not None and self.decided < end:
            position, pieces = self._follow(token_ids)
            self._pieces += pieces
            length, prompt = (num_pieces(tokens, self._ends) for tokens in (self._length, self._prompt_tokens))
            view = self._running.decide(self._pieces, length, prompt)
            if view is not None:
                starts.append(position if self._starts or starts else 0)
                views.append(view)
        return starts, views

    def _follow(self, token_ids: Sequence[int]) -> tuple[int, list[str]]:
        """Count the next position that has no weights as decided; return it, and the texts of the tokens to read."""
        position, params = self.decided, self.group.params
        if position == 0 and params.prefill == "prompt":
            position = self._prompt_tokens - 1  # a prompt is decided at its last token
        length = decision_length(position, self._prompt_tokens, params)
        pieces = self._read(token_ids, length, position)
        self.decided = next_decision(position, self._prompt_tokens, params)
        return position, pieces

    def _read(self, token_ids: Sequence[int], length: int, position: int) -> list[str]:
        """Return the texts of the tokens up to `length`, by which the weights at `position` are decided."""
        if len(token_ids) < length:
            raise RuntimeError(
                f"weights of position {position} are asked for, but only {len(token_ids)} tokens are known"
            )
        if self._between:
            return self._read_chat(token_ids, length)
        known, push = self._pushed, self._push
        self._length = self._pushed = length
        if length == known + 1:  # almost always
            return [push(token_ids[known])]
        return [push(each) for each in token_ids[known:length]]

    def _read_chat(self, token_ids: Sequence[int], length: int) -> list[str]:
        """Do what `_read` does, up to the first token of the answer of a chat."""
        self._length = length
        if self._chat is not None:
            own = [self._push(each) for each in token_ids[: self._prompt_tokens]]
            self._pieces = list(self._chat.pieces)
            self._ends, self._pushed, self._chat = self._chat.ends(own, self.group.params), self._prompt_tokens, None
        if length <= self._prompt_tokens:
            return []
        before, self._between = self._between, ""
        first, *others = self._read(token_ids, length, length - 1)
        return [before + first, *others]

    def follow_on(self, token_ids: Sequence[int]) -> tuple[int, list[str]]:
        """Do what `_follow` does, where the prompt is decided: decisions then are `every` tokens apart."""
        position = self.decided
        pieces = self._read(token_ids, position + 1 - self._behind, position)
        self.decided = position + self._every
        return position, pieces

    def spans(self) -> tuple[int | None, ...] | None:
        """Return what the views of the running text look at; None = it has to be followed alone, as a prompt is."""
        running = self._running
        if running is None or self.decided < self._prompt_tokens or Texts.room_of(running.spans) > MOST_ROOM:
            return None
        return running.spans

    def join(self, texts: Texts) -> None:
        """Be followed together with others from now on."""
        assert self._running is not None
        track = self._running.longest
        assert isinstance(track, StaticTrack)  # the bundle's embedder was checked
        self.texts, self.row = texts, texts.adopt(track.state())
        self._running, self._pieces = None, []
        weakref.finalize(self, texts.release, self.row).atexit = False

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
        """Return what tells the newest weights apart; b"" = no adapter acts."""
        return self._keys[-1]

    def key(self, start: int, end: int) -> bytes | None:
        """Return what a block's hash must contain besides its tokens; None where no adapter acts on any of them."""
        runs = [(self._keys[index], count) for index, count in self._runs(start, end)]
        if not any(key for key, _ in runs):
            return None
        fingerprint = self.mixture.fingerprint.encode()
        return b"|".join([fingerprint, *(b"%d:%b" % (count, key) for key, count in runs)])
