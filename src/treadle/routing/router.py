"""Turns texts into adapter weights: the scores of the centroids, then a rule.

Everything here is closed form on small numpy arrays: no gradient, no torch, no model.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from treadle.common.errors import AdapterError, OptionError, TreadleError, one_or_list, unknown_name
from treadle.common.params import RoutingParams, Score
from treadle.routing.centroids import Centroids, Floats, log_softmax
from treadle.routing.embedder import Embedder, encode_views
from treadle.routing.rules import apply_rule, apply_rule_beside_base
from treadle.routing.running_sum import Tails
from treadle.routing.schedule import DecisionCursor, Seen, Views, finish_views
from treadle.routing.states import StateClasses, check_state_params, wants_states

NO_SAMPLES = (
    "no adapter has sample texts, so nothing can be routed: choose an adapter by its name, give fixed weights (such as "
    "{}=1), or put samples.txt or samples.jsonl into the adapters' folders."
)


@dataclass(frozen=True)
class Comparison:
    """How near texts are to each adapter, as their weights were made from it.

    Attributes:
        cosines: (..., N) with the centroids; NaN where an adapter has no samples.
        scores: (..., N) by the params' score, before any rule; NaN there, too.
    """

    cosines: Floats
    scores: Floats


@dataclass(frozen=True)
class Router:
    """Centroids, the embedder that made them, and the params that apply unless others are given.

    Attributes:
        centroids: of texts.
        embedder: embeds them.
        params: the default.
        states: classes over the base model's states, which decide once the model has read the text; None = the text
            alone decides. Adapters that joined without states are missing: then params with `states` are refused.
        unrouted: names of adapters without samples. No text chooses them; they act under `fixed` weights alone.
    """

    centroids: Centroids
    embedder: Embedder = field(repr=False)
    params: RoutingParams = RoutingParams()
    states: StateClasses | None = None
    unrouted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse an embedder other than the one that made the centroids."""
        if self.centroids.embedder_id != self.embedder.id:
            raise OptionError(
                f"the centroids were made by the embedder {self.centroids.embedder_id!r}, not {self.embedder.id!r}; "
                "fit them again with this embedder, or load theirs."
            )
        known = self.states.centroids.names if self.states is not None else ()
        if known != tuple(name for name in self.centroids.names if name in known):
            raise OptionError(
                f"the classes of states are of {', '.join(known)}, the centroids of {', '.join(self.centroids.names)}; "
                "fit both on the same adapters."
            )
        if len(set(self.names)) < len(self.names):
            raise AdapterError(f"adapters have the same name: {', '.join(self.names)}.")

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order of every N axis: those without samples come last."""
        return (*self.centroids.names, *self.unrouted)

    @property
    def lacks_samples(self) -> bool:
        """Whether there are adapters and none has samples: then nothing but `fixed` weights can decide."""
        return bool(self.unrouted) and not self.centroids.names

    @property
    def tails(self) -> Tails:
        """The words of each view of a text but the first, which is the whole text."""
        return self.centroids.tails

    def weights(self, texts: Sequence[str], params: RoutingParams | None = None) -> Floats:
        """Return the weights (B, N) float32 of B prompts; what a row lacks to 1 is the base's share."""
        params = params or self.params
        if params.rule == "fixed":
            return np.tile(self.fixed_weights(params), (len(texts), 1))
        return self.weigh(self.see(texts, is_running=params.prefill == "causal"), params)

    def scores(self, texts: Sequence[str], params: RoutingParams | None = None, *, is_running: bool = False) -> Floats:
        """Return the scores (B, N) float32 of B texts, prompts or running ones, before any rule."""
        params = params or self.params
        is_running = is_running or params.prefill == "causal"  # as where a prompt is read
        return self.compare(self.see(texts, is_running=is_running), params).scores

    def see(self, texts: Sequence[str], *, is_running: bool = False) -> Seen:
        """Return the views (B, K, D) of B texts, as prompts or as running texts."""
        return Seen(encode_views(self.embedder, texts, self.tails), np.full(len(texts), is_running))

    def finish(self, views: Sequence[Views]) -> Seen:
        """Embed the views of decisions (`DecisionCursor`) in one call of the embedder."""
        return finish_views(self.embedder, views, 1 + len(self.tails))

    def weigh(self, seen: Seen, params: RoutingParams) -> Floats:
        """Return the weights (B, N) of texts under params whose rule is not `fixed`.

        A text without any known word goes to the base, or weighs all adapters alike if the base has no share.
        """
        if self.lacks_samples:
            raise OptionError(NO_SAMPLES.format(self.unrouted[0]))
        if params.score != "lda" or not self.centroids.names:
            return self._over_all(_without_base(self._finite(self._cosines(seen, params.score)), seen, params), 0)
        return self._posterior(self.centroids, seen, params)

    def weigh_states(self, seen: Seen, params: RoutingParams) -> Floats:
        """Return the weights (B, N) of texts from the views (B, K, H) of the base model's states."""
        assert self.states is not None
        return self._posterior(self.states.centroids, seen, params)

    def _posterior(self, centroids: Centroids, seen: Seen, params: RoutingParams) -> Floats:
        """Return the weights (B, N) that classes give."""
        evidence = self._finite(centroids.evidence(seen.views, seen.is_running))  # (B, N or N + 1)
        temperatures = centroids.temperatures(seen.is_running)
        if centroids.general is None or not params.fallback:
            return self._over_all(_without_base(evidence[:, : len(centroids.names)], seen, params, temperatures), 0)
        return self._over_all(apply_rule_beside_base(evidence, params, temperatures), 0)

    def _over_all(self, routed: Floats, value: float) -> Floats:
        """Return numbers (..., adapters with samples) as (..., N), with a value for the adapters without."""
        if not self.unrouted:
            return routed
        rest = np.full((*routed.shape[:-1], len(self.unrouted)), value, np.float32)
        return np.concatenate([routed, rest], -1)

    def compare(self, seen: Seen, params: RoutingParams) -> Comparison:
        """Compare texts with the centroids, each result (B, N): `weigh` makes weights from these."""
        cosines = self._cosines(seen, "cosine")
        if params.score != "lda" or not self.centroids.names:
            return self._comparison(cosines, self._cosines(seen, params.score))
        evidence = self.centroids.evidence(seen.views, seen.is_running)[:, : len(self.centroids.names)]
        return self._comparison(cosines, log_softmax(evidence))

    def _comparison(self, cosines: Floats, scores: Floats) -> Comparison:
        return Comparison(self._over_all(cosines, np.nan), self._over_all(scores, np.nan))

    def compare_states(self, seen: Seen) -> Comparison:
        """Compare the base model's states with their classes, each result (B, N)."""
        assert self.states is not None
        centroids = self.states.centroids
        evidence = centroids.evidence(seen.views, seen.is_running)[:, : len(centroids.names)]
        return self._comparison(centroids.cosines(seen.views[:, 0]), log_softmax(evidence))

    def among(self, names: Collection[str]) -> "Router":
        """Return the router of some adapters."""
        states = self.states and self.states.among(names)
        unrouted = tuple(name for name in self.unrouted if name in names)
        return replace(self, centroids=self.centroids.among(names), states=states, unrouted=unrouted)

    def join(self, own: Centroids, states: Centroids | None = None) -> "Router":
        """Return the router with one more adapter, whose states may be unknown."""
        joined = self.states.join(states) if self.states is not None and states is not None else self.states
        return replace(self, centroids=self.centroids.join(own), states=joined)

    def remove(self, name: str) -> "Router":
        """Return the router without one adapter; the others' numbers do not change."""
        if name not in self.names:
            raise AdapterError(unknown_name("adapter", name, self.names))
        return self.among([other for other in self.names if other != name])

    def check_states(self, params: RoutingParams | None = None) -> None:
        """Raise an OptionError if the base model's states cannot decide as params ask."""
        params = params or self.params
        if self.states is None:
            return
        check_state_params(params)
        missing = [name for name in self.centroids.names if name not in self.states.centroids.names]
        if missing and wants_states(params):
            raise OptionError(
                f"the base model's states are unknown for {', '.join(missing)}: fit the bundle again, or give states = "
                "false to route by the text alone."
            )

    def _cosines(self, seen: Seen, score: Score) -> Floats:
        """Return cosines (B, N) of whole texts."""
        return self.centroids.cosines(seen.views[:, 0], score)

    def _finite(self, scores: Floats) -> Floats:
        """Return the scores; a TreadleError if one is not finite."""
        if not np.isfinite(scores).all():
            raise TreadleError(
                "the scores of a text are not finite: its embedding holds NaN, infinity or huge numbers."
            )
        return scores

    def fixed_weights(self, params: RoutingParams) -> Floats:
        """Return the weights (N,) of params whose rule is `fixed`; a name that does not exist is an AdapterError."""
        fixed = params.fixed or {}
        unknown = [unknown_name("adapter", name, self.names) for name in fixed if name not in self.names]
        if unknown:
            raise AdapterError(one_or_list("fixed weights:", unknown))
        return np.array([fixed.get(name, 0.0) for name in self.names], np.float32)

    def check(self, params: RoutingParams) -> None:
        """Raise a TreadleError if these adapters do not allow the params: an unknown name, or a score that fails."""
        self.check_states(params)
        if params.rule == "fixed":
            self.fixed_weights(params)
        else:
            self.weigh(
                Seen(np.zeros((1, 1 + len(self.tails), self.embedder.dim), np.float32), np.zeros(1, bool)), params
            )

    def trace(
        self, pieces: Sequence[str], prompt_tokens: int, params: RoutingParams, *, ends: Sequence[int] | None = None
    ) -> Floats:
        """Return the weights (T, N) under which each of T tokens is read, from the text that the tokens add.

        The same numbers as the engine's step by step, computed at once: the forward pass over a finished text with
        these weights is what cached decoding did.

        Args:
            pieces: (T,) the text of each token, or that of a chat's prompt and of the tokens after it.
            prompt_tokens: the tokens of the prompt.
            params: how weights are made.
            ends: of a chat's prompt, the number of pieces read with each token (`num_pieces`).
        """
        if params.rule == "fixed":
            length = DecisionCursor(self, params, pieces, prompt_tokens, ends).num_tokens
            return np.tile(self.fixed_weights(params), (length, 1))
        seen, decisions = self.decisions(pieces, prompt_tokens, params, ends=ends)
        return self.weigh(seen, params)[decisions]

    def trace_comparison(
        self, pieces: Sequence[str], prompt_tokens: int, params: RoutingParams, *, ends: Sequence[int] | None = None
    ) -> Comparison | None:
        """Compare the text of each of T tokens with the centroids, (T, N); None under fixed weights."""
        if params.rule == "fixed":
            return None
        seen, decisions = self.decisions(pieces, prompt_tokens, params, ends=ends)
        compared = self.compare(seen, params)
        return Comparison(compared.cosines[decisions], compared.scores[decisions])

    def decisions(
        self, pieces: Sequence[str], prompt_tokens: int, params: RoutingParams, *, ends: Sequence[int] | None = None
    ) -> tuple[Seen, NDArray[np.int64]]:
        """Return the embedded decisions over T tokens, and which of them each token has (T,)."""
        cursor = DecisionCursor(self, params, pieces, prompt_tokens, ends)
        decided = cursor.decide(cursor.num_tokens)
        starts = [start for start, _ in decided]
        which = np.searchsorted(starts, np.arange(cursor.num_tokens), "right") - 1
        return self.finish([views for _, views in decided]), which


def _without_base(scores: Floats, seen: Seen, params: RoutingParams, temperatures: Floats | None = None) -> Floats:
    """Return weights (B, N) that sum to 1; those of a text without a known word are all alike."""
    weights = apply_rule(scores, params, temperatures)
    if params.rule == "top_k" and not (heard := seen.views[:, 0].any(-1)).all():
        weights[~heard] = 1 / max(1, scores.shape[-1])  # not the first k
    return weights
