"""The weights of every token of every request, decided where vLLM schedules: a pure function of text and options.

A stream remembers each decision with the position from which it holds. A preempted request that is computed again, a
prompt read in chunks, a batch of any make-up and another replica therefore see the same weights at the same position.
Prompts are followed one by one; the texts that a step continues, all together (`treadle.vllm_plugin.texts`). Nothing
here imports vLLM.
"""

import weakref
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from treadle.centroids import Floats
from treadle.embed import StaticEmbedder, StaticTrack
from treadle.params import RoutingParams
from treadle.routing import RunningText, decision_length, finish_views, next_decision
from treadle.text import Detokenizer
from treadle.vllm_plugin.counts import Counts
from treadle.vllm_plugin.mixture import Mixture
from treadle.vllm_plugin.texts import MOST_ROOM, Texts, Words

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


@dataclass(frozen=True, eq=False)
class Kind:
    """Streams that are decided together: the same adapters, the same params."""

    mixture: Mixture
    params: RoutingParams

    def weights_of(self, keys: Sequence[bytes]) -> Floats:
        """Return the weights (P, N) that keys stand for."""
        none = bytes(4 * len(self.mixture.names))
        return np.frombuffer(b"".join(key or none for key in keys), np.float32).reshape(len(keys), -1)

    def gates_of(self, keys: Sequence[bytes]) -> Floats:
        """Return the gates (P, G, slots) of the weights that keys stand for."""
        return self.mixture.gates(self.weights_of(keys), self.params.combine)


class Stream:
    """One request: its text so far, and every decision that has been made on it."""

    def __init__(self, kind: Kind, prompt_tokens: int, detokenizer: Detokenizer) -> None:
        self.kind = kind
        self.decided = 0  # positions that have weights
        self.texts: Texts | None = None  # where it is followed together with others, in `row`
        self.row = -1
        self._prompt_tokens = prompt_tokens
        self._push = detokenizer.push
        self._every = kind.params.every or 0  # tokens between two decisions; 0 = the prompt's is the only one
        self._behind = kind.params.lag * self._every  # tokens that a decision comes late
        self._pieces: list[str] = []
        self._length = 0  # tokens that have been read
        self._starts: list[int] = []  # the first position of each decision
        self._keys: list[bytes] = []  # of each decision (`keys_of`)
        self._newest: Floats = np.zeros(0, np.float32)  # (G, slots) of the newest decision
        self._running: RunningText | None = None
        if kind.params.rule == "fixed":
            weights = kind.mixture.router.fixed_weights(kind.params)[None]
            self.settle(0, keys_of(weights)[0], kind.mixture.gates(weights, kind.params.combine)[0])
            self.decided = next_decision(0, prompt_tokens, kind.params)
        else:
            self._running = RunningText(kind.mixture.router, kind.params)

    @property
    def mixture(self) -> Mixture:
        """The adapters that there were when it was opened."""
        return self.kind.mixture

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
            view = self._running.decide(self._pieces, self._length, self._prompt_tokens)
            if view is not None:
                starts.append(position if self._starts or starts else 0)
                views.append(view)
        return starts, views

    def _follow(self, token_ids: Sequence[int]) -> tuple[int, list[str]]:
        """Count the next position that has no weights as decided; return it, and the texts of the tokens to read."""
        position, params = self.decided, self.kind.params
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
        known, push = self._length, self._push
        self._length = length
        if length == known + 1:  # almost always
            return [push(token_ids[known])]
        return [push(each) for each in token_ids[known:length]]

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
        """Take a decision: its first position, its key and its gates (G, slots)."""
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
        """Return the gates (G, slots) of each run of some positions, and how many tokens each run has."""
        if start >= self._starts[-1]:
            return (self._newest,), (end - start,)
        runs = self._runs(start, end)
        return list(self.kind.gates_of([self._keys[index] for index, _ in runs])), tuple(count for _, count in runs)

    def weights(self, start: int, end: int) -> Floats:
        """Return the weights (T, N) of some positions."""
        runs = self._runs(start, end)
        made = self.kind.weights_of([self._keys[index] for index, _ in runs])
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
        parts = [self.mixture.fingerprint.encode(), self.kind.params.combine.encode()]
        return b"|".join([*parts, *(b"%d:%b" % (count, key) for key, count in runs)])


Need = tuple[Stream, Sequence[int], int]
"""A stream, its token ids so far, and the position below which it needs weights."""


