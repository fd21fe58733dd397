"""Centroids as treadle 0.1 wrote them: one view, one stage, groups found by k-means, a scatter around the means."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from treadle.common.documents import parse_json
from treadle.common.errors import BundleError, OptionError, problem_list, shown
from treadle.routing.centroids import Calibration, Centroids
from treadle.routing.samples import STAGES
from treadle.routing.statistics import Statistics, factors_of

ARRAYS = ("counts", "means", "scatter")
GROUP_ARRAYS = ("group_means", "group_owners", "group_sizes")
"""Present in later files; without them each adapter is one group."""
FLOATS = ("means", "scatter", "group_means")
WHOLE = (torch.int64, torch.int32)
SHRINKAGE, TEMPERATURE = 0.2, 1.6
"""The share of the sphere in the covariance, and what divided the scores."""
SLACK = 0.01
MOST_SAMPLES = 1 << 40


def read_old(file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Centroids:
    """Return the centroids of a file of treadle 0.1; their prompts are routed as they were."""
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
    names = _read_names(metadata["names"], file)
    if problems := _shape_problems(arrays, len(names)) or _size_problems(arrays):
        raise BundleError(problem_list(f"{file.name}:", problems))
    means, counts = arrays["means"], arrays["counts"]
    if not has_groups:
        arrays |= {"group_means": means, "group_owners": np.arange(len(names)), "group_sizes": counts}
    try:
        return Centroids(
            names=names,
            means=means,
            counts=counts,
            stages=dict.fromkeys(STAGES, _statistics(arrays)),
            embedder_id=metadata["embedder_id"],
            calibrations=dict.fromkeys(STAGES, Calibration(TEMPERATURE)),
            shrinkage=SHRINKAGE,
        )
    except OptionError as error:
        raise BundleError(f"{file.name}: {error}") from error


def _statistics(arrays: Mapping[str, NDArray[Any]]) -> Statistics:
    """Return the statistics within groups: the scatter was around each adapter's mean."""
    owners, sizes = arrays["group_owners"], arrays["group_sizes"]
    apart = (arrays["group_means"] - arrays["means"][owners]).astype(np.float64)  # (P, D)
    factors: list[NDArray[np.float32]] = []
    for index, scatter in enumerate(arrays["scatter"].astype(np.float64)):
        own = owners == index
        within = scatter - (apart[own] * sizes[own, None]).T @ apart[own]
        factors.append(factors_of((within + within.T) / 2, len(within))[0])
    size = arrays["means"].shape[1]
    stacked = np.stack(factors) if factors else np.zeros((0, 0, size), np.float32)
    return Statistics(arrays["group_means"], owners, sizes, stacked, np.zeros(len(factors), np.float32))


def _dtype_problems(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return which arrays are not of numbers as they should be; eight bits hold neither."""
    problems: list[str] = []
    if not all(tensors[key].is_floating_point() and tensors[key].itemsize > 1 for key in tensors.keys() & FLOATS):
        problems.append(f"{', '.join(FLOATS)} must be floating-point")
    if not all(tensors[key].dtype in WHOLE for key in tensors.keys() - FLOATS):
        problems.append("counts, group_owners and group_sizes must be whole numbers of 32 or 64 bits")
    return problems


def _shape_problems(arrays: Mapping[str, NDArray[Any]], count: int) -> list[str]:
    """Return arrays whose shapes do not fit each other, and numbers that are not finite."""
    if arrays["means"].ndim != 2:
        return [f"means has shape {arrays['means'].shape}, expected (adapters, dimensions)"]
    size = arrays["means"].shape[1]
    groups = arrays["group_owners"].size if "group_owners" in arrays else 0
    shapes = {"means": (count, size), "counts": (count,), "scatter": (count, size, size), "group_means": (groups, size),
              "group_owners": (groups,), "group_sizes": (groups,)}  # fmt: skip
    wrong = [key for key in arrays if arrays[key].shape != shapes[key]]
    if wrong:
        return [f"{key} has shape {arrays[key].shape}, expected {shapes[key]}" for key in wrong]
    problems = [
        f"{key} holds NaN or infinity" for key in FLOATS if key in arrays and not np.isfinite(arrays[key]).all()
    ]
    if (arrays["counts"] < 1).any():
        problems.append("every adapter needs at least one sample")
    if "group_owners" in arrays and not problems:
        owners, sizes = arrays["group_owners"], arrays["group_sizes"]
        rising = (np.diff(owners) >= 0).all() and set(owners.tolist()) == set(range(count))
        if not rising or (sizes < 1).any() or (np.bincount(owners, sizes, count) != arrays["counts"]).any():
            problems.append("the groups are not those of the adapters: owners must rise, and sizes add up to counts")
    return problems


def _size_problems(arrays: Mapping[str, NDArray[Any]]) -> list[str]:
    """Return values that unit vectors cannot give: all adapters' scores would overflow."""
    problems = [
        f"{key} has a row longer than 1, but means of unit vectors are at most 1 long"
        for key in ("means", "group_means")
        if key in arrays and not (np.linalg.norm(arrays[key], axis=-1) <= 1 + SLACK).all()
    ]
    most = 4 * (1 + SLACK) * arrays["counts"][:, None, None]  # two vectors are at most 2 apart
    if not (abs(arrays["scatter"]) <= most).all() or (arrays["counts"] > MOST_SAMPLES).any():
        problems.append("scatter or counts are larger than those of any samples")
    return problems


def _read_names(text: str, file: Path) -> tuple[str, ...]:
    try:
        names = parse_json(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in cast(list[Any], names)):
        raise BundleError(f"{file.name}: its metadata names must be a list of names, not {shown(text)}")
    return tuple(cast(list[str], names))
