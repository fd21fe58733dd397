"""The routing that a request asks for: its options over the bundle's default, the same in every server."""

from collections.abc import Mapping
from typing import Any

from treadle.common.errors import shown
from treadle.common.options import read_options
from treadle.common.params import RoutingParams

LARGEST_WEIGHT = 100
"""Of an adapter; larger ones make activations overflow."""
LARGEST_COUNT = 1_000_000
"""Tokens or adapters that an option of a request may name."""


def requested(default: RoutingParams, options: Mapping[str, Any]) -> RoutingParams:
    """Return `default` with a request's options over it; `fixed` alone implies its rule.

    Raises:
        OptionError: an option does not exist, cannot be read, or does not fit the others.
    """
    given = dict(options)
    if given.get("fixed") is not None:
        given = {"rule": "fixed", **given}  # nobody would give both
    elif default.fixed is not None and given.get("rule", "fixed") != "fixed":
        given = {"fixed": None, **given}
    return read_options(RoutingParams, given, onto=default)


def too_large(params: RoutingParams) -> list[str]:
    """Return the values that a request may not give, because they would overflow in the arithmetic of its row."""
    given = {name: getattr(params, name) for name in ("every", "window", "recent", "top_k")}
    limits = dict.fromkeys(given, LARGEST_COUNT)
    given |= {f"fixed.{name}": weight for name, weight in (params.fixed or {}).items()}
    return [
        f"{name}: got {shown(value)}; allowed: at most {limits.get(name, LARGEST_WEIGHT)}"
        for name, value in given.items()
        if value is not None and value > limits.get(name, LARGEST_WEIGHT)
    ]
