"""The weights of every token of every request, decided where vLLM schedules: a pure function of text and options.

`treadle.serving.vllm.request_weights` remembers each decision with the position from which it holds. A preempted
request that is computed again, a prompt read in chunks, a batch of any make-up and another replica therefore see the
same weights at the same position. Prompts are followed one by one; the texts that a step continues, all together
(`treadle.serving.vllm.text_pool`). Nothing here imports vLLM.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from treadle.common.params import RoutingParams
from treadle.engine.chat import ChatText
from treadle.engine.tokenization import Detokenizer
from treadle.routing.centroids import Floats
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.running_sum import Tails
from treadle.routing.schedule import Seen, Views
from treadle.serving.vllm.mixture import Mixture
from treadle.serving.vllm.request_weights import RequestWeights, RoutingGroup, keys_of
from treadle.serving.vllm.text_pool import TextPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_PARAMS = 1024
"""Different routing params that are remembered."""


class Counts:
    """Counts decisions and generated tokens for vLLM's metrics, for the adapters that are there now.

    Attributes:
        decisions: how often weights were made from a text.
        seconds: the time spent on decisions.
        tokens: how many tokens were generated.
        base_tokens: how many of them no adapter acted on.
        weights: adapter -> the sum of its weights over generated tokens.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.decisions = 0
        self.seconds = 0.0
        self.tokens = 0
        self.base_tokens = 0
        self.weights = dict.fromkeys(names, 0.0)

    def rename(self, names: Sequence[str]) -> None:
        """Count for these adapters from now on; those that stay keep their sums."""
        self.weights = {name: self.weights.get(name, 0.0) for name in names}

    def add(self, names: Sequence[str], keys: Sequence[bytes]) -> None:
        """Count generated tokens by the keys of the weights under which they were made."""
        acting = [key for key in keys if key]
        self.tokens += len(keys)
        self.base_tokens += len(keys) - len(acting)
        if acting:
            weights = np.frombuffer(b"".join(acting), np.float32).reshape(-1, len(names))
            for name, weight in zip(names, cast(list[float], weights.sum(0, np.float64).tolist()), strict=True):
                if name in self.weights:  # a running request may still have one that has left
                    self.weights[name] += weight


@dataclass(frozen=True)
class Plan:
    """The gates of one step, for the workers: it travels with vLLM's scheduler output.

    Attributes:
        rows: (S, slots) float32 gates of each run of tokens.
        spans: request id -> (its first run, how many tokens each of its runs has).
    """

    rows: Floats
    spans: Mapping[str, tuple[int, tuple[int, ...]]]

    def in_order(self, request_ids: Sequence[str]) -> tuple[Floats, list[int]]:
        """Return the runs (S, slots) in the order of a worker's batch, and the tokens of each run."""
        order: list[int] = []
        counts: list[int] = []
        for request_id in request_ids:
            first, each = self.spans[request_id]
            order += range(first, first + len(each))
            counts += each
        rows = self.rows if order == list(range(len(self.rows))) else self.rows[order]
        return rows, counts


Need = tuple[RequestWeights, Sequence[int], int]
"""A request, its token ids so far, and the position below which it needs weights."""
OpenDecision = tuple[RequestWeights, int]
"""A request, and the first position of a decision."""


