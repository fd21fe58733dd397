"""The weights of every token of every request, decided where vLLM schedules: a pure function of text and options.

A stream remembers each decision with the position from which it holds. A preempted request that is computed again, a
prompt read in chunks, a batch of any make-up and another replica therefore see the same weights at the same position.
Nothing here imports vLLM.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from treadle.centroids import Floats
from treadle.params import RoutingParams
from treadle.routing import RunningText, decision_length, finish_views
from treadle.text import Detokenizer
from treadle.vllm_plugin.mixture import Mixture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_PARAMS = 1024
"""Different routing params that are remembered."""


@dataclass(frozen=True)
class Plan:
    """The gates of one step, for the workers: it travels with vLLM's scheduler output.

    Attributes:
        rows: (S, G, slots) float32 gates of each run of tokens.
        spans: request id -> (its first run, how many tokens each of its runs has).
    """

    rows: Floats
    spans: Mapping[str, tuple[int, tuple[int, ...]]]

    def in_order(self, request_ids: Sequence[str]) -> tuple[Floats, list[int]]:
        """Return the runs (S, G, slots) in the order of a worker's batch, and the tokens of each run."""
        order: list[int] = []
        counts: list[int] = []
        for request_id in request_ids:
            first, each = self.spans[request_id]
            order += range(first, first + len(each))
            counts += each
        rows = self.rows if order == list(range(len(self.rows))) else self.rows[order]
        return rows, counts


def keys_of(weights: Floats) -> list[bytes]:
    """Return what tells each of the weights (P, N) apart; b"" = no adapter acts."""
    whole, size = weights.tobytes(), weights.itemsize * weights.shape[1]
    acting = cast(list[bool], weights.any(1).tolist())
    return [whole[index * size : (index + 1) * size] if acting[index] else b"" for index in range(len(weights))]


