"""Tries other views and other classes for prompts, on validation rows of eight domains: prints accuracies.

    python benchmarks/views.py --data ../shared/data [--only now tails ...] [--counts 600 60]

Printed: share of texts whose nearest adapter is their own, with 600 samples each, and with 60 (mean of 3 choices).
The texts: prompts, bare prompts, both behind a text of another domain, and the first 12 words of bare prompts.
"""

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from router import EMBEDDER
from router_rows import EIGHT, load_rows

from treadle.routing.discriminant import Discriminant, oas
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.fitting import draw_others
from treadle.routing.general_text import general_texts
from treadle.routing.running_sum import WORD
from treadle.routing.samples import sample_texts
from treadle.routing.statistics import Statistics

Floats = NDArray[np.float32]
Words = list[str]
WHOLES, BEGINS, JOINS = ("prompt", "bare"), ("begin", "bare-begin"), ("join", "bare-join")
KINDS = (*WHOLES, *BEGINS, *JOINS)


def tail(count: int) -> Callable[[Words], Words]:
    return lambda words: words[-count:]


def head(count: int) -> Callable[[Words], Words]:
    return lambda words: words[:count]


def sentences(count: int) -> Callable[[Words], Words]:
    """Take the last sentences: what follows the count-th last full stop, question mark or exclamation mark."""

    def take(words: Words) -> Words:
        ends = [place for place, word in enumerate(words[:-1]) if word in ".!?"]
        return words[ends[-count] + 1 :] if len(ends) >= count else words

    return take


VIEWS: dict[str, Callable[[Words], Words]] = {
    "whole": lambda words: words,
    **{f"last {count}": tail(count) for count in (4, 8, 12, 16, 24, 40)},
    **{f"first {count}": head(count) for count in (8, 16)},
    "last sentence": sentences(1),
    "last 2 sentences": sentences(2),
    "2 sentences' beginning": lambda words: sentences(2)(words)[:3],
}


@dataclass(frozen=True)
class Trial:
    """One way to fit the classes of prompts.

    Attributes:
        views: that are compared.
        kinds: of texts that are fitted on.
        merged: whether all kinds are one class.
        scatter: of some kinds, what their scatter counts.
        shares: of some kinds, their prior; None = as many as there are texts.
        shrinkage: share of the sphere; None = OAS.
        covariances: kinds that share a covariance; () = all share one.
    """

    views: Sequence[str] = ("whole", "last 24", "last 8")
    kinds: Sequence[str] = KINDS
    merged: bool = False
    scatter: Mapping[str, float] = field(default_factory=dict[str, float])
    shares: Mapping[str, float] | None = None
    shrinkage: float | None = None
    covariances: Sequence[Sequence[str]] = ()


def shared(begins: float, joins: float) -> dict[str, float]:
    return {**dict.fromkeys(WHOLES, 1.0), **dict.fromkeys(BEGINS, begins), **dict.fromkeys(JOINS, joins)}


