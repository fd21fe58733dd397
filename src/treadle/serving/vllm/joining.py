"""Adapters that join a mixture, and adapters that leave it. Nothing here imports vLLM."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from treadle.bundle.bundle import NAME, RESERVED, foreign_base
from treadle.bundle.centroid_files import read_centroid
from treadle.common.errors import LONGEST_NAME, AdapterError, OptionError, problem_list, shown, unknown_name
from treadle.lora.adapter import Adapter, read_adapter
from treadle.routing.centroids import Centroids
from treadle.routing.fitting import centroid_of
from treadle.serving.vllm.mixture import FIELDS, Mixture, largest_rank, main_scale
from treadle.serving.vllm.params import PluginParams


@dataclass(frozen=True)
class Newcomer:
    """An adapter that joins a running server: its factors and its centroid, both read and checked."""

    adapter: Adapter
    centroids: Centroids = field(repr=False)


def check_name(name: str, taken: Iterable[str]) -> None:
    """Raise an AdapterError if an adapter that joins cannot be called this: what a request asks for would be unclear.

    Args:
        name: of the adapter.
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
    problems = [foreign_base(adapter, base)]
    if params.max_rank is not None and largest_rank(adapter) > params.max_rank:
        problems.append(f"adapter {name!r} has rank {largest_rank(adapter)}; max_rank is {params.max_rank}")
    if any(problems):
        raise AdapterError(problem_list("the adapter cannot join:", [problem for problem in problems if problem]))
    embedder = mixture.router.embedder
    if samples:
        own = centroid_of(name, samples, embedder)
    else:
        own = read_centroid(Path(path), name)
    mixture.router.centroids.join(own)
    return Newcomer(adapter, own)


def with_adapter(mixture: Mixture, newcomer: Newcomer, slot: int) -> Mixture:
    """Return the mixture with one more adapter, in a free slot; an AdapterError if the router then cannot decide."""
    joined = replace(mixture.router, centroids=mixture.router.centroids.join(newcomer.centroids))
    made = replace(
        mixture,
        router=joined,
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
        router=replace(mixture.router, centroids=mixture.router.centroids.remove(name)),
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
