"""One sequence while it is generated: its tokens, its options, and the weights of its next forward pass.

Routing, sampling and adapters are data of the row and never state of the model; `treadle.engine.batch` runs rows
together.
"""

import traceback
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch

from treadle.common.errors import TreadleError, reason_of
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.chat import TokenPrompt, prompt_cursor, token_prompt
from treadle.engine.tokenization import Detokenizer, StopStrings, stop_ids
from treadle.routing.centroids import Floats
from treadle.routing.embedder import Embedder
from treadle.routing.router import Comparison, Router
from treadle.routing.schedule import Views

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_ROUTED = "its text cannot be routed"
Found = TypeVar("Found")
FinishReason = Literal["stop", "length"]
Likeliest = tuple[tuple[int, float], ...]
"""The most probable tokens at one place, the most probable first: (token id, log-probability in nats)."""


@dataclass(frozen=True)
class OutputOptions:
    """Output beyond a row's tokens. Each part costs a little and is off unless asked for.

    Attributes:
        likeliest: how many of the most probable tokens come with each token.
        prompt: whether the prompt's own tokens are scored as they are read.
        comparison: whether each token says how near the text was to each adapter.
    """

    likeliest: int = 0
    prompt: bool = False
    comparison: bool = False


@dataclass(frozen=True)
class TokenScore:
    """How probable a token of the prompt was: its log-probability (nats), and the likeliest tokens in its place."""

    logprob: float
    likeliest: Likeliest = ()


@dataclass(frozen=True)
class TokenEvent:
    """One generated token.

    Attributes:
        index: 0 for the first generated token of the row.
        token_id: of the base model's vocabulary.
        text: what it adds to the text, safe to print; may be "" (inside a character, or what may begin a stop string).
        logprob: of the token under the blended model, in nats.
        weights: (N,) under which the forward pass ran that gave the token.
        finish_reason: "stop" (end of text or a stop string) or "length" on a row's last token, else None.
        likeliest: as many of the most probable tokens as the row's report asks for.
        comparison: what `weights` were made from, if the row's report asks for it; None where they are fixed.
    """

    index: int
    token_id: int
    text: str
    logprob: float
    weights: Floats
    finish_reason: FinishReason | None = None
    likeliest: Likeliest = ()
    comparison: Comparison | None = None


class SequenceError(TreadleError):
    """Ends a row that cannot be computed; `__cause__` is the error of its pass or routing."""

    @classmethod
    def of(cls, what: str, error: Exception) -> "SequenceError":
        """Return the error of a row for which `what` happened: what was raised becomes its cause."""
        traceback.clear_frames(error.__traceback__)  # they hold what has been computed so far
        failure = cls(f"{what}: {reason_of(error)}")
        failure.__cause__ = error
        return failure


