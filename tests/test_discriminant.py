"""The discriminant is scikit-learn's and SciPy's: shared Gaussians, mixtures of groups, and general text's own."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from treadle.routing.centroids import log_softmax
from treadle.routing.discriminant import MIN_VARIANCE_SHARE, Discriminant, oas
from treadle.routing.statistics import Statistics

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
Floats = np.ndarray
SHRINKAGE = 0.2
LEAST = -60
"""Log-likelihoods so far below the best are not told apart."""


def clouds_from(seed: int, adapters: int, groups: int, count: int, size: int) -> Floats:
    """Random texts (N, groups, count, F) around a mean of each group."""
    random = np.random.default_rng(seed)
    means = random.normal(size=(adapters, groups, 1, size))
    return (means + 0.5 * random.normal(size=(adapters, groups, count, size))).astype(np.float32)


def statistics(clouds: Floats) -> Statistics:
    """Return statistics whose factors are not rounded to float16, for exact comparisons."""
    joined = None
    for cloud in clouds:
        kinds = [f"{index:02d}" for index in range(len(cloud)) for _ in cloud[index]]
        own = Statistics.of(cloud.reshape(-1, cloud.shape[-1]), kinds)
        residuals = cloud - cloud.mean(1, keepdims=True, dtype=np.float64)
        own = replace(own, factors=residuals.reshape(1, -1, cloud.shape[-1]).astype(np.float32))
        joined = own if joined is None else joined.join(own)
    assert joined is not None
    return joined


def fitted(clouds: Floats, general: Floats | None = None, shrinkage: float | None = SHRINKAGE) -> Discriminant:
    background = None if general is None else Statistics.of(general, ["general"] * len(general))
    return Discriminant.fit(statistics(clouds), clouds[..., 0].size, background, shrinkage)


def texts_from(seed: int, size: int, count: int = 5) -> Floats:
    return np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)


def clipped(evidence: Floats) -> Floats:
    return np.maximum(log_softmax(evidence), LEAST)


cases = st.tuples(st.integers(0, 99), st.integers(2, 4), st.integers(1, 3), st.integers(4, 9), st.integers(1, 7))


def reference(clouds: Floats):
    """Return scikit-learn's discriminant of the groups, and its covariance by degrees of freedom."""
    sklearn = pytest.importorskip("sklearn.discriminant_analysis")
    adapters, groups, count, size = clouds.shape
    classes = adapters * groups
    made = sklearn.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE, priors=[1 / classes] * classes)
    made.fit(clouds.reshape(-1, size), np.repeat(range(classes), count))
    # scikit-learn divides a scatter by n, we divide the pooled one by its degrees of freedom, n - 1 a group
    covariance = np.atleast_2d(made.covariance_) * count / (count - 1)
    assume(np.trace(covariance) > MIN_VARIANCE_SHARE * clouds.reshape(-1, size).var(0).sum())  # else it is raised
    return made, covariance


@given(st.tuples(st.integers(0, 99), st.integers(2, 4), st.just(1), st.integers(4, 9), st.integers(2, 7)))
@quick
def test_one_group_an_adapter_is_scikit_learns_lda(case):
    clouds = clouds_from(*case)
    made, _ = reference(clouds)
    x, count = texts_from(case[0], clouds.shape[-1]), clouds.shape[2]
    decision = made.decision_function(x)
    if len(clouds) == 2:  # scikit-learn gives the difference
        decision = np.stack([np.zeros(len(x)), decision], -1)
    expected = clipped(decision * (count - 1) / count)
    np.testing.assert_allclose(clipped(fitted(clouds).evidence(x)), expected, atol=1e-3, rtol=1e-3)


@given(cases)
@quick
def test_groups_are_a_mixture_of_gaussians_with_one_covariance(case):
    clouds = clouds_from(*case)
    _, covariance = reference(clouds)
    x = texts_from(case[0], clouds.shape[-1])
    each = [[multivariate_normal(part.mean(0), covariance).logpdf(x) for part in cloud] for cloud in clouds]
    expected = np.stack([logsumexp(np.reshape(one, (-1, len(x))), axis=0) for one in each], -1)
    np.testing.assert_allclose(clipped(fitted(clouds).evidence(x)), clipped(expected), atol=2e-3, rtol=2e-3)


