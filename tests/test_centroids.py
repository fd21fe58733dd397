"""Statistics of adapters are kept apart; cosines and log-likelihoods are closed forms of them."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.common.errors import AdapterError, OptionError
from treadle.routing.centroids import SURE_NATS, Calibration, Centroids
from treadle.routing.fitting import centroid_from
from treadle.routing.samples import STAGES, SampleText
from treadle.routing.statistics import EmbeddedTexts, Statistics

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
DIM, TAILS = 4, (24, 8)
VIEWS = 1 + len(TAILS)
Floats = np.ndarray


def clouds_from(seed: int, counts: Sequence[int] = (5, 8, 3), dim: int = DIM, spread: float = 0.5) -> dict[str, Floats]:
    """Random views (count, K, D) of adapters a, b, c, around different means."""
    random = np.random.default_rng(seed)
    return {
        name: (random.normal(size=(VIEWS, dim)) + spread * random.normal(size=(count, VIEWS, dim))).astype(np.float32)
        for name, count in zip("abcdef", counts, strict=False)
    }


def centroid(name: str, cloud: Floats, kinds: Sequence[str] = ("prompt", "begin")) -> Centroids:
    """One adapter's centroid; texts of both stages are the same, and of kinds in turn."""
    texts = [SampleText("", stage, kinds[index % len(kinds)], index) for stage in STAGES for index in range(len(cloud))]
    return centroid_from(name, EmbeddedTexts(texts, np.concatenate([cloud, cloud])), SimpleNamespace(id="test"), TAILS)  # pyright: ignore[reportArgumentType]


def general_of(dim: int = DIM, width: float = 2.0, count: int = 60) -> dict[str, Statistics]:
    """Statistics of general text, wide in every direction."""
    views = width * np.random.default_rng(99).normal(size=(count, VIEWS * dim))
    return {stage: Statistics.of(views.astype(np.float32), ["general"] * count) for stage in STAGES}


def fitted(clouds: dict[str, Floats], is_general: bool = False) -> Centroids:
    dim = next(iter(clouds.values())).shape[-1]
    centroids = Centroids.empty("test", dim, TAILS, general_of(dim) if is_general else None)
    for name, cloud in clouds.items():
        centroids = centroids.join(centroid(name, cloud))
    return centroids


def prompts(count: int) -> np.ndarray:
    return np.zeros(count, bool)


shapes = st.tuples(
    st.integers(0, 99), st.lists(st.integers(2, 9), min_size=2, max_size=5).map(tuple), st.integers(1, 5)
)
clouds_of = shapes.map(lambda drawn: clouds_from(*drawn))


# Statistics


@given(clouds_of)
@quick
def test_statistics_are_means_sizes_and_the_scatter_within_groups(clouds):
    for cloud in clouds.values():
        kinds = ["prompt", "whole"] * len(cloud)
        flat = cloud.reshape(len(cloud), -1)
        found = Statistics.of(flat, kinds[: len(cloud)])
        parts = [flat[::2], flat[1::2]]
        np.testing.assert_allclose(found.means, [part.mean(0) for part in parts], atol=1e-5)
        assert found.sizes.tolist() == [len(part) for part in parts]
        expected = sum(np.cov(part.T, ddof=0).reshape(flat.shape[1], -1) * len(part) for part in parts)
        np.testing.assert_allclose(found.scatter(), expected, atol=1e-2)  # factors have values of float16
        assert found.means.dtype == found.factors.dtype == found.rest.dtype == np.float32


def test_of_a_large_scatter_the_largest_axes_are_kept_and_its_trace():
    random = np.random.default_rng(0)
    texts = (random.normal(size=(50, 6)) * [9, 5, 1, 0.5, 0.2, 0.1]).astype(np.float32)
    whole, short = Statistics.of(texts, ["x"] * 50), Statistics.of(texts, ["x"] * 50, max_factors=2)
    assert short.factors.shape == (1, 2, 6)
    np.testing.assert_allclose(np.trace(short.scatter()), np.trace(whole.scatter()), rtol=1e-3)
    large = np.linalg.eigvalsh(whole.scatter())[-2:]
    np.testing.assert_allclose(np.linalg.eigvalsh(short.scatter())[-2:], large, rtol=0.01)


