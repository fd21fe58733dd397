"""Centroids are read as they were written, and nothing is read from a damaged file; files of treadle 0.1 too."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from old_centroids import GROUPS, old_arrays, old_samples, write_old
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal

from treadle.bundle.centroid_files import read_centroids, write_centroids
from treadle.common.errors import BundleError
from treadle.common.params import RoutingParams
from treadle.routing.centroids import Centroids, log_softmax
from treadle.routing.fitting import fit
from treadle.routing.rules import apply_rule
from treadle.routing.samples import STAGES

from conftest import SAMPLES

Tensors = dict[str, torch.Tensor]
PARTS = ("means", "owners", "sizes", "factors", "rest")


@pytest.fixture(scope="module")
def centroids(embedder) -> Centroids:
    return fit(SAMPLES, embedder).centroids


@pytest.fixture(scope="module")
def views(embedder) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(6, 3, embedder.dim)).astype(np.float32)


def evidence(centroids: Centroids, views: np.ndarray, is_running: bool) -> np.ndarray:
    return centroids.evidence(views, np.full(len(views), is_running))


# Round trips


@pytest.mark.parametrize("name", ["embedder", "terse"])
def test_what_is_read_is_what_was_written(tmp_path, name, request):
    given = fit(SAMPLES, request.getfixturevalue(name)).centroids
    assert (given.general is None) == (name == "terse")
    write_centroids(tmp_path / "c.safetensors", given)
    read = read_centroids(tmp_path / "c.safetensors")
    for field in ("names", "embedder_id", "tails", "calibrations", "shrinkage"):
        assert getattr(read, field) == getattr(given, field)
    np.testing.assert_array_equal(read.means, given.means)
    np.testing.assert_array_equal(read.counts, given.counts)
    parts = [(read.stages, given.stages)]
    parts += [(read.general, given.general)] if read.general and given.general else []
    assert (read.general is None) == (given.general is None)
    for one, other in parts:
        for stage in STAGES:
            for part in PARTS:
                np.testing.assert_array_equal(getattr(one[stage], part), getattr(other[stage], part))
    write_centroids(tmp_path / "again.safetensors", read)
    once, twice = (load_file(tmp_path / name) for name in ("c.safetensors", "again.safetensors"))
    assert all(torch.equal(once[key], twice[key]) for key in once.keys() | twice.keys())


def test_a_text_has_the_same_evidence_bit_for_bit(tmp_path, centroids, views):
    write_centroids(tmp_path / "c.safetensors", centroids)
    read = read_centroids(tmp_path / "c.safetensors")
    for is_running in (False, True):
        one, other = (evidence(each, views, is_running) for each in (read, centroids))
        np.testing.assert_array_equal(one, other)


def test_calibrations_and_shrinkage_are_kept(tmp_path, centroids):
    given = replace(centroids, shrinkage=0.25, calibrations={
        "prompt": replace(centroids.calibrations["prompt"], temperature=1.5, base_bias=-3.0),
        "running": replace(centroids.calibrations["running"], temperature=7.0, base_bias=11.0),
    })  # fmt: skip
    write_centroids(tmp_path / "c.safetensors", given)
    read = read_centroids(tmp_path / "c.safetensors")
    assert (read.shrinkage, read.calibrations) == (0.25, given.calibrations)


def test_factors_too_large_for_float16_stay_float32(tmp_path, centroids):
    stages = dict(centroids.stages)
    factors = stages["prompt"].factors.copy()
    factors[0, 0, 0] = 70_000
    sizes = np.full_like(stages["prompt"].sizes, 1 << 31)  # as many texts as have such a scatter
    stages["prompt"] = replace(stages["prompt"], factors=factors, sizes=sizes)
    write_centroids(tmp_path / "c.safetensors", replace(centroids, stages=stages))
    read = read_centroids(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(read.stages["prompt"].factors, factors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_numbers_of_other_widths_are_read_as_float32(tmp_path, centroids, views, dtype):
    write_centroids(tmp_path / "c.safetensors", centroids)
    change(lambda tensors: {
        key: tensor.to(dtype if tensor.is_floating_point() else torch.int32) for key, tensor in tensors.items()
    })(tmp_path / "c.safetensors")  # fmt: skip
    read = read_centroids(tmp_path / "c.safetensors")
    assert {read.means.dtype, read.stages["running"].factors.dtype} == {np.dtype(np.float32)}
    assert read.counts.dtype == np.int64
    np.testing.assert_allclose(read.means, centroids.means, atol=0.01)
    assert np.isfinite(evidence(read, views, is_running=True)).all()


# Damage

Damage = Callable[[Path], Any]


def change(change_tensors: Callable[[Tensors], Mapping[str, torch.Tensor]] = dict, **metadata: str | None) -> Damage:
    """Change tensors and metadata of a file; metadata of None are left out."""

    def damage(file: Path) -> None:
        with safe_open(file, "pt") as opened:
            given = dict(opened.metadata()) | metadata
        tensors = {key: tensor.clone().contiguous() for key, tensor in change_tensors(load_file(file)).items()}
        save_file(tensors, file, {key: value for key, value in given.items() if value is not None})

    return damage


def set_to(key: str, make: Callable[[torch.Tensor], torch.Tensor], **metadata: str | None) -> Damage:
    return change(lambda tensors: tensors | {key: make(tensors[key])}, **metadata)


def without(*keys: str) -> Damage:
    return change(lambda tensors: {key: tensor for key, tensor in tensors.items() if key not in keys})


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = float("nan")
    return tensor


MUST_HOLD = "must hold means, counts, prompt.means,"
NUMBERS = "counts, owners and sizes must be whole numbers of 32 or 64 bits, the others floating-point"
CALIBRATIONS = "metadata calibrations must give prompt and running a temperature of at least 0.001 and a base_bias"
GOOD = {"temperature": 2.0, "base_bias": 0.0}
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no means": (without("means"), MUST_HOLD),
    "no running factors": (without("running.factors"), MUST_HOLD),
    "part of general text": (without("general.running.rest"), MUST_HOLD),
    "another array": (change(lambda a: a | {"scale": a["means"]}), MUST_HOLD),
    **{f"no {key}": (change(**{key: None}), "as metadata, names, embedder_id, tails and calibrations")
       for key in ("names", "embedder_id", "tails", "calibrations")},
    "eight bits": (set_to("means", lambda t: t.to(torch.float8_e4m3fn)), f"means: {NUMBERS}"),
    "fractions": (set_to("counts", lambda t: t.float()), f"counts: {NUMBERS}"),
    "whole factors": (set_to("prompt.factors", lambda t: t.int()), f"prompt.factors: {NUMBERS}"),
    "owners of fractions": (set_to("general.prompt.owners", lambda t: t.float()), f"general.prompt.owners: {NUMBERS}"),
    "bytes": (set_to("running.sizes", lambda t: t.to(torch.int8)), f"running.sizes: {NUMBERS}"),
    "flat means": (set_to("means", lambda t: t.view(-1)), "means has shape (24,), expected (adapters, dimensions)"),
    "fewer means": (set_to("means", lambda t: t[:2]), "means has shape (2, 8), expected (3, 8)"),
    "fewer counts": (set_to("counts", lambda t: t[:2]), "counts has shape (2,), expected (3,)"),
    "no samples": (set_to("counts", lambda t: t * 0), "every adapter needs at least one sample"),
    "too many samples": (set_to("counts", lambda t: t + (1 << 41)), "counts are larger than those of any samples"),
    "long means": (set_to("means", lambda t: t * 1000), "means has a row longer than 1, but means of unit vectors"),
    "long means of groups": (set_to("running.means", lambda t: t * 1000), "running.means has a row longer than 1.73"),
    "long general text": (set_to("general.prompt.means", lambda t: t * 99), "general.prompt.means has a row longer"),
    "NaN means": (set_to("means", with_nan), "means holds NaN or infinity"),
    "NaN factors": (set_to("prompt.factors", with_nan), "prompt holds NaN or infinity"),
    "NaN rest of general text": (set_to("general.running.rest", with_nan), "general running holds NaN or infinity"),
    "narrow groups": (set_to("prompt.means", lambda t: t[:, :8]), "prompt means has shape (9, 8), expected (9, 24)"),
    "flat factors": (set_to("prompt.factors", lambda t: t[0]), "prompt factors has shape"),
    "factors of two": (set_to("prompt.factors", lambda t: t[:2]), "prompt factors has shape (2, "),
    "factors of no texts": (
        set_to("running.factors", lambda t: t.float() * 1e5), "running: factors, rest or sizes are larger than those of"
    ),
    "rest of no texts": (set_to("prompt.rest", lambda t: t + 1e9), "prompt: factors, rest or sizes are larger than"),
    "sizes of no texts": (set_to("prompt.sizes", lambda t: t + (1 << 42)), "prompt: factors, rest or sizes are larger"),
    "negative rest": (set_to("prompt.rest", lambda t: t - 1), "prompt: owners must rise from 0 to 2"),
    "one owner": (set_to("prompt.owners", lambda t: t[0]), "prompt owners has shape (), expected (1,)"),
    "groups of nobody": (set_to("prompt.owners", lambda t: t + 1), "prompt: owners must rise from 0 to 2"),
    "groups in disorder": (set_to("running.owners", lambda t: t.flip(0)), "running: owners must rise from 0 to 2"),
    "empty groups": (set_to("running.sizes", lambda t: t * 0), "sizes be at least 1"),
    "two general texts": (set_to("general.prompt.owners", lambda t: t + 1), "general prompt: owners must rise from 0"),
    "names not JSON": (change(names="math, code"), "names must be a list of names, not 'math, code'"),
    "names not a list": (change(names="7"), "names must be a list of names, not '7'"),
    "fewer names": (change(names='["math", "code"]'), "means has shape (3, 8), expected (2, 8)"),
    "a name twice": (change(names='["math", "code", "math"]'), "names repeat: math, code, math"),
    **{f"tails {text}": (change(tails=text), "tails must be a list of numbers of words, 1 to 64, not")
       for text in ("7", "[0]", "[65]", "[true]", "[1.5]", '["8"]', "[", "null")},
    "other tails": (change(tails="[24]"), "prompt means has shape (9, 24), expected (9, 16)"),
    **{f"shrinkage {text}": (change(shrinkage=text), "shrinkage must be null or a number from 0 to 1, not")
       for text in ("2.0", "-0.1", '"0.2"', "true", "[]")},
    **{f"calibrations {text}": (change(calibrations=text), CALIBRATIONS) for text in (
        "7", "null", "[", json.dumps({"prompt": GOOD}), json.dumps({"prompt": GOOD, "running": 2}),
        *(json.dumps({"prompt": GOOD, "running": GOOD | bad}) for bad in (
            {"temperature": 0}, {"temperature": -1}, {"temperature": "hot"}, {"temperature": None}, {"base_bias": 1e9},
            {"temperature": float("nan")}, {"base_bias": float("inf")}, {"scale": 1.0},
        )),
    )},
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_in_one_message(tmp_path, centroids, damage, message):
    file = tmp_path / "centroids.safetensors"
    write_centroids(file, centroids)
    damage(file)
    with pytest.raises(BundleError) as caught:
        read_centroids(file)
    assert message in str(caught.value)
    assert str(caught.value).startswith("centroids.safetensors")


def test_problems_come_together(tmp_path, centroids):
    file = tmp_path / "centroids.safetensors"
    write_centroids(file, centroids)
    set_to("means", lambda tensor: tensor * 1000)(file)
    set_to("prompt.rest", lambda tensor: tensor + 1e9)(file)
    with pytest.raises(BundleError, match=r"(?s)means has a row longer.*prompt: factors, rest or sizes"):
        read_centroids(file)


# Files of treadle 0.1

OLD_TEXTS = np.random.default_rng(8).normal(size=(4, 8))
OLD_TEXTS = (OLD_TEXTS / np.linalg.norm(OLD_TEXTS, axis=1, keepdims=True)).astype(np.float32)
OLD_WEIGHTS = {  # as commit abd7a17 gives them for OLD_TEXTS
    True: [[0.621851, 0, 0.378149], [0.000104, 0.999896, 0], [0.995763, 0.000803, 0.003434], [0, 1, 0]],
    False: [[0.831997, 0, 0.168003], [0.000003, 0.999998, 0], [0.997628, 0.000279, 0.002093], [0, 1, 0]],
}


@pytest.mark.parametrize("has_groups", [True, False])
def test_an_old_file_gives_the_weights_that_it_gave(tmp_path, has_groups):
    read = read_centroids(write_old(tmp_path / "old.safetensors", old_arrays(has_groups)))
    assert (read.names, read.tails, read.general, read.embedder_id) == (tuple(GROUPS), (), None, "test")
    for is_running in (False, True):
        stages = np.full(4, is_running)
        weights = apply_rule(evidence(read, OLD_TEXTS[:, None], is_running), RoutingParams(), read.temperatures(stages))
        np.testing.assert_allclose(weights, OLD_WEIGHTS[has_groups], atol=3e-6)


def test_an_old_file_is_a_mixture_of_gaussians_of_its_samples(tmp_path):
    read = read_centroids(write_old(tmp_path / "old.safetensors"))
    parts = [[each[np.array(groups) == group].astype(np.float64) for group in sorted(set(groups))]
             for each, groups in zip(old_samples().values(), GROUPS.values(), strict=True)]  # fmt: skip
    residuals = np.concatenate([part - part.mean(0) for own in parts for part in own])
    pooled = residuals.T @ residuals / (len(residuals) - sum(map(len, parts)))
    covariance = 0.8 * pooled + 0.2 * np.trace(pooled) / 8 * np.eye(8)
    logs = [
        logsumexp(
            [multivariate_normal(part.mean(0), covariance).logpdf(OLD_TEXTS) for part in own],
            axis=0,
            b=np.array([[len(part) / sum(map(len, own))] for part in own]),
        )
        for own in parts
    ]
    expected = np.stack(logs, -1)
    found = evidence(read, OLD_TEXTS[:, None], is_running=False)
    np.testing.assert_allclose(softmax(found / 1.6, -1), softmax(expected / 1.6, -1), atol=1e-4)
    np.testing.assert_allclose(read.temperatures(np.array([False, True])), [[1.6], [1.6]])


def test_an_old_file_is_written_as_a_new_one(tmp_path):
    read = read_centroids(write_old(tmp_path / "old.safetensors"))
    write_centroids(tmp_path / "new.safetensors", read)
    again = read_centroids(tmp_path / "new.safetensors")
    assert (again.tails, again.general, again.shrinkage) == ((), None, 0.2)
    one, other = (log_softmax(evidence(each, OLD_TEXTS[:, None], is_running=False)) for each in (read, again))
    np.testing.assert_allclose(one, other, rtol=5e-3, atol=0.01)


def old(**changes: Callable[[np.ndarray], np.ndarray] | None) -> Damage:
    """Write an old file with changed arrays; None = left out."""

    def damage(file: Path) -> None:
        arrays = old_arrays()
        for key, make in changes.items():
            if make is None:
                del arrays[key]
            else:
                arrays[key] = make(arrays[key])
        write_old(file, arrays)

    return damage


FLOATING = "means, scatter, group_means must be floating-point"
WHOLE = "counts, group_owners and group_sizes must be whole numbers of 32 or 64 bits"
OLD_DAMAGES: dict[str, tuple[Damage, str]] = {
    "means of no vectors": (old(means=lambda a: a * 1000), "means has a row longer than 1, but means of unit vectors"),
    "groups of no vectors": (old(group_means=lambda a: a * 1000), "group_means has a row longer than 1"),
    "scatter of no samples": (old(scatter=lambda a: a * np.float32(1e30)), "scatter or counts are larger than those"),
    "no counts": (old(counts=None), "must hold counts, means, scatter and, as metadata, names and embedder_id"),
    "groups without sizes": (old(group_sizes=None), "group_means, group_owners, group_sizes together or not at all"),
    "no embedder": (lambda file: write_old(file, embedder_id=None), "as metadata, names and embedder_id"),
    "NaN": (old(means=lambda a: a * np.float32("nan")), "means holds NaN or infinity"),
    "fewer means": (old(means=lambda a: a[:2]), "means has shape (2, 8), expected (3, 8)"),
    "means of no dimension": (old(means=lambda a: a.sum()), "means has shape (), expected"),
    "whole-number means": (old(means=lambda a: a.astype(np.int64)), FLOATING),
    "fractions of samples": (old(counts=lambda a: a.astype(np.float32)), WHOLE),
    "owners of fractions": (old(group_owners=lambda a: a.astype(np.float32)), WHOLE),
    "no samples": (old(counts=lambda a: a * 0), "every adapter needs at least one sample"),
    "groups of other sizes": (old(group_sizes=lambda a: a + 1), "the groups are not those of the adapters"),
    "one owner": (old(group_owners=lambda a: a[0]), "group_owners has shape (), expected (1,)"),
    "groups of nobody": (old(group_owners=lambda a: a + 1), "the groups are not those of the adapters"),
    "groups of negative owners": (old(group_owners=lambda a: a - 1), "the groups are not those of the adapters"),
    "narrow groups": (old(group_means=lambda a: a[:, :2]), "group_means has shape (5, 2), expected (5, 8)"),
    "fewer names": (lambda file: write_old(file, names='["math"]'), "means has shape (3, 8), expected (1, 8)"),
    "names not JSON": (lambda file: write_old(file, names="math"), "names must be a list of names, not 'math'"),
}


@pytest.mark.parametrize(("damage", "message"), OLD_DAMAGES.values(), ids=OLD_DAMAGES)
def test_a_damaged_old_file_is_refused(tmp_path, damage, message):
    damage(tmp_path / "old.safetensors")
    with pytest.raises(BundleError) as caught:
        read_centroids(tmp_path / "old.safetensors")
    assert message in str(caught.value)
    assert str(caught.value).startswith("old.safetensors")
