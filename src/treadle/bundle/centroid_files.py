"""Centroids in files: of a bundle's adapters, and of one adapter beside its factors, where training left it.

centroids.safetensors    in a bundle: means (N, D), counts (N,), scatter (N, D, D), groups (P) and the embedder's id
centroid.safetensors     in a PEFT folder: the same for its one adapter
treadle.json             in a PEFT folder: which embedder made the centroid, and how the adapter was trained
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from treadle.common.documents import is_file, parse_json
from treadle.common.errors import AdapterError, BundleError, problem_list, shown
from treadle.common.tensor_files import read_tensors
from treadle.common.version import __version__
from treadle.routing.centroids import Centroids, Groups

CENTROID_FILE, RECORD_FILE = "centroid.safetensors", "treadle.json"
ARRAYS = ("counts", "means", "scatter")
GROUP_ARRAYS = ("group_means", "group_owners", "group_sizes")
"""Present in files written since adapters have groups; without them each adapter is one group."""
FLOATS = ("means", "scatter", "group_means")
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
    return replace(centroids, names=(name,), given_groups=centroids.groups)


def read_centroids(file: Path) -> Centroids:
    """Return the centroids of a file; a BundleError says what is wrong with it."""
    if not is_file(file):
        raise BundleError(f"{file.name} is missing")
    tensors, metadata = read_tensors(file, BundleError)
    has_groups = set(tensors) == {*ARRAYS, *GROUP_ARRAYS}
    if (set(tensors) != {*ARRAYS} and not has_groups) or not {"names", "embedder_id"} <= set(metadata):
        raise BundleError(
            f"{file.name} must hold {', '.join(ARRAYS)} and, as metadata, names and embedder_id; "
            f"{', '.join(GROUP_ARRAYS)} together or not at all"
        )
    if problems := _dtype_problems(tensors):
        raise BundleError(problem_list(f"{file.name}:", problems))
    floats = {key: tensors[key].to(torch.float32).numpy() for key in tensors.keys() & FLOATS}
    wholes = {key: tensors[key].to(torch.int64).numpy() for key in tensors.keys() - FLOATS}
    arrays: dict[str, NDArray[Any]] = {**floats, **wholes}
    if arrays["means"].ndim != 2:
        raise BundleError(f"{file.name}: means has shape {arrays['means'].shape}, expected (adapters, dimensions)")
    groups = Groups(*(arrays[key] for key in GROUP_ARRAYS)) if has_groups else None
    names, embedder_id = _read_names(metadata["names"], file), metadata["embedder_id"]
    centroids = Centroids(names, arrays["means"], arrays["counts"], arrays["scatter"], embedder_id, groups)
    if problems := _size_problems(centroids):
        raise BundleError(problem_list(f"{file.name}:", problems))
    return centroids


def _dtype_problems(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return which arrays are not of numbers as they should be; eight bits hold neither."""
    problems: list[str] = []
    if not all(tensors[key].is_floating_point() and tensors[key].itemsize > 1 for key in tensors.keys() & FLOATS):
        problems.append(f"{', '.join(FLOATS)} must be floating-point")
    if not all(tensors[key].dtype in WHOLE for key in tensors.keys() - FLOATS):
        problems.append("counts, group_owners and group_sizes must be whole numbers of 32 or 64 bits")
    return problems


def _size_problems(centroids: Centroids) -> list[str]:
    """Return values that unit vectors cannot give: all adapters' scores would overflow."""
    problems = [
        f"{key} has a row longer than 1, but means of unit vectors are at most 1 long"
        for key, means in (("means", centroids.means), ("group_means", centroids.groups.means))
        if not (np.linalg.norm(means, axis=-1) <= 1 + SLACK).all()
    ]
    most = 4 * (1 + SLACK) * centroids.counts[:, None, None]  # two vectors are at most 2 apart
    if not (abs(centroids.scatter) <= most).all() or (centroids.counts > MOST_SAMPLES).any():
        problems.append("scatter or counts are larger than those of any samples")
    return problems


def write_centroids(file: Path, centroids: Centroids) -> None:
    """Write means, counts, scatter and groups, with names and the embedder's id as metadata."""
    groups = centroids.groups
    arrays: dict[str, Any] = {
        **{key: getattr(centroids, key) for key in ARRAYS},
        **dict(zip(GROUP_ARRAYS, (groups.means, groups.owners, groups.sizes), strict=True)),
    }
    metadata = {"names": json.dumps(centroids.names), "embedder_id": centroids.embedder_id}
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, file, metadata)


def _read_names(text: str, file: Path) -> tuple[str, ...]:
    try:
        names = parse_json(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in cast(list[Any], names)):
        raise BundleError(f"{file.name}: its metadata names must be a list of names, not {shown(text)}")
    return tuple(cast(list[str], names))
