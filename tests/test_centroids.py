"""Means, counts and scatter are plain statistics; the scores are closed forms of them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.common.errors import AdapterError, OptionError
from treadle.routing.centroids import SHRINKAGE, Centroids, group, log_softmax

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def samples(seed: int, counts: tuple[int, ...] = (5, 8, 3), dim: int = 6) -> dict[str, np.ndarray]:
    """Random embeddings (count, D) of adapters a, b, c, around different means."""
    random = np.random.default_rng(seed)
    return {
        name: (random.normal(size=dim) + 0.5 * random.normal(size=(count, dim))).astype(np.float32)
        for name, count in zip("abcdef", counts, strict=False)
    }


def fitted(clouds: dict[str, np.ndarray], **options: int) -> Centroids:
    centroids = Centroids.empty("test", next(iter(clouds.values())).shape[1])
    for name, cloud in clouds.items():
        centroids = centroids.add(name, cloud, **options)
    return centroids


shapes = st.tuples(
    st.integers(0, 99), st.lists(st.integers(2, 9), min_size=2, max_size=5).map(tuple), st.integers(1, 7)
)
clouds_of = shapes.map(lambda drawn: samples(*drawn))


@given(clouds_of)
@quick
def test_they_are_the_mean_the_count_and_the_scatter_of_the_samples(clouds):
    centroids = fitted(clouds)
    assert centroids.names == tuple(clouds)
    for index, cloud in enumerate(clouds.values()):
        np.testing.assert_allclose(centroids.means[index], cloud.mean(0), atol=1e-5)
        assert centroids.counts[index] == len(cloud)
        np.testing.assert_allclose(
            centroids.scatter[index], np.cov(cloud.T, ddof=0).reshape(len(cloud.T), -1) * len(cloud), atol=1e-4
        )
    assert centroids.means.dtype == centroids.scatter.dtype == np.float32


@given(clouds_of, st.data())
@quick
def test_adding_then_removing_is_as_before(clouds, data):
    name = data.draw(st.sampled_from(sorted(clouds)))
    without = fitted({other: cloud for other, cloud in clouds.items() if other != name})
    same = without.add(name, clouds[name]).remove(name)
    also = fitted(clouds).remove(name)
    for result in (same, also):
        assert result.names == without.names
        for field in ("means", "counts", "scatter"):
            np.testing.assert_array_equal(getattr(result, field), getattr(without, field))


@given(clouds_of)
@quick
def test_words_count_within_groups_alone(clouds):
    name, cloud = next(iter(clouds.items()))
    empty = Centroids.empty("test", cloud.shape[1])
    plain, alike = empty.add(name, cloud), empty.add(name, cloud, np.full(len(cloud), 7))
    for field in ("means", "counts", "scatter"):
        np.testing.assert_allclose(getattr(alike, field), getattr(plain, field), atol=1e-5)
    words = np.arange(1, len(cloud) + 1)
    weighed = empty.add(name, cloud, words)
    np.testing.assert_array_equal(weighed.means, plain.means)
    spread = cloud - cloud.mean(0)
    np.testing.assert_allclose(weighed.scatter[0], (spread.T * words / words.mean()) @ spread, atol=1e-4)


def test_texts_of_any_length_say_the_same_of_a_word():
    """The mean of n words has 1/n of their covariance: weighed, short texts do not outvote the long ones."""
    random = np.random.default_rng(0)
    lengths = random.choice([1, 100], 400)
    word = np.float64([3, 1, 0.1])  # standard deviations of a word's vector
    means = (random.normal(size=(400, 3)) * word / np.sqrt(lengths)[:, None]).astype(np.float32)
    found = Centroids.empty("test", 3).add("a", means, lengths)
    np.testing.assert_allclose(np.diag(found.scatter[0]) * lengths.mean() / 400, word**2, rtol=0.25)


def test_a_centroid_is_not_normalised_again():
    centroids = fitted({"a": np.float32([[1, 0], [0, 1]])})
    np.testing.assert_array_equal(centroids.means, [[0.5, 0.5]])


# Scores


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@given(clouds_of, st.integers(0, 99))
@quick
def test_cosines_are_cosines(clouds, seed):
    centroids = fitted(clouds)
    x = np.random.default_rng(seed).normal(size=(2, 3, centroids.means.shape[1])).astype(np.float32)
    expected = np.einsum("bte,ne->btn", unit(x), unit(centroids.means))
    np.testing.assert_allclose(centroids.score(x, "cosine"), expected, atol=1e-5)
    middle = centroids.means.mean(0)
    expected = np.einsum("bte,ne->btn", unit(x - middle), unit(centroids.means - middle))
    np.testing.assert_allclose(centroids.score(x, "centred"), expected, atol=1e-4)


def test_a_text_without_words_is_equally_far_from_all():
    np.testing.assert_array_equal(fitted(samples(0)).score(np.zeros((1, 6), np.float32), "cosine"), [[0, 0, 0]])


def log_posteriors(clouds: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Gaussians of one covariance and equal priors, each density written out."""
    means = [cloud.mean(0, dtype=np.float64) for cloud in clouds.values()]
    residuals = np.concatenate([cloud - mean for cloud, mean in zip(clouds.values(), means, strict=True)])
    pooled = residuals.T @ residuals / (len(residuals) - len(means))
    covariance = (1 - SHRINKAGE) * pooled + SHRINKAGE * np.diag(np.full(len(pooled), np.diag(pooled).mean()))
    inverse = np.linalg.inv(covariance)
    logs = np.stack([[-0.5 * (row - mean) @ inverse @ (row - mean) for mean in means] for row in x])  # (B, N)
    return (
        logs - np.log(np.exp(logs - logs.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logs.max(-1, keepdims=True)
    )


@given(clouds_of, st.integers(0, 99))
@quick
def test_lda_is_the_log_posterior_of_gaussians_with_one_shrunk_covariance(clouds, seed):
    centroids = fitted(clouds)
    x = np.random.default_rng(seed).normal(size=(4, centroids.means.shape[1])).astype(np.float32)
    scores, expected = centroids.score(x, "lda"), log_posteriors(clouds, x)
    np.testing.assert_allclose(scores, expected, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(np.exp(scores).sum(-1), 1, atol=1e-5)


@given(clouds_of, st.integers(1, 9))
@quick
def test_groups_part_the_samples(clouds, number):
    cloud = next(iter(clouds.values()))
    groups, owners = group(cloud, number)
    assert 1 <= len(groups.sizes) <= number
    assert groups.sizes.sum() == len(cloud)
    assert (groups.sizes > 0).all()
    np.testing.assert_allclose(groups.sizes @ groups.means / len(cloud), cloud.mean(0), atol=1e-5)
    np.testing.assert_array_equal(np.bincount(owners), groups.sizes)
    again, _ = group(cloud, number)
    np.testing.assert_array_equal(groups.means, again.means)


def test_groups_are_clusters():
    random = np.random.default_rng(0)
    corners = np.float32([[0, 9], [9, 0], [9, 9]])
    cloud = np.concatenate([corner + random.normal(size=(5, 2)) for corner in corners]).astype(np.float32)
    groups, _ = group(random.permutation(cloud), 3)
    assert sorted(groups.sizes) == [5, 5, 5]
    found = groups.means[np.lexsort(groups.means.T)]
    np.testing.assert_allclose(found, corners[np.lexsort(corners.T)], atol=1.5)


def test_lda_of_groups_is_the_log_posterior_of_their_mixtures():
    clouds = samples(5, (13, 4, 8))
    centroids = fitted(clouds, group_samples=4)
    assert np.bincount(centroids.groups.owners).tolist() == [3, 1, 2]
    x = np.random.default_rng(6).normal(size=(4, 6)).astype(np.float32)
    parts = [group(cloud, len(cloud) // 4)[0] for cloud in clouds.values()]
    residuals = []
    for cloud, each in zip(clouds.values(), parts, strict=True):
        nearest = ((cloud[:, None] - each.means) ** 2).sum(-1).argmin(-1)
        assert np.bincount(nearest).tolist() == each.sizes.tolist()
        residuals.append(cloud - each.means[nearest])
    stacked = np.concatenate(residuals).astype(np.float64)
    pooled = stacked.T @ stacked / (len(stacked) - 6)
    covariance = (1 - SHRINKAGE) * pooled + SHRINKAGE * np.diag(np.full(6, np.diag(pooled).mean()))
    inverse = np.linalg.inv(covariance)
    densities = np.stack(
        [
            sum(
                size / each.sizes.sum() * np.exp(-0.5 * np.einsum("bd,de,be->b", x - mean, inverse, x - mean))
                for mean, size in zip(each.means, each.sizes, strict=True)
            )
            for each in parts
        ],
        -1,
    )
    expected = np.log(densities / densities.sum(-1, keepdims=True))
    np.testing.assert_allclose(centroids.score(x, "lda"), expected, atol=1e-3, rtol=1e-3)


def test_groups_come_and_go_with_their_adapter():
    clouds = samples(7, (13, 4, 8))
    some = {name: clouds[name] for name in "ac"}
    whole, without = (fitted(each, group_samples=4) for each in (clouds, some))
    for field in ("means", "owners", "sizes"):
        np.testing.assert_array_equal(
            getattr(whole.remove("b").groups, field), getattr(without.groups, field), err_msg=field
        )
    x = np.random.default_rng(8).normal(size=(2, 3, 6)).astype(np.float32)
    np.testing.assert_array_equal(whole.remove("b").score(x, "lda"), without.score(x, "lda"))


def test_lda_is_scikit_learns():
    discriminant = pytest.importorskip("sklearn.discriminant_analysis")
    count = 9
    clouds = samples(3, (count, count, count, count))
    reference = discriminant.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE, priors=[0.25] * 4)
    reference.fit(np.concatenate(list(clouds.values())), np.repeat(range(4), count))
    x = np.random.default_rng(4).normal(size=(5, 6)).astype(np.float32)
    # scikit-learn divides each scatter by n, we divide the pooled one by its degrees of freedom, n - 1 an adapter
    expected = log_softmax(reference.decision_function(x) * (count - 1) / count)
    np.testing.assert_allclose(fitted(clouds).score(x, "lda"), expected, atol=1e-4)


def test_lda_finds_directions_that_cosines_miss():
    """Two adapters that differ in a quiet direction, beside a loud one that says nothing."""
    random = np.random.default_rng(0)
    loud, quiet = random.normal(3, 2, size=200), random.normal([[0.5], [1.5]], 0.1, size=(2, 200))
    clouds = {name: np.stack([loud, quiet[i]], 1).astype(np.float32) for i, name in enumerate("ab")}
    centroids = fitted(clouds)
    x = np.concatenate(list(clouds.values()))
    truth = np.repeat([0, 1], 200)
    assert (centroids.score(x, "lda").argmax(-1) == truth).mean() > 0.97
    assert (centroids.score(x, "cosine").argmax(-1) == truth).mean() < 0.8


@given(clouds_of, st.sampled_from(["cosine", "centred", "lda"]))
@quick
def test_a_batch_scores_as_its_rows(clouds, score):
    centroids = fitted(clouds)
    x = np.concatenate(list(clouds.values()))
    rows = np.stack([centroids.score(row, score) for row in x])
    np.testing.assert_allclose(centroids.score(x, score), rows, atol=1e-3, rtol=1e-4)


def test_lda_works_where_samples_do_not_vary():
    centroids = fitted({"a": np.float32([[1, 0], [1, 0]]), "b": np.float32([[0, 1]])})
    scores = centroids.score(np.float32([[1, 0], [0, 1]]), "lda")
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(scores.argmax(-1), [0, 1])


# Errors


def test_lda_needs_an_adapter_with_two_samples():
    centroids = fitted({"a": np.float32([[1, 0]]), "b": np.float32([[0, 1]])})
    assert centroids.score(np.float32([[1, 0]]), "cosine").argmax() == 0
    with pytest.raises(OptionError, match="at least two samples; use cosine or centred"):
        centroids.score(np.float32([[1, 0]]), "lda")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"means": np.zeros((2, 6), np.float32)}, r"means has shape \(2, 6\), expected \(3, 6\)"),
        ({"counts": np.ones(4, np.int64)}, r"counts has shape \(4,\), expected \(3,\)"),
        ({"scatter": np.zeros((3, 6), np.float32)}, r"scatter has shape \(3, 6\), expected \(3, 6, 6\)"),
        ({"means": np.full((3, 6), np.nan, np.float32)}, "means holds NaN or infinity"),
        ({"scatter": np.full((3, 6, 6), np.inf, np.float32)}, "scatter holds NaN or infinity"),
        ({"names": ("a", "b", "a")}, "names repeat: a, b, a"),
        ({"counts": np.array([3, 0, 1])}, "every adapter needs at least one sample"),
        (
            {"means": np.full((2, 6), np.nan, np.float32), "counts": np.zeros(3, np.int64)},
            r"(?s)shape.*NaN.*at least one",
        ),
    ],
)
def test_centroids_refuse(changes, message):
    with pytest.raises(OptionError, match=message):
        replace(fitted(samples(0)), **changes)


def test_a_text_without_words_is_no_sample():
    embeddings = np.eye(3, dtype=np.float32)
    embeddings[1] = 0
    with pytest.raises(OptionError, match=r"samples of 'a': 1 of 3 hold no word that the embedder knows \(index 1\)"):
        Centroids.empty("e", 3).add("a", embeddings)
    with pytest.raises(OptionError, match=r"30 of 30 .* \(index 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 \.\.\.\)"):
        Centroids.empty("e", 3).add("a", np.zeros((30, 3), np.float32))


def test_names_are_checked():
    centroids = fitted(samples(0))
    with pytest.raises(AdapterError, match="'a' has a centroid already"):
        centroids.add("a", np.zeros((1, 6), np.float32))
    with pytest.raises(AdapterError, match=r"unknown adapter 'z'.*Allowed: a, b, c"):
        centroids.remove("z")
    with pytest.raises(OptionError, match="'d' has no sample texts"):
        centroids.add("d", np.zeros((0, 6), np.float32))
    with pytest.raises(OptionError, match="NaN"):
        centroids.add("d", np.full((2, 6), np.nan, np.float32))