def test_few_and_many_factors_lie_beside_each_other():
    few, many = (
        Statistics.of(cloud.reshape(len(cloud), -1), ["x"] * len(cloud)) for cloud in clouds_from(0, (2, 9)).values()
    )
    for joined in (few.join(many), many.join(few)):
        np.testing.assert_allclose(joined.scatter(), few.scatter() + many.scatter(), atol=1e-5)
        assert joined.problems("x", 2, VIEWS * DIM) == []


@given(clouds_of, st.data())
@quick
def test_adding_then_removing_is_as_before(clouds, data):
    name = data.draw(st.sampled_from(sorted(clouds)))
    without = fitted({other: cloud for other, cloud in clouds.items() if other != name})
    same = without.join(centroid(name, clouds[name])).remove(name)
    also = fitted(clouds).remove(name)
    among = fitted(clouds).among(set(clouds) - {name})
    x = np.random.default_rng(0).normal(size=(3, *next(iter(clouds.values())).shape[1:])).astype(np.float32)
    for result in (same, also, among):
        assert result.names == without.names
        np.testing.assert_array_equal(result.means, without.means)
        np.testing.assert_array_equal(result.counts, without.counts)
        for stage in STAGES:
            one, other = result.stages[stage], without.stages[stage]
            for field in ("means", "owners", "sizes", "rest"):
                np.testing.assert_array_equal(getattr(one, field), getattr(other, field), err_msg=field)
            rows = other.factors.shape[1]
            np.testing.assert_array_equal(one.factors[:, :rows], other.factors)
            assert not one.factors[:, rows:].any()
        one, other = (each.evidence(x, prompts(3)) for each in (result, without))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


def test_a_centroid_is_the_mean_of_whole_texts_and_not_normalised_again():
    views = np.zeros((2, VIEWS, 2), np.float32)
    views[0, :, 0] = views[1, :, 1] = 1
    np.testing.assert_array_equal(centroid("a", views).means, [[0.5, 0.5]])
    joined = [SampleText("", "prompt", "prompt", 0), SampleText("", "prompt", "join", 0)]
    joined.append(SampleText("", "running", "whole", 0))
    given = EmbeddedTexts(joined, np.stack([views[0], views[1], views[0]]))
    made = centroid_from("a", given, SimpleNamespace(id="test"), TAILS)  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(made.means, [[1, 0]])  # a joined text begins with another adapter's


# Scores


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@given(clouds_of, st.integers(0, 99))
@quick
def test_cosines_are_cosines(clouds, seed):
    centroids = fitted(clouds)
    x = np.random.default_rng(seed).normal(size=(2, 3, centroids.means.shape[1])).astype(np.float32)
    expected = np.einsum("bte,ne->btn", unit(x), unit(centroids.means))
    np.testing.assert_allclose(centroids.cosines(x), expected, atol=1e-5)
    middle = centroids.means.mean(0)
    expected = np.einsum("bte,ne->btn", unit(x - middle), unit(centroids.means - middle))
    np.testing.assert_allclose(centroids.cosines(x, "centred"), expected, atol=1e-4)


def test_a_text_without_words_is_equally_far_from_all_and_surely_general():
    nothing = np.zeros((1, VIEWS, DIM), np.float32)
    for is_general, expected in ((False, [0, 0, 0]), (True, [0, 0, 0, SURE_NATS])):
        centroids = fitted(clouds_from(0), is_general)
        np.testing.assert_array_equal(centroids.cosines(nothing[:, 0]), [[0, 0, 0]])
        for is_running in (False, True):
            np.testing.assert_array_equal(centroids.evidence(nothing, np.array([is_running])), [expected])


@given(clouds_of, st.booleans())
@quick
def test_a_batch_scores_as_its_rows(clouds, is_general):
    centroids = fitted(clouds, is_general)
    x = np.concatenate(list(clouds.values()))
    stages = np.arange(len(x)) % 2 == 0  # a batch holds prompts and running texts
    rows = np.concatenate([centroids.evidence(x[i : i + 1], stages[i : i + 1]) for i in range(len(x))])
    np.testing.assert_array_equal(centroids.evidence(x, stages), rows)  # bit for bit: keys of cached blocks hold them
    for score in ("cosine", "centred"):
        rows = np.concatenate([centroids.cosines(row[None], score) for row in x[:, 0]])
        np.testing.assert_array_equal(centroids.cosines(x[:, 0], score), rows)


