"""One sequence while it is generated: its tokens, its options, and the weights of its next forward pass.

Routing, sampling and adapters are data of the row and never state of the model; `treadle.batch` runs rows together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from treadle.centroids import Floats
from treadle.params import RoutingParams, SamplingParams
from treadle.routing import Router, RunningText, decision_length
from treadle.text import Detokenizer, StopStrings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]
Likeliest = tuple[tuple[int, float], ...]
"""The most probable tokens at one place, the most probable first: (token id, log-probability in nats)."""


@dataclass(frozen=True)
class Report:
    """What a row tells beyond its tokens; each costs a little, so nothing is on unless asked for.

    Attributes:
        likeliest: how many of the most probable tokens come with each token.
        prompt: whether the prompt's own tokens are scored as they are read.
    """

    likeliest: int = 0
    prompt: bool = False


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
    """

    index: int
    token_id: int
    text: str
    logprob: float
    weights: Floats
    finish_reason: FinishReason | None = None
    likeliest: Likeliest = ()


class Row:
    """One sequence: its tokens so far, its options, and the weights that its next forward pass uses."""

    def __init__(
        self,
        ids: Sequence[int],
        router: Router,
        routing: RoutingParams,
        sampling: SamplingParams,
        tokenizer: "PreTrainedTokenizerBase",
        report: Report | None = None,
    ) -> None:
        self.ids = list(ids)  # prompt and generated tokens
        self.prompt_tokens = len(ids)
        self.router = router  # as it was when the row started: adapters that come and go later do not matter
        self.routing = routing
        self.sampling = sampling
        self.report = report or Report()
        self.owner = ""  # rows of one owner alone share what they have read (`treadle.prefixes`)
        self.reused = 0  # tokens of the prompt whose keys and values were there already
        self.generator: torch.Generator | None = None
        self.events: list[TokenEvent] = []
        self.prompt_scores: list[TokenScore] = []  # of the prompt's second token and those behind it
        self.weights: Floats = np.zeros(len(router.names), np.float32)  # (N,)
        self.read_under: Floats = self.weights[None]  # (T, N) or (1, N) for all T alike, of the pass over the prompt
        self._text = Detokenizer(tokenizer)
        self._stops = StopStrings(sampling.stop)
        self._pieces = [self._text.push(token_id) for token_id in ids]
        self._running = RunningText(router.embedder, routing)

    @property
    def is_finished(self) -> bool:
        """Whether the row's last token has been generated."""
        return bool(self.events) and self.events[-1].finish_reason is not None

    def due_snapshot(self) -> tuple[Any, ...] | None:
        """Return what the embedder needs, if the pass that reads the newest token needs new weights; else None."""
        length = decision_length(len(self.ids) - 1, self.prompt_tokens, self.routing)
        return self._running.decide(self._pieces, length, self.prompt_tokens)

    def prompt_weights(self) -> Floats:
        """Return the weights (T, N), or (1, N) for all T alike, of the pass that reads all tokens so far."""
        if self.routing.prefill == "causal":
            return self.router.trace(self._pieces, self.prompt_tokens, self.routing)
        return self.weights[None]

    def accept(self, token_id: int, logprob: float, is_end: bool, likeliest: Likeliest = ()) -> TokenEvent:
        """Append a generated token and return its event."""
        self.ids.append(token_id)
        piece = "" if is_end else self._text.push(token_id)
        self._pieces.append(piece)
        text = self._stops.push(piece)
        reason: FinishReason | None = None
        if is_end or self._stops.found:
            reason = "stop"
        elif len(self.events) + 1 == self.sampling.max_tokens:
            reason = "length"
        if reason and not self._stops.found:
            text += self._stops.push(self._text.flush())
            text += self._stops.flush()
        event = TokenEvent(len(self.events), token_id, text, logprob, self.weights.copy(), reason, likeliest)
        self.events.append(event)
        return event


def route(rows: Sequence[Row]) -> list[Row]:
    """Give new weights to the rows that are due, and return these.

    Each embedder is called once for all its rows, and rows with the same router and options are weighed together.
    """
    due: dict[int, list[tuple[Row, tuple[Any, ...]]]] = {}
    changed: list[Row] = []
    for row in rows:
        snapshot = row.due_snapshot()
        if snapshot is None:
            continue
        changed.append(row)
        if row.routing.rule == "fixed":
            row.weights = row.router.fixed_weights(row.routing)
        else:
            due.setdefault(id(row.router.embedder), []).append((row, snapshot))
    for pairs in due.values():
        embedder = pairs[0][0].router.embedder
        embeddings = iter(embedder.finish([view for _, views in pairs for view in views]))  # (sum of K, D)
        alike: dict[tuple[int, RoutingParams], list[tuple[Row, Floats]]] = {}
        for row, views in pairs:
            own = np.stack([next(embeddings) for _ in views])  # (K, D)
            alike.setdefault((id(row.router), row.routing), []).append((row, own))
        for group in alike.values():
            first = group[0][0]
            weights = first.router.weigh(np.stack([own for _, own in group]), first.routing)  # (rows, N)
            for (row, _), each in zip(group, weights, strict=True):
                row.weights = each
    return changed
