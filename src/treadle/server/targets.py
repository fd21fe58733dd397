"""Whom a request means: the routed model, one adapter or the base, and with which routing."""

from dataclasses import dataclass
from typing import Any, cast

from treadle.errors import OptionError, TreadleError, unknown_name
from treadle.generate import Engine
from treadle.params import RoutingParams
from treadle.requested import requested, too_large
from treadle.server.bodies import Json, shown
from treadle.server.failures import Failure, Problems
from treadle.server.keys import Caller
from treadle.server.routers import Routers

AUTO, BASE = "auto", "base"


@dataclass(frozen=True)
class Target:
    """How a request is routed.

    Attributes:
        routing: of all its sequences.
        adapters: names of those that may take part; None = all.
        has_trace: whether each choice carries its weights and what they were made from.
    """

    routing: RoutingParams
    adapters: frozenset[str] | None
    has_trace: bool


@dataclass(frozen=True)
class Targets:
    """What can be named on one server."""

    engine: Engine
    routers: Routers
    names: tuple[str, ...]  # of the routed model

    def models(self, caller: Caller) -> list[str]:
        """Return what a caller may name as model: the routed one, its adapters, the base."""
        return [*self.names, *self.adapters(caller), BASE]

    def adapters(self, caller: Caller) -> list[str]:
        """Return the adapters that a caller may use, in the order of the engine."""
        allowed = caller.adapters
        return [name for name in self.engine.adapter_names if allowed is None or name in allowed]

    def read(self, model: str, given: Json | None, problems: Problems, caller: Caller) -> Target:
        """Return whom a request means by its fields `model` and `treadle`; adds to its problems.

        Raises:
            Failure: 404, the model does not exist or the caller may not use it.
        """
        names = self.models(caller)
        if model not in names:
            raise Failure(404, unknown_name("model", model, names), param="model", code="model_not_found")
        options = dict(given or {})
        has_trace = options.pop("trace", False)
        if not isinstance(has_trace, bool):
            problems.append(("treadle", f"treadle.trace: got {shown(has_trace)}; allowed: true or false"))
        if model not in self.names:
            if options:
                what = f"treadle.{', '.join(options)}: model {model!r} is not routed"
                problems.append(("treadle", f"{what}; allowed: 'trace', or model {AUTO!r}"))
            fixed = RoutingParams.base() if model == BASE else RoutingParams.one(model)
            return Target(fixed, caller.adapters, bool(has_trace))
        adapters = self._chosen(options.pop("adapters", None), problems, caller)
        params = self._params(options, problems)
        if not problems:
            try:
                self.engine.check_routing([params], self.routers.among(adapters))
            except TreadleError as error:
                problems.append(("treadle", f"treadle: {error}"))
        return Target(params, adapters, bool(has_trace))

    def _chosen(self, chosen: Any, problems: Problems, caller: Caller) -> frozenset[str] | None:
        """Return the adapters that may take part: those that the request names, of those that the caller may use."""
        if chosen is None:
            return caller.adapters
        names = self.adapters(caller)
        if not isinstance(chosen, list) or not all(isinstance(name, str) for name in cast(list[Any], chosen)):
            allowed = ", ".join(names)
            problems.append(("treadle", f"treadle.adapters: got {shown(chosen)}; allowed: a list of {allowed}"))
            return caller.adapters
        given = cast(list[str], chosen)
        problems += [
            ("treadle", f"treadle.adapters: {unknown_name('adapter', name, names)}")
            for name in given
            if name not in names
        ]
        return frozenset(given)

    def _params(self, options: Json, problems: Problems) -> RoutingParams:
        """Return the bundle's routing with a request's options over it."""
        default = self.engine.router.params
        try:
            params = requested(default, options)
            problems += [("treadle", f"treadle.{problem}") for problem in too_large(params)]
            return params
        except OptionError as error:
            problems.append(("treadle", f"treadle: {error}; got {shown(options)}"))
            return default