NOW = Trial()
THREE = ("whole", "last 40", "last 16", "last 8")
TRIALS = {
    "now": NOW,
    "no joins": replace(NOW, kinds=(*WHOLES, *BEGINS)),
    "whole prompts alone": replace(NOW, kinds=WHOLES),
    "whole prompts, one class": replace(NOW, kinds=WHOLES, merged=True),
    "scatter of joins counts 1/4": replace(NOW, scatter=dict.fromkeys(JOINS, 0.25)),
    "scatter of joins and begins counts 1/4": replace(NOW, scatter=dict.fromkeys((*JOINS, *BEGINS), 0.25)),
    "share of joins 0.1": replace(NOW, shares=shared(1, 0.1)),
    "share of joins 0.03, of begins 0.1": replace(NOW, shares=shared(0.1, 0.03)),
    "a covariance of whole prompts, of begins, of joins": replace(NOW, covariances=(WHOLES, BEGINS, JOINS)),
    "a covariance of whole prompts, of the others": replace(NOW, covariances=(WHOLES, (*BEGINS, *JOINS))),
    **{f"shrinkage {share}": replace(NOW, shrinkage=share) for share in (0.02, 0.05, 0.1, 0.2)},
    "last 12": replace(NOW, views=("whole", "last 12")),
    "last 24, 12": replace(NOW, views=("whole", "last 24", "last 12")),
    "last 40, 16": replace(NOW, views=("whole", "last 40", "last 16")),
    "last 40, 16, 8": replace(NOW, views=THREE),
    "last 40, 16, 4": replace(NOW, views=("whole", "last 40", "last 16", "last 4")),
    "last 24, 8, first 16": replace(NOW, views=("whole", "last 24", "last 8", "first 16")),
    "last 40, 16, 8, first 8": replace(NOW, views=(*THREE, "first 8")),
    "last 24, 8, last sentence": replace(NOW, views=("whole", "last 24", "last 8", "last sentence")),
    "last 24, 8, last 2 sentences": replace(NOW, views=("whole", "last 24", "last 8", "last 2 sentences")),
    "last 40, 16, 8, last 2 sentences": replace(NOW, views=(*THREE, "last 2 sentences")),
    "last 24, 8, beginning of 2 sentences": replace(
        NOW, views=("whole", "last 24", "last 8", "2 sentences' beginning")
    ),
}


class Texts:
    """Embedded texts: each view (texts, D) in half precision."""

    def __init__(self, embedder: StaticEmbedder, texts: Sequence[str]) -> None:
        words = [WORD.findall(text) for text in texts]
        self._views = {
            name: embedder.finish([embedder.sum_words(take(each)) for each in words]).astype(np.float16)
            for name, take in VIEWS.items()
        }

    def views(self, names: Sequence[str]) -> Floats:
        """Return some views (texts, F) side by side."""
        return np.concatenate([self._views[name] for name in names], -1).astype(np.float32)


@dataclass(frozen=True)
class Samples:
    """The texts of one domain's samples, with the kind and the sample of each."""

    texts: Texts
    kinds: NDArray[np.str_]
    owners: NDArray[np.int64]

    def some(self, trial: Trial, count: int, seed: int) -> tuple[Floats, NDArray[np.str_], int]:
        """Return the views and kinds of the texts of some samples, and the number of samples."""
        owners = np.unique(self.owners)
        if count < len(owners):
            owners = np.random.RandomState(seed).choice(owners, count, replace=False)
        kept = np.isin(self.owners, owners) & np.isin(self.kinds, list(trial.kinds))
        return self.texts.views(trial.views)[kept], self.kinds[kept], len(owners)


Scores = Callable[[Floats], Floats]


def fit(trial: Trial, samples: Mapping[str, Samples], general: Texts, count: int, seed: int) -> Scores:
    chosen = [each.some(trial, count, seed) for each in samples.values()]
    num_samples = sum(number for _, _, number in chosen)
    if trial.covariances:
        parts = [_gaussians(chosen, kinds, num_samples) for kinds in trial.covariances]
        return lambda texts: np.logaddexp.reduce([each(texts) for each in parts])
    joined: Statistics | None = None
    for views, kinds, _ in chosen:
        for kind, share in trial.scatter.items():
            own = kinds == kind
            views[own] = views[own].mean(0) + (views[own] - views[own].mean(0)) * np.sqrt(share)
        made = Statistics.of(views, ["all"] * len(kinds) if trial.merged else kinds.tolist())
        joined = made if joined is None else joined.join(made)
    assert joined is not None
    apart = general.views(trial.views)
    fitted = Discriminant.fit(joined, num_samples, Statistics.of(apart, ["general"] * len(apart)), trial.shrinkage)
    if trial.shares is not None:
        prior = np.array([trial.shares[kind] for kind in sorted(trial.kinds)])
        given = joined.sizes / np.bincount(joined.owners, joined.sizes)[joined.owners]
        moved = np.log(np.tile(prior / prior.sum(), len(samples))) - np.log(given)
        fitted = replace(fitted, offsets=(fitted.offsets + moved).astype(np.float32))
    return lambda texts: fitted.evidence(texts)[:, : len(samples)]


