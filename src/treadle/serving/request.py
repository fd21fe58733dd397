"""Checks the sizes in the routing that a request asks for, the same in every server."""

from treadle.common.errors import shown
from treadle.common.params import RoutingParams

MAX_WEIGHT = 100
"""The largest weight of an adapter; larger ones make activations overflow."""
MAX_COUNT = 1_000_000
"""The most tokens or adapters that an option of a request may name."""


def size_problems(params: RoutingParams) -> list[str]:
    """Return the values that a request may not give, because they would overflow in its arithmetic."""
    given = {name: getattr(params, name) for name in ("every", "window", "top_k")}
    limits = dict.fromkeys(given, MAX_COUNT)
    given |= {f"fixed.{name}": weight for name, weight in (params.fixed or {}).items()}
    return [
        f"{name}: got {shown(value)}; allowed: at most {limits.get(name, MAX_WEIGHT)}"
        for name, value in given.items()
        if value is not None and value > limits.get(name, MAX_WEIGHT)
    ]