class Schedule:
    """Opens streams and gives them weights; the input thread and the scheduler may both call it."""

    def __init__(self, mixture: Mixture, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._mixture = mixture
        self._tokenizer = tokenizer
        self._lock = Lock()  # of all below
        self._kinds: dict[RoutingParams, Kind] = {}  # equal params once, so that their streams are one product
        self._words = Words(cast(StaticEmbedder, mixture.router.embedder))
        self._texts: weakref.WeakValueDictionary[tuple[int | None, ...], Texts] = weakref.WeakValueDictionary()
        self.counts = Counts(mixture.names)

    @property
    def mixture(self) -> Mixture:
        """The adapters as they are now; streams that were opened before keep theirs."""
        return self._mixture

    @mixture.setter
    def mixture(self, mixture: Mixture) -> None:
        with self._lock:
            self._mixture, self._kinds = mixture, {}
            self.counts.rename(mixture.names)

    def open(self, given: Any, prompt_tokens: int) -> Stream:
        """Return the stream of a new request; see `Mixture.read_request` for `given` and errors."""
        with self._lock:
            kind = Kind(self._mixture, self._mixture.read_request(given))
            if kind.params.rule != "fixed":  # those need no product
                if len(self._kinds) >= MAX_PARAMS:
                    self._kinds.clear()
                kind = self._kinds.setdefault(kind.params, kind)
        return Stream(kind, prompt_tokens, Detokenizer(self._tokenizer))

    def decide(self, needs: Sequence[Need]) -> None:
        """Give weights to all positions that need them; one product for all streams of a kind that are due."""
        needs = [need for need in needs if need[2] > need[0].decided]
        if not needs:
            return
        started = perf_counter()
        with self._lock:
            while needs:
                alone: list[Need] = []
                together: dict[Texts, list[Need]] = {}
                for need in needs:
                    texts = need[0].texts or self._joined(need[0])
                    (alone if texts is None else together.setdefault(texts, [])).append(need)
                self._decide_alone(alone)
                for texts, each in together.items():
                    self._decide_together(texts, each)
                needs = [need for need in needs if need[2] > need[0].decided]  # such as chunks of a text read again
            self.counts.seconds += perf_counter() - started

    def _joined(self, stream: Stream) -> Texts | None:
        spans = stream.spans()
        if spans is None:
            return None
        texts = self._texts.get(spans)
        if texts is None:
            texts = self._texts[spans] = Texts(self._words, spans)
        stream.join(texts)
        return texts

    def _decide_alone(self, needs: Sequence[Need]) -> None:
        """Decide all positions that prompts need, and texts with a long window."""
        due: dict[Kind, tuple[list[tuple[Stream, int]], list[tuple[Any, ...]]]] = {}
        for stream, token_ids, end in needs:
            starts, views = stream.pending(token_ids, end)
            if starts:
                places, all_views = due.setdefault(stream.kind, ([], []))
                places += [(stream, start) for start in starts]
                all_views += views
        for kind, (places, views) in due.items():
            self._settle(kind, places, finish_views(kind.mixture.router.embedder, views))

    def _decide_together(self, texts: Texts, needs: Sequence[Need]) -> None:
        """Decide the next position of each running text."""
        due: dict[Kind, tuple[list[tuple[Stream, int]], list[int]]] = {}
        rows: list[int] = []
        pieces: list[list[str]] = []
        for stream, token_ids, _ in needs:
            start, news = stream.follow_on(token_ids)
            if news:  # else it comes late, and was made from just as many tokens
                rows.append(stream.row)
                pieces.append(news)
                places, kind_rows = due.setdefault(stream.kind, ([], []))
                places.append((stream, start))
                kind_rows.append(stream.row)
        if rows:
            texts.extend(rows, pieces)
        for kind, (places, kind_rows) in due.items():
            self._settle(kind, places, texts.embeddings(kind_rows))

    def _settle(self, kind: Kind, places: Sequence[tuple[Stream, int]], embeddings: Floats) -> None:
        """Decide from the embeddings (P, K, D) of streams at their first positions."""
        weights = kind.mixture.router.weigh(embeddings, kind.params)  # (P, N)
        gates = kind.mixture.gates(weights, kind.params.combine)  # (P, G, slots)
        self.counts.decisions += len(weights)
        for (stream, start), key, each in zip(places, keys_of(weights), gates, strict=True):
            stream.settle(start, key, each)

    def plan(self, scheduled: Sequence[tuple[str, Stream, Sequence[int], int, int]]) -> Plan:
        """Return the gates of one step, of (request id, stream, token ids, start, end) of each scheduled request."""
        self.decide([(stream, token_ids, end) for _, stream, token_ids, _, end in scheduled])
        rows: list[Floats] = []
        spans: dict[str, tuple[int, tuple[int, ...]]] = {}
        made: dict[tuple[str, ...], list[bytes]] = {}  # adapters' names -> keys of the tokens that will be generated
        for request_id, stream, token_ids, start, end in scheduled:
            gates, counts = stream.gates(start, end)
            spans[request_id] = (len(rows), counts)
            rows += gates
            if end == len(token_ids):
                made.setdefault(stream.mixture.names, []).append(stream.newest_key)
        for names, keys in made.items():
            self.counts.add(names, keys)
        shape = (len(rows), self._mixture.num_gates, self._mixture.num_slots)
        return Plan(np.concatenate(rows).reshape(shape) if rows else np.zeros(shape, np.float32), spans)