class Schedule:
    """Opens requests and gives them weights; the input thread and the scheduler may both call it."""

    def __init__(self, mixture: Mixture, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._mixture = mixture
        self._tokenizer = tokenizer
        self._lock = Lock()  # of all below; a request by itself belongs to one thread at a time
        self._groups: dict[RoutingParams, RoutingGroup] = {}  # requests of equal params share a product
        self._embedder = cast(StaticEmbedder, mixture.router.embedder)  # the bundle was checked
        self.request_type: type[RequestWeights] = RequestWeights
        self._pools: weakref.WeakValueDictionary[Tails, TextPool] = weakref.WeakValueDictionary()
        self.counts = Counts(mixture.names)

    @property
    def mixture(self) -> Mixture:
        """The adapters as they are now; requests that were opened before keep theirs."""
        return self._mixture

    @mixture.setter
    def mixture(self, mixture: Mixture) -> None:
        with self._lock:
            self._mixture, self._groups = mixture, {}
            self.counts.rename(mixture.names)

    def open(self, given: Any, prompt_tokens: int, contents: Sequence[str] | None = None) -> RequestWeights:
        """Return the weights of a new request, none decided yet; see `Mixture.read_request` for `given` and errors.

        `contents` are those of a chat's messages, which alone count of its prompt; None = the prompt is no chat.
        """
        with self._lock:
            group = RoutingGroup(self._mixture, self._mixture.read_request(given))
            if group.params.rule != "fixed":  # those need no product
                if len(self._groups) >= MAX_PARAMS:
                    self._groups.clear()
                group = self._groups.setdefault(group.params, group)
        chat = None
        if contents is not None and group.params.rule != "fixed":
            chat = ChatText.of(self._tokenizer, contents)
        return self.request_type(group, prompt_tokens, Detokenizer(self._tokenizer), chat)

    def decide(self, needs: Sequence[Need]) -> None:
        """Give weights to all positions that need them; one product for all requests of a group that are due.

        A prompt is read without the lock: it may be long, and no step shall wait for it. Until its request is handed to
        the scheduler, only the thread that opened it knows it; what requests share without the lock (the
        embedder's words, the tokenizer, the centroids) any thread may use.
        """
        needs = [need for need in needs if need[2] > need[0].decided]
        if not needs:
            return
        started, made = perf_counter(), 0
        while needs:
            alone: list[Need] = []
            together: dict[TextPool, list[Need]] = {}
            with self._lock:
                for need in needs:
                    pool = need[0].pool or self._joined(need[0])
                    (alone if pool is None else together.setdefault(pool, [])).append(need)
                made += sum(self._decide_together(pool, each) for pool, each in together.items())
            made += self._decide_alone(alone)
            needs = [need for need in needs if need[2] > need[0].decided]  # such as chunks of a text read again
        with self._lock:
            self.counts.decisions += made
            self.counts.seconds += perf_counter() - started

    def _joined(self, request: RequestWeights) -> TextPool | None:
        tails = request.pool_tails
        if tails is None:
            return None
        pool = self._pools.get(tails)
        if pool is None:
            pool = self._pools[tails] = TextPool(self._embedder, tails)
        request.join(pool)
        return pool

    def _decide_alone(self, needs: Sequence[Need]) -> int:
        """Decide all positions that prompts need, and texts seen in a window; return the number of decisions."""
        due: dict[RoutingGroup, tuple[list[OpenDecision], list[Views]]] = {}
        for request, token_ids, end in needs:
            for start, views in request.due(token_ids, end):
                places, all_views = due.setdefault(request.group, ([], []))
                places.append((request, start))
                all_views.append(views)
        for group, (places, views) in due.items():
            self._settle(group, places, group.mixture.router.finish(views))
        return sum(len(places) for places, _ in due.values())

    def _decide_together(self, pool: TextPool, needs: Sequence[Need]) -> int:
        """Decide the next position of each running text; return the number of decisions."""
        due: dict[RoutingGroup, tuple[list[OpenDecision], list[int]]] = {}
        rows: list[int] = []
        pieces: list[list[str]] = []
        for request, token_ids, _ in needs:
            start, news = request.next_in_pool(token_ids)
            if news:  # else no text has come since the decision that stands
                rows.append(request.row)
                pieces.append(news)
                places, group_rows = due.setdefault(request.group, ([], []))
                places.append((request, start))
                group_rows.append(request.row)
        if rows:
            pool.extend(rows, pieces)
        for group, (places, group_rows) in due.items():
            self._settle(group, places, Seen(pool.embeddings(group_rows), np.ones(len(group_rows), bool)))
        return len(rows)

    def _settle(self, group: RoutingGroup, places: Sequence[OpenDecision], seen: Seen) -> None:
        """Decide from the embedded texts of requests at their first positions."""
        weights = group.mixture.router.weigh(seen, group.params)  # (P, N)
        gates = group.mixture.gates(weights)  # (P, slots)
        for (request, start), key, each in zip(places, keys_of(weights), gates, strict=True):
            request.settle(start, key, each)

    def plan(self, scheduled: Sequence[tuple[str, RequestWeights, Sequence[int], int, int]]) -> Plan:
        """Return the gates of one step, of (id, request, token ids, start, end) of each scheduled request."""
        self.decide([(request, token_ids, end) for _, request, token_ids, _, end in scheduled])
        rows: list[Floats] = []
        spans: dict[str, tuple[int, tuple[int, ...]]] = {}
        made: dict[tuple[str, ...], list[bytes]] = {}  # adapters' names -> keys of the tokens that will be generated
        for request_id, request, token_ids, start, end in scheduled:
            gates, counts = request.gates(start, end)
            spans[request_id] = (len(rows), counts)
            rows += gates
            if end == len(token_ids):
                made.setdefault(request.mixture.names, []).append(request.newest_key)
        for names, keys in made.items():
            self.counts.add(names, keys)
        shape = (len(rows), self._mixture.num_slots)
        return Plan(np.concatenate(rows).reshape(shape) if rows else np.zeros(shape, np.float32), spans)
