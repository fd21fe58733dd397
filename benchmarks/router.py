"""Prints how well the router knows domains, as Markdown tables: validation rows, or test rows with `--test`.

    python benchmarks/router.py --data ../shared/data [--only nearest streams base seconds] [--test]
        [--embedder FOLDER] [--tails 40 16 8]

- nearest: the share of prompts whose nearest adapter is their own, over scores and numbers of samples;
- streams: how soon the right adapter leads after a text has changed its domain;
- base: the base's share, on prompts of the adapters' domains, of domains without an adapter, and in other languages;
- seconds: the time of a fit.

Needs no model: the demo's embedder, and for streams the tokenizer of the demo's base. The same rows give the same
numbers, but for the seconds.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, permutations
from pathlib import Path
from time import perf_counter

import numpy as np
from router_rows import EIGHT, FOUR, MORE, NUM_HELD_OUT, load_rows

from treadle.bundle.base_model import load_tokenizer
from treadle.common.files import locate
from treadle.common.params import RoutingParams, Score
from treadle.engine.tokenization import Detokenizer, completion_ids, prompt_ids
from treadle.experiments.tasks import SEPARATOR, Example
from treadle.routing.centroids import Centroids
from treadle.routing.embedder import TAIL_WORDS, StaticEmbedder
from treadle.routing.fitting import centroid_of, fit
from treadle.routing.general_text import general_statistics, general_views
from treadle.routing.router import Router
from treadle.routing.schedule import Seen

EMBEDDER = Path(__file__).parents[1] / "demo" / "bundle" / "embedder"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
LANGUAGES = Path(__file__).with_name("languages.json")
PARTS = ("nearest", "streams", "base", "seconds")
FORMS = {"template": "prompt", "bare": "bare"}
SCORES: tuple[Score, ...] = ("lda", "centred", "cosine")
COUNTS = (600, 60, 30, 10, 5, 3)
DRAWS = 5
"""Choices of few samples, whose results are averaged."""
FEW = 30
"""So many samples are few."""
NUM_STREAMS = 168
"""About so many texts; each ordered pair of domains has as many as any other."""

Samples = Mapping[str, Sequence[Example]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data files")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--test", action="store_true", help="test rows; choices are made on validation rows only")
    parser.add_argument("--embedder", type=Path, default=EMBEDDER, help="folder of a static embedder")
    parser.add_argument("--tails", type=int, nargs="*", default=TAIL_WORDS, help="words of each view but the whole")
    options = parser.parse_args()
    rows = load_rows(options.data)
    held_out = rows["test" if options.test else "validation"]

    def load() -> StaticEmbedder:
        embedder = StaticEmbedder.load(options.embedder)
        embedder.tails = tuple(options.tails)
        return embedder

    fits = Fits(rows["samples"], load)
    if "nearest" in options.only:
        print_nearest(rows["samples"], held_out, load())
    if "streams" in options.only:
        print_streams(fits, held_out)
    if "base" in options.only:
        print_base(fits, held_out)
    if "seconds" in options.only:
        print_seconds(fits)


def print_table(title: str, heads: Sequence[str], lines: Iterator[Sequence[object]]) -> None:
    print(f"{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for line in lines:
        print(f"| {' | '.join(f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in line)} |", flush=True)
    print(flush=True)


def chosen(samples: Samples, names: Sequence[str], count: int, seed: int = 0) -> dict[str, list[Example]]:
    """Return `count` samples of each adapter; all that it has where these are fewer."""
    choose = random.Random(seed)
    return {name: choose.sample(list(samples[name]), min(count, len(samples[name]))) for name in names}


class Fits:
    """Fitted routers, and the seconds that each fit took with a freshly loaded embedder."""

    def __init__(self, samples: Samples, load: Callable[[], StaticEmbedder]) -> None:
        self._samples = samples
        self._load = load
        self._made: dict[tuple[Sequence[str], int], tuple[Router, float]] = {}

    def router(self, names: Sequence[str], count: int) -> Router:
        """Return the router of some adapters with so many samples each."""
        return self._fit(names, count)[0]

    def seconds(self, names: Sequence[str], count: int) -> float:
        """Return the seconds of its fit."""
        return self._fit(names, count)[1]

    def _fit(self, names: Sequence[str], count: int) -> tuple[Router, float]:
        if (names, count) not in self._made:
            given, embedder = chosen(self._samples, names, count), self._load()
            start = perf_counter()
            self._made[names, count] = fit(given, embedder), perf_counter() - start
        return self._made[names, count]


def texts_of(examples: Sequence[Example], form: str) -> list[str]:
    return [getattr(example, FORMS[form]) for example in examples]


# nearest adapter


def print_nearest(samples: Samples, held_out: Samples, embedder: StaticEmbedder) -> None:
    views = general_views(embedder, embedder.tails)
    empty = Centroids.empty(
        embedder.id, embedder.dim, embedder.tails, None if views is None else general_statistics(views)
    )
    see = Router(empty, embedder).see  # views do not depend on the samples
    seen = {(name, form): see(texts_of(held_out[name], form)) for name in EIGHT for form in FORMS}
    title = (
        f"Share of prompts whose nearest adapter is their own, mean of the domains (up to {NUM_HELD_OUT} prompts each; "
        f"{FEW} samples and fewer: mean of {DRAWS} choices)."
    )
    heads = ["domains", "samples each", *(f"{score}, {form}" for score in SCORES for form in FORMS)]
    print_table(title, heads, _nearest_lines(samples, seen, Router(empty, embedder)))


def _nearest_lines(samples: Samples, seen: Mapping[tuple[str, str], Seen], empty: Router) -> Iterator[Sequence[object]]:
    for names in (FOUR, EIGHT):
        for count in COUNTS:
            draws = DRAWS if count <= FEW else 1
            routers = [uncalibrated(chosen(samples, names, count, seed), empty) for seed in range(draws)]
            found = [
                [accuracy(each, names, seen, form, score) for score in SCORES for form in FORMS] for each in routers
            ]
            yield [len(names), count, *np.mean(found, 0).tolist()]


def uncalibrated(samples: Samples, empty: Router) -> Router:
    """Return a router as `fit` makes it but for its calibration, which does not matter to the nearest adapter."""
    centroids = empty.centroids
    for name, own in samples.items():
        others = [each.whole for other in samples if other != name for each in samples[other]]
        centroids = centroids.join(centroid_of(name, own, empty.embedder, tails=empty.tails, others=others))
    return Router(centroids, empty.embedder)


def accuracy(
    router: Router, names: Sequence[str], seen: Mapping[tuple[str, str], Seen], form: str, score: Score
) -> float:
    params = RoutingParams(score=score)
    scores = [router.compare(seen[name, form], params).scores for name in names]
    return float(np.mean([(each.argmax(-1) == index).mean() for index, each in enumerate(scores)]))


# streams


@dataclass(frozen=True)
class Stream:
    """Two examples of different domains, each domain by its index."""

    first: int
    example: Example
    second: int
    other: Example


@dataclass(frozen=True)
class Followed:
    """How a router followed a stream; tokens are those of the second example unless another part is named.

    Attributes:
        leads: tokens before its adapter is nearest for the first time; all of them if it never is.
        stays: tokens before its adapter is nearest for good.
        is_lost: it is not nearest at the end.
        first: share of the first answer's tokens whose nearest adapter is right.
        asked: the same of the second prompt.
        answered: the same of the second answer.
        weight: mean weight of its adapter.
        base: the base's mean share.
    """

    leads: int
    stays: int
    is_lost: bool
    first: float
    asked: float
    answered: float
    weight: float
    base: float


def print_streams(fits: Fits, held_out: Samples) -> None:
    title = (
        "Two examples of different domains in one text, decided at every token. Leads: tokens of the second example "
        "before its adapter is nearest (median, 90th percentile). Stays: before it is nearest for good. Lost: it is "
        "not nearest at the end. Right: share of the tokens whose nearest adapter is right."
    )
    heads = ["domains", "samples each", "second prompt", "streams", "leads", "stays", "lost", "right, first answer",
             "right, second prompt", "right, second answer", "its adapter's weight", "base's share"]  # fmt: skip
    print_table(title, heads, _stream_lines(fits, held_out))


def _stream_lines(fits: Fits, held_out: Samples) -> Iterator[Sequence[object]]:
    pieces = Pieces()
    for names in (FOUR, EIGHT):
        for count in (600, 60):
            router = fits.router(names, count)
            for form in FORMS:
                followed = [follow(router, pieces, stream, form) for stream in streams(names, held_out)]
                tokens = [quantiles([getattr(each, field) for each in followed]) for field in ("leads", "stays")]
                means = [
                    float(np.mean([getattr(each, field) for each in followed]))
                    for field in ("is_lost", "first", "asked", "answered", "weight", "base")
                ]
                yield [len(names), count, form, len(followed), *tokens, *means]


def quantiles(tokens: Sequence[int]) -> str:
    middle, high = np.percentile(tokens, (50, 90))
    return f"{middle:.0f}, {high:.0f}"


def streams(names: Sequence[str], held_out: Samples) -> Iterator[Stream]:
    """Yield streams of every ordered pair of domains, each as often as any other."""
    ordered = list(permutations(range(len(names)), 2))
    choose = random.Random(0)
    for _ in range(NUM_STREAMS // len(ordered)):
        for first, second in ordered:
            example, other = choose.choice(held_out[names[first]]), choose.choice(held_out[names[second]])
            yield Stream(first, example, second, other)


class Pieces:
    """Cuts a stream into the text that each token adds."""

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer(locate(BASE))

    def cut(self, *texts: str) -> tuple[list[str], list[int]]:
        """Return the pieces of texts that follow each other, and the position of the end of each text."""
        detokenizer = Detokenizer(self.tokenizer)
        ids = [prompt_ids(self.tokenizer, texts[0]), *(completion_ids(self.tokenizer, text) for text in texts[1:])]
        return [detokenizer.push(each) for part in ids for each in part], list(accumulate(map(len, ids)))


def follow(router: Router, pieces: Pieces, stream: Stream, form: str) -> Followed:
    """Decide a stream at every token of it."""
    first, second = stream.example, stream.other
    prompt = getattr(second, FORMS[form])
    texts, ends = pieces.cut(first.prompt, first.completion, SEPARATOR, prompt, second.completion)
    params = RoutingParams(every=1)
    seen, decisions = router.decisions(texts, ends[0], params)
    nearest = router.compare(seen, params).scores.argmax(-1)[decisions]  # (T,)
    weights = router.weigh(seen, params)[decisions[ends[2] :]]  # (tokens of the second example, N)
    is_right = nearest[ends[2] :] == stream.second
    asked = ends[3] - ends[2]
    return Followed(
        leads=int(is_right.argmax()) if is_right.any() else len(is_right),
        stays=0 if is_right.all() else len(is_right) - int(is_right[::-1].argmin()),
        is_lost=not is_right[-1],
        first=float((nearest[ends[0] : ends[1]] == stream.first).mean()),
        asked=float(is_right[:asked].mean()),
        answered=float(is_right[asked:].mean()),
        weight=float(weights[:, stream.second].mean()),
        base=float(1 - weights.sum(-1).mean()),
    )


# the base's share


def print_base(fits: Fits, held_out: Samples) -> None:
    title = (
        "Mean weights of prompts, under adapters of the first four domains. Nearest: the share whose nearest adapter "
        "is right."
    )
    heads = ["prompts", "form", *(f"{what}, {count} samples" for count in (600, 60, 10)
                                  for what in ("base's share", "right adapter", "nearest"))]  # fmt: skip
    print_table(title, heads, _base_lines(fits, held_out))


def _base_lines(fits: Fits, held_out: Samples) -> Iterator[Sequence[object]]:
    routers = [fits.router(FOUR, count) for count in (600, 60, 10)]
    for form in FORMS:
        for name in FOUR:
            texts = texts_of(held_out[name], form)
            yield [name, form, *(cell for router in routers for cell in shares(router, texts, [name] * len(texts)))]
    for form in FORMS:
        for name in MORE:
            texts = texts_of(held_out[name], form)
            yield [f"{name} (no adapter)", form, *(cell for router in routers for cell in shares(router, texts))]
    for language, prompts in json.loads(LANGUAGES.read_text("utf-8")).items():
        right = [name for name in FOUR for _ in prompts[name]]
        texts = [text for name in FOUR for text in prompts[name]]
        yield [language, "bare", *(cell for router in routers for cell in shares(router, texts, right))]


def shares(router: Router, texts: Sequence[str], right: Sequence[str] = ()) -> list[float | str]:
    """Return the base's mean share, the right adapter's, and how often that is nearest."""
    weights = router.weights(texts)  # (B, N)
    base = float(1 - weights.sum(-1).mean())
    if not right:
        return [base, "", ""]
    columns = np.array([router.names.index(name) for name in right])
    own = float(weights[np.arange(len(columns)), columns].mean())
    return [base, own, float((router.scores(texts).argmax(-1) == columns).mean())]


# seconds


def print_seconds(fits: Fits) -> None:
    print_table("Seconds of a fit, the embedder freshly loaded.", ["domains", "samples each", "seconds"],
                ([len(names), count, f"{fits.seconds(names, count):.1f}"]
                 for names in (FOUR, EIGHT) for count in (10, 60, 600)))  # fmt: skip


if __name__ == "__main__":
    main()
