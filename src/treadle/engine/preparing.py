"""Makes a bundle of a base and a folder of adapters, for every command alike.

Adapters stay where they are and are read from there. What is computed of their samples lies in treadle's cache:

    routers/<key>/centroids.safetensors    as in a bundle; states.safetensors, too, where the base's states decide
    routers/<key>/fit.json                 what cross-validation found, and which samples they were

The key is made of the content of samples and adapters and of the embedder, so that a change of any makes a new router.
A bad adapter is left out with its reason. An adapter without samples is loaded; no text chooses it.
"""

import hashlib
import json
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from treadle.bundle.adapter_places import adapter_place, adapters_below, samples_beside
from treadle.bundle.base_model import load_outline
from treadle.bundle.bundle import Bundle, name_problems, read_bundle
from treadle.bundle.bundle_files import CENTROIDS_FILE, STATES_FILE
from treadle.bundle.centroid_files import (
    CENTROID_FILE,
    read_centroid,
    read_centroids,
    read_states,
    recorded_embedder,
    write_centroids,
    write_states,
)
from treadle.bundle.token_embedder import TOKENS, find_embedder
from treadle.common.documents import is_file, read_object
from treadle.common.errors import AdapterWarning, BundleError, OptionError, TreadleError, first_of, problem_list, shown
from treadle.common.files import digest, home
from treadle.common.options import named
from treadle.common.params import RoutingParams, SourceParams
from treadle.common.version import __version__
from treadle.common.writing import locked, put, workplace
from treadle.engine.sample_files import load_samples
from treadle.engine.state_fitting import fit_base_states
from treadle.lora import compatibility
from treadle.lora.adapter import Adapter, read_adapter
from treadle.lora.names import is_foreign, warn_of_bases, with_model_names
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
MAX_LISTED = 5
KEPT_SAMPLES = 3
"""Samples of each adapter that a bundle keeps for `treadle doctor`."""
STATES = "base"
"""In the name of an embedder, base+NAME: the base model's own states decide finally."""


@dataclass(frozen=True)
class Fitted:
    """A router, and what cross-validation found of its texts and, if there are any, of the base model's states."""

    router: Router
    report: FitReport
    by_states: FitReport | None = None


def open_bundle(bundle: str | Path | None, source: SourceParams, *, strict: bool = False) -> Bundle:
    """Return the bundle in a folder, or one made of a base and adapters (`prepare`).

    Raises:
        OptionError: both are given, or neither.
        TreadleError: what is given cannot be used.
    """
    if (bundle is None) == (source.base is None):
        raise OptionError("give the folder of a bundle, or --base with --adapters FOLDER or --adapter name=PATH.")
    if bundle is not None or source.base is None:
        return read_bundle(bundle or "")
    folder = Path(source.adapters) if source.adapters else None
    below, others = adapters_below(folder) if folder else ({}, [])
    if others:
        logger.info("sub-folders without an adapter: %s", ", ".join(first_of(others, MAX_LISTED)))
    single = named(source.adapter, "--adapter")
    if twice := sorted(below.keys() & single.keys()):
        raise OptionError(f"--adapters and --adapter both name {', '.join(twice)}; give each once.")
    return prepare(source.base, below | single, embedder=source.embedder, strict=strict, folder=folder)


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
class _Found:
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


def prepare(
    base: str,
    places: Mapping[str, str | Path],
    *,
    embedder: str | None = None,
    strict: bool = False,
    folder: Path | None = None,
) -> Bundle:
    """Make a bundle of a base and adapters where they lie; what each adapter was is logged.

    Args:
        base: folder or hub id of the base model.
        places: name of each adapter -> its folder or hub id.
        embedder: of sample texts, as `treadle fit` takes it; None = `tokens`, the base's own token vectors.
        strict: refuse where an adapter would be left out or is doubtful.
        folder: what the bundle is called by.

    Raises:
        TreadleError: the base or the embedder cannot be used, or no adapter is left; with `strict`, any fault.
    """
    found = _Found()
    for name, place in places.items():
        try:
            _read_one(found, name, place, base)
        except TreadleError as error:
            found.left_out[name] = str(error).removeprefix(f"adapter {name!r}: ")
    if found.adapters:
        _leave_misfits_out(found, base, strict=strict)
        _doubt_bases(found, base, strict=strict)
    name = embedder or TOKENS
    chosen, with_states = text_embedder(name, base), is_by_states(name)
    _check_centroids(found, chosen, with_states)
    _refuse(found, strict)
    router = _router_of(base, found, chosen, with_states)
    unrouted = tuple(name for name in found.adapters if name not in router.names)
    router = replace(router, unrouted=unrouted)
    if router.lacks_samples and len(unrouted) == 1:  # there is nothing to choose
        router = replace(router, params=RoutingParams.one(unrouted[0]))
    _tell(found, router)
    kept = {name: [each.whole for each in texts[:KEPT_SAMPLES]] for name, (_, texts) in found.samples.items()}
    adapters = tuple(found.adapters[name] for name in router.names)
    return Bundle(folder or Path("adapters"), base, adapters, router, kept, found.left_out, is_strict=strict)


