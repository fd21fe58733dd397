"""Cross-validation tells how far a router can be trusted; general text is what no adapter's texts are like."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import softmax

from treadle.common.errors import OptionError
from treadle.common.params import RoutingParams
from treadle.routing.calibration import (
    BASE_BIASES,
    DEFAULT,
    FLOOR,
    FOLDS,
    TEMPERATURES,
    UNSEEN_WEIGHT,
    FitReport,
    calibrate,
)
from treadle.routing.centroids import Calibration
from treadle.routing.discriminant import Discriminant
from treadle.routing.fitting import embed_texts, fit, fit_with_report, texts_of
from treadle.routing.general_text import general_statistics, general_texts, general_views, staged_texts
from treadle.routing.samples import STAGES, Sample
from treadle.routing.statistics import Statistics

from conftest import SAMPLES

WORDS_OF = {"math": "add sum three four plus", "science": "cell atom planet heat", "code": "def return list loop"}
FOREIGN = ["What is the capital of France?", "A letter to my aunt about the weather.", "Bonjour, il fait beau."]


def many(count: int, seed: int = 0, words: int = 12) -> dict[str, list[str]]:
    """Return samples of each adapter in its own words."""
    random = np.random.default_rng(seed)
    return {name: [" ".join(random.choice(own.split(), words)) for _ in range(count)] for name, own in WORDS_OF.items()}


@pytest.fixture(scope="module")
def fitted(embedder):
    return fit_with_report(many(9), embedder)


# General text


def test_general_texts_are_many_and_all_different():
    texts = general_texts()
    assert len(texts) == len(set(texts)) >= 500
    assert all(text.strip() for text in texts)
    assert sum("?" in text for text in texts) > 50  # requests of users among them


def test_running_general_text_is_a_beginning_of_general_text_and_always_the_same():
    staged = staged_texts()
    assert staged == staged_texts()
    assert staged["prompt"] == list(general_texts())
    for whole, part in zip(staged["prompt"], staged["running"], strict=True):
        assert whole.startswith(part)
    assert staged["running"] != staged["prompt"]


def test_an_embedder_that_knows_few_words_knows_no_general_text(embedder, terse):
    assert general_views(terse, terse.tails) is None
    assert fit(SAMPLES, terse).centroids.general is None
    views = general_views(embedder, embedder.tails)
    assert views is not None
    for stage in STAGES:
        assert views[stage].shape[1:] == (3, embedder.dim)
        assert views[stage][:, 0].any(-1).all()
        found = general_statistics(views)[stage]
        flat = views[stage].reshape(len(views[stage]), -1)
        np.testing.assert_allclose(found.means[0], flat.mean(0), atol=1e-5)
        np.testing.assert_allclose(found.scatter() / len(flat), np.cov(flat.T, ddof=0), atol=1e-3)


def test_a_text_of_a_foreign_kind_goes_to_the_base_and_own_texts_to_their_adapter(fitted):
    router, _ = fitted
    weights = router.weights(FOREIGN)
    assert (weights.sum(-1) < 0.5).all()
    own = router.weights([texts[0] for texts in many(1, seed=5).values()])
    assert (own.argmax(-1) == np.arange(3)).all()
    assert (own.max(-1) > 0.5).all()
    np.testing.assert_allclose(router.weights(FOREIGN, RoutingParams(fallback=False)).sum(-1), 1, atol=1e-5)


# Calibration


def embedded(samples, embedder):
    return {name: embed_texts(name, texts_of(name, texts), embedder, embedder.tails) for name, texts in samples.items()}


def test_the_calibration_is_the_one_with_the_least_loss(embedder):
    """All by hand: folds, a router without each, softmax of SciPy, the loss over the whole grid."""
    given, general = embedded(many(6), embedder), general_views(embedder, embedder.tails)
    assert general is not None
    background = general_statistics(general)
    found = calibrate(given, general)
    for stage in STAGES:

        def classes(names, keep, stage=stage):
            own = {name: given[name].keep([keep(text) for text in given[name].texts]) for name in names}
            joined: Statistics | None = None
            for each in own.values():
                made = each.statistics(stage, max_factors=len(each.texts))
                joined = made if joined is None else joined.join(made)
            assert joined is not None
            count = sum(len({text.owner for text in each.texts}) for each in own.values())
            return Discriminant.fit(joined, count, background[stage])

        def evidence(made, name, keep, stage=stage):
            each = given[name].keep([text.stage == stage and keep(text) for text in given[name].texts])
            return made.evidence(each.views.reshape(len(each.views), -1))

        held = {name: [] for name in given}
        for fold in range(FOLDS):
            made = classes(given, lambda text, fold=fold: text.owner % FOLDS != fold)
            for name in given:
                held[name].append(evidence(made, name, lambda text, fold=fold: text.owner % FOLDS == fold))
        unseen = [classes(given, lambda _: True).evidence(general[stage].reshape(len(general[stage]), -1))]
        for name in given:
            others = classes([other for other in given if other != name], lambda _: True)
            unseen.append(evidence(others, name, lambda _: True))

        def loss(temperature, bias, held=held, unseen=unseen):
            def cost(each, column):
                shifted = each.astype(np.float64) + np.eye(each.shape[1])[-1] * bias
                return -np.log(softmax(shifted / temperature, -1)[:, column] + FLOOR)

            own = np.mean([cost(np.concatenate(each), index).mean() for index, each in enumerate(held.values())])
            return own + UNSEEN_WEIGHT * np.mean([cost(each, -1).mean() for each in unseen])

        losses = {(t, b): loss(t, b) for t in TEMPERATURES for b in BASE_BIASES}
        chosen = found.calibrations[stage]
        assert losses[chosen.temperature, chosen.base_bias] == pytest.approx(min(losses.values()), abs=1e-4)


def test_without_general_text_the_base_has_no_bias(terse):
    report = calibrate(embedded(many(6), terse), None)
    assert {each.base_bias for each in report.calibrations.values()} == {0}
    assert len(report.confusion[0]) == 4
    assert all(row[-1] == 0 for row in report.confusion)


def test_texts_of_one_sample_are_held_out_together(embedder):
    """Else a router would know each text by its sample's others, and be right of samples that are of no kind."""
    random = np.random.default_rng(0)
    words = " ".join(WORDS_OF.values()).split()
    noise = {name: [" ".join(random.choice(words, 12)) for _ in range(12)] for name in ("a", "b", "c")}
    _, report = fit_with_report(noise, embedder)
    assert report.accuracy is not None
    assert report.accuracy < 0.7