class Stream:
    """One request: its text so far, and every decision that has been made on it."""

    def __init__(self, mixture: Mixture, params: RoutingParams, prompt_tokens: int, detokenizer: Detokenizer) -> None:
        self.mixture = mixture
        self.params = params
        self._prompt_tokens = prompt_tokens
        self._detokenizer = detokenizer
        self._pieces: list[str] = []
        self._starts: list[int] = []  # the first position of each decision
        self._gates: list[Floats] = []  # (G, slots) of each decision
        self._weights: list[Floats] = []  # (N,) of each decision
        self._keys: list[bytes] = []  # of each decision (`keys_of`)
        self._decided = 0  # positions that have weights
        self._running: RunningText | None = None
        if params.rule == "fixed":
            weights = mixture.router.fixed_weights(params)[None]
            self.settle([0], weights, mixture.gates(weights, params.combine), keys_of(weights))
        else:
            self._running = RunningText(mixture.router.embedder, params)

    @property
    def is_fixed(self) -> bool:
        """Whether the weights were given, so that no text is needed."""
        return self._running is None

    def pending(self, token_ids: Sequence[int], end: int) -> tuple[list[int], list[tuple[Any, ...]]]:
        """Read on to position `end` and return the decisions that are due, as first positions and views.

        Args:
            token_ids: of the request so far, at least `end`.
            end: the position behind the last one that needs weights.
        """
        running = self._running
        if running is None or end <= self._decided:
            return [], []
        if len(token_ids) < max(end, self._prompt_tokens):
            raise RuntimeError(
                f"weights of position {end - 1} are asked for, but only {len(token_ids)} tokens are known"
            )
        self._read(token_ids, max(end, self._prompt_tokens))
        starts: list[int] = []
        views: list[tuple[Any, ...]] = []
        for position in self._undecided(end):
            length = decision_length(position, self._prompt_tokens, self.params)
            view = running.decide(self._pieces, length, self._prompt_tokens)
            if view is not None:
                starts.append(position if self._starts or starts else 0)
                views.append(view)
            self._decided = position + 1
        return starts, views

    def _undecided(self, end: int) -> range:
        """Return the positions to decide, so that all below `end` have weights; a prompt is decided at its last."""
        if self._decided == 0 and self.params.prefill == "prompt":
            return range(self._prompt_tokens - 1, max(end, self._prompt_tokens))
        return range(self._decided, end)

    def _read(self, token_ids: Sequence[int], end: int) -> None:
        push, known = self._detokenizer.push, len(self._pieces)
        if end == known + 1:
            self._pieces.append(push(token_ids[known]))
        else:
            self._pieces += [push(token_id) for token_id in token_ids[known:end]]

    def settle(self, starts: Sequence[int], weights: Floats, gates: Floats, keys: Sequence[bytes]) -> None:
        """Take the weights (P, N), gates (P, G, slots) and keys of the decisions that were due."""
        self._starts.extend(starts)
        self._weights.extend(weights)  # of an array: its rows
        self._gates.extend(gates)
        self._keys.extend(keys)

    def _runs(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return (decision, tokens) of each run of positions under one decision."""
        first = bisect_right(self._starts, start) - 1
        if first == len(self._starts) - 1 or self._starts[first + 1] >= end:
            return [(first, end - start)]
        last = bisect_right(self._starts, end - 1) - 1
        edges = [start, *self._starts[first + 1 : last + 1], end]
        return [(first + index, after - before) for index, (before, after) in enumerate(pairwise(edges))]

    def gates(self, start: int, end: int) -> tuple[list[Floats], tuple[int, ...]]:
        """Return the gates (G, slots) of each run of some positions, and how many tokens each run has."""
        if start >= self._starts[-1]:
            return self._gates[-1:], (end - start,)
        runs = self._runs(start, end)
        return [self._gates[index] for index, _ in runs], tuple(count for _, count in runs)

    def weights(self, start: int, end: int) -> Floats:
        """Return the weights (T, N) of some positions."""
        runs = self._runs(start, end)
        return np.repeat(np.stack([self._weights[index] for index, _ in runs]), [count for _, count in runs], 0)

    def key(self, start: int, end: int) -> bytes | None:
        """Return what a block's hash must contain besides its tokens; None where no adapter acts on any of them."""
        runs = [(self._keys[index], count) for index, count in self._runs(start, end)]
        if not any(key for key, _ in runs):
            return None
        parts = [self.mixture.fingerprint.encode(), self.params.combine.encode()]
        return b"|".join([*parts, *(b"%d:%b" % (count, key) for key, count in runs)])


class Schedule:
    """Opens streams and gives them weights; the input thread and the scheduler may both call it."""

    def __init__(self, mixture: Mixture, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.mixture = mixture
        self._tokenizer = tokenizer
        self._lock = Lock()  # the embedder keeps what it has looked up
        self._params: dict[RoutingParams, RoutingParams] = {}  # equal ones once, so that their streams are one product
        self.decisions = 0
        self.seconds = 0.0  # spent on them

    def open(self, given: Any, prompt_tokens: int) -> Stream:
        """Return the stream of a new request; see `Mixture.read_request` for `given` and errors."""
        mixture = self.mixture
        params = mixture.read_request(given)
        if params.rule != "fixed":
            if len(self._params) >= MAX_PARAMS:
                self._params.clear()
            params = self._params.setdefault(params, params)
        return Stream(mixture, params, prompt_tokens, Detokenizer(self._tokenizer))

    def decide(self, needs: Sequence[tuple[Stream, Sequence[int], int]]) -> None:
        """Give weights to all positions below `end` of (stream, token ids, end); one product for those that are due."""
        if not needs:
            return
        started = perf_counter()
        with self._lock:
            due: dict[tuple[int, int], list[tuple[Stream, list[int], list[tuple[Any, ...]]]]] = {}
            for stream, token_ids, end in needs:
                starts, views = stream.pending(token_ids, end)
                if starts:
                    due.setdefault((id(stream.mixture), id(stream.params)), []).append((stream, starts, views))
            for group in due.values():
                first = group[0][0]
                router = first.mixture.router
                snapshots = [view for _, _, views in group for view in views]
                weights = router.weigh(finish_views(router.embedder, snapshots), first.params)  # (P, N)
                gates, keys = first.mixture.gates(weights, first.params.combine), keys_of(weights)
                self.decisions += len(weights)
                done = 0
                for stream, starts, _ in group:
                    end = done + len(starts)
                    stream.settle(starts, weights[done:end], gates[done:end], keys[done:end])
                    done = end
        self.seconds += perf_counter() - started

    def plan(self, scheduled: Sequence[tuple[str, Stream, Sequence[int], int, int]]) -> Plan:
        """Return the gates of one step, of (request id, stream, token ids, start, end) of each scheduled request."""
        self.decide([(stream, token_ids, end) for _, stream, token_ids, _, end in scheduled if not stream.is_fixed])
        rows: list[Floats] = []
        spans: dict[str, tuple[int, tuple[int, ...]]] = {}
        for request_id, stream, _, start, end in scheduled:
            gates, counts = stream.gates(start, end)
            spans[request_id] = (len(rows), counts)
            rows += gates
        shape = (0, self.mixture.num_gates, self.mixture.num_slots)
        return Plan(np.stack(rows) if rows else np.zeros(shape, np.float32), spans)
