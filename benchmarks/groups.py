"""Prints what the router's own choices do on validation rows; the base model is not run.

    python benchmarks/validation.py --data ../shared/data -o work/validation2
    python benchmarks/groups.py --data ../shared/data --validation work/validation2

First table: accuracy of the nearest adapter over the number of groups that each adapter's samples are in
(`treadle.routing.centroids.MOST_GROUPS`). Second: over the share of the score that recent tokens give
(`treadle.routing.router.RECENT_SHARE`), the mean weight that answers' tokens do *not* give to their own adapter.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import treadle
from treadle.bundle.base_model import load_tokenizer
from treadle.common.params import EvalParams
from treadle.engine.tokenization import Detokenizer, completion_ids, prompt_ids
from treadle.experiments.data import load_examples
from treadle.experiments.sets import load_sets
from treadle.experiments.streams import join_streams
from treadle.experiments.tasks import PAPER, SEPARATOR, Example
from treadle.routing import centroids
from treadle.routing import router as routing
from treadle.routing.embedder import num_words
from treadle.routing.router import Router
from treadle.routing.samples import sample_texts

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

from recipe import ADAPTERS, BUNDLE, SAMPLES

GROUPS = (1, 2, 4, 8, 16)
SHARES = (0.5, 0.67, 0.75, 0.8, 0.9, 1.0)
SINGLES = 150
"""Single examples a task, of the second table."""
VIEWS: dict[str, Callable[[Example], str]] = {
    "with template": lambda each: each.prompt,
    "bare": lambda each: each.bare,
    "first 16 words": lambda each: _words(each.prompt)[:16],
    "last 24 words with the answer": lambda each: _words(each.prompt + each.completion)[-24:],
}
Segment = tuple[np.ndarray, list[tuple[int, int, int]]]
"""Embeddings (T, K, D) under which each of T tokens is weighed, and start, end and adapter of each answer."""


def main() -> None:
    data, rows = read_arguments(__doc__)
    bundle = treadle.read_bundle(BUNDLE)
    print_groups(bundle.router, data, rows)
    print()
    print_shares(bundle.router, load_tokenizer(bundle.base_model), rows)


def read_arguments(description: str | None) -> tuple[Path, dict[str, Sequence[Example]]]:
    """Return the folder of the data sets and the validation rows of each task, as the command line names them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    options = parser.parse_args()
    specs = [f"{task}={options.validation / task}.jsonl.gz" for task in PAPER]
    return options.data, {each.name: each.examples for each in load_sets(specs, EvalParams())}


def training_texts(data: Path) -> dict[str, list[str]]:
    """Return the texts of each task that the demo's router is fitted on."""
    return {
        task: sample_texts(load_examples(data / ADAPTERS[task][0], task, limit=SAMPLES, seed=1)).texts for task in PAPER
    }


def joined(rows: Mapping[str, Sequence[Example]], count: int) -> list[list[tuple[str, Example]]]:
    """Return the parts of mixed streams, each with its adapter."""
    return [[(part.adapter, part.example) for part in stream] for stream in join_streams(rows, count, seed=0)]


def print_groups(router: Router, data: Path, rows: dict[str, Sequence[Example]]) -> None:
    texts = training_texts(data)
    vectors = {task: router.embedder.encode(each) for task, each in texts.items()}
    seen = {
        name: [router.embedder.encode(["".join(view(each)) for each in rows[task]]) for task in PAPER]
        for name, view in VIEWS.items()
    }
    print("| groups | " + " | ".join(VIEWS) + " |\n" + "|---" * (len(VIEWS) + 1) + "|")
    for most in GROUPS:
        centroids.MOST_GROUPS = most
        found = centroids.Centroids.empty(router.embedder.id, router.embedder.dim)
        for task, each in vectors.items():
            found = found.add(task, each, num_words(texts[task]))
        cells = [
            np.mean([(found.score(each, "lda").argmax(-1) == index).mean() for index, each in enumerate(every)])
            for every in seen.values()
        ]
        print(f"| {most} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |", flush=True)


def print_shares(router: Router, tokenizer: object, rows: dict[str, Sequence[Example]]) -> None:
    singles = [[(task, each)] for task in PAPER for each in rows[task][:SINGLES]]
    kinds = {
        name: [decisions(router, tokenizer, parts) for parts in texts]
        for name, texts in {"single examples": singles, "mixed streams": joined(rows, 300)}.items()
    }
    print("| share of recent tokens | " + " | ".join(kinds) + " |\n" + "|---" * (len(kinds) + 1) + "|")
    for share in SHARES:
        routing.SHARES[2] = np.array([1 - share, share], np.float32)
        print(f"| {share} | " + " | ".join(f"{missed(router, each):.3f}" for each in kinds.values()) + " |", flush=True)


def decisions(router: Router, tokenizer: object, parts: Sequence[tuple[str, Example]]) -> Segment:
    """Return what decides over each token of examples that are joined, of which the first prompt is the prompt."""
    ids: list[int] = []
    answers: list[tuple[int, int, int]] = []
    for name, example in parts:
        ids += completion_ids(tokenizer, SEPARATOR + example.prompt) if ids else prompt_ids(tokenizer, example.prompt)
        start = len(ids)
        ids += completion_ids(tokenizer, example.completion)
        answers.append((start - 1, len(ids) - 1, router.names.index(name)))  # a token is predicted at the one before
    text = Detokenizer(tokenizer)
    pieces = [text.push(token) for token in ids[:-1]]
    embeddings, places = router.decisions(pieces, answers[0][0] + 1, replace(router.params))
    return embeddings[places], answers


def missed(router: Router, segments: Sequence[Segment]) -> float:
    """Return the mean weight that does not go to an answer's own adapter: mean over answers, then over adapters."""
    found: dict[int, list[float]] = {}
    for embeddings, answers in segments:
        weights = router.weigh(embeddings, router.params)  # (T, N)
        for start, end, owner in answers:
            found.setdefault(owner, []).append(1 - float(weights[start:end, owner].mean()))
    return float(np.mean([np.mean(each) for each in found.values()]))


def _words(text: str) -> list[str]:
    return re.findall(r"\S+\s*", text)


if __name__ == "__main__":
    main()
