"""Turns texts into adapter weights: centroids, scores, rules, and when a weight is decided.

Everything here is closed form on small numpy arrays: no gradient, no torch, no model. Weights are a pure function of
the centroids, the params and the text, which is what lets a cached prefix, a resumed row and another process agree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from treadle.centroids import Centroids, Floats, Score
from treadle.embed import Embedder, load_embedder
from treadle.errors import AdapterError, OptionError, problem_list, unknown_name
from treadle.options import option

Rule = Literal["boosted", "softmax", "top_k", "fixed"]
Combine = Literal["sum", "linear", "paper"]

DEFAULT_TEMPERATURE: dict[Score, float] = {"lda": 2.4, "cosine": 0.05, "centred": 0.05}
"""Log-posteriors are overconfident, cosines lie close together: for `lda`, the least log-loss on held-out prompts."""


@dataclass(frozen=True)
class RoutingParams:
    """How weights are made from the text, and when. The same fields are flags, request fields and result keys."""

    score: Score = option("lda", "text against centroids: cosine (the paper), centred, or lda")
    rule: Rule = option("softmax", "scores to weights: boosted (the paper), softmax, top_k or fixed")
    boost: float = option(4.0, "boosted: factor on the largest cosine")
    temperature: float | None = option(None, "softmax, top_k: divides the scores; none = 2.4 for lda, 0.05 for cosines")
    top_k: int = option(2, "top_k: how many adapters keep a weight")
    fixed: Mapping[str, float] | None = option(None, "fixed: name=weight pairs; adapters not named get 0")
    unit_scale: bool = option(False, "divide by the largest weight: the nearest acts at its trained strength")
    floor: float | None = option(None, "adapters whose score is below get 0; where all are, the base answers")
    every: int | None = option(2, "re-weigh every so many generated tokens; none = once, from the prompt")
    window: int | None = option(None, "the embedder sees the last so many tokens; none = all")
    prefill: Literal["prompt", "causal"] = option(
        "prompt", "prompt tokens: weights of the whole prompt, or of the text so far"
    )
    past: Literal["keep", "recompute"] = option("keep", "on new weights: keep cached keys and values, or read again")
    combine: Combine = option("sum", "sum (the true mixture), linear (PEFT >= 0.9) or paper (PEFT 0.4.0)")

    def __post_init__(self) -> None:
        """Check every field and the fields against each other; one message lists all problems."""
        if self.fixed is not None:
            object.__setattr__(self, "fixed", dict(self.fixed))
        if problems := [*self._choice_problems(), *self._number_problems(), *self._clashes()]:
            raise OptionError(problem_list("routing options:", problems))

    def _choice_problems(self) -> list[str]:
        choices = {"score": Score, "rule": Rule, "combine": Combine}
        allowed = {name: get_args(kind) for name, kind in choices.items()}
        allowed |= {"prefill": ("prompt", "causal"), "past": ("keep", "recompute")}
        return [
            unknown_name(name, str(getattr(self, name)), values)
            for name, values in allowed.items()
            if getattr(self, name) not in values
        ]

    def _number_problems(self) -> list[str]:
        problems = [
            f"{name} must be a number above 0, not {getattr(self, name)!r}"
            for name in ("boost", "temperature")
            if (value := getattr(self, name)) is not None and not (np.isfinite(value) and value > 0)
        ]
        problems += [
            f"{name} must be a whole number of at least 1, or none, not {getattr(self, name)!r}"
            for name in ("top_k", "every", "window")
            if (value := getattr(self, name)) is not None and (not isinstance(value, int) or value < 1)
        ]
        if self.floor is not None and not np.isfinite(self.floor):
            problems.append(f"floor must be a finite score, or none, not {self.floor!r}")
        bad = [name for name, weight in (self.fixed or {}).items() if not (np.isfinite(weight) and weight >= 0)]
        return problems + [f"fixed weight of {name!r} must be finite and not negative" for name in bad]

    def _clashes(self) -> list[str]:
        problems: list[str] = []
        if self.rule == "boosted" and self.score == "lda":
            problems.append("rule boosted multiplies a cosine; with score lda use rule softmax")
        if (self.rule == "fixed") != (self.fixed is not None):
            problems.append("rule fixed and fixed weights go together: give both or neither")
        if self.prefill == "causal" and self.every is None:
            problems.append(
                "prefill causal decides in blocks of `every` tokens; every none decides once, from the prompt"
            )
        if self.prefill == "causal" and self.past == "recompute":
            problems.append("past recompute reads the prompt again under later weights; it cannot be causal")
        return problems

    @classmethod
    def paper(cls) -> "RoutingParams":
        """Return what the paper's code computes; use a bundle whose embedder is the sentence embedder."""
        return cls(score="cosine", rule="boosted", boost=4.0, every=2, past="recompute", combine="paper")

    @classmethod
    def base(cls) -> "RoutingParams":
        """Return params under which no adapter acts."""
        return cls(rule="fixed", fixed={}, every=None)

    @classmethod
    def one(cls, name: str) -> "RoutingParams":
        """Return params under which one adapter acts alone, at the strength it was trained at."""
        return cls(rule="fixed", fixed={name: 1.0}, every=None)

    @classmethod
    def uniform(cls, names: Sequence[str]) -> "RoutingParams":
        """Return params under which every adapter of `names` has the same weight; the weights sum to 1."""
        return cls(rule="fixed", fixed={name: 1.0 / len(names) for name in names}, every=None)


