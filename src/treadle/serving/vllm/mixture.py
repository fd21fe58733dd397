"""One process's view of the adapters: their slots, how texts are routed, and the options of requests.

The API server, the scheduler and `/treadle/route` each hold a mixture of the same bundle. It holds no factors: those
are in the workers (`treadle.serving.vllm.stacks`). Adapters join a mixture and leave it. Nothing here imports vLLM.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from treadle.bundle.bundle import NAME, RESERVED, Bundle, read_bundle
from treadle.bundle.centroid_files import read_centroid
from treadle.common.errors import (
    LONGEST_NAME,
    AdapterError,
    BundleError,
    OptionError,
    problem_list,
    shown,
    unknown_name,
)
from treadle.common.params import RoutingParams, read_routing
from treadle.lora.adapter import Adapter, read_adapter
from treadle.lora.names import warn_of_bases
from treadle.routing.centroids import Centroids, Floats
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.fitting import centroid_of
from treadle.routing.router import Router
from treadle.routing.states import uses_states
from treadle.serving.request import size_problems
from treadle.serving.vllm.params import KEY, NO_STATES_REASON, SUM_ONLY_REASON, PluginParams

AUTO, BASE = "auto", "base"
FIELDS = frozenset(each.name for each in fields(RoutingParams))
"""Options that a request's object may set; an adapter of such a name is asked for by `fixed`."""


@dataclass(frozen=True)
class Mixture:
    """Adapters in slots, and the router over them; a change makes a new one, and requests keep theirs.

    Attributes:
        router: decides the weights (N,), in the order of its N axis.
        slots: (N,) the slot of each adapter.
        scales: (N,) the factor of each adapter's update.
        identities: (N,) a digest of each adapter's factors.
        num_slots: the number of slots, taken or free.
    """

    router: Router
    slots: tuple[int, ...]
    scales: tuple[float, ...]
    identities: tuple[str, ...]
    num_slots: int

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order of every N axis."""
        return self.router.names

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the adapters and their order: it is part of the hash of every block of keys and values.

        Weights (N,) follow it in the hash, so the order counts: an adapter that leaves and comes back is the last.
        """
        parts = list(zip(self.slots, self.identities, self.scales, strict=True))
        return hashlib.sha256(repr((parts, self.router.embedder.id)).encode()).hexdigest()[:16]

    @cached_property
    def _columns(self) -> list[int]:
        return list(self.slots)

    def gates(self, weights: Floats) -> Floats:
        """Return the gates (P, slots) of weights (P, N): each weight times its adapter's scale, 0 in free slots."""
        gates = np.zeros((len(weights), self.num_slots), np.float32)
        gates[:, self._columns] = weights * np.array(self.scales, np.float32)
        return gates

    def read_request(self, given: Any) -> RoutingParams:
        """Return the routing that a request asks for.

        Args:
            given: None or "auto" = the bundle's; "base" = no adapter; an adapter's name = that one alone;
                `{"math": 0.7, "code": 0.3}` = these weights; `{"every": 8, ...}` = fields of `RoutingParams` over the
                bundle's. Objects may come as JSON text, because vLLM's `vllm_xargs` take no objects.

        Raises:
            OptionError: it cannot be read, or these adapters do not allow it; lists every problem.
        """
        if isinstance(given, str) and given.lstrip().startswith("{"):
            given = _read_json(given)
        if given is None or given == AUTO:
            params = self.router.params
        elif given == BASE:
            params = RoutingParams.base()
        elif isinstance(given, str):
            if given not in self.names:
                raise OptionError(f"{KEY}: " + unknown_name("choice", given, self.choices()))
            params = RoutingParams.one(given)
        elif isinstance(given, Mapping):
            params = self._read_options(cast(Mapping[str, Any], given))
        else:
            raise OptionError(f"{KEY}: got {given!r}; allowed: {', '.join(self.choices())}, or an object of options")
        self.check(params)
        return params

    def choices(self) -> tuple[str, ...]:
        """Return the names that a request may ask for."""
        return (AUTO, BASE, *self.names)

    def _read_options(self, given: Mapping[str, Any]) -> RoutingParams:
        if given and all(name in self.names and name not in FIELDS for name in given):
            given = {"fixed": given, "every": None}  # weights by name
        try:
            params = read_routing(given, self.router.params)
        except OptionError as error:
            raise OptionError(f"{KEY}: {error}; got {json.dumps(dict(given), default=str)[:200]}") from error
        if problems := size_problems(params):
            raise OptionError(problem_list(f"{KEY}:", problems))
        return params

    def check(self, params: RoutingParams) -> None:
        """Raise an OptionError that lists everything these params ask for that cannot be done here."""
        problems: list[str] = []
        if params.past == "recompute":
            problems.append("past='recompute' reads the whole text again for each token; vLLM's cache cannot: use keep")
        if params.combine != "sum":
            problems.append(f"combine {params.combine!r}: {SUM_ONLY_REASON}")
        if uses_states(self.router.states, params):
            problems.append(f"states = true: {NO_STATES_REASON}: use states = false to route by the text alone")
        try:
            self.router.check(params)
        except (AdapterError, OptionError) as error:
            problems.append(str(error))
        if problems:
            raise OptionError(problem_list(f"{KEY}:", problems))