def test_a_group_weighs_as_many_texts_as_it_has():
    many, few = clouds_from(0, 1, 1, 9, 3)[0, 0], clouds_from(1, 1, 1, 3, 3)[0, 0]
    own = Statistics.of(np.concatenate([many, few]), ["a"] * 9 + ["b"] * 3)
    made = Discriminant.fit(own.join(Statistics.of(few + 1, ["a"] * 3)), 15, None, 1.0)
    x = texts_from(2, 3)
    variance = np.trace(own.join(Statistics.of(few + 1, ["a"] * 3)).scatter()) / 12 / 3  # of a sphere
    parts = [multivariate_normal(part.mean(0), variance).logpdf(x) for part in (many, few, few + 1)]
    mixture = np.logaddexp(parts[0] + np.log(0.75), parts[1] + np.log(0.25))
    found = made.evidence(x)
    np.testing.assert_allclose(found[:, 0] - found[:, 1], mixture - parts[2], atol=1e-3, rtol=1e-3)


# General text


@given(cases, st.floats(0.05, 4))
@quick
def test_general_text_is_a_gaussian_nowhere_narrower_than_an_adapters(case, width):
    clouds = clouds_from(*case)
    size = clouds.shape[-1]
    general = (width * np.random.default_rng(5).normal(size=(40, size)) + 0.3).astype(np.float32)
    made = fitted(clouds, general)
    x = texts_from(case[0], size)
    places = x.astype(np.float64) @ made.axes  # classes of adapters have covariance 1 here
    spread = np.atleast_2d(np.cov((general.astype(np.float64) @ made.axes).T, ddof=0))
    values, directions = np.linalg.eigh(spread)
    wide = directions @ np.diag(np.maximum(values, 1)) @ directions.T
    base = multivariate_normal(made.origin, wide).logpdf(places)
    of_groups = [
        logsumexp([multivariate_normal(part.mean(0) @ made.axes).logpdf(places) for part in cloud], axis=0)
        - np.log(len(cloud))
        for cloud in clouds.astype(np.float64)
    ]
    found = made.evidence(x)
    assert found.shape == (len(x), len(clouds) + 1)
    expected = np.stack([*of_groups, np.broadcast_to(base, len(x))], -1).reshape(len(x), -1)
    np.testing.assert_allclose(clipped(found), clipped(expected), atol=5e-3, rtol=5e-3)


def test_general_text_explains_what_no_adapter_does():
    random = np.random.default_rng(0)
    means = np.eye(3, 8)[:, None, None] * 3
    clouds = (means + 0.2 * random.normal(size=(3, 1, 20, 8))).astype(np.float32)
    general = random.normal(size=(200, 8)).astype(np.float32) * 1.5
    made = fitted(clouds, general)
    assert (made.evidence(clouds[:, 0]).argmax(-1) == np.arange(3)[:, None]).all()
    foreign = means.mean(0)[0] - clouds[:, 0].mean(0)  # on no adapter's side
    assert (made.evidence(foreign).argmax(-1) == 3).all()


def test_general_text_leaves_the_odds_of_adapters_as_they_are():
    """It moves the origin of the axes, and what they keep; not what adapters are to each other."""
    clouds, x = clouds_from(3, 3, 2, 6, 5), texts_from(4, 5)
    general = np.random.default_rng(5).normal(size=(60, 5)).astype(np.float32)
    with_it, without = fitted(clouds, general).evidence(x)[:, :3], fitted(clouds).evidence(x)
    np.testing.assert_allclose(log_softmax(with_it), log_softmax(without), atol=1e-3, rtol=1e-3)


# Shrinkage


def covariance_from(seed: int, size: int, count: int) -> Floats:
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, size)) * np.linspace(0.2, 3, size)
    return x.T @ x / count


