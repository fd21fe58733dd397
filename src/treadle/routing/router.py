"""Turns texts into adapter weights: centroids, scores, rules, and when a weight is decided.

Everything here is closed form on small numpy arrays: no gradient, no torch, no model. Weights are a pure function of
the centroids, the params and the text, which is what lets a cached prefix, a resumed row and another process agree.
"""

import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.common.errors import AdapterError, OptionError, TreadleError, collect, problem_list, unknown_name
from treadle.common.params import DEFAULT_TEMPERATURE, RoutingParams, Score
from treadle.routing.centroids import Centroids, Floats, log_softmax
from treadle.routing.embedder import Embedder, Track, load_embedder
from treadle.routing.fitting import centroid_of
from treadle.routing.samples import Sample
from treadle.routing.segmentation import last_change

RECENT_SHARE = 0.75
"""Of the score of running text, what its recent tokens give; chosen on mixed streams of validation rows."""
SHARES = {1: np.ones(1, np.float32), 2: np.array([1 - RECENT_SHARE, RECENT_SHARE], np.float32)}
"""Of the score, what each view of a text gives, by their number K."""


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
    """Return the first position after `position` whose `decision_length` may differ; a huge number = there is none."""
    if params.every is None or params.rule == "fixed":
        return sys.maxsize
    if params.prefill == "causal":
        return (position // params.every + 1) * params.every
    decisions = max(position - prompt_tokens + 1, 0) // params.every
    return prompt_tokens - 1 + (decisions + 1) * params.every


def is_prompt_decision(length: int, prompt_tokens: int, params: RoutingParams) -> bool:
    """Return whether a decision from `length` tokens, or pieces, is that of the prompt as a whole."""
    return params.prefill == "prompt" and length <= prompt_tokens


def num_pieces(length: int, ends: Sequence[int] | None) -> int:
    """Return how many pieces of text the first `length` tokens have added.

    Args:
        length: tokens.
        ends: how many of its pieces have been read with each token of the prompt; None = each adds one, as every token
            behind the prompt does.
    """
    if ends is None or not length:
        return length
    return ends[length - 1] if length <= len(ends) else ends[-1] + length - len(ends)


# Rules: scores (..., N) -> weights (..., N)


def softmax(scores: Floats, temperature: float = 1.0) -> Floats:
    """Return the softmax of scores / temperature; -inf gets 0, and a row that is -inf throughout is 0 throughout."""
    top = scores.max(-1, keepdims=True)
    raised = np.exp((scores - np.where(np.isfinite(top), top, 0.0)) / temperature)
    return (raised / np.maximum(raised.sum(-1, keepdims=True), 1e-30)).astype(np.float32)


def boosted(cosines: Floats, boost: float = 4.0) -> Floats:
    """Return the paper's weights: the largest cosine is multiplied by `boost`, then softmax.

    The paper's code multiplies whatever its sign, which pushes a negative largest cosine down. Here a negative one is
    divided instead, so that boosting always helps the nearest adapter.
    """
    top = cosines.max(-1, keepdims=True)
    lifted = np.where(top < 0, top / boost, top * boost)
    first = np.arange(cosines.shape[-1]) == cosines.argmax(-1)[..., None]
    return softmax(np.where(first & np.isfinite(top), lifted, cosines))


def top_k(scores: Floats, k: int, temperature: float = 1.0) -> Floats:
    """Return the softmax of the k largest scores and 0 elsewhere; ties go to the earlier adapter."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    keep = np.zeros(scores.shape, bool)
    np.put_along_axis(keep, order[..., :k], True, -1)
    return softmax(np.where(keep, scores, -np.inf).astype(np.float32), temperature)


def apply_rule(scores: Floats, params: RoutingParams) -> Floats:
    """Return the weights (..., N) of scores (..., N) under a rule other than `fixed`, floor and unit scale included."""
    if scores.shape[-1] == 0:
        return scores
    if params.floor is not None:
        scores = np.where(scores < params.floor, -np.inf, scores).astype(np.float32)
    temperature = params.temperature or DEFAULT_TEMPERATURE[params.score]
    if params.rule == "boosted":
        weights = boosted(scores, params.boost)
    elif params.rule == "top_k":
        weights = top_k(scores, params.top_k, temperature)
    else:
        weights = softmax(scores, temperature)
    if params.unit_scale:
        weights = weights / np.maximum(weights.max(-1, keepdims=True), 1e-30)
    return weights


class RunningText:
    """One running text, as routing params look at it: all of it or a window, and its recent tokens if they ask.

    A prompt that is decided as a whole has no recent tokens: there the first view counts alone. Where its domain
    changes, the text begins at the last change, also for what is decided later.
    """

    def __init__(self, router: "Router", params: RoutingParams) -> None:
        embedder = router.embedder
        self._router = router
        self._params = params
        self._begin = 0  # the piece that the text is read from
        self._decided_at = -1  # pieces that the newest decision was made from; -1 = there was none
        recent = params.recent
        self._has_whole = recent is not None and params.window is None  # then one track gives both views
        self._tracks = [embedder.track(recent if self._has_whole else params.window)]
        if recent is not None and params.window is not None and recent < params.window:
            self._tracks.append(embedder.track(recent))

    @property
    def longest(self) -> Track:
        """The track from which all views could be taken."""
        return self._tracks[0]

    @property
    def spans(self) -> tuple[int | None, ...]:
        """How many of the last tokens each of the K views of running text looks at; None = all."""
        window, recent = self._params.window, self._params.recent
        if window is None:
            return (None,) if recent is None else (None, recent)
        return (window,) if recent is None or recent >= window else (window, recent)

    def decide(self, pieces: Sequence[str], length: int, prompt_pieces: int) -> tuple[Any, ...] | None:
        """Read on to the first `length` pieces and return what `finish_views` needs, one entry for each of K views.

        None where the newest decision was made from just as many.

        Args:
            pieces: the text so far: what each token adds, of a chat's prompt what it says (`treadle.engine.chat`).
            length: how many pieces decide (`decision_length`, `num_pieces`); never less than before.
            prompt_pieces: how many of the pieces are the prompt's.
        """
        if length == self._decided_at:
            return None
        is_prompt = is_prompt_decision(length, prompt_pieces, self._params)
        if is_prompt:
            self._begin = self._last_change(pieces[:length])
        for track in self._tracks:
            track.extend(pieces[max(self._decided_at, self._begin) : length])
        self._decided_at = length
        if self._has_whole:
            whole = self._tracks[0].whole()
            return whole, whole if is_prompt else self._tracks[0].snapshot()
        if is_prompt:
            return (self._tracks[0].snapshot(),) * len(self._tracks)
        return tuple(track.snapshot() for track in self._tracks)

    def _last_change(self, pieces: Sequence[str]) -> int:
        """Return the piece that the last domain of a prompt begins with."""
        at = self._router.last_change("".join(pieces), self._params)
        return bisect_right(list(accumulate(map(len, pieces))), at) if at else 0


def finish_views(embedder: Embedder, snapshots: Sequence[tuple[Any, ...]]) -> Floats:
    """Return the embeddings (B, K, D) of snapshots of texts that have K views each, in one call of the embedder."""
    flat = embedder.finish([view for views in snapshots for view in views])
    return flat.reshape(len(snapshots), len(snapshots[0]) if snapshots else 1, embedder.dim)


@dataclass(frozen=True)
class Comparison:
    """How near texts are to each adapter, as their weights were made from it.

    Attributes:
        cosines: (..., N) with the centroids.
        scores: (..., N) by the params' score, before any rule.
    """

    cosines: Floats
    scores: Floats


@dataclass(frozen=True)
class Router:
    """Centroids, the embedder that made them, and the params that apply unless others are given."""

    centroids: Centroids
    embedder: Embedder = field(repr=False)
    params: RoutingParams = RoutingParams()

    def __post_init__(self) -> None:
        """Refuse an embedder other than the one that made the centroids."""
        if self.centroids.embedder_id != self.embedder.id:
            raise OptionError(
                f"the centroids were made by the embedder {self.centroids.embedder_id!r}, not {self.embedder.id!r}; "
                "fit them again with this embedder, or load theirs."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order of every N axis."""
        return self.centroids.names

    def weights(self, texts: Sequence[str], params: RoutingParams | None = None) -> Floats:
        """Return the weights (B, N) float32 of B whole texts."""
        params = params or self.params
        if params.rule == "fixed":
            return np.tile(self.fixed_weights(params), (len(texts), 1))
        counted = [text[self.last_change(text, params) :] for text in texts]
        return self.weigh(self.embedder.encode(counted)[:, None], params)

    def last_change(self, text: str, params: RoutingParams) -> int:
        """Return where what counts of a prompt begins, as an index of characters; see `RoutingParams.change`."""
        if params.change is None or params.score != "lda" or params.window is not None or params.rule == "fixed":
            return 0
        return last_change(text, self._log_posteriors, params.change) if len(self.names) > 1 else 0

    def _log_posteriors(self, texts: Sequence[str]) -> Floats:
        return self.centroids.score(self.embedder.encode(texts), "lda")

    def scores(self, texts: Sequence[str], params: RoutingParams | None = None) -> Floats:
        """Return the scores (B, N) float32 of B whole texts, before any rule."""
        return self.centroids.score(self.embedder.encode(texts), (params or self.params).score)

    def weigh(self, embeddings: Floats, params: RoutingParams) -> Floats:
        """Return the weights (..., N) of texts under params whose rule is not `fixed`.

        A text without any known word weighs all adapters alike.

        Args:
            embeddings: (..., K, D) of the K views of each text (`RunningText`), the recent tokens last.
            params: score and rule.
        """
        # no rule but `floor` asks how large scores are: what all adapters have in common may stay away
        scores = self._scores_of(embeddings, params.score, is_relative=params.floor is None)
        if not np.isfinite(scores).all():
            raise TreadleError(
                "the scores of a text are not finite: its embedding holds NaN, infinity or huge numbers."
            )
        weights = apply_rule(scores, params)
        if params.rule == "top_k" and not (heard := embeddings.any((-1, -2))).all():
            weights[~heard] = apply_rule(scores[~heard], replace(params, rule="softmax"))  # not the first k
        return weights

    def compare(self, embeddings: Floats, params: RoutingParams) -> Comparison:
        """Return what `weigh` makes weights from, each (..., N), of embeddings (..., K, D)."""
        return Comparison(self._scores_of(embeddings, "cosine"), self._scores_of(embeddings, params.score))

    def _scores_of(self, embeddings: Floats, score: Score, *, is_relative: bool = False) -> Floats:
        """Return the scores (..., N) of texts, each the weighted mean of its views (..., K, D)."""
        shares = SHARES[embeddings.shape[-2]]
        if score != "lda" or not self.names:
            return shares @ self.centroids.score(embeddings, score)  # of (..., K, N)
        evidence = shares @ self.centroids.evidence(embeddings)
        return evidence if is_relative else log_softmax(evidence)

    def fixed_weights(self, params: RoutingParams) -> Floats:
        """Return the weights (N,) of params whose rule is `fixed`; a name that does not exist is an AdapterError."""
        fixed = params.fixed or {}
        unknown = [unknown_name("adapter", name, self.names) for name in fixed if name not in self.names]
        if unknown:
            raise AdapterError(unknown[0] if len(unknown) == 1 else problem_list("fixed weights:", unknown))
        return np.array([fixed.get(name, 0.0) for name in self.names], np.float32)

    def trace(
        self, pieces: Sequence[str], prompt_tokens: int, params: RoutingParams, *, ends: Sequence[int] | None = None
    ) -> Floats:
        """Return the weights (T, N) under which each of T tokens is read, from the text that the tokens add.

        The same numbers as the engine's step by step, computed at once: the forward pass over a finished text with
        these weights is what cached decoding did.

        Args:
            pieces: (T,) the text of each token, or that of a chat's prompt and of the tokens behind it.
            prompt_tokens: how many of the tokens are the prompt.
            params: how weights are made.
            ends: of a chat's prompt, how many of the pieces have been read with each token (`num_pieces`).
        """
        if params.rule == "fixed":
            length = len(pieces) if ends is None else len(pieces) - ends[-1] + prompt_tokens
            return np.tile(self.fixed_weights(params), (length, 1))
        embeddings, decisions = self.decisions(pieces, prompt_tokens, params, ends=ends)
        return self.weigh(embeddings, params)[decisions]

    def trace_comparison(
        self, pieces: Sequence[str], prompt_tokens: int, params: RoutingParams, *, ends: Sequence[int] | None = None
    ) -> Comparison | None:
        """Return what `trace` makes the weights from, each (T, N); None where they are fixed."""
        if params.rule == "fixed":
            return None
        embeddings, decisions = self.decisions(pieces, prompt_tokens, params, ends=ends)
        compared = self.compare(embeddings, params)
        return Comparison(compared.cosines[decisions], compared.scores[decisions])

    def decisions(
        self, pieces: Sequence[str], prompt_tokens: int, params: RoutingParams, *, ends: Sequence[int] | None = None
    ) -> tuple[Floats, NDArray[np.int64]]:
        """Return the embeddings (decisions, K, D) that decide over T tokens, and which of them each token has (T,)."""
        num_tokens = len(pieces) if ends is None else len(pieces) - ends[-1] + prompt_tokens
        tokens = [decision_length(position, prompt_tokens, params) for position in range(num_tokens)]
        lengths = tokens if ends is None else [num_pieces(length, ends) for length in tokens]
        wanted = sorted(set(lengths))
        text = RunningText(self, params)
        prompt = num_pieces(prompt_tokens, ends)
        snapshots = [views for length in wanted if (views := text.decide(pieces, length, prompt)) is not None]
        return finish_views(self.embedder, snapshots), np.searchsorted(wanted, lengths)


def fit(
    samples: Mapping[str, Sequence[str | Sample]],
    embedder: Embedder | str,
    params: RoutingParams | None = None,
    *,
    fitted: Sequence[Centroids] = (),
) -> Router:
    """Make a router from sample texts of each adapter; nothing is trained.

    Args:
        samples: adapter name -> texts of the kind it was trained for, or `Sample`s, which tell prompt and answer
            apart; tens are enough. Each becomes several texts (`treadle.routing.samples.sample_texts`).
        embedder: an Embedder, a model2vec folder, or the name of a sentence-transformers model.
        params: the routing params to use by default.
        fitted: centroids of further adapters, made by the same embedder (`treadle.bundle.centroid_files`).
    """
    if not samples and not fitted:
        raise OptionError("fit needs sample texts of at least one adapter.")
    loaded = load_embedder(embedder) if isinstance(embedder, str) else embedder
    centroids = Centroids.empty(loaded.id, loaded.dim)
    problems: list[str] = []
    own = collect(problems, [partial(centroid_of, name, texts, loaded) for name, texts in samples.items()])
    if problems:
        raise OptionError(problems[0] if len(problems) == 1 else problem_list("the samples:", problems))
    for each in (*own, *fitted):
        centroids = centroids.join(each)
    return Router(centroids, loaded, params or RoutingParams())
