"""A bundle on disk: which base, which adapters, their centroids and the default routing.

    bundle.json               what is in it; unknown keys are an error
    centroids.safetensors     what is known of each adapter's samples (`treadle.bundle.centroid_files`)
    states.safetensors        optional: the same of the base model's own states
    samples.json              optional: a few texts of each adapter, for `treadle doctor`
    adapters/<name>/          folders that PEFT or mlx-lm wrote
    embedder/                 optional: the embedder's own folder

Everything is checked before anything is used, and one message lists every problem. Only safetensors are read.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from treadle.bundle.bundle_files import (
    ADAPTERS,
    BUNDLE_FILE,
    CENTROIDS_FILE,
    NAME,
    SAMPLES_FILE,
    STATES_FILE,
    finish_replacing,
    has_bundle,
    read_version,
    replace_bundle,
)
from treadle.bundle.centroid_files import read_centroids, read_states, write_centroids, write_states
from treadle.common.documents import is_file, is_inside, read_object
from treadle.common.errors import LONGEST_NAME, BundleError, collect, problem_list, shown, unknown_name
from treadle.common.options import read_options
from treadle.common.params import RoutingParams
from treadle.common.version import __version__
from treadle.lora.adapter import Adapter, files_of, read_adapter
from treadle.lora.compatibility import check_combine
from treadle.lora.names import warn_of_bases
from treadle.routing.centroids import Centroids
from treadle.routing.embedder import load_embedder
from treadle.routing.router import Router
from treadle.routing.states import StateClasses

KEYS = {"treadle": str, "base_model": str, "embedder": str, "adapters": list, "routing": dict}
ADAPTER_KEYS = {"name": str, "path": str, "samples": int}
REMOVED_OPTIONS = {"unit_scale": False, "floor": None}
"""Routing options that bundles of 0.1 may hold, and the value of each that changed no weight."""
REPLACED_OPTIONS = ("recent", "change")
"""Routing options of 0.1 that views of the text have replaced: bundles may hold them, and they do nothing."""
RESERVED = ("base", "auto")
"""Names that requests use for the model without an adapter and for the routed one."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have all been read and checked.

    Attributes:
        folder: where it lies.
        base_model: folder or hub id of its base model.
        adapters: in the order of every N axis.
        router: centroids, embedder and default params.
        samples: adapter name -> a few texts, where the bundle keeps some.
        left_out: name -> why an adapter is missing, of adapters that were taken from folders.
        is_strict: False = adapters that do not fit the loaded model are left out, too.
    """

    folder: Path
    base_model: str
    adapters: tuple[Adapter, ...]
    router: Router
    samples: Mapping[str, Sequence[str]]
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    is_strict: bool = True


def read_bundle(path: str | Path) -> Bundle:
    """Read and check every file of a bundle; the base model is not touched.

    A writer beside it does no harm: all files are of one version.

    Raises:
        BundleError: lists everything that is wrong with it.
    """
    return replace(read_version(Path(path), _read_version), folder=Path(path))


def _read_version(folder: Path) -> Bundle:
    document = _read_document(folder)
    problems = _document_problems(document, folder)
    _stop(folder, problems)
    entries = document["adapters"]
    adapters = collect(problems, [lambda e=e: read_adapter(folder / e["path"], e["name"]) for e in entries])
    collect(problems, [lambda: warn_of_bases(adapters, document["base_model"])])
    centroids = collect(problems, [lambda: read_centroids(folder / CENTROIDS_FILE)])
    embedder = collect(problems, [lambda: load_embedder(_embedder_name(folder, document["embedder"]))])
    states = collect(problems, [lambda: _read_states(folder)])
    routing = collect(problems, [lambda: _routing_of(document["routing"])])
    samples = collect(problems, [lambda: _read_samples(folder, [entry["name"] for entry in entries])])
    if centroids:
        problems += _centroid_problems(centroids[0], entries)
    if states and states[0]:
        problems += _foreign_names(STATES_FILE, states[0].centroids, entries)
    _stop(folder, problems)
    routers = collect(problems := [], [lambda: Router(centroids[0], embedder[0], routing[0], states[0])])
    _stop(folder, problems)
    # what the default routing asks of these adapters: names that exist, samples enough for the score, equal ranks
    collect(
        problems,
        [lambda: routers[0].weights([]), routers[0].check_states, lambda: check_combine(routing[0].combine, adapters)],
    )
    _stop(folder, problems)
    return Bundle(folder, document["base_model"], tuple(adapters), routers[0], samples[0])


def save_bundle(
    path: str | Path,
    *,
    base: str,
    adapters: Mapping[str, str | Path],
    router: Router,
    samples: Mapping[str, Sequence[str]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a bundle that holds copies of everything but the base model.

    Args:
        path: the folder to write.
        base: folder or hub id of the base model.
        adapters: name -> folder, for each adapter that the router knows.
        router: its params become the bundle's default routing.
        samples: name -> a few texts to keep for `treadle doctor`; everybody who gets the bundle can read them.
        overwrite: replace a bundle that is there.

    Raises:
        TreadleError: something does not fit; what was in the folder is as it was.
    """
    folder = Path(path)
    finish_replacing(folder)
    if has_bundle(folder) and not overwrite:
        raise BundleError(f"{folder} holds a bundle already; name another folder, or overwrite it.")
    if problems := _write_problems(base, adapters, router, samples or {}):
        raise BundleError(problem_list("the bundle cannot be written:", problems))

    sources = {name: Path(source) for name, source in adapters.items()}
    write = partial(_write, base=base, adapters=sources, router=router, samples=samples or {})
    replace_bundle(folder, write, overwrite=overwrite)
    return folder


