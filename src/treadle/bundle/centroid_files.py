"""Centroids in files: of a bundle's adapters, and of one adapter beside its factors, where training left it.

centroids.safetensors    in a bundle: means (N, D), counts (N,), statistics of each stage, and of general text
states.safetensors       in a bundle: the same of the base model's states, with their layer and spans as metadata
centroid.safetensors     in a PEFT folder: the same for its one adapter, without general text
treadle.json             in a PEFT folder: which embedder made the centroid, and how the adapter was trained

The arrays are those of `treadle.routing.centroids.Centroids`. Files of treadle 0.1 hold one view and no stages; they
are read as centroids whose two stages are alike (`treadle.bundle.centroid_files_0_1`).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from treadle.bundle.centroid_files_0_1 import read_old
from treadle.common.documents import is_file, parse_json, read_object
from treadle.common.errors import AdapterError, BundleError, OptionError, problem_list, shown
from treadle.common.tensor_files import read_tensors
from treadle.common.version import __version__
from treadle.routing.centroids import Calibration, Centroids
from treadle.routing.running_sum import MAX_TAIL_WORDS
from treadle.routing.samples import STAGES, Stage
from treadle.routing.states import StateClasses
from treadle.routing.statistics import Statistics

CENTROID_FILE, RECORD_FILE = "centroid.safetensors", "treadle.json"
ARRAYS = ("means", "counts")
PARTS = {"means": False, "owners": True, "sizes": True, "factors": False, "rest": False}
"""The arrays of statistics, and whether they hold whole numbers."""
GENERAL = "general."
WHOLE = (torch.int64, torch.int32)
SLACK = 0.01
"""Allowance for rounding, in bfloat16 too."""
MOST_SAMPLES = 1 << 40


def save_centroid(folder: Path, own: Centroids, embedder: str, training: Mapping[str, Any]) -> None:
    """Write an adapter's centroid into its PEFT folder, so that `treadle fit` needs no samples of it.

    Args:
        folder: the PEFT folder.
        own: the centroid of this adapter alone.
        embedder: the name by which what made it can be loaded again.
        training: what is recorded about the training.
    """
    write_centroids(folder / CENTROID_FILE, own)
    samples = int(own.counts.sum())
    record = {"treadle": __version__, "embedder": embedder, "embedder_id": own.embedder_id, "samples": samples}
    (folder / RECORD_FILE).write_text(json.dumps({**record, "training": training}, indent=2) + "\n", "utf-8")


def read_centroid(folder: Path, name: str) -> Centroids:
    """Return the centroid that training left in a PEFT folder, for an adapter called `name`."""
    file = folder / CENTROID_FILE
    if not is_file(file):
        raise AdapterError(f"{folder} holds no {CENTROID_FILE}: give sample texts of {name!r}")
    centroids = read_centroids(file)
    if len(centroids.names) != 1:
        raise AdapterError(f"{file} holds {len(centroids.names)} centroids, not one")
    return replace(centroids, names=(name,))


def recorded_embedder(folder: Path) -> str | None:
    """Return the name of the embedder that made the centroid in a PEFT folder; None where nothing says it."""
    if not is_file(folder / RECORD_FILE):
        return None
    name = read_object(folder / RECORD_FILE, AdapterError).get("embedder")
    return name if isinstance(name, str) else None


def read_centroids(file: Path) -> Centroids:
    """Return the centroids of a file; a BundleError says what is wrong with it."""
    if not is_file(file):
        raise BundleError(f"{file.name} is missing")
    tensors, metadata = read_tensors(file, BundleError)
    return read_old(file, tensors, metadata) if "scatter" in tensors else _centroids(file, tensors, metadata)


def read_states(file: Path) -> StateClasses:
    """Return the classes of states of a file; a BundleError says what is wrong with it."""
    tensors, metadata = read_tensors(file, BundleError)
    centroids = _centroids(file, tensors, metadata)
    layer, spans = (_parsed(metadata.get(key, "null")) for key in ("layer", "spans"))
    is_list = isinstance(spans, list) and all(type(span) is int for span in cast(list[Any], spans))
    if type(layer) is not int or not is_list:
        raise BundleError(f"{file.name}: its metadata must give a layer, and the spans of the views as a list")
    try:
        return StateClasses(centroids, layer, tuple(cast(list[int], spans)))
    except OptionError as error:
        raise BundleError(f"{file.name}: {error}") from error


def _centroids(file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Centroids:
    """Return the centroids that the content of a file stands for."""
    is_general = any(key.startswith(GENERAL) for key in tensors)
    expected = _keys(is_general)
    if set(tensors) != set(expected) or not {"names", "embedder_id", "tails", "calibrations"} <= set(metadata):
        raise BundleError(
            f"{file.name} must hold {', '.join(_keys(False))}, the same of {GENERAL}* or none of them, and, as "
            "metadata, names, embedder_id, tails and calibrations"
        )
    wrong = [key for key, is_whole in expected.items() if not _is_kind(tensors[key], is_whole)]
    if wrong:
        raise BundleError(
            f"{file.name}: {', '.join(wrong)}: counts, owners and sizes must be whole numbers of 32 or 64 bits, the "
            "others floating-point"
        )
    arrays = {key: _array(tensors[key], is_whole) for key, is_whole in expected.items()}
    if arrays["means"].ndim != 2:
        raise BundleError(f"{file.name}: means has shape {arrays['means'].shape}, expected (adapters, dimensions)")
    try:
        centroids = Centroids(
            names=_read_names(metadata["names"], file),
            means=arrays["means"],
            counts=arrays["counts"],
            stages={stage: _statistics(arrays, f"{stage}.") for stage in STAGES},
            embedder_id=metadata["embedder_id"],
            tails=_read_tails(metadata["tails"], file),
            general={s: _statistics(arrays, f"{GENERAL}{s}.") for s in STAGES} if is_general else None,
            calibrations=_read_calibrations(metadata["calibrations"], file),
            shrinkage=_read_shrinkage(metadata.get("shrinkage", "null"), file),
        )
    except OptionError as error:
        raise BundleError(f"{file.name}: {error}") from error
    if problems := _size_problems(centroids):
        raise BundleError(problem_list(f"{file.name}:", problems))
    return centroids


def write_states(file: Path, classes: StateClasses) -> None:
    """Write classes of states as `write_centroids` does, with their layer and spans."""
    write_centroids(file, classes.centroids, {"layer": str(classes.layer), "spans": json.dumps(classes.spans)})


def write_centroids(file: Path, centroids: Centroids, further: Mapping[str, str] | None = None) -> None:
    """Write the arrays of centroids, with names, embedder, tails and calibrations as metadata; factors in float16.

    `further` is more metadata.
    """
    arrays: dict[str, NDArray[Any]] = {key: getattr(centroids, key) for key in ARRAYS}
    parts = {f"{stage}.": centroids.stages[stage] for stage in STAGES}
    parts |= {f"{GENERAL}{stage}.": centroids.general[stage] for stage in STAGES} if centroids.general else {}
    for prefix, statistics in parts.items():
        arrays |= {f"{prefix}{name}": getattr(statistics, name) for name in PARTS}
        factors = arrays[f"{prefix}factors"]
        if abs(factors).max(initial=0) < np.finfo(np.float16).max:
            arrays[f"{prefix}factors"] = factors.astype(np.float16)
    metadata = {
        "names": json.dumps(centroids.names),
        "embedder_id": centroids.embedder_id,
        "tails": json.dumps(centroids.tails),
        "shrinkage": json.dumps(centroids.shrinkage),
        "calibrations": json.dumps({stage: asdict(each) for stage, each in centroids.calibrations.items()}),
        **(further or {}),
    }
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, file, metadata)


def _keys(is_general: bool) -> dict[str, bool]:
    """Return the name of each array, and whether it holds whole numbers."""
    prefixes = [f"{start}{stage}." for start in ("", *([GENERAL] if is_general else [])) for stage in STAGES]
    parts = {f"{prefix}{name}": is_whole for prefix in prefixes for name, is_whole in PARTS.items()}
    return {"means": False, "counts": True, **parts}


def _is_kind(tensor: torch.Tensor, is_whole: bool) -> bool:
    """Return whether a tensor holds numbers as it should; eight bits hold neither."""
    return tensor.dtype in WHOLE if is_whole else tensor.is_floating_point() and tensor.itemsize > 1


def _array(tensor: torch.Tensor, is_whole: bool) -> NDArray[Any]:
    return tensor.to(torch.int64 if is_whole else torch.float32).numpy()


def _statistics(arrays: Mapping[str, NDArray[Any]], prefix: str) -> Statistics:
    return Statistics(**{name: arrays[f"{prefix}{name}"] for name in PARTS})


def _size_problems(centroids: Centroids) -> list[str]:
    """Return values that unit vectors cannot give: all adapters' scores would overflow."""
    num_views = 1 + len(centroids.tails)
    parts = {**centroids.stages, **{f"{GENERAL}{stage}": each for stage, each in (centroids.general or {}).items()}}
    lengths = {"means": (centroids.means, 1.0)}
    lengths |= {f"{name}.means": (each.means, float(np.sqrt(num_views))) for name, each in parts.items()}
    problems = [
        f"{name} has a row longer than {most:.3g}, but means of unit vectors are no longer"
        for name, (means, most) in lengths.items()
        if not (np.linalg.norm(means, axis=-1) <= most * (1 + SLACK)).all()
    ]
    for name, each in parts.items():
        num_texts = np.bincount(each.owners, each.sizes, each.num_adapters)  # (N,)
        most = 4 * (1 + SLACK) * num_views * np.maximum(num_texts, 1)  # two unit vectors are at most 2 apart
        trace = (each.factors.astype(np.float64) ** 2).sum((1, 2)) + each.rest.astype(np.float64) * each.means.shape[1]
        if not (trace <= most).all() or (num_texts > MOST_SAMPLES).any():
            problems.append(f"{name}: factors, rest or sizes are larger than those of any samples")
    if (centroids.counts > MOST_SAMPLES).any():
        problems.append("counts are larger than those of any samples")
    return problems