@given(st.integers(0, 99), st.integers(60, 120), st.integers(3, 80))
@quick
def test_oas_is_scikit_learns_but_for_terms_of_two_by_the_size(seed, size, count):
    """scikit-learn leaves 2 / F out of the paper's formula."""
    covariance = pytest.importorskip("sklearn.covariance")
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, size)) * np.linspace(0.2, 3, size)
    expected = covariance.OAS(assume_centered=True).fit(x).shrinkage_
    assert oas(x.T @ x / count, count) == pytest.approx(expected, rel=3 / size)


@given(st.integers(0, 99), st.integers(2, 12), st.integers(3, 200))
@quick
def test_oas_is_where_the_oracles_iteration_ends(seed, size, count):
    """The paper's equations (17) and (18): the oracle's share, with the estimate in the place of the truth."""
    sample = covariance_from(seed, size, count)
    sphere, share = np.eye(size) * np.trace(sample) / size, 0.5
    for _ in range(20_000):
        estimate = (1 - share) * sample + share * sphere
        product, square = np.trace(estimate @ sample), np.trace(estimate) ** 2
        before, share = (
            share,
            ((1 - 2 / size) * product + square) / ((count + 1 - 2 / size) * product + (1 - count / size) * square),
        )
        if abs(share - before) < 1e-13:
            break
    assert oas(sample, count) == pytest.approx(min(share, 1), rel=1e-3)


def test_oas_of_a_sphere_is_the_sphere_and_more_samples_shrink_less():
    assert oas(np.eye(4) * 3, 10) == 1
    sample = covariance_from(0, 8, 500)
    shares = [oas(sample, count) for count in (1, 5, 20, 100, 1000)]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < 0.05 < shares[1] <= 1


def test_the_share_of_the_sphere_is_that_of_oas_where_none_is_given():
    clouds, x = clouds_from(0, 3, 2, 6, 5), texts_from(1, 5)
    share = oas(statistics(clouds).scatter() / (36 - 6), 36)
    np.testing.assert_allclose(
        log_softmax(fitted(clouds, shrinkage=None).evidence(x)),
        log_softmax(fitted(clouds, shrinkage=share).evidence(x)),
        atol=1e-4,
        rtol=1e-4,
    )


# Few texts


@given(
    st.integers(0, 99), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 3]), st.booleans(), st.booleans()
)
@quick
def test_few_texts_never_blow_up(seed, adapters, groups, count, is_alike, is_general):
    clouds = clouds_from(seed, adapters, groups, count, 24)
    if is_alike:
        clouds[:] = clouds[:, :, :1]
    clouds /= np.linalg.norm(clouds, axis=-1, keepdims=True)
    general = texts_from(seed + 1, 24, 100)
    general /= np.linalg.norm(general, axis=-1, keepdims=True)
    made = fitted(clouds, general if is_general else None, shrinkage=None)
    for x in (clouds.reshape(-1, 24), general):
        found = made.evidence(x)
        assert np.isfinite(found).all()
        assert abs(found).max() < 1e5
    if adapters > 1 and groups == 1:
        assert (made.evidence(clouds[:, 0])[..., :adapters].argmax(-1) == np.arange(adapters)[:, None]).all()


def test_it_finds_directions_that_cosines_miss():
    """Two adapters that differ in a quiet direction, beside a loud one that says nothing."""
    random = np.random.default_rng(0)
    loud, quiet = random.normal(3, 2, size=200), random.normal([[0.5], [1.5]], 0.1, size=(2, 200))
    clouds = np.stack([np.stack([loud, quiet[i]], 1) for i in range(2)])[:, None].astype(np.float32)
    assert (fitted(clouds, shrinkage=None).evidence(clouds[:, 0]).argmax(-1) == [[0], [1]]).mean() > 0.97
    unit = clouds / np.linalg.norm(clouds, axis=-1, keepdims=True)
    means = clouds.mean((1, 2)) / np.linalg.norm(clouds.mean((1, 2)), axis=-1, keepdims=True)
    assert ((unit[:, 0] @ means.T).argmax(-1) == [[0], [1]]).mean() < 0.8