def _gaussians(
    chosen: Sequence[tuple[Floats, NDArray[np.str_], int]], kinds: Sequence[str], num_samples: int
) -> Scores:
    """Return the log-likelihoods of classes of some kinds, which share a covariance of their own."""
    means: list[NDArray[np.float64]] = []
    scatter, total = 0.0, 0
    for views, own_kinds, _ in chosen:
        for kind in kinds:
            own = views[own_kinds == kind].astype(np.float64)
            means.append(own.mean(0))
            scatter, total = scatter + (own - means[-1]).T @ (own - means[-1]), total + len(own)
    covariance = np.asarray(scatter) / (total - len(means))
    share = oas(covariance, num_samples)
    size = len(covariance)
    covariance = (1 - share) * covariance + share * np.trace(covariance) / size * np.eye(size)
    lower = np.linalg.cholesky(covariance)
    whitener, log_volume = np.linalg.inv(lower), float(np.log(np.diag(lower)).sum())
    places = np.stack(means) @ whitener.T

    def score(texts: Floats) -> Floats:
        found = texts @ whitener.T
        distances = (found**2).sum(1)[:, None] - 2 * found @ places.T + (places**2).sum(1)
        each = (-0.5 * distances - log_volume).reshape(len(texts), len(chosen), len(kinds))
        return np.logaddexp.reduce(each, -1)

    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--counts", nargs="+", type=int, default=[600, 60])
    options = parser.parse_args()
    rows, embedder = load_rows(options.data), StaticEmbedder.load(EMBEDDER)
    samples: dict[str, Samples] = {}
    for name, own in rows["samples"].items():
        texts = [each for each in sample_texts(own, draw_others(rows["samples"], name)) if each.stage == "prompt"]
        kinds, owners = np.array([each.kind for each in texts]), np.array([each.owner for each in texts])
        samples[name] = Samples(Texts(embedder, [each.text for each in texts]), kinds, owners)
    general = Texts(embedder, general_texts())
    held_out: dict[str, dict[str, Texts]] = {}
    choose = random.Random(5)
    for name in EIGHT:
        own = rows["validation"][name]
        others = [each.whole for other in EIGHT if other != name for each in rows["validation"][other]]
        forms = {
            "template": [each.prompt for each in own],
            "bare": [each.bare for each in own],
            "joined": [f"{choose.choice(others)}\n\n{each.prompt}" for each in own],
            "joined, bare": [f"{choose.choice(others)}\n\n{each.bare}" for each in own],
            "begun": [" ".join(each.bare.split()[:12]) for each in own],
        }
        held_out[name] = {form: Texts(embedder, texts) for form, texts in forms.items()}
    print("| trial | samples | template | bare | joined | joined, bare | begun |\n|---|---|---|---|---|---|---|")
    for trial in options.only:
        for count in options.counts:
            shares = [
                measure(TRIALS[trial], samples, general, held_out, count, seed) for seed in range(1 + 2 * (count < 600))
            ]
            print(
                f"| {trial} | {count} | " + " | ".join(f"{each:.3f}" for each in np.mean(shares, 0)) + " |", flush=True
            )


def measure(
    trial: Trial,
    samples: Mapping[str, Samples],
    general: Texts,
    held_out: Mapping[str, Mapping[str, Texts]],
    count: int,
    seed: int,
) -> list[float]:
    """Return the share of texts of each form whose nearest adapter is their own, mean of the domains."""
    score = fit(trial, samples, general, count, seed)
    found = [
        [float((score(texts.views(trial.views)).argmax(-1) == index).mean()) for texts in held_out[name].values()]
        for index, name in enumerate(EIGHT)
    ]
    return np.mean(found, 0).tolist()


if __name__ == "__main__":
    main()