class TokenSequence:
    """One sequence: its tokens so far, its options, and the weights that its next forward pass uses."""

    def __init__(
        self,
        prompt: Sequence[int] | TokenPrompt,
        router: Router,
        routing: RoutingParams,
        sampling: SamplingParams,
        tokenizer: "PreTrainedTokenizerBase",
        report: OutputOptions | None = None,
    ) -> None:
        prompt = token_prompt(prompt)
        self.ids = list(prompt.ids)  # prompt and generated tokens
        self.prompt_tokens = len(self.ids)
        self.router = router  # as it was when the row started: adapters that come and go later do not matter
        self.routing = routing
        self.sampling = sampling
        self.report = report or OutputOptions()
        self.owner = ""  # rows of one owner alone share what they have read (`treadle.engine.prefix_cache`)
        self.num_read = 0  # tokens whose keys and values are in a batch's cache
        self.reused = 0  # tokens of the prompt whose keys and values were there already
        self.generator: torch.Generator | None = None
        self.events: list[TokenEvent] = []
        self.failure: SequenceError | None = None
        self.prompt_scores: list[TokenScore] = []  # of the prompt's second token and those behind it
        self.weights: Floats = np.zeros(len(router.names), np.float32)  # (N,)
        self.read_under: Floats = self.weights[None]  # (T, N) or (1, N) for all T alike, of the pass over the prompt
        self.comparison: Comparison | None = None  # what `weights` were made from, if the report asks for it
        self.read_after: Comparison | None = None  # what `read_under` was made from, if the report asks for it
        self._text = Detokenizer(tokenizer)
        self._stops = StopStrings(sampling.stop)
        self._stop_ids = stop_ids(tokenizer, sampling)
        self.prompt_pieces = [self._text.push(token_id) for token_id in self.ids]  # what each token of it adds
        # a decision that takes effect late is embedded at once, beside the model
        self.cursor = prompt_cursor(router, replace(routing, lag=0), self.prompt_pieces, prompt.chat)
        self.ahead: Ahead | None = None  # what decides next, if that takes effect a decision late

    @property
    def most_tokens(self) -> int:
        """How many tokens the row can have in a cache: prompt and answer but the last, which no pass reads."""
        return self.prompt_tokens + self.sampling.max_tokens - 1

    @property
    def is_finished(self) -> bool:
        """Whether the row's last token has been generated, or none can be."""
        return self.failure is not None or (bool(self.events) and self.events[-1].finish_reason is not None)

    @property
    def is_like_prompt(self) -> bool:
        """Whether all tokens were read as a later prompt could read them; a prompt that is weighed whole is alike."""
        if self.routing.past == "recompute":
            return False
        same = self.read_under[0]
        return self.routing.prefill == "causal" or all((event.weights == same).all() for event in self.events)

    def newest_views(self) -> Views | None:
        """Return the views of the newest decision, for the embedder; None = it is made."""
        return self.cursor.decide_last(len(self.ids))

    @property
    def is_late(self) -> bool:
        """Whether the newest decision takes effect when the next one is due."""
        return self.routing.lag > 0 and len(self.ids) > self.prompt_tokens

    def prompt_weights(self) -> Floats:
        """Return the weights (T, N), or (1, N) for all T, of a pass over all tokens so far."""
        if self.routing.prefill == "causal":
            text = self.cursor
            return self.router.trace(text.pieces, self.prompt_tokens, self.routing, ends=text.ends)
        return self.weights[None]

    def weights_again(self) -> Floats:
        """Return the weights (T, N) under which each token so far was read, and the newest will be."""
        if self.routing.past == "recompute":
            return self.prompt_weights()
        prompt = np.broadcast_to(self.read_under, (self.prompt_tokens, len(self.router.names)))
        return np.concatenate([prompt, *(event.weights[None] for event in self.events[1:]), self.weights[None]])

    def prompt_comparison(self) -> Comparison | None:
        """Return the comparison behind `prompt_weights`, each (T, N) or (1, N); None where they are fixed."""
        if self.routing.prefill == "causal":
            text = self.cursor
            return self.router.trace_comparison(text.pieces, self.prompt_tokens, self.routing, ends=text.ends)
        made_from = self.comparison
        return made_from and Comparison(made_from.cosines[None], made_from.scores[None])

    def accept(self, token_id: int, logprob: float, is_end: bool, likeliest: Likeliest = ()) -> TokenEvent:
        """Append a generated token and return its event."""
        self.ids.append(token_id)
        is_end = is_end or token_id in self._stop_ids
        piece = "" if is_end else self._text.push(token_id)
        self.cursor.add([piece])
        text = self._stops.push(piece)
        reason: FinishReason | None = None
        if is_end or self._stops.found:
            reason = "stop"
        elif len(self.events) + 1 == self.sampling.max_tokens:
            reason = "length"
        if reason and not self._stops.found:
            text += self._stops.push(self._text.flush())
            text += self._stops.flush()
        weights = self.weights.copy()
        event = TokenEvent(len(self.events), token_id, text, logprob, weights, reason, likeliest, self.comparison)
        self.events.append(event)
        return event


@dataclass(frozen=True)
class Ahead:
    """The embeddings (sum of K, D) of late decisions, and the part that is a row's."""

    embeddings: "Future[Floats]"
    rows: slice
    embedder: Embedder
    views: Views

    def get(self) -> Floats:
        """Return the row's own (K, D), when they are there."""
        try:
            return self.embeddings.result()[self.rows]
        except Exception:  # other rows' texts may be to blame
            return self.embedder.finish(list(self.views))


RowViews = list[tuple[TokenSequence, Views]]
"""The views of each row's text, before they are embedded."""
Seen = list[tuple[TokenSequence, Floats]]
"""The views (K, D) of each row's text."""