def open_bundle(params: PluginParams) -> tuple[Bundle, Mixture]:
    """Read a bundle and return it with its mixture.

    Raises:
        TreadleError: the bundle is damaged, or something in it cannot be done in vLLM; lists every problem.
    """
    bundle = read_bundle(params.bundle)
    problems = list(_problems(bundle, params))
    if problems:
        raise BundleError(problem_list(f"bundle {bundle.folder} cannot be blended in vLLM:", problems))
    adapters = by_router(bundle)
    mixture = Mixture(
        router=bundle.router,
        slots=tuple(range(len(adapters))),
        scales=tuple(main_scale(adapter) for adapter in adapters),
        identities=tuple(adapter.identity for adapter in adapters),
        num_slots=params.max_adapters or len(adapters),
    )
    mixture.check(bundle.router.params)
    return bundle, mixture


def by_router(bundle: Bundle) -> list[Adapter]:
    """Return the adapters in the order of the router's N axis."""
    return sorted(bundle.adapters, key=lambda adapter: bundle.router.names.index(adapter.name))


def _problems(bundle: Bundle, params: PluginParams) -> Iterable[str]:
    adapters = bundle.adapters
    if not isinstance(bundle.router.embedder, StaticEmbedder):
        yield (
            f"its embedder {bundle.router.embedder.id} runs a neural network for each decision, and the scheduler "
            "cannot wait for that: fit the bundle again with a static embedder (treadle fit --embedder FOLDER)"
        )
    if params.max_adapters is not None and len(adapters) > params.max_adapters:
        yield f"it has {len(adapters)} adapters; max_adapters is {params.max_adapters}"
    yield from filter(None, map(vector_problem, adapters))
    ranks = {adapter.name: largest_rank(adapter) for adapter in adapters}
    large = [f"{name} {rank}" for name, rank in ranks.items() if rank > (params.max_rank or rank)]
    if large:
        yield f"max_rank is {params.max_rank}; larger are: {', '.join(large)}"
    if bundle.router.params.combine != "sum":
        yield f"its default routing has combine {bundle.router.params.combine!r}: {SUM_ONLY_REASON}"
    if uses_states(bundle.router.states, bundle.router.params):
        yield (
            f'its default routing uses the base model\'s states: {NO_STATES_REASON}. Write "states": false under '
            "routing in its bundle.json to route by the text alone"
        )


@dataclass(frozen=True)
class Newcomer:
    """An adapter that joins a running server: its factors and its centroid, read and checked."""

    adapter: Adapter
    centroids: Centroids = field(repr=False)


def check_name(name: str, taken: Iterable[str]) -> None:
    """Raise an AdapterError if an adapter cannot join under a name: requests for it would be unclear.

    Args:
        name: the adapter's name.
        taken: names that mean something already.
    """
    problems: list[str] = []
    if name in taken:
        problems.append(f"{name!r} exists already; remove it first, or choose another name")
    if name in RESERVED:
        problems.append(f"{name!r} is reserved; so are {', '.join(each for each in RESERVED if each != name)}")
    if name in FIELDS:
        problems.append(f"{name!r} is an option of the routing")
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        problems.append(f"use letters, digits, '.', '_' and '-', at most {LONGEST_NAME}; got {shown(name)}")
    if problems:
        raise AdapterError(problem_list("adapter name:", problems))


