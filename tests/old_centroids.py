"""Writes a centroids file as treadle 0.1 did: one view, groups of samples, a scatter around each adapter's mean."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GROUPS = {"math": (0, 0, 1, 1, 1, 0), "science": (0, 0, 0, 0), "code": (0, 1, 0, 1, 1)}
"""Adapter -> the group of each of its samples."""


def old_samples(dim: int = 8) -> dict[str, np.ndarray]:
    """Return unit vectors (samples, D) of each adapter, the same every time."""
    random = np.random.default_rng(7)
    vectors = {name: random.normal(size=dim) + 0.7 * random.normal(size=(len(groups), dim))
               for name, groups in GROUPS.items()}  # fmt: skip
    return {name: (each / np.linalg.norm(each, axis=1, keepdims=True)).astype(np.float32)
            for name, each in vectors.items()}  # fmt: skip


def old_arrays(has_groups: bool = True) -> dict[str, np.ndarray]:
    """Return the arrays of the file."""
    samples = {name: each.astype(np.float64) for name, each in old_samples().items()}
    means = {name: each.mean(0) for name, each in samples.items()}
    arrays = {
        "means": np.stack(list(means.values())).astype(np.float32),
        "counts": np.array([len(each) for each in samples.values()]),
        "scatter": np.stack([(each - means[name]).T @ (each - means[name]) for name, each in samples.items()]).astype(
            np.float32
        ),
    }
    if not has_groups:
        return arrays
    parts = [
        (index, samples[name][np.array(groups) == group])
        for index, (name, groups) in enumerate(GROUPS.items())
        for group in sorted(set(groups))
    ]
    return arrays | {
        "group_means": np.stack([part.mean(0) for _, part in parts]).astype(np.float32),
        "group_owners": np.array([index for index, _ in parts]),
        "group_sizes": np.array([len(part) for _, part in parts]),
    }


def write_old(file: Path, arrays: dict[str, np.ndarray] | None = None, **metadata: str | None) -> Path:
    """Write such a file, with other arrays or metadata where they are given."""
    given = {"names": json.dumps(list(GROUPS)), "embedder_id": "test"} | metadata
    kept = {key: value for key, value in given.items() if value is not None}
    arrays = old_arrays() if arrays is None else arrays
    save_file({key: np.array(array, order="C") for key, array in arrays.items()}, file, kept)
    return file
