"""Rules make weights from scores: pure functions, (..., N) to (..., N)."""

from dataclasses import replace

import numpy as np

from treadle.common.params import COSINE_TEMPERATURE, RoutingParams
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
    return softmax(keep_largest(scores, k), temperature)


def keep_largest(scores: Floats, k: int) -> Floats:
    """Return the scores with -inf for all but the k largest of each row."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    keep = np.zeros(scores.shape, bool)
    np.put_along_axis(keep, order[..., :k], True, -1)
    return np.where(keep, scores, -np.inf).astype(np.float32)


def apply_rule(scores: Floats, params: RoutingParams, temperature: Floats | None = None) -> Floats:
    """Return the weights (..., N) of scores (..., N) under a rule other than `fixed`.

    Args:
        scores: of the adapters.
        params: the rule and its options.
        temperature: (..., 1) divides the scores if the params name none; None = that of cosines.
    """
    if scores.shape[-1] == 0:
        return scores
    if params.rule == "boosted":
        return boosted(scores, params.boost)
    own = COSINE_TEMPERATURE if temperature is None else temperature
    divided = scores / (own if params.temperature is None else params.temperature)
    return top_k(divided, params.top_k) if params.rule == "top_k" else softmax(divided)


def apply_rule_beside_base(scores: Floats, params: RoutingParams, temperature: Floats) -> Floats:
    """Return the weights (..., N) of scores (..., N + 1) whose last column is the base's.

    What a row lacks to 1 is the base's share.
    Under `top_k` the base is none of the k.
    """
    adapters, base = scores[..., :-1], scores[..., -1:]
    if params.rule == "top_k":
        adapters = keep_largest(adapters, params.top_k)
    return apply_rule(np.concatenate([adapters, base], -1), replace(params, rule="softmax"), temperature)[..., :-1]