def _write_problems(
    base: str, adapters: Mapping[str, str | Path], router: Router, samples: Mapping[str, Sequence[str]]
) -> list[str]:
    """Name each part that does not fit the others of a bundle to write."""
    problems = name_problems(list(adapters))
    if router.states and router.states.centroids.names != router.names:
        problems.append(f"the router's states know {', '.join(router.states.centroids.names)} only; fit it again")
    else:
        collect(problems, [router.check_states])
    if set(adapters) != set(router.names):
        problems.append(f"the router knows {', '.join(router.names)}; the adapters are {', '.join(adapters)}")
    problems += [f"adapter {name!r} has no samples; a bundle holds adapters with samples" for name in router.unrouted]
    problems += [unknown_name("adapter in samples", name, adapters) for name in samples if name not in adapters]
    read = collect(problems, [lambda n=n, p=p: read_adapter(p, n) for n, p in adapters.items()])
    collect(problems, [lambda: warn_of_bases(read, base)])
    return problems


def _write(
    folder: Path, *, base: str, adapters: Mapping[str, Path], router: Router, samples: Mapping[str, Sequence[str]]
) -> None:
    """Write all files of a bundle into an empty folder."""
    for name in router.names:
        target = folder / ADAPTERS / name
        target.mkdir(parents=True)
        for file in files_of(adapters[name]):
            shutil.copyfile(file, target / file.name)
    write_centroids(folder / CENTROIDS_FILE, router.centroids)
    if router.states is not None:
        write_states(folder / STATES_FILE, router.states)
    if samples:
        _write_json(folder / SAMPLES_FILE, {name: list(texts) for name, texts in samples.items()})
    counts = router.centroids.counts.tolist()
    document = {
        "treadle": __version__,
        "base_model": base,
        "embedder": router.embedder.save(folder),
        "adapters": [
            {"name": name, "path": f"{ADAPTERS}/{name}", "samples": count}
            for name, count in zip(router.names, counts, strict=True)
        ],
        "routing": asdict(router.params),
    }
    _write_json(folder / BUNDLE_FILE, document)


def _read_document(folder: Path) -> dict[str, Any]:
    file = folder / BUNDLE_FILE
    if not is_file(file):
        raise BundleError(f"{folder} is not a bundle: it has no {BUNDLE_FILE}. `treadle fit` makes one.")
    return read_object(file, BundleError)