# The report


def test_the_report_tells_accuracy_and_what_is_taken_for_what(fitted):
    router, report = fitted
    assert report.names == router.names == tuple(WORDS_OF)
    assert report.calibrations == router.centroids.calibrations
    assert report.accuracy is not None
    assert report.accuracy > 0.9
    assert report.warnings() == []
    table = np.array(report.confusion)
    assert table.shape == (3, 4)
    np.testing.assert_allclose(table.sum(-1), 1, atol=1e-6)
    assert (table[:, :3].argmax(-1) == np.arange(3)).all()
    assert json.loads(json.dumps(report.confusion)) == [list(row) for row in report.confusion]


def test_one_sample_of_an_adapter_is_too_few_for_a_cross_validation(embedder, terse):
    for each, expected in ((embedder, DEFAULT), (terse, Calibration())):
        _, report = fit_with_report({**many(4), "math": ["add three"]}, each)
        assert (report.accuracy, report.accuracy_of_half, report.confusion) == (None, None, ())
        assert set(report.calibrations.values()) == {expected}
        assert report.warnings() == ["each adapter needs 2 samples at least for a cross-validation; give tens of each."]


def test_a_low_accuracy_is_told_with_what_helps():
    report = FitReport(
        ("math", "code"), {}, accuracy=0.7, confusion=((0.6, 0.1, 0.3), (0.2, 0.8, 0.0)), accuracy_of_half=0.6
    )
    (told,) = report.warnings()
    assert "70% of the samples' prompts by cross-validation, which is low" in told
    assert "With half of the samples it knew 60%: twice as many samples would help" in told
    assert "Most often 'math' is taken for 'the base' (30%)" in told
    for half in (None, 0.69):
        (told,) = replace(report, accuracy_of_half=half).warnings()
        assert "twice as many" not in told
    assert replace(report, accuracy=0.9).warnings() == []


