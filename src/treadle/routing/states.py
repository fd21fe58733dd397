"""Routes by the base model's own hidden states: means of a text's last tokens, after one layer.

The states are those of the pass that reads the text anyway, under the weights in force. The classes are fitted on the
plain base's states: then it makes little difference to them which adapter acts.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from treadle.common.errors import OptionError, problem_list
from treadle.common.params import RoutingParams
from treadle.routing.centroids import Centroids, Floats

STATE_SPANS = (16, 4)
"""The tokens of each view of a text, its last so many; chosen on validation rows."""
MAX_SPAN = 64
REREAD_BOUND = 0.25
"""A prompt is read again if its states move a weight further than this from what its text gave."""


@dataclass(frozen=True)
class StateClasses:
    """Classes over the base model's states.

    Attributes:
        centroids: statistics of the K views of sample texts; a view is a mean of states (H,), brought to length 1.
        layer: whose output the states are, counted as transformers' `hidden_states`.
        spans: tokens of each view.
    """

    centroids: Centroids = field(repr=False)
    layer: int
    spans: tuple[int, ...] = STATE_SPANS

    def __post_init__(self) -> None:
        """Check layer and spans; one message lists all problems."""
        problems: list[str] = []
        if self.layer < 1:
            problems.append(f"layer {self.layer}: the first is 1")
        if not self.spans or not all(0 < span <= MAX_SPAN for span in self.spans):
            problems.append(f"spans {list(self.spans)}: each is 1 to {MAX_SPAN} tokens")
        elif self.spans[1:] != self.centroids.tails:
            problems.append(f"spans {list(self.spans)} do not fit the tails {list(self.centroids.tails)}")
        if problems:
            raise OptionError(problem_list("states:", problems))

    def join(self, own: Centroids) -> "StateClasses":
        """Return these classes followed by that of one more adapter."""
        return replace(self, centroids=self.centroids.join(own))

    def among(self, names: Collection[str]) -> "StateClasses":
        """Return the classes of some adapters."""
        return replace(self, centroids=self.centroids.among(names))


class StateTrail:
    """The states of one text's last tokens, as passes read them. The first token is left out: it is a sink.

    Attributes:
        room: tokens whose states are kept.
        end: tokens of the text that have been read.
    """

    def __init__(self, spans: Sequence[int]) -> None:
        self._spans = spans
        self.room = max(spans)
        self._states: NDArray[np.float32] = np.zeros((0, 0), np.float32)  # (tokens, H), the newest last
        self.end = 0

    def put(self, start: int, states: NDArray[np.float32]) -> None:
        """Take the states (T, H) of the tokens from `start` on; what was known from there on is replaced."""
        end = start + len(states)
        if start == 0:
            start, states = 1, states[1:]
        known = len(self._states) - max(self.end - start, 0)  # of the states that stay
        before = self._states[:known] if known > 0 and self.end >= start else states[:0]
        self._states = np.concatenate([before, states])[-self.room :] if len(before) else states[-self.room :]
        self.end = end

    @property
    def is_empty(self) -> bool:
        """Whether no token but the first has been read."""
        return not len(self._states)

    def copy(self) -> "StateTrail":
        """Return the trail of a text that has been the same so far."""
        trail = StateTrail(self._spans)
        trail._states, trail.end = self._states, self.end
        return trail

    def views(self) -> Floats:
        """Return the K views (K, H) of a text that is not empty."""
        means = np.stack([self._states[-span:].mean(0, dtype=np.float64) for span in self._spans])
        return unit(means)


def unit(means: NDArray[np.float64]) -> Floats:
    """Return means of states (..., H), each brought to length 1."""
    lengths = np.linalg.norm(means, axis=-1, keepdims=True)
    return (means / np.maximum(lengths, 1e-12)).astype(np.float32)


def new_trail(classes: StateClasses | None, params: RoutingParams) -> StateTrail | None:
    """Return a trail for a new text; None = its states decide nothing."""
    return StateTrail(classes.spans) if classes is not None and wants_states(params) else None


def is_far(weights: Floats, others: Floats) -> bool:
    """Return whether weights (N,) that states give are so far from those in force that a prompt is read again."""
    return bool((abs(weights - others) > REREAD_BOUND).any())


def uses_states(classes: StateClasses | None, params: RoutingParams) -> bool:
    """Return whether weights come from states under these params."""
    return classes is not None and wants_states(params)


def wants_states(params: RoutingParams) -> bool:
    """Return whether weights come from states under these params, if there are any."""
    return params.states and params.score == "lda" and params.rule != "fixed"


def check_state_params(params: RoutingParams) -> None:
    """Raise an OptionError if params want states but need weights before the states are there."""
    if not wants_states(params):
        return
    problems = [
        name
        for name, is_wrong in (
            ("prefill = causal", params.prefill == "causal"),
            ("past = recompute", params.past == "recompute" and params.every is not None),
            ("lag = 1", params.lag > 0),
        )
        if is_wrong
    ]
    if problems:
        raise OptionError(
            f"{', '.join(problems)}: not possible where the base model's states decide; give states = false to route "
            "by the text alone."
        )
