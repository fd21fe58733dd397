"""Rules make weights from scores: pure functions, (..., N) to (..., N)."""

import numpy as np

from treadle.common.params import DEFAULT_TEMPERATURE, RoutingParams
from treadle.routing.centroids import Floats

MIN_WEIGHT_SUM = 1e-30
"""The least divisor of weights, so that a row of zeros stays a row of zeros."""


def softmax(scores: Floats, temperature: float = 1.0) -> Floats:
    """Return the softmax of scores / temperature; -inf gets 0, and a row that is -inf throughout is 0 throughout."""
    top = scores.max(-1, keepdims=True)
    raised = np.exp((scores - np.where(np.isfinite(top), top, 0.0)) / temperature)
    return (raised / np.maximum(raised.sum(-1, keepdims=True), MIN_WEIGHT_SUM)).astype(np.float32)


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
        weights = weights / np.maximum(weights.max(-1, keepdims=True), MIN_WEIGHT_SUM)
    return weights