def _document_problems(document: dict[str, Any], folder: Path) -> list[str]:
    problems = _key_problems(document, KEYS, BUNDLE_FILE)
    if problems:
        return problems
    entries = cast(list[Any], document["adapters"])
    if not entries:
        return [f"{BUNDLE_FILE}: it names no adapter"]
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            problems.append(f"adapters[{index}] is not an object")
        else:
            problems += _key_problems(cast(dict[str, Any], entry), ADAPTER_KEYS, f"adapters[{index}]")
    if problems:
        return problems
    problems += name_problems([entry["name"] for entry in entries])
    for entry in entries:
        if not is_inside(folder, entry["path"]):
            problems.append(f"adapter {entry['name']!r}: path {shown(entry['path'])} leaves the bundle's folder")
    embedder = document["embedder"].removeprefix("static:")
    if embedder.startswith((".", "/", "~")) or not is_inside(folder, embedder):
        problems.append(f"embedder {shown(document['embedder'])} leaves the bundle's folder")
    return problems


def _key_problems(given: dict[str, Any], expected: dict[str, type], where: str) -> list[str]:
    problems = [f"{where}: " + unknown_name("key", key, expected) for key in given if key not in expected]
    problems += [f"{where}: key {key!r} is missing" for key in expected if key not in given]
    problems += [
        f"{where}: {key!r} must be a {kind.__name__}, not {shown(given[key])}"
        for key, kind in expected.items()
        if key in given and (not isinstance(given[key], kind) or isinstance(given[key], bool))
    ]
    return problems


def name_problems(names: Sequence[str]) -> list[str]:
    """Return a problem for each name that adapters of one bundle may not have."""
    problems = [f"two adapters are called {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    problems += [
        f"adapter name {shown(name)}: use letters, digits, '.', '_' and '-', at most {LONGEST_NAME}"
        for name in names
        if not NAME.fullmatch(name) or len(name) > LONGEST_NAME
    ]
    problems += [f"adapter name {name!r} is reserved" for name in names if name in RESERVED]
    return problems


def _embedder_name(folder: Path, embedder: str) -> str:
    # absolute: where the folder is missing, a relative path would pass for a name on the hub
    inside = (folder / embedder).absolute()
    return str(inside) if os.path.isdir(inside) or embedder == "embedder" else embedder


def _centroid_problems(centroids: Centroids, entries: Sequence[dict[str, Any]]) -> list[str]:
    return _foreign_names(CENTROIDS_FILE, centroids, entries) or [
        f"adapter {name!r}: {CENTROIDS_FILE} counts {count} samples, {BUNDLE_FILE} says {entry['samples']}"
        for name, count, entry in zip(centroids.names, centroids.counts.tolist(), entries, strict=True)
        if count != entry["samples"]
    ]


def _foreign_names(file: str, centroids: Centroids, entries: Sequence[dict[str, Any]]) -> list[str]:
    names = tuple(entry["name"] for entry in entries)
    if centroids.names == names:
        return []
    return [f"{file} is for {', '.join(centroids.names)}; {BUNDLE_FILE} names {', '.join(names)}"]


def _read_states(folder: Path) -> StateClasses | None:
    file = folder / STATES_FILE
    return read_states(file) if os.path.lexists(file) else None


def _read_samples(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    file = folder / SAMPLES_FILE
    samples = read_object(file, BundleError) if os.path.lexists(file) else {}
    for name, texts in samples.items():
        if name not in names:
            raise BundleError(f"{SAMPLES_FILE}: " + unknown_name("adapter", name, names))
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in cast(list[Any], texts)):
            raise BundleError(f"{SAMPLES_FILE}: {name!r} must be a list of texts")
    return samples


def _write_json(file: Path, document: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _routing_of(given: Mapping[str, Any]) -> RoutingParams:
    """Return a bundle's default routing; removed options may be there with the value that did nothing."""
    changed = [name for name, value in REMOVED_OPTIONS.items() if given.get(name, value) != value]
    if changed:
        options = ", ".join(f"{name} = {shown(given[name])}" for name in changed)
        raise BundleError(
            f"routing: treadle no longer has {options}; delete it from {BUNDLE_FILE} to route without it, or use the "
            f"treadle that wrote the bundle"
        )
    gone = {*REMOVED_OPTIONS, *REPLACED_OPTIONS}
    return read_options(RoutingParams, {name: value for name, value in given.items() if name not in gone})


def _stop(folder: Path, problems: Sequence[str]) -> None:
    if problems:
        raise BundleError(problem_list(f"bundle {folder} cannot be used:", problems))