def update_weights(rows: Sequence[TokenSequence]) -> tuple[list[TokenSequence], dict[TokenSequence, SequenceError]]:
    """Give new weights to the rows that are due; return these, and the errors of those that cannot be weighed.

    Each embedder is called once for all its rows, and rows with the same router and options are weighed together. What
    takes effect late is embedded by a thread of its own, while the model runs.
    """
    due: RowViews = []
    late: RowViews = []
    seen: Seen = []
    fixed: list[TokenSequence] = []
    lost: dict[TokenSequence, SequenceError] = {}
    for row in rows:
        try:
            views = row.newest_views()
            if views is None:
                continue
            if row.routing.rule == "fixed":
                row.weights = row.router.fixed_weights(row.routing)
                fixed.append(row)
            elif row.is_late:
                seen += [(row, row.ahead.get())] if row.ahead else []
                late.append((row, views))
            else:
                due.append((row, views))
        except Exception as error:  # whatever an embedder or a tokenizer raises: it must cost no other row
            lost[row] = SequenceError.of(NOT_ROUTED, error)
    for pairs in _grouped(late, lambda row: id(row.router.embedder)):
        _embed_beside(pairs)
    for pairs in _grouped(due, lambda row: id(row.router.embedder)):
        seen += _together(pairs, _embed, lost)
    weighed: Seen = []
    for group in _grouped(seen, lambda row: (id(row.router), row.routing)):
        weighed += _together(group, _weigh, lost)
    return [*fixed, *(row for row, _ in weighed)], lost


def _grouped(
    pairs: list[tuple[TokenSequence, Found]], key: Callable[[TokenSequence], Hashable]
) -> list[list[tuple[TokenSequence, Found]]]:
    """Return pairs in groups whose rows have the same key."""
    groups: dict[Hashable, list[tuple[TokenSequence, Found]]] = {}
    for pair in pairs:
        groups.setdefault(key(pair[0]), []).append(pair)
    return list(groups.values())


def _together(
    pairs: list[tuple[TokenSequence, Found]],
    run: Callable[[list[tuple[TokenSequence, Found]]], Seen],
    lost: dict[TokenSequence, SequenceError],
) -> Seen:
    """Run on rows together, and where that fails on each alone; rows that fail alone are `lost`."""
    try:
        return run(pairs)
    except Exception as error:  # as in `update_weights`
        if len(pairs) == 1:
            lost[pairs[0][0]] = SequenceError.of(NOT_ROUTED, error)
            return []
    return [made for pair in pairs for made in _together([pair], run, lost)]


def _embed(pairs: RowViews) -> Seen:
    """Return the views (K, D) of rows with the same embedder."""
    views, places = _flat(pairs)
    finished = pairs[0][0].router.embedder.finish(views)  # (sum of K, D)
    return [(row, finished[place]) for (row, _), place in zip(pairs, places, strict=True)]


def _embed_beside(pairs: RowViews) -> None:
    """Let the thread beside the model embed the texts of rows with the same embedder."""
    views, places = _flat(pairs)
    embedder = pairs[0][0].router.embedder
    embeddings = _beside().submit(embedder.finish, views)
    for (row, own), place in zip(pairs, places, strict=True):
        row.ahead = Ahead(embeddings, place, embedder, own)


def _flat(pairs: RowViews) -> tuple[list[Any], list[slice]]:
    """Return the views of all rows in one list, and where each row's are."""
    views: list[Any] = []
    places: list[slice] = []
    for _, own in pairs:
        places.append(slice(len(views), len(views) + len(own)))
        views += own
    return views, places


@cache
def _beside() -> ThreadPoolExecutor:
    """Return the thread that embeds texts beside the model; the decisions of one row are made in their order."""
    return ThreadPoolExecutor(1, "treadle-embedder")


def _weigh(rows: Seen) -> Seen:
    """Weigh rows with the same router and options together, each from the views (K, D) of its text."""
    router, routing = rows[0][0].router, rows[0][0].routing
    weights = router.weigh(np.stack([seen for _, seen in rows]), routing)  # (B, N)
    for (row, seen), own in zip(rows, weights, strict=True):
        row.weights = own
        if row.report.comparison:
            row.comparison = router.compare(seen, routing)
    return rows