def _read_names(text: str, file: Path) -> tuple[str, ...]:
    names = _parsed(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in cast(list[Any], names)):
        raise BundleError(f"{file.name}: its metadata names must be a list of names, not {shown(text)}")
    return tuple(cast(list[str], names))


def _read_tails(text: str, file: Path) -> tuple[int, ...]:
    tails = _parsed(text)
    is_right = isinstance(tails, list) and all(
        type(each) is int and 1 <= each <= MAX_TAIL_WORDS for each in cast(list[Any], tails)
    )
    if not is_right:
        raise BundleError(
            f"{file.name}: its metadata tails must be a list of numbers of words, 1 to {MAX_TAIL_WORDS}, not "
            f"{shown(text)}"
        )
    return tuple(cast(list[int], tails))


def _read_calibrations(text: str, file: Path) -> dict[Stage, Calibration]:
    given = _parsed(text)
    made: dict[Stage, Calibration] = {}
    try:
        made = {stage: Calibration(**{key: float(value) for key, value in given[stage].items()}) for stage in STAGES}
    except (TypeError, KeyError, AttributeError, ValueError):
        made = {}
    if not made or not all(each.temperature >= 1e-3 and abs(each.base_bias) <= 1e6 for each in made.values()):
        raise BundleError(
            f"{file.name}: its metadata calibrations must give {' and '.join(STAGES)} a temperature of at least 0.001 "
            f"and a base_bias, not "
            f"{shown(text)}"
        )
    return made


def _read_shrinkage(text: str, file: Path) -> float | None:
    given = _parsed(text) if text != "null" else None
    if given is not None and not (isinstance(given, float) and 0 <= given <= 1):
        raise BundleError(
            f"{file.name}: its metadata shrinkage must be null or a number from 0 to 1, not {shown(text)}"
        )
    return given if isinstance(given, float) else None


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None
