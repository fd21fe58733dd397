"""Fits routers, and keeps those of adapters in folders in treadle's cache.

    routers/<key>/centroids.safetensors    as in a bundle; states.safetensors, too, where the base's states decide
    routers/<key>/fit.json                 what cross-validation found, and which samples they were

The key is made of the content of samples and adapters and of the embedder, so that a change of any makes a new router.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from treadle.bundle.bundle_files import CENTROIDS_FILE, STATES_FILE
from treadle.bundle.centroid_files import CENTROID_FILE, read_centroids, read_states, write_centroids, write_states
from treadle.bundle.token_embedder import base_identity
from treadle.common.documents import read_object
from treadle.common.errors import BundleError, TreadleError
from treadle.common.files import digest, home
from treadle.common.params import RoutingParams
from treadle.common.version import __version__
from treadle.common.writing import locked, put, workplace
from treadle.engine.state_fitting import fit_base_states
from treadle.lora.adapter import Adapter
from treadle.routing.calibration import FitReport
from treadle.routing.centroids import Centroids
from treadle.routing.embedder import Embedder
from treadle.routing.fitting import empty_router, fit_with_report
from treadle.routing.router import Router
from treadle.routing.samples import Sample

logger = logging.getLogger("treadle.adapters")

FIT_FILE = "fit.json"
FORMAT = 1
"""Part of the cache's key: a router that is fitted in another way needs another number."""


@dataclass(frozen=True)
class Fitted:
    """A router, and what cross-validation found of its texts and, if there are any, of the base model's states."""

    router: Router
    report: FitReport
    by_states: FitReport | None = None


def fit_router(  # noqa: PLR0913 each is one of the things that a router is made of
    base: str,
    adapters: Sequence[Adapter],
    samples: Mapping[str, Sequence[Sample]],
    embedder: Embedder,
    params: RoutingParams,
    *,
    fitted: Sequence[Centroids] = (),
    with_states: bool = False,
) -> Fitted:
    """Fit a router of adapters: the one way in which `treadle fit` and all other commands do it.

    Args:
        base: folder or hub id of the base model.
        adapters: all that have samples, and perhaps others.
        samples: of each adapter that has some.
        embedder: of the texts.
        params: become the router's default.
        fitted: centroids of further adapters, by the same embedder.
        with_states: fit classes over the base model's states, too.
    """
    router, report = fit_with_report(samples, embedder, params, fitted=fitted)
    if not with_states:
        return Fitted(router, report)
    by_name = {adapter.name: adapter for adapter in adapters}
    states, by_states = fit_base_states(base, samples, [by_name[name] for name in router.names])
    return Fitted(replace(router, states=states), report, by_states)


@dataclass
class FoundAdapters:
    """Adapters on their way into a bundle, and what is wrong.

    Attributes:
        adapters: that can be blended.
        samples: files of sample texts, by adapter.
        centroids: that training left, by adapter.
        left_out: why an adapter is missing.
        doubts: what a strict caller refuses though the adapter can be used.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict[str, Adapter])
    samples: dict[str, tuple[Path, list[Sample]]] = field(default_factory=dict[str, tuple[Path, list[Sample]]])
    centroids: dict[str, Centroids] = field(default_factory=dict[str, Centroids])
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    doubts: dict[str, str] = field(default_factory=dict[str, str])


def cached_router(base: str, found: FoundAdapters, embedder: Embedder, with_states: bool) -> Router:
    """Return the router of the adapters with samples: from the cache, or fitted and put there."""
    routed = [*found.samples, *found.centroids]
    contents = [[name, found.adapters[name].identity, _content(found, name)] for name in routed]
    key = digest(
        [FORMAT, __version__, embedder.id, embedder.tails, base_identity(base) if with_states else "", contents]
    )
    entry = home() / "routers" / key
    if not entry.exists():
        _make_entry(entry, base, found, embedder, with_states)
    elif routed:
        logger.info("router: from the cache, %s", entry)
    try:
        told = read_object(entry / FIT_FILE, BundleError)
        states = read_states(entry / STATES_FILE) if with_states and routed else None
        router = Router(read_centroids(entry / CENTROIDS_FILE), embedder, states=states)
    except TreadleError as error:
        raise BundleError(f"the cached router in {entry} cannot be used: {error}; delete that folder.") from error
    for line in told.get("lines", ()):
        logger.info("%s", line)
    return router


def _content(found: FoundAdapters, name: str) -> str:
    """Return a digest of the file that an adapter is routed by."""
    file = found.samples[name][0] if name in found.samples else found.adapters[name].source / CENTROID_FILE
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _make_entry(entry: Path, base: str, found: FoundAdapters, embedder: Embedder, with_states: bool) -> None:
    """Fit a router and put it into the cache; of processes that do so at once, the first one's stays."""
    started = time.perf_counter()
    samples = {name: texts for name, (_, texts) in found.samples.items()}
    if samples or found.centroids:
        logger.info("router: fitting it to the samples of %d adapters ...", len(samples) + len(found.centroids))
        adapters = [*found.adapters.values()]
        fitted = fit_router(base, adapters, samples, embedder, RoutingParams(), fitted=[*found.centroids.values()],
                              with_states=with_states)  # fmt: skip
        lines = list(_lines(fitted))
    else:
        fitted, lines = Fitted(empty_router(embedder), FitReport((), {})), []
    with workplace(entry.parent) as place:
        made = place / "router"
        made.mkdir()
        write_centroids(made / CENTROIDS_FILE, fitted.router.centroids)
        if fitted.router.states is not None:
            write_states(made / STATES_FILE, fitted.router.states)
        files = {name: str(file) for name, (file, _) in found.samples.items()}
        told = {"treadle": __version__, "base_model": base, "samples": files, "lines": lines}
        (made / FIT_FILE).write_text(json.dumps(told, indent=2) + "\n", "utf-8")
        with locked(entry.parent):
            if not entry.exists():
                put(made, entry)
    if lines:
        logger.info("router: fitted in %.0f s, kept in %s", time.perf_counter() - started, entry)


def _lines(fitted: Fitted) -> list[str]:
    """Return the findings of cross-validation, a line each."""
    told: list[str] = []
    for what, report in (("", fitted.report), ("the base model's states: ", fitted.by_states)):
        if report is not None and report.accuracy is not None:
            told.append(f"router: {what}{report.accuracy:.1%} of the samples' prompts are nearest to their own adapter")
        told += [f"router: {what}{warning}" for warning in report.warnings()] if report is not None else []
    return told
