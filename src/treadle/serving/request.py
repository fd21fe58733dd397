"""Reads the routing that a request asks for: its options over the bundle's default, the same in every server."""

from collections.abc import Mapping
from typing import Any

from treadle.common.errors import shown
from treadle.common.options import read_options
from treadle.common.params import RoutingParams

MAX_WEIGHT = 100
"""The largest weight of an adapter; larger ones make activations overflow."""
MAX_COUNT = 1_000_000
"""The most tokens or adapters that an option of a request may name."""


def requested_routing(default: RoutingParams, options: Mapping[str, Any]) -> RoutingParams:
    """Return `default` with a request's options over it; `fixed` alone implies its rule.

    Raises:
        OptionError: an option does not exist, cannot be read, or does not fit the others.
    """
    given = dict(options)
    if given.get("fixed") is not None:
        given = {"rule": "fixed", **given}  # the caller gives one of them
    elif default.fixed is not None and given.get("rule", "fixed") != "fixed":
        given = {"fixed": None, **given}
    return read_options(RoutingParams, given, onto=default)


def size_problems(params: RoutingParams) -> list[str]:
    """Return the values that a request may not give, because they would overflow in its arithmetic."""
    given = {name: getattr(params, name) for name in ("every", "window", "recent", "top_k")}
    limits = dict.fromkeys(given, MAX_COUNT)
    given |= {f"fixed.{name}": weight for name, weight in (params.fixed or {}).items()}
    return [
        f"{name}: got {shown(value)}; allowed: at most {limits.get(name, MAX_WEIGHT)}"
        for name, value in given.items()
        if value is not None and value > limits.get(name, MAX_WEIGHT)
    ]
