"""Says when weights change, and from how much of the text: one cursor for the engine, `hf`, scores and vLLM.

Decisions are a pure function of the text and the params. That is why a cached prefix, a resumed sequence and another
process get the same weights.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from treadle.common.params import RoutingParams
from treadle.routing.centroids import Bools, Floats
from treadle.routing.embedder import Embedder
from treadle.routing.running_sum import Tails

BLANK_LINE = "\n\n"
"""Between the contents of a chat, and between its last message and the answer."""


class Views(NamedTuple):
    """The embedder's input for one decision.

    Attributes:
        parts: one for each of the K views, the whole first; () under fixed weights.
        is_running: False = a prompt that is decided as a whole.
    """

    parts: tuple[Any, ...]
    is_running: bool


Decision = tuple[int, Views]
"""The first position that a decision holds for, and the views that it is made from."""


def decision_length(position: int, prompt_tokens: int, params: RoutingParams) -> int:
    """Return how many tokens of the text decide the weights of the forward pass that reads `position`.

    With `prefill="prompt"` all prompt positions use the whole prompt, and after `every` generated tokens the text up
    to and including the newest decides. With `prefill="causal"` position p uses the text up to the first token of its
    block of `every`, so that the weights of a prefix never depend on what follows. With `lag` a decision takes effect
    when the next one is due.
    """
    if params.rule == "fixed":
        return 0
    if params.prefill == "causal" and params.every is not None:
        return position // params.every * params.every + 1
    if params.every is None or position < prompt_tokens:
        return prompt_tokens
    decisions = (position - prompt_tokens + 1) // params.every
    return prompt_tokens + max(decisions - params.lag, 0) * params.every


def next_decision(position: int, prompt_tokens: int, params: RoutingParams) -> int:
    """Return the first position after `position` whose `decision_length` may differ; `sys.maxsize` = there is none."""
    if params.every is None or params.rule == "fixed":
        return sys.maxsize
    if params.prefill == "causal":
        return (position // params.every + 1) * params.every
    decisions = max(position - prompt_tokens + 1, 0) // params.every
    return prompt_tokens - 1 + (decisions + 1) * params.every


def is_due_by_states(num_tokens: int, prompt_tokens: int, params: RoutingParams) -> bool:
    """Return whether states decide anew before the last of so many tokens is read: also with the first new one."""
    lengths = {decision_length(num_tokens - back, prompt_tokens, params) for back in (1, 2)}
    return num_tokens == prompt_tokens + 1 or len(lengths) > 1


def decisions_from(position: int, prompt_tokens: int, params: RoutingParams) -> Iterator[tuple[int, int, int]]:
    """Walk over the decisions from `position` on, without end.

    Yields:
        the first position of a decision, the tokens that it is made from, and the position of the next decision.
    """
    length, after = decision_length(position, prompt_tokens, params), next_decision(position, prompt_tokens, params)
    yield position, length, after
    every = params.every or 0
    tokens_less = params.lag * every - 1
    while True:  # from the second decision on they are `every` tokens apart
        position, after = after, after + every
        yield position, position - tokens_less, after


def num_pieces(length: int, ends: Sequence[int] | None) -> int:
    """Return how many pieces of text the first `length` tokens have added.

    Args:
        length: tokens.
        ends: the number of pieces read with each token of the prompt; None = each token adds one, as every token
            after the prompt does.
    """
    if ends is None or not length:
        return length
    return ends[length - 1] if length <= len(ends) else ends[-1] + length - len(ends)


class Seen(NamedTuple):
    """Embedded decisions: the views (B, K, D) of each, and whether it is of running text (B,)."""

    views: Floats
    is_running: Bools


def finish_views(embedder: Embedder, views: Sequence[Views], num_views: int) -> Seen:
    """Return the embeddings of B decisions of K views each, in one call of the embedder."""
    flat = embedder.finish([part for each in views for part in each.parts])
    return Seen(flat.reshape(len(views), num_views, embedder.dim), np.array([each.is_running for each in views], bool))


class FollowingRouter(Protocol):
    """A router, as far as a cursor needs it."""

    @property
    def embedder(self) -> Embedder:
        """Embeds the text."""
        ...

    @property
    def tails(self) -> Tails:
        """The words of each view but the first."""
        ...


class DecisionCursor:
    """Follows one running text and says when its weights change.

    Attributes:
        pieces: the pieces of text of the prompt, then one of each token after it.
        prompt_tokens: the tokens of the prompt.
        prompt_pieces: the pieces of the prompt.
        ends: of a chat's prompt, the number of pieces read with each token (`num_pieces`); None = each token adds one.
        decided: the positions that have a decision.
        walk: the decisions to come (`decisions_from`).
        sum: the running sum of the text up to the newest decision; None = the embedder reads each text anew.
    """

    def __init__(
        self,
        router: FollowingRouter,
        params: RoutingParams,
        pieces: Sequence[str],
        prompt_tokens: int,
        ends: Sequence[int] | None = None,
    ) -> None:
        self._router = router
        self._params = params
        self.pieces = list(pieces)
        self.prompt_tokens = prompt_tokens
        self.prompt_pieces = num_pieces(prompt_tokens, ends)
        self.ends = ends
        self.decided = 0
        self.walk = decisions_from(0, prompt_tokens, params)
        self.sum = router.embedder.follow(router.tails, params.window)
        self._num_summed = 0  # pieces
        self._newest = -1  # pieces that the newest decision was made from; -1 = there is none
        self._gap = BLANK_LINE if ends is not None and len(self.pieces) == self.prompt_pieces else ""

    @property
    def num_tokens(self) -> int:
        """The tokens whose text the cursor knows."""
        return self.prompt_tokens + len(self.pieces) - self.prompt_pieces

    def add(self, pieces: Sequence[str]) -> None:
        """Append the text of tokens after the prompt, one piece a token."""
        if self._gap and pieces:
            pieces = [self._gap + pieces[0], *pieces[1:]]
            self._gap = ""
        self.pieces += pieces

    def decide(self, end: int) -> list[Decision]:
        """Return the decisions that the positions below `end` still need, in their order.

        A decision that was made from no more text than the one before it is left out: its positions keep the weights.
        """
        found: list[Decision] = []
        while self.decided < end:
            position, length, self.decided = next(self.walk)
            views = self._read(num_pieces(length, self.ends))
            if views is not None:
                found.append((position, views))
        return found

    def decide_last(self, end: int) -> Views | None:
        """Return the views of the decision for position `end` - 1; None = it is made already."""
        if end <= self.decided:
            return None
        if end - 1 > self.decided:
            self.walk = decisions_from(end - 1, self.prompt_tokens, self._params)
        _, length, self.decided = next(self.walk)
        return self._read(num_pieces(length, self.ends))

    def tokens_needed(self, end: int) -> int:
        """Return how many tokens of text the decisions for the positions below `end` need."""
        return decision_length(end - 1, self.prompt_tokens, self._params)

    def unread(self) -> list[str]:
        """Return the pieces that no decision has read yet."""
        return self.pieces[self._num_summed :]

    def first(self, count: int) -> "DecisionCursor":
        """Return a cursor over the first `count` tokens, whose next decision is that for position `count`."""
        ends = None if self.ends is None else self.ends[:count]
        pieces = self.pieces[: num_pieces(count, self.ends)]
        prompt_tokens = min(self.prompt_tokens, count)
        cursor = DecisionCursor(self._router, self._params, pieces, prompt_tokens, ends)
        cursor.decided = count
        cursor.walk = decisions_from(count, prompt_tokens, self._params)
        return cursor

    def _read(self, count: int) -> Views | None:
        """Read on to the first `count` pieces, never fewer than before; None = the newest decision has read as many."""
        if count == self._newest:
            return None
        self._newest = count
        if self._params.rule == "fixed":
            return Views((), False)
        if self.sum is None:
            parts = self._texts(count)
        else:
            self.sum.extend(self.pieces[self._num_summed : count])
            parts = self.sum.views()
        self._num_summed = count
        # under `causal` a prompt is running text, so that its weights do not depend on where it ends
        return Views(parts, self._params.prefill == "causal" or count > self.prompt_pieces)

    def _texts(self, count: int) -> tuple[Any, ...]:
        """Return the text of each view of the first `count` pieces."""
        text, window = "".join(self.pieces[:count]), self._params.window
        _, *tails = self._router.embedder.views(text, self._router.tails)
        return (text if window is None else "".join(self.pieces[max(0, count - window) : count]), *tails)