def test_an_adapter_whose_prompts_the_embedder_does_not_know_spoils_no_figure(embedder):
    silent = [Sample("\U0001f389", f" {text}") for text in SAMPLES["math"]]
    router, report = fit_with_report({"silent": silent, "code": SAMPLES["code"]}, embedder)
    json.dumps([report.accuracy, report.accuracy_of_half, report.confusion], allow_nan=False)
    assert np.isfinite(router.weights(["add three", "def loop", ""])).all()
    alone, _ = fit_with_report({"silent": silent}, embedder)
    assert np.isfinite(alone.weights(["add three", ""])).all()


@pytest.mark.parametrize("name", ["embedder", "terse"])
def test_some_prompts_that_the_embedder_does_not_know_are_left_out(name, request):
    half = [Sample("\U0001f389" if index in {0, 3} else text, f" {text}") for index, text in enumerate(SAMPLES["math"])]
    for samples in (half, half[:2]):
        router, report = fit_with_report({"half": samples, "code": SAMPLES["code"]}, request.getfixturevalue(name))
        json.dumps([report.accuracy, report.accuracy_of_half, report.confusion], allow_nan=False)
        assert np.isfinite(router.weights(["add three", "def loop", ""])).all()
        assert np.isfinite(fit({"half": samples}, request.getfixturevalue(name)).weights(["add"])).all()


def test_samples_without_a_known_prompt_are_refused_where_nothing_else_says_what_they_are(terse):
    with pytest.raises(OptionError, match="samples of 'silent': none of the prompts holds a word that the embedder"):
        fit({"silent": [Sample("\U0001f389", " add three")] * 3}, terse)


# Few samples


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", ["embedder", "terse"])
@pytest.mark.parametrize("adapters", [1, 3])
def test_few_samples_give_finite_weights(name, count, adapters, request):
    samples = dict(list(many(count).items())[:adapters])
    router, report = fit_with_report(samples, request.getfixturevalue(name))
    texts = [*FOREIGN, "", *(each[0] for each in samples.values()), "add " * 200]
    for is_running in (False, True):
        seen = router.see(texts, is_running=is_running)
        assert abs(router.compare(seen, RoutingParams()).scores).max() < 1e5
        for params in (RoutingParams(), RoutingParams(fallback=False), RoutingParams(rule="top_k", top_k=1)):
            weights = router.weigh(seen, params)
            assert np.isfinite(weights).all()
            assert ((weights >= 0) & (weights <= 1)).all()
            if not params.fallback or name == "terse":
                np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        own = router.weigh(seen, RoutingParams(fallback=False))[len(FOREIGN) + 1 : -1]
        assert (own.argmax(-1) == np.arange(adapters)).all()
    assert report.accuracy is None or 0 <= report.accuracy <= 1


def test_samples_that_are_all_alike_give_finite_weights(embedder, terse):
    for each in (embedder, terse):
        for samples in ({"math": ["add"]}, {"math": ["add"] * 5}, {"math": ["add"] * 3, "code": ["def"] * 3}):
            weights = fit(samples, each).weights(["add", "def", "loop", ""])
            assert np.isfinite(weights).all()
            assert weights[0, 0] == weights[0].max()


def test_one_message_names_all_adapters_without_a_known_word(terse):
    with pytest.raises(OptionError, match=r"(?s)'math'.*'code'"):
        fit({"math": ["unheard"], "code": ["of"]}, terse)
