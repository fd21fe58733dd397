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
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from treadle import __version__
from treadle.centroids import Centroids, Groups
from treadle.errors import AdapterError, BundleError

CENTROID_FILE, RECORD_FILE = "centroid.safetensors", "treadle.json"
ARRAYS = ("counts", "means", "scatter")
GROUP_ARRAYS = ("group_means", "group_owners", "group_sizes")
"""Of files written since adapters have groups; without them each adapter is one."""
FLOATS = ("means", "scatter", "group_means")


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
    if not file.is_file():
        raise AdapterError(f"{folder} holds no {CENTROID_FILE}: give sample texts of {name!r}")
    centroids = read_centroids(file)
    if len(centroids.names) != 1:
        raise AdapterError(f"{file} holds {len(centroids.names)} centroids, not one")
    return replace(centroids, names=(name,), given_groups=centroids.groups)


def read_centroids(file: Path) -> Centroids:
    """Return the centroids of a file; a BundleError says what is wrong with it."""
    if not file.is_file():
        raise BundleError(f"{file.name} is missing")
    try:
        with safe_open(file, "numpy") as opened:
            metadata = opened.metadata() or {}
            arrays = {key: opened.get_tensor(key) for key in opened.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise BundleError(f"{file.name} cannot be read: {error}") from error
    has_groups = set(arrays) == {*ARRAYS, *GROUP_ARRAYS}
    if (set(arrays) != {*ARRAYS} and not has_groups) or not {"names", "embedder_id"} <= set(metadata):
        raise BundleError(
            f"{file.name} must hold {', '.join(ARRAYS)} and, as metadata, names and embedder_id; "
            f"{', '.join(GROUP_ARRAYS)} together or not at all"
        )
    if not all(np.issubdtype(arrays[key].dtype, np.floating) for key in arrays.keys() & FLOATS):
        raise BundleError(f"{file.name}: {', '.join(FLOATS)} must be floating-point")
    if arrays["means"].ndim != 2:
        raise BundleError(f"{file.name}: means has shape {arrays['means'].shape}, expected (adapters, dimensions)")
    groups = None
    if has_groups:
        groups = Groups(*(arrays[key] for key in GROUP_ARRAYS))
        if not all(np.issubdtype(each.dtype, np.integer) for each in (groups.owners, groups.sizes)):
            raise BundleError(f"{file.name}: group_owners and group_sizes must be whole numbers")
    names, embedder_id = _read_names(metadata["names"], file), metadata["embedder_id"]
    return Centroids(names, arrays["means"], arrays["counts"], arrays["scatter"], embedder_id, groups)


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
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in cast(list[Any], names)):
        raise BundleError(f"{file.name}: its metadata names must be a list of names, not {text!r}")
    return tuple(cast(list[str], names))
