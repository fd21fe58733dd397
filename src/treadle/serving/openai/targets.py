"""Finds a request's target: the routed model, one adapter or the base, and the routing."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from treadle.bundle.bundle import Bundle
from treadle.common.errors import OptionError, OptionProblem, shown, unknown_name
from treadle.common.options import meanings
from treadle.common.params import RoutingParams, read_routing
from treadle.engine.engine import Engine
from treadle.routing.router import Router
from treadle.serving.openai.bodies import Json
from treadle.serving.openai.failures import MAX_LISTED_PROBLEMS, Problem, Problems, cut
from treadle.serving.openai.keys import Caller
from treadle.serving.openai.params import BASE, ServeParams
from treadle.serving.request import size_problems

AUTO = "auto"
TREADLE_FIELDS = ("adapters", "trace")
"""Fields of `treadle` besides the routing options."""
MAX_ROUTERS, MAX_ROUTER_BYTES = 256, 64 << 20
"""Limits of the kept routers: requests choose from 2**N sets of adapters."""


class Routers:
    """Makes routers of chosen adapters, and keeps the last used ones until the engine's adapters change."""

    def __init__(self, engine: Engine, max_routers: int = MAX_ROUTERS) -> None:
        self._engine = engine
        self._max_routers = max_routers
        self._whole = engine.router
        self._made: OrderedDict[frozenset[str], Router] = OrderedDict()  # the last used last
        self._turn = threading.Lock()  # requests are prepared in several threads

    def __len__(self) -> int:
        """Return how many routers are kept."""
        return len(self._made)

    def among(self, names: frozenset[str] | None) -> Router:
        """Return the router of some of the engine's adapters, by name; None = of all."""
        whole = self._engine.router
        if names is None or names >= set(whole.names):
            return whole
        key = names & set(whole.names)
        with self._turn:
            if self._whole is not whole:
                self._whole = whole
                self._made.clear()
            router = self._made.pop(key, None) or whole.among(key)
            self._made[key] = router
            most = min(self._max_routers, max(1, MAX_ROUTER_BYTES // max(1, router.centroids.num_bytes)))
            while len(self._made) > most:
                self._made.popitem(last=False)
        return router


@dataclass(frozen=True)
class Target:
    """How a request is routed.

    Attributes:
        routing: the routing of all its sequences.
        adapters: names of the adapters that may take part; None = all.
        has_trace: whether each choice carries its weights and what they were made from.
    """

    routing: RoutingParams
    adapters: frozenset[str] | None
    has_trace: bool


@dataclass(frozen=True)
class Targets:
    """The models that requests can name on one server."""

    engine: Engine
    routers: Routers
    names: tuple[str, ...]  # of the routed model

    def models(self, caller: Caller) -> list[str]:
        """Return the models that a caller may name: the routed model, its adapters, the base."""
        return [*self.names, *self.adapters(caller), BASE]

    def adapters(self, caller: Caller) -> list[str]:
        """Return the adapters that a caller may use, in the engine's order."""
        allowed = caller.adapters
        return [name for name in self.engine.adapter_names if allowed is None or name in allowed]

    def unknown(self, model: str, caller: Caller) -> Problems:
        """Return the problem of a model that does not exist or that the caller may not use, if so."""
        names = self.models(caller)
        if model in names:
            return []
        return [Problem("model", unknown_name("model", model, names), status=404, code="model_not_found")]

    def read(self, model: str, given: Json | None, problems: Problems, caller: Caller) -> Target:
        """Return the target of a request's fields `model` and `treadle`, and add to its problems.

        If the model does not exist, the options are read as the routed model's.
        """
        unknown = self.unknown(model, caller)
        problems += unknown
        options = dict(given or {})
        has_trace = options.pop("trace", False)
        if not isinstance(has_trace, bool):
            problems.append(Problem.of("treadle.trace", has_trace, "true or false"))
        if model not in self.names and not unknown:
            if options:
                places = ", ".join(f"treadle.{name}" for name in list(options)[:MAX_LISTED_PROBLEMS])
                what = f"{cut(places)}: model {shown(model)} is not routed"
                problems.append(Problem("treadle", f"{what}; allowed: 'trace', or model {AUTO!r}"))
            fixed = RoutingParams.base() if model == BASE else RoutingParams.one(model)
            return Target(fixed, caller.adapters, bool(has_trace))
        adapters = self._chosen(options.pop("adapters", None), problems, caller)
        params = self._params(options, problems)
        takes_part = [name for name in self.adapters(caller) if adapters is None or name in adapters]
        problems += _unknown_names("treadle.fixed", list(params.fixed or {}), takes_part)
        if not problems:
            try:
                self.engine.check_routing([params], self.routers.among(adapters))
            except OptionError as error:
                problems += [_worded(problem, options) for problem in error.problems]
        return Target(params, adapters, bool(has_trace))

    def _chosen(self, chosen: Any, problems: Problems, caller: Caller) -> frozenset[str] | None:
        """Return the adapters that may take part: named by the request and allowed for the caller."""
        if chosen is None:
            return caller.adapters
        names = self.adapters(caller)
        if not isinstance(chosen, list) or not all(isinstance(name, str) for name in cast(list[Any], chosen)):
            problems.append(Problem.of("treadle.adapters", chosen, f"a list of {', '.join(names)}"))
            return caller.adapters
        given = cast(list[str], chosen)
        problems += _unknown_names("treadle.adapters", given, names)
        return frozenset(given) & frozenset(names)

    def _params(self, options: Json, problems: Problems) -> RoutingParams:
        """Return the bundle's routing with a request's options over it."""
        default, known = self.engine.router.params, meanings(RoutingParams)
        unknown = [name for name in options if name not in known]
        allowed = [*known, *TREADLE_FIELDS]
        problems += [
            Problem("treadle", f"{cut(f'treadle.{name}')}: {unknown_name('option', name, allowed)}") for name in unknown
        ]
        try:
            params = read_routing({name: value for name, value in options.items() if name in known}, default)
        except OptionError as error:
            problems += [_worded(problem, options) for problem in error.problems]
            return default
        problems += [Problem("treadle", f"treadle.{problem}") for problem in size_problems(params)]
        return params


def _unknown_names(place: str, given: Sequence[str], names: Sequence[str]) -> Problems:
    """Return a problem for each name that is no adapter's."""
    unknown = list(dict.fromkeys(name for name in given if name not in names))
    worded = [
        Problem(place, f"{place}: {unknown_name('adapter', name, names)}") for name in unknown[:MAX_LISTED_PROBLEMS]
    ]
    return [*worded, Problem.others(len(unknown) - len(worded))] if len(unknown) > len(worded) else worded


def _worded(problem: OptionProblem, options: Json) -> Problem:
    """Return the problem of an option in the words of a JSON document."""
    if not problem.options:
        return Problem("treadle", f"treadle: {problem.text}")
    place, *others = [f"treadle.{option}" for option in problem.options]
    if not problem.allowed:
        return Problem(place, f"{cut(place)}: {problem.text}")
    given = shown(options.get(problem.options[0], problem.given)) + (f" with {', '.join(others)}" if others else "")
    allowed = problem.allowed.replace("or none", "or null")
    return Problem(place, f"{cut(place)}: got {given}; allowed: {allowed}")


def model_name(bundle: Bundle, params: ServeParams) -> str:
    """Return the name of the routed model besides auto; an OptionError says that it names something else, too."""
    name = params.model_name or bundle.folder.resolve().name
    if name in (*bundle.router.names, BASE):
        what = "the base model" if name == BASE else "an adapter"
        given = f"model_name {name!r}" if params.model_name else f"model_name is not given, and the folder's {name!r}"
        raise OptionError(f"{given} is what requests call {what}; give another one with --model-name.")
    return name
