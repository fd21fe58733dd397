"""Prints how the router weighs passages of subjects that no sample is about, by how its scatter counts the samples.

    python benchmarks/scatter.py --data ../shared/data [--samples 6000]

Training rows only. Of SQuAD, a third of the articles are held out whole, so that prompts of `reading` are about things
that no sample mentions (other validation rows share their articles with the samples); of GSM8K and CodeAlpaca other
rows, of ARC-Challenge its validation split. Each cell: accuracy of the nearest adapter, and the mean weight that does
not go to the text's own; means over the four tasks, then reading alone. The base model is not run.
"""

import argparse
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import treadle
from treadle.experiments.data import load_examples, read_rows
from treadle.experiments.tasks import TASKS, Example
from treadle.routing.centroids import Centroids
from treadle.routing.embedder import num_words
from treadle.routing.router import Router
from treadle.routing.samples import sample_texts

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

from groups import VIEWS
from validation import SPLIT_OF_ITS_OWN

from recipe import ADAPTERS, BUNDLE, SAMPLES

ASKED = 1500
"""Examples a task that are asked, where there are so many."""
COUNTED: dict[str, Callable[[Sequence[str]], np.ndarray | None]] = {
    "alike": lambda texts: None,
    "by the square root of their words": lambda texts: np.sqrt(num_words(texts)),
    "by their words": num_words,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="a task at most, to fit on")
    options = parser.parse_args()
    rows = {task: split(options.data, task, options.samples) for task in ADAPTERS}
    router = treadle.read_bundle(BUNDLE).router
    texts = {task: sample_texts(fitted).texts for task, (fitted, _) in rows.items()}
    vectors = {task: router.embedder.encode(each) for task, each in texts.items()}
    asked = {
        name: {task: router.embedder.encode(["".join(view(each)) for each in held]) for task, (_, held) in rows.items()}
        for name, view in VIEWS.items()
    }
    print("| samples count | " + " | ".join(VIEWS) + " |\n|---" + "|---" * len(VIEWS) + "|")
    for name, count in COUNTED.items():
        centroids = Centroids.empty(router.embedder.id, router.embedder.dim)
        for task, each in vectors.items():
            centroids = centroids.add(task, each, count(texts[task]))
        fresh = replace(router, centroids=centroids)
        print(f"| {name} | " + " | ".join(cell(fresh, each) for each in asked.values()) + " |", flush=True)


def split(data: Path, task: str, samples: int) -> tuple[list[Example], list[Example]]:
    """Return examples to fit on, `samples` at most, and others to ask."""
    if task == "reading":
        rows = list(read_rows(data / ADAPTERS[task][0]))
        titles = sorted({row["title"] for row in rows})
        random.Random(5).shuffle(titles)
        known = set(titles[: 2 * len(titles) // 3])
        parts = [[row for row in rows if (row["title"] in known) == is_known] for is_known in (True, False)]
        chosen = [random.Random(1).sample(part, most) for part, most in zip(parts, (samples, ASKED), strict=True)]
        fitted, held = ([TASKS[task].read(row) for row in part] for part in chosen)
        return fitted, held
    if task in SPLIT_OF_ITS_OWN:
        fitted = load_examples(data / ADAPTERS[task][0], task, limit=samples, seed=1)
        return fitted, load_examples(data / SPLIT_OF_ITS_OWN[task], task)
    examples = load_examples(data / ADAPTERS[task][0], task, limit=samples + ASKED, seed=1)
    random.Random(1).shuffle(examples)
    return examples[:-ASKED], examples[-ASKED:]


def cell(router: Router, asked: Mapping[str, np.ndarray]) -> str:
    """Return accuracy and missed weight of embeddings (B, D) by their domain."""
    right: list[float] = []
    missed: list[float] = []
    for index, (task, vectors) in enumerate(asked.items()):
        assert router.names[index] == task
        weights = router.weigh(vectors[:, None], router.params)  # (B, N)
        right.append(float((weights.argmax(-1) == index).mean()))
        missed.append(1 - float(weights[:, index].mean()))
    return f"{np.mean(right):.3f}, {np.mean(missed):.3f}; {right[-1]:.3f}, {missed[-1]:.3f}"


if __name__ == "__main__":
    main()