def decision_length(position: int, prompt_tokens: int, params: RoutingParams) -> int:
    """Return how many tokens of the text decide the weights of the forward pass that reads `position`.

    With `prefill="prompt"` all prompt positions use the whole prompt, and after `every` generated tokens the text up
    to and including the newest decides. With `prefill="causal"` position p uses the text up to the first token of its
    block of `every`, so that the weights of a prefix never depend on what follows.
    """
    if params.rule == "fixed":
        return 0
    if params.prefill == "causal" and params.every is not None:
        return position // params.every * params.every + 1
    if params.every is None or position < prompt_tokens:
        return prompt_tokens
    return prompt_tokens + (position - prompt_tokens + 1) // params.every * params.every


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
        return self.weigh(self.embedder.encode(texts), params)

    def scores(self, texts: Sequence[str], params: RoutingParams | None = None) -> Floats:
        """Return the scores (B, N) float32 of B whole texts, before any rule."""
        return self.centroids.score(self.embedder.encode(texts), (params or self.params).score)

    def weigh(self, embeddings: Floats, params: RoutingParams) -> Floats:
        """Return the weights (..., N) of embeddings (..., D) under params whose rule is not `fixed`."""
        return apply_rule(self.centroids.score(embeddings, params.score), params)

    def fixed_weights(self, params: RoutingParams) -> Floats:
        """Return the weights (N,) of params whose rule is `fixed`; a name that does not exist is an AdapterError."""
        fixed = params.fixed or {}
        unknown = [unknown_name("adapter", name, self.names) for name in fixed if name not in self.names]
        if unknown:
            raise AdapterError(unknown[0] if len(unknown) == 1 else problem_list("fixed weights:", unknown))
        return np.array([fixed.get(name, 0.0) for name in self.names], np.float32)

    def trace(self, pieces: Sequence[str], prompt_tokens: int, params: RoutingParams) -> Floats:
        """Return the weights (T, N) under which each of T tokens is read, from the text that each token adds.

        The same numbers as the engine's step by step, computed at once: the forward pass over a finished text with
        these weights is what cached decoding did.
        """
        if params.rule == "fixed":
            return np.tile(self.fixed_weights(params), (len(pieces), 1))
        lengths = [decision_length(position, prompt_tokens, params) for position in range(len(pieces))]
        wanted = sorted(set(lengths))
        track = self.embedder.track(params.window)
        snapshots: list[Any] = []
        read = 0
        for length in wanted:
            track.extend(pieces[read:length])
            read = length
            snapshots.append(track.snapshot())
        weights = self.weigh(self.embedder.finish(snapshots), params)  # (decisions, N)
        index = {length: row for row, length in enumerate(wanted)}
        return weights[[index[length] for length in lengths]]


def fit(samples: Mapping[str, Sequence[str]], embedder: Embedder | str, params: RoutingParams | None = None) -> Router:
    """Make a router from sample texts of each adapter; nothing is trained.

    Args:
        samples: adapter name -> texts of the kind it was trained for; tens are enough.
        embedder: an Embedder, a model2vec folder, or the name of a sentence-transformers model.
        params: the routing params to use by default.
    """
    if not samples:
        raise OptionError("fit needs sample texts of at least one adapter.")
    loaded = load_embedder(embedder) if isinstance(embedder, str) else embedder
    centroids = Centroids.empty(loaded.id, loaded.dim)
    for name, texts in samples.items():
        if isinstance(texts, str):
            raise OptionError(f"samples of {name!r} are one text; give a list of texts.")
        centroids = centroids.add(name, loaded.encode(texts) if len(texts) else np.zeros((0, loaded.dim), np.float32))
    return Router(centroids, loaded, params or RoutingParams())
