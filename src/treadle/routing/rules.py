"""Rules make weights from scores: pure functions, (..., N) to (..., N)."""

import numpy as np

from treadle.common.params import DEFAULT_TEMPERATURE, RoutingParams
from treadle.routing.centroids import Floats


def softmax(scores: Floats, temperature: float = 1.0) -> Floats:
    """Return the softmax of scores / temperature; a score of -inf gets 0, beside a finite one."""
    raised = np.exp((scores - scores.max(-1, keepdims=True)) / temperature)
    return (raised / raised.sum(-1, keepdims=True)).astype(np.float32)


def boosted(cosines: Floats, boost: float = 4.0) -> Floats:
    """Return the paper's weights: the largest cosine is multiplied by `boost`, then softmax.

    The paper's code multiplies whatever its sign, which pushes a negative largest cosine down. Here a negative one is
    divided instead, so that boosting always helps the nearest adapter.
    """
    top = cosines.max(-1, keepdims=True)
    lifted = np.where(top < 0, top / boost, top * boost)
    first = np.arange(cosines.shape[-1]) == cosines.argmax(-1)[..., None]
    return softmax(np.where(first, lifted, cosines))


def top_k(scores: Floats, k: int, temperature: float = 1.0) -> Floats:
    """Return the softmax of the k largest scores and 0 elsewhere; ties go to the earlier adapter."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    keep = np.zeros(scores.shape, bool)
    np.put_along_axis(keep, order[..., :k], True, -1)
    return softmax(np.where(keep, scores, -np.inf).astype(np.float32), temperature)


def apply_rule(scores: Floats, params: RoutingParams) -> Floats:
    """Return the weights (..., N) of scores (..., N) under a rule other than `fixed`."""
    if scores.shape[-1] == 0:
        return scores
    temperature = params.temperature or DEFAULT_TEMPERATURE[params.score]
    if params.rule == "boosted":
        return boosted(scores, params.boost)
    if params.rule == "top_k":
        return top_k(scores, params.top_k, temperature)
    return softmax(scores, temperature)