def test_each_stage_has_its_own_classes_and_calibration():
    prompt, running = centroid("a", clouds_from(1)["a"]), centroid("a", clouds_from(2)["a"])
    mixed = replace(
        prompt,
        stages={"prompt": prompt.stages["prompt"], "running": running.stages["running"]},
        general=general_of(),
        calibrations={"prompt": Calibration(2, 5), "running": Calibration(3, -7)},
    )
    x = np.random.default_rng(3).normal(size=(4, VIEWS, DIM)).astype(np.float32)
    is_running = np.array([False, True, True, False])
    plain = dict.fromkeys(STAGES, Calibration())
    alone = {False: replace(prompt, general=general_of(), calibrations=plain),
             True: replace(running, general=general_of(), calibrations=plain)}  # fmt: skip
    found = mixed.evidence(x, is_running)
    for row, stage, bias in zip(range(4), is_running, np.where(is_running, -7, 5), strict=True):
        expected = alone[bool(stage)].evidence(x[row : row + 1], np.array([stage]))[0]
        np.testing.assert_allclose(found[row], expected + np.array([0, bias]), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(mixed.temperatures(is_running), [[2], [3], [3], [2]])


# Errors

STAGE = "prompt"


def changed(**changes: object) -> dict[str, object]:
    """Stages with another statistics of prompts."""
    stages = fitted(clouds_from(0)).stages
    return {"stages": {**stages, STAGE: replace(stages[STAGE], **changes)}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"means": np.zeros((2, DIM), np.float32)}, r"means has shape \(2, 4\), expected \(3, 4\)"),
        ({"counts": np.ones(4, np.int64)}, r"counts has shape \(4,\), expected \(3,\)"),
        ({"means": np.full((3, DIM), np.nan, np.float32)}, "means holds NaN or infinity"),
        ({"names": ("a", "b", "a")}, "names repeat: a, b, a"),
        ({"counts": np.array([3, 0, 1])}, "every adapter needs at least one sample"),
        (
            {"means": np.full((2, DIM), np.nan, np.float32), "counts": np.zeros(3, np.int64)},
            r"(?s)shape.*NaN.*at least one",
        ),
        ({"tails": (24,)}, r"prompt means has shape \(6, 12\), expected \(6, 8\)"),
        (changed(means=np.zeros((6, 5), np.float32)), r"prompt means has shape \(6, 5\), expected \(6, 12\)"),
        (changed(factors=np.zeros((2, 3, 12), np.float32)), r"prompt factors has shape .* expected \(3, 3, 12\)"),
        (changed(factors=np.zeros((3, 12), np.float32)), r"prompt factors has shape \(3, 12\)"),
        (changed(rest=np.zeros(2, np.float32)), r"prompt rest has shape \(2,\), expected \(3,\)"),
        (changed(rest=np.full(3, np.nan, np.float32)), "prompt holds NaN or infinity"),
        (changed(rest=np.full(3, -1, np.float32)), "prompt: owners must rise from 0 to 2, .* rest at least 0"),
        (changed(owners=np.array([0, 0, 1, 1, 1, 1])), "prompt: owners must rise from 0 to 2"),
        (changed(owners=np.array([0, 0, 2, 2, 1, 1])), "prompt: owners must rise from 0 to 2"),
        (changed(sizes=np.array([0, 2, 4, 4, 1, 2])), "prompt: .* sizes be at least 1"),
        ({"general": general_of(DIM + 1)}, r"(?s)general prompt means.*general running means"),
    ],
)
def test_centroids_refuse(changes, message):
    with pytest.raises(OptionError, match=message):
        replace(fitted(clouds_from(0)), **changes)


def test_names_embedders_and_tails_are_checked():
    centroids = fitted(clouds_from(0))
    with pytest.raises(AdapterError, match="'a' has a centroid already"):
        centroids.join(centroid("a", clouds_from(0)["a"]))
    with pytest.raises(AdapterError, match=r"unknown adapter 'z'.*Allowed: a, b, c"):
        centroids.remove("z")
    one = centroid("d", clouds_from(0)["a"])
    with pytest.raises(OptionError, match=r"centroids of d were made by the embedder 'other' .* not by 'test'"):
        centroids.join(replace(one, embedder_id="other"))
    with pytest.raises(OptionError, match=r"with tails \(8, 24\), not by 'test' with \(24, 8\)"):
        centroids.join(replace(one, tails=(8, 24)))
    with pytest.raises(OptionError, match="NaN"):
        centroid("d", np.full((2, VIEWS, DIM), np.nan, np.float32))