def read_newcomer(
    mixture: Mixture, params: PluginParams, base: str, name: str, path: str, samples: Sequence[str] | None
) -> Newcomer:
    """Read an adapter that shall join, and check it against the mixture; nothing changes.

    Raises:
        TreadleError: lists what is wrong.
    """
    check_name(name, mixture.names)
    adapter = read_adapter(path, name)
    warn_of_bases([adapter], base)
    if problem := vector_problem(adapter):
        raise AdapterError(problem)
    if params.max_rank is not None and largest_rank(adapter) > params.max_rank:
        raise AdapterError(f"adapter {name!r} has rank {largest_rank(adapter)}; max_rank is {params.max_rank}")
    embedder = mixture.router.embedder
    if samples:
        own = centroid_of(name, samples, embedder, tails=mixture.router.tails)
    else:
        own = read_centroid(Path(path), name)
    mixture.router.centroids.join(own)
    return Newcomer(adapter, own)


def with_adapter(mixture: Mixture, newcomer: Newcomer, slot: int) -> Mixture:
    """Return the mixture with one more adapter, in a free slot; an AdapterError if the router then cannot decide."""
    made = replace(
        mixture,
        router=mixture.router.join(newcomer.centroids),
        slots=(*mixture.slots, slot),
        scales=(*mixture.scales, main_scale(newcomer.adapter)),
        identities=(*mixture.identities, newcomer.adapter.identity),
    )
    return _able_to_route(made, f"with {newcomer.adapter.name!r}")


def without_adapter(mixture: Mixture, name: str) -> Mixture:
    """Return the mixture without one adapter; its slot is free once no request uses it."""
    if name not in mixture.names:
        raise AdapterError(unknown_name("adapter", name, mixture.names))
    if name in (mixture.router.params.fixed or {}):
        raise AdapterError(f"adapter {name!r} has a weight in the default routing's `fixed`; it has to stay.")
    if len(mixture.names) == 1:
        raise AdapterError(f"adapter {name!r} is the last one; it has to stay.")
    keep = [index for index, other in enumerate(mixture.names) if other != name]
    made = replace(
        mixture,
        router=mixture.router.remove(name),
        slots=tuple(mixture.slots[index] for index in keep),
        scales=tuple(mixture.scales[index] for index in keep),
        identities=tuple(mixture.identities[index] for index in keep),
    )
    return _able_to_route(made, f"without {name!r}")


def _able_to_route(mixture: Mixture, how: str) -> Mixture:
    """Return a changed mixture if its default routing can still decide: the requests to come depend on it."""
    try:
        mixture.check(mixture.router.params)
    except OptionError as error:
        raise AdapterError(f"{how} the adapters cannot be routed: {error}") from error
    return mixture


def main_scale(adapter: Adapter) -> float:
    """Return the scale of most of an adapter's modules; the others' factors are multiplied by what differs."""
    scales = [pair.scale for _, pair in sorted(adapter.pairs.items())]
    return max(dict.fromkeys(scales), key=scales.count)


def largest_rank(adapter: Adapter) -> int:
    """Return the largest rank of an adapter's factors."""
    return max((pair.rank for pair in adapter.pairs.values()), default=0)


def vector_problem(adapter: Adapter) -> str | None:
    """Return why an adapter cannot be blended in vLLM's layers, which add factors alone; None if it can."""
    if adapter.initial:
        return (
            f"adapter {adapter.name!r} began from a part of the base's weights ({adapter.initial}), which the plugin "
            "does not compute again. treadle serve blends it"
        )
    if adapter.has_experts:
        return f"adapter {adapter.name!r} changes fused experts, which the plugin does not. treadle serve blends it"
    if adapter.virtual:
        return f"adapter {adapter.name!r} has virtual tokens, which the plugin does not know. treadle serve blends it"
    if not adapter.vectors:
        return None
    return (
        f"adapter {adapter.name!r} scales or shifts outputs of {len(adapter.vectors)} modules (DoRA, IA3, bias); the "
        "layers in vLLM add factors alone. treadle serve blends it"
    )


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise OptionError(f"{KEY}: {text[:60]!r} is not JSON: {error}") from error
