"""Fits a router: samples become texts, their embeddings become statistics. Nothing is trained."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import numpy as np

from treadle.common.errors import OptionError, collect, one_or_list
from treadle.common.params import RoutingParams
from treadle.routing.calibration import FitReport, calibrate
from treadle.routing.centroids import Centroids
from treadle.routing.embedder import Embedder, encode_views, load_embedder
from treadle.routing.general_text import general_statistics, general_texts, general_views
from treadle.routing.router import Router
from treadle.routing.running_sum import Tails
from treadle.routing.samples import JOINED, STAGES, Sample, SampleText, sample_texts
from treadle.routing.statistics import EmbeddedTexts

MAX_LISTED_SAMPLES = 10
"""The most samples that a message names."""
MAX_OTHERS = 500
"""The most texts of other adapters from which beginnings of joined texts are drawn."""


def centroid_of(
    name: str,
    samples: Sequence[str | Sample],
    embedder: Embedder,
    *,
    tails: Tails | None = None,
    others: Sequence[str] = (),
) -> Centroids:
    """Return the centroid of the adapter `name` from its samples; errors as in `texts_of` and `known_texts`."""
    tails = embedder.tails if tails is None else tails
    return centroid_from(name, embed_texts(name, texts_of(name, samples, others), embedder, tails), embedder, tails)


def texts_of(name: str, samples: Sequence[str | Sample], others: Sequence[str] = ()) -> list[SampleText]:
    """Return the texts that the samples of an adapter become.

    Args:
        name: of the adapter.
        samples: its samples.
        others: texts of other adapters; without any, general text stands for them.

    Raises:
        OptionError: there are no samples, or one text instead of a list.
    """
    if isinstance(samples, str):
        raise OptionError(f"samples of {name!r} are one text; give a list of texts.")
    if not samples:
        raise OptionError(f"adapter {name!r} has no sample texts.")
    return sample_texts(samples, others or general_texts())


def embed_texts(name: str, texts: Sequence[SampleText], embedder: Embedder, tails: Tails) -> EmbeddedTexts:
    """Embed the texts of an adapter; errors as in `known_texts`."""
    return known_texts(name, EmbeddedTexts(texts, encode_views(embedder, [each.text for each in texts], tails)))


def known_texts(name: str, given: EmbeddedTexts) -> EmbeddedTexts:
    """Return the texts with a word that the embedder knows.

    Raises:
        OptionError: some samples have no known word in any text, listed as their owner counts; or no prompt has one.
    """
    is_known = cast(list[bool], given.views[:, 0].any(-1).tolist())
    owned = [(text.owner, known) for text, known in zip(given.texts, is_known, strict=True) if JOINED not in text.kind]
    heard = {owner for owner, known in owned if known}
    if silent := sorted({owner for owner, _ in owned} - heard):
        numbers = ", ".join(str(index + 1) for index in silent[:MAX_LISTED_SAMPLES])
        more = " ..." if len(silent) > MAX_LISTED_SAMPLES else ""
        raise OptionError(
            f"samples of {name!r}: {len(silent)} of {len(heard) + len(silent)} hold no word that the embedder knows "
            f"(number {numbers}{more}); leave them out, or give other texts."
        )
    if not any(known and text.stage == "prompt" for text, known in zip(given.texts, is_known, strict=True)):
        raise OptionError(
            f"samples of {name!r}: none of the prompts holds a word that the embedder knows; give other samples, or "
            "another embedder."
        )
    return given.keep(is_known)


def centroid_from(name: str, given: EmbeddedTexts, embedder: Embedder, tails: Tails) -> Centroids:
    """Return the centroid of the adapter `name` from its embedded texts."""
    wholes = given.keep([JOINED not in text.kind for text in given.texts]).views[:, 0]
    return Centroids(
        names=(name,),
        means=wholes.mean(0, dtype=np.float64)[None].astype(np.float32),
        counts=np.array([len({text.owner for text in given.texts})]),
        stages={stage: given.statistics(stage) for stage in STAGES},
        embedder_id=embedder.id,
        tails=tails,
    )


def fit(
    samples: Mapping[str, Sequence[str | Sample]],
    embedder: Embedder | str,
    params: RoutingParams | None = None,
    *,
    fitted: Sequence[Centroids] = (),
) -> Router:
    """Make a router from sample texts of each adapter; nothing is trained.

    Args:
        samples: adapter name -> texts of the kind it was trained for, or `Sample`s, which tell prompt and answer
            apart; tens are enough. Each becomes several texts (`treadle.routing.samples.sample_texts`).
        embedder: an Embedder, a model2vec folder, or the name of a sentence-transformers model.
        params: the routing params to use by default.
        fitted: centroids of further adapters, made by the same embedder (`treadle.bundle.centroid_files`).
    """
    return fit_with_report(samples, embedder, params, fitted=fitted)[0]


def fit_with_report(
    samples: Mapping[str, Sequence[str | Sample]],
    embedder: Embedder | str,
    params: RoutingParams | None = None,
    *,
    fitted: Sequence[Centroids] = (),
) -> tuple[Router, FitReport]:
    """Make a router as `fit` does, and tell how well it knows its own samples by cross-validation."""
    if not samples and not fitted:
        raise OptionError("fit needs sample texts of at least one adapter.")
    return _fit(samples, load_embedder(embedder) if isinstance(embedder, str) else embedder, params, fitted)


def empty_router(embedder: Embedder) -> Router:
    """Return a router that knows general text and no adapter yet; adapters may join it."""
    return _fit({}, embedder, None, ())[0]


def _fit(
    samples: Mapping[str, Sequence[str | Sample]],
    loaded: Embedder,
    params: RoutingParams | None,
    fitted: Sequence[Centroids],
) -> tuple[Router, FitReport]:
    tails = loaded.tails
    problems: list[str] = []

    def embed(name: str) -> EmbeddedTexts:
        return embed_texts(name, texts_of(name, samples[name], draw_others(samples, name)), loaded, tails)

    embedded = collect(problems, [partial(embed, name) for name in samples])
    if problems:
        raise OptionError(one_or_list("the samples:", problems))
    by_name = dict(zip(samples, embedded, strict=True))
    general = general_views(loaded, tails)
    centroids = Centroids.empty(loaded.id, loaded.dim, tails, None if general is None else general_statistics(general))
    for each in (*(centroid_from(name, own, loaded, tails) for name, own in by_name.items()), *fitted):
        centroids = centroids.join(each)
    report = calibrate(by_name, general)
    return Router(replace(centroids, calibrations=report.calibrations), loaded, params or RoutingParams()), report


def draw_others(samples: Mapping[str, Sequence[str | Sample]], name: str) -> list[str]:
    """Return texts of the other adapters, drawn evenly."""
    choose = random.Random(name)
    share = max(1, MAX_OTHERS // max(1, len(samples) - 1))
    others: list[str] = []
    for other, given in samples.items():
        if other != name and not isinstance(given, str):
            drawn = choose.sample(list(given), min(share, len(given)))
            others += [each if isinstance(each, str) else each.whole for each in drawn]
    return [text for text in others if text.strip()]
