"""Prints how well prompts whose domain changes are cut (`segmentation`), on validation rows; no base model is run.

    python benchmarks/validation.py --data ../shared/data -o work/full/validation
    python benchmarks/changes.py --validation work/full/validation

Of each kind of prompt: the mean weight that does *not* go to the adapter of its last question, and the share of prompts
that are cut. Single examples should not be; conversations, whose every question is of another domain, should.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import treadle
from treadle.common.params import EvalParams
from treadle.experiments.sets import load_sets
from treadle.experiments.streams import join_streams
from treadle.experiments.tasks import PAPER, SEPARATOR, Example
from treadle.routing import segmentation
from treadle.routing.router import Router

BUNDLE = Path(__file__).parents[1] / "demo" / "bundle"
SINGLES, STREAMS = 200, 200
SURE = (25, segmentation.SURE, 70)
NATS = (3.0, 4.0, 5.0)
Prompts = Sequence[tuple[str, str]]
"""A text, and the adapter of its last question."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    options = parser.parse_args()
    router = treadle.read_bundle(options.bundle).router
    specs = [f"{task}={options.validation / task}.jsonl.gz" for task in PAPER]
    rows = {each.name: each.examples for each in load_sets(specs, EvalParams())}
    kinds: dict[str, Prompts] = {
        "single examples": [(each.prompt, task) for task in PAPER for each in rows[task][:SINGLES]],
        "conversations": conversations(rows),
    }
    print("| words that count half | nats | " + " | ".join(kinds) + " | ms a prompt |\n|---|---|---|---|---|")
    print_line(router, kinds, "", None)
    for segmentation.SURE in SURE:
        for nats in NATS:
            print_line(router, kinds, str(segmentation.SURE), nats)


def conversations(rows: Mapping[str, Sequence[Example]]) -> Prompts:
    """Return the prompts of all questions but the first of mixed streams, with everything that was said before."""
    prompts: list[tuple[str, str]] = []
    for stream in join_streams(rows, STREAMS, seed=0):
        said = ""
        for part in stream:
            said += (SEPARATOR if said else "") + part.example.prompt
            if said != part.example.prompt:
                prompts.append((said, part.adapter))
            said += part.example.completion
    return prompts


def print_line(router: Router, kinds: dict[str, Prompts], sure: str, nats: float | None) -> None:
    params = replace(router.params, change=nats)
    cells: list[str] = []
    started = time.perf_counter()
    for prompts in kinds.values():
        texts = [text for text, _ in prompts]
        own = [router.names.index(name) for _, name in prompts]
        missed = 1 - router.weights(texts, params)[np.arange(len(own)), own]
        cut = np.mean([router.topic_start(text, params) > 0 for text in texts])
        cells.append(f"{missed.mean():.4f}, {100 * cut:.1f} % cut")
    seconds = (time.perf_counter() - started) / 2 / sum(map(len, kinds.values()))  # each was cut twice
    print(f"| {sure} | {nats or 'none'} | " + " | ".join(cells) + f" | {1000 * seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
