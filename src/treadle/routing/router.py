"""Turns texts into adapter weights: the scores of the centroids, then a rule.

Everything here is closed form on small numpy arrays: no gradient, no torch, no model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from treadle.common.errors import AdapterError, OptionError, TreadleError, collect, one_or_list, unknown_name
from treadle.common.params import RoutingParams, Score
from treadle.routing.centroids import Centroids, Floats, log_softmax
from treadle.routing.embedder import Embedder, load_embedder
from treadle.routing.fitting import centroid_of
from treadle.routing.rules import apply_rule
from treadle.routing.samples import Sample
from treadle.routing.schedule import DecisionCursor, finish_views
from treadle.routing.segmentation import last_topic_start

RECENT_SHARE = 0.75
"""Share of a running text's score from its recent tokens; chosen on mixed validation streams."""
SHARES = {1: np.ones(1, np.float32), 2: np.array([1 - RECENT_SHARE, RECENT_SHARE], np.float32)}
"""Share of the score from each view of a text, by the number of views K."""


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
        counted = [text[self.topic_start(text, params) :] for text in texts]
        return self.weigh(self.embedder.encode(counted)[:, None], params)

    def topic_start(self, text: str, params: RoutingParams) -> int:
        """Return where the last topic of a prompt begins, as an index of characters; see `RoutingParams.change`."""
        if params.change is None or params.score != "lda" or params.window is not None or params.rule == "fixed":
            return 0
        return last_topic_start(text, self._log_posteriors, params.change) if len(self.names) > 1 else 0

    def _log_posteriors(self, texts: Sequence[str]) -> Floats:
        return self.centroids.score(self.embedder.encode(texts), "lda")

    def scores(self, texts: Sequence[str], params: RoutingParams | None = None) -> Floats:
        """Return the scores (B, N) float32 of B whole texts, before any rule."""
        return self.centroids.score(self.embedder.encode(texts), (params or self.params).score)

    def weigh(self, embeddings: Floats, params: RoutingParams) -> Floats:
        """Return the weights (..., N) of texts under params whose rule is not `fixed`.

        A text without any known word weighs all adapters alike.

        Args:
            embeddings: (..., K, D) of the K views of each text (`DecisionCursor`), the recent tokens last.
            params: score and rule.
        """
        # rules look at differences of log-posteriors only: what all adapters have in common may stay away
        scores = self._scores_of(embeddings, params.score, is_relative=True)
        if not np.isfinite(scores).all():
            raise TreadleError(
                "the scores of a text are not finite: its embedding holds NaN, infinity or huge numbers."
            )
        weights = apply_rule(scores, params)
        if params.rule == "top_k" and not (heard := embeddings.any((-1, -2))).all():
            weights[~heard] = apply_rule(scores[~heard], replace(params, rule="softmax"))  # not the first k
        return weights

    def compare(self, embeddings: Floats, params: RoutingParams) -> Comparison:
        """Compare embeddings (..., K, D) with the centroids, each result (..., N): `weigh` makes weights from these."""
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
            raise AdapterError(one_or_list("fixed weights:", unknown))
        return np.array([fixed.get(name, 0.0) for name in self.names], np.float32)

    def check(self, params: RoutingParams) -> None:
        """Raise a TreadleError if these adapters do not allow the params: an unknown name, or a score that fails."""
        if params.rule == "fixed":
            self.fixed_weights(params)
        else:
            self.weigh(np.zeros((1, 1, self.embedder.dim), np.float32), params)

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
        embeddings, decisions = self.decisions(pieces, prompt_tokens, params, ends=ends)
        return self.weigh(embeddings, params)[decisions]

    def trace_comparison(
        self, pieces: Sequence[str], prompt_tokens: int, params: RoutingParams, *, ends: Sequence[int] | None = None
    ) -> Comparison | None:
        """Compare the text of each of T tokens with the centroids, (T, N); None under fixed weights."""
        if params.rule == "fixed":
            return None
        embeddings, decisions = self.decisions(pieces, prompt_tokens, params, ends=ends)
        compared = self.compare(embeddings, params)
        return Comparison(compared.cosines[decisions], compared.scores[decisions])

    def decisions(
        self, pieces: Sequence[str], prompt_tokens: int, params: RoutingParams, *, ends: Sequence[int] | None = None
    ) -> tuple[Floats, NDArray[np.int64]]:
        """Return the embeddings (decisions, K, D) that decide over T tokens, and which of them each token has (T,)."""
        cursor = DecisionCursor(self, params, pieces, prompt_tokens, ends)
        decided = cursor.decide(cursor.num_tokens)
        starts = [start for start, _ in decided]
        which = np.searchsorted(starts, np.arange(cursor.num_tokens), "right") - 1
        return finish_views(self.embedder, [views for _, views in decided]), which


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
        raise OptionError(one_or_list("the samples:", problems))
    for each in (*own, *fitted):
        centroids = centroids.join(each)
    return Router(centroids, loaded, params or RoutingParams())