def _read_one(found: _Found, name: str, place: str | Path, base: str) -> None:
    """Read an adapter and what lies beside it; an error says why it is to be left out."""
    if problems := name_problems([name]):
        raise BundleError(f"{problems[0]}; rename its folder, or name it by --adapter name=PATH")
    folder = adapter_place(place, name)
    adapter = read_adapter(folder, name)
    found.adapters[name] = adapter
    try:
        if file := samples_beside(folder):
            found.samples[name] = file, load_samples(file)
        elif is_file(folder / CENTROID_FILE):
            found.centroids[name] = read_centroid(folder, name)
    except TreadleError as error:
        found.doubts[name] = f"its samples cannot be used: {error}"


def _leave_misfits_out(found: _Found, base: str, *, strict: bool) -> None:
    """Leave out adapters whose factors fit no layer of the base; its weights are not loaded."""
    model = load_outline(base)
    for name, adapter in list(found.adapters.items()):
        # what else an adapter holds needs the base's weights
        factors = replace(with_model_names(model, adapter), weights={}, vectors={}, initial="")
        try:
            with warnings.catch_warnings():  # of what the base lacks; the loaded model gives them again
                warnings.simplefilter("error" if strict else "ignore", AdapterWarning)
                compatibility.fit_adapters(model, [factors])
        except TreadleError as error:
            found.left_out[name] = str(error)
            for group in (found.adapters, found.samples, found.centroids, found.doubts):
                group.pop(name, None)


def _doubt_bases(found: _Found, base: str, *, strict: bool) -> None:
    """Warn of adapters that name another base in one line; for a strict caller each is a doubt."""
    foreign = [adapter for adapter in found.adapters.values() if is_foreign(adapter, base)]
    if not strict:
        warn_of_bases(foreign, base)
        return
    for adapter in foreign:
        found.doubts[adapter.name] = f"by its config it was trained on {adapter.base_model!r}; the base is {base!r}"


def is_by_states(embedder: str) -> bool:
    """Return whether an embedder's name asks for the base model's own states, which decide finally."""
    return embedder == STATES or embedder.startswith(f"{STATES}+")


def text_embedder(name: str, base: str) -> Embedder:
    """Load the embedder of texts that a name means: of base+NAME that is NAME, of `base` alone `tokens`."""
    own = name.removeprefix(STATES).removeprefix("+") if is_by_states(name) else name
    return find_embedder(own or TOKENS, base)


def _check_centroids(found: _Found, embedder: Embedder, with_states: bool) -> None:
    """Set aside centroids that do not go with the embedder."""
    for name, own in list(found.centroids.items()):
        if with_states:
            doubt = "the base model's states need sample texts of it, and training left only a centroid"
        elif (own.embedder_id, own.tails) != (embedder.id, embedder.tails):
            maker = shown(_maker(found.adapters[name].source) or own.embedder_id)
            doubt = f"its {CENTROID_FILE} was made by the embedder {maker}, not by this one; name it by --embedder"
        else:
            continue
        del found.centroids[name]
        found.doubts[name] = doubt


def _maker(folder: Path) -> str | None:
    """Return the embedder that an adapter's folder names; it is not loaded, as anybody may have written it."""
    try:
        return recorded_embedder(folder)
    except TreadleError:
        return None


def _refuse(found: _Found, strict: bool) -> None:
    """Raise a BundleError where no adapter is left, or where a strict caller takes no fault."""
    faults = [f"{name}: {reason}" for name, reason in found.left_out.items()]
    if strict:
        faults += [f"{name}: {reason}" for name, reason in found.doubts.items()]
    if strict and faults:
        raise BundleError(problem_list("adapters are refused (without --strict the others are used):", faults))
    if not found.adapters:
        raise BundleError(problem_list("no adapter can be used:", faults or ["none was given"]))


def _router_of(base: str, found: _Found, embedder: Embedder, with_states: bool) -> Router:
    """Return the router of the adapters with samples: from the cache, or fitted and put there."""
    routed = [*found.samples, *found.centroids]
    contents = [[name, found.adapters[name].identity, _content(found, name)] for name in routed]
    key = digest([FORMAT, __version__, embedder.id, embedder.tails, base if with_states else "", contents])
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


def _content(found: _Found, name: str) -> str:
    """Return a digest of the file that an adapter is routed by."""
    file = found.samples[name][0] if name in found.samples else found.adapters[name].source / CENTROID_FILE
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _make_entry(entry: Path, base: str, found: _Found, embedder: Embedder, with_states: bool) -> None:
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


def _tell(found: _Found, router: Router) -> None:
    """Log a line for each adapter."""
    for name in found.adapters:
        if name in found.samples:
            file, texts = found.samples[name]
            logger.info("adapter %s: routed by %d samples (%s)", name, len(texts), file.name)
        elif name in found.centroids:
            logger.info("adapter %s: routed by the centroid that training left", name)
        elif router.params.rule == "fixed":
            logger.info("adapter %s: no samples; it is the only one, so it acts in every text", name)
        else:
            logger.warning("adapter %s: no samples, so no text chooses it; give its name or fixed weights", name)
        if name in found.doubts:
            logger.warning("adapter %s: %s", name, found.doubts[name])
    for name, reason in found.left_out.items():
        logger.warning("adapter %s: LEFT OUT: %s", name, reason)
    if router.lacks_samples and router.params.rule != "fixed":
        logger.warning("nothing is routed: no adapter has samples.txt or samples.jsonl beside it")
    if found.left_out:
        total = len(found.adapters) + len(found.left_out)
        logger.warning("%d of %d adapters are left out", len(found.left_out), total)
