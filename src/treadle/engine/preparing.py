"""Makes a bundle of a base and a folder of adapters, for every command alike.

Adapters stay where they are and are read from there. What is computed of their samples lies in treadle's cache
(`treadle.engine.router_cache`). A bad adapter is left out with its reason. An adapter without samples is loaded; no
text chooses it.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from treadle.bundle.adapter_places import adapter_place, adapters_below, samples_beside
from treadle.bundle.base_model import load_outline
from treadle.bundle.bundle import Bundle, name_problems, read_bundle
from treadle.bundle.centroid_files import (
    CENTROID_FILE,
    read_centroid,
    recorded_embedder,
)
from treadle.bundle.token_embedder import TOKENS, find_embedder
from treadle.common.documents import is_file
from treadle.common.errors import AdapterWarning, BundleError, OptionError, TreadleError, first_of, problem_list, shown
from treadle.common.options import named
from treadle.common.params import RoutingParams, SourceParams
from treadle.engine.router_cache import FoundAdapters, cached_router, logger
from treadle.engine.sample_files import load_samples
from treadle.lora import compatibility
from treadle.lora.adapter import read_adapter
from treadle.lora.names import is_foreign, warn_of_bases, with_model_names
from treadle.routing.embedder import Embedder
from treadle.routing.router import Router

MAX_LISTED = 5
KEPT_SAMPLES = 3
"""Samples of each adapter that a bundle keeps for `treadle doctor`."""
STATES = "base"
"""In the name of an embedder, base+NAME: the base model's own states decide finally."""


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
    found = FoundAdapters()
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
    router = cached_router(base, found, chosen, with_states)
    unrouted = tuple(name for name in found.adapters if name not in router.names)
    router = replace(router, unrouted=unrouted)
    if router.lacks_samples and len(unrouted) == 1:  # there is nothing to choose
        router = replace(router, params=RoutingParams.one(unrouted[0]))
    _tell(found, router)
    kept = {name: [each.whole for each in texts[:KEPT_SAMPLES]] for name, (_, texts) in found.samples.items()}
    adapters = tuple(found.adapters[name] for name in router.names)
    return Bundle(folder or Path("adapters"), base, adapters, router, kept, found.left_out, is_strict=strict)


def _read_one(found: FoundAdapters, name: str, place: str | Path, base: str) -> None:
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


def _leave_misfits_out(found: FoundAdapters, base: str, *, strict: bool) -> None:
    """Leave out adapters whose factors fit no layer of the base; its weights are not loaded."""
    model = load_outline(base)
    for name, adapter in list(found.adapters.items()):
        try:
            # what else an adapter holds needs the base's weights
            factors = replace(with_model_names(model, adapter), weights={}, vectors={}, initial="")
            with warnings.catch_warnings():  # of what the base lacks; the loaded model gives them again
                warnings.simplefilter("error" if strict else "ignore", AdapterWarning)
                compatibility.fit_adapters(model, [factors])
        except TreadleError as error:
            found.left_out[name] = str(error)
            for group in (found.adapters, found.samples, found.centroids, found.doubts):
                group.pop(name, None)


def _doubt_bases(found: FoundAdapters, base: str, *, strict: bool) -> None:
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


def _check_centroids(found: FoundAdapters, embedder: Embedder, with_states: bool) -> None:
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


def _refuse(found: FoundAdapters, strict: bool) -> None:
    """Raise a BundleError where no adapter is left, or where a strict caller takes no fault."""
    faults = [f"{name}: {reason}" for name, reason in found.left_out.items()]
    if strict:
        faults += [f"{name}: {reason}" for name, reason in found.doubts.items()]
    if strict and faults:
        raise BundleError(problem_list("adapters are refused (without --strict the others are used):", faults))
    if not found.adapters:
        raise BundleError(problem_list("no adapter can be used:", faults or ["none was given"]))


def _tell(found: FoundAdapters, router: Router) -> None:
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
