"""One sequence while it is generated: its tokens, its options, and the weights of its next forward pass.

Routing, sampling and adapters are data of the row and never state of the model; `treadle.engine.batch` runs rows
together.
"""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch

from treadle.common.errors import TreadleError, reason_of
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.chat import TokenPrompt, prompt_cursor, token_prompt
from treadle.engine.tokenization import Detokenizer, StopStrings, stop_ids
from treadle.routing.centroids import Floats
from treadle.routing.router import Comparison, Router
from treadle.routing.schedule import Seen, Views, is_due_by_states
from treadle.routing.states import new_trail

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_ROUTED = "its text cannot be routed"
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


class LateDecision(Protocol):
    """A decision that takes effect when the next one is due."""

    def get(self) -> Seen:
        """Return the decision, when it is there."""
        ...


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
        self.ahead: LateDecision | None = None  # what decides next, if that takes effect a decision late
        # the base model's states of its last tokens, if these decide
        self.trail = new_trail(router.states, routing)
        self.is_reread = False  # its prompt has been read again, under the weights that its states gave
        self.forced: Sequence[int] = ()  # the tokens that it has to generate: their probability is asked

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

    @property
    def forced_next(self) -> int | None:
        """The token that comes next, if it is not to be drawn."""
        return self.forced[len(self.events)] if self.forced else None

    @property
    def has_states(self) -> bool:
        """Whether states decide, and a pass has read some."""
        return self.trail is not None and not self.trail.is_empty

    @property
    def is_decided_by_states(self) -> bool:
        """Whether its states decide from now on: a pass has read its prompt."""
        return bool(self.events) and self.has_states

    def is_due_by_states(self) -> bool:
        """Return whether its states decide anew before its newest token is read."""
        return is_due_by_states(len(self.ids), self.prompt_tokens, self.routing)

    def state_views(self) -> Seen:
        """Return the views (1, K, H) of its states, which it has."""
        assert self.trail is not None
        return Seen(self.trail.views()[None], np.array([self.trail.end > self.prompt_tokens]))

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
