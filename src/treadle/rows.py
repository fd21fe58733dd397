"""One sequence while it is generated, and the batch of sequences that share a forward pass.

The only place where the model is stepped. Rows join and leave between steps; each has its own routing, sampling and
adapters, which are data of the row and never state of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from treadle.blend import Blend
from treadle.cache import RowCache
from treadle.centroids import Floats
from treadle.fast_step import FastStep
from treadle.params import RoutingParams, SamplingParams
from treadle.routing import Router, RunningText, decision_length
from treadle.sampling import new_generator, sample
from treadle.text import Detokenizer, StopStrings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]


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
    """

    index: int
    token_id: int
    text: str
    logprob: float
    weights: Floats
    finish_reason: FinishReason | None = None


class Row:
    """One sequence: its tokens so far, its options, and the weights that its next forward pass uses."""

    def __init__(
        self,
        ids: Sequence[int],
        router: Router,
        routing: RoutingParams,
        sampling: SamplingParams,
        tokenizer: "PreTrainedTokenizerBase",
    ) -> None:
        self.ids = list(ids)  # prompt and generated tokens
        self.prompt_tokens = len(ids)
        self.router = router  # as it was when the row started: adapters that come and go later do not matter
        self.routing = routing
        self.sampling = sampling
        self.generator: torch.Generator | None = None
        self.events: list[TokenEvent] = []
        self.weights: Floats = np.zeros(len(router.names), np.float32)  # (N,)
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

    def accept(self, token_id: int, logprob: float, is_end: bool) -> TokenEvent:
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
        event = TokenEvent(len(self.events), token_id, text, logprob, self.weights.copy(), reason)
        self.events.append(event)
        return event


class Batch:
    """Rows that share a forward pass, and their key-value cache."""

    def __init__(
        self, model: "PreTrainedModel", blend: Blend, end_ids: frozenset[int], fast_step: FastStep | None
    ) -> None:
        self.rows: list[Row] = []
        self._model = model
        self._blend = blend
        self._end_ids = end_ids
        self._cache = RowCache()
        self._fast_step = fast_step

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> list[tuple[Row, TokenEvent]]:
        """Read the prompts of new rows and give each its first token."""
        for row in rows:
            row.generator = new_generator(row.sampling, self._model.device)
        _route(rows)
        return self._advance(rows, self._read_whole(rows))

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, TokenEvent]]:
        """Give every row its next token."""
        changed = _route(self.rows)
        again = [row for row in changed if row.routing.past == "recompute"]
        if again:
            self._keep([row for row in self.rows if row not in again])
        going = list(self.rows)
        logits = [self._read_newest()] if going else []
        if again:
            logits.append(self._read_whole(again))
        return self._advance([*going, *again], torch.cat(logits))

    def leave(self, rows: Sequence[Row]) -> None:
        """Drop rows, finished or not; the others do not notice."""
        self._keep([row for row in self.rows if row not in rows])

    def _advance(self, rows: Sequence[Row], logits: Tensor) -> list[tuple[Row, TokenEvent]]:
        """Sample the next token of each row from logits (B, V); finished rows leave."""
        tokens, logprobs = sample(logits, [row.sampling for row in rows], [row.generator for row in rows])
        events = [
            (row, row.accept(token, logprob, token in self._end_ids))
            for row, token, logprob in zip(rows, tokens, logprobs, strict=True)
        ]
        if any(row.is_finished for row in rows):
            self._keep([row for row in self.rows if not row.is_finished])
        return events

    def _read_whole(self, rows: Sequence[Row]) -> Tensor:
        """Read all tokens of some rows into the cache and append the rows; return the last logits (B, V)."""
        length = max(len(row.ids) for row in rows)
        pads = [length - len(row.ids) for row in rows]
        cache = RowCache()
        ids = torch.tensor([[0] * pad + row.ids for pad, row in zip(pads, rows, strict=True)])
        logits = self._forward(rows, ids, pads, cache, [row.prompt_weights() for row in rows])
        if self.rows:
            self._cache.merge(cache)
        else:
            self._cache = cache
        self.rows = [*self.rows, *rows]
        return logits

    def _read_newest(self) -> Tensor:
        """Read the newest token of every row; return the logits (B, V)."""
        ids = torch.tensor([row.ids[-1:] for row in self.rows])
        pads = [self._cache.length + 1 - len(row.ids) for row in self.rows]
        return self._forward(self.rows, ids, pads, self._cache, [row.weights[None] for row in self.rows])

    def _forward(
        self, rows: Sequence[Row], ids: Tensor, pads: Sequence[int], cache: RowCache, weights: Sequence[Floats]
    ) -> Tensor:
        """Run the model on ids (B, T), whose rows have `pads` columns of padding before them in the whole text."""
        device = self._model.device
        start, new = cache.length, ids.shape[1]
        left = torch.tensor(pads)[:, None]  # (B, 1)
        positions = (torch.arange(start, start + new) - left).clamp(min=0)  # (B, T)
        mask = (torch.arange(start + new) >= left).long().to(device) if any(pads) else None  # (B, L)
        with self._blend.using(self._stacked(rows, weights, new), [row.routing.combine for row in rows]):
            if self._fast_step and start and new == 1:
                return self._fast_step(ids, positions, mask, cache)
            output = self._model(
                input_ids=ids.to(device),
                attention_mask=mask,
                position_ids=positions.to(device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1]  # (B, V)

    def _stacked(self, rows: Sequence[Row], weights: Sequence[Floats], num_tokens: int) -> Floats | None:
        """Return the rows' weights as (B, 1 or T, N of the blend); None where no adapter acts on any row."""
        if not any(each.any() for each in weights):
            return None
        length = num_tokens if any(len(each) > 1 for each in weights) else 1
        names = self._blend.names
        stacked = np.zeros((len(rows), length, len(names)), np.float32)
        for index, (row, each) in enumerate(zip(rows, weights, strict=True)):
            start = max(0, length - len(each)) if len(each) > 1 else 0
            stacked[index, start:, _columns(names, row.router.names)] = each.T
        return stacked

    def _keep(self, rows: list[Row]) -> None:
        if rows and len(rows) < len(self.rows):
            kept = [self.rows.index(row) for row in rows]
            longest = max(len(row.ids) for row in rows) - 1  # the newest token is not in the cache yet
            self._cache.select(kept, self._cache.length - longest)
        self.rows = rows
        if not rows:
            self._cache = RowCache()


@lru_cache(maxsize=256)
def _columns(all_names: tuple[str, ...], names: tuple[str, ...]) -> list[int]:
    """Return where each of `names` is in `all_names`."""
    places = {name: index for index, name in enumerate(all_names)}
    return [places[name] for name in names]


def _route(rows: Sequence[Row]) -> list[Row]:
    """Give new weights to the rows that are due, and return these; each embedder is called once for all its rows."""
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
        for row, views in pairs:
            row.weights = row.router.weigh(np.stack([next(embeddings) for _ in views]), row.routing)
    return changed
