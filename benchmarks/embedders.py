"""Measures how well the router knows the domain, by embedder, score and fitted texts: a table of docs/results.md.

    python benchmarks/embedders.py --data ../shared/data [--sentence]

Fits on training rows and asks held-out prompts, with the template's words and without; accuracy of the nearest adapter,
mean over the four tasks. Shows what the small embedder costs against the 384 float32 dimensions it was made from.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from model2vec import StaticModel
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from treadle.common.params import RoutingParams
from treadle.experiments.data import load_examples
from treadle.experiments.tasks import Example
from treadle.routing.embedder import Embedder, SentenceEmbedder, StaticEmbedder
from treadle.routing.router import fit
from treadle.routing.samples import sample_texts

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))
from embedder import model_folder as minilm_folder
from experts import HELD_OUT
from recipe import ADAPTERS

BUNDLE = Path(__file__).parents[1] / "demo" / "bundle"


def raw_embedder() -> StaticEmbedder:
    """All 384 dimensions of MiniLM's input vectors in float32: what the demo's embedder was made from."""
    folder = minilm_folder()
    vectors = load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]
    return StaticEmbedder(StaticModel(vectors, Tokenizer.from_file(str(folder / "tokenizer.json")), max_length=None))


def accuracy(embedder: Embedder, texts: dict[str, list[str]], asked: dict[str, list[str]], score: str) -> float:
    router = fit(texts, embedder)
    right = [
        np.mean(router.scores(prompts, RoutingParams(score=score)).argmax(-1) == router.names.index(task))
        for task, prompts in asked.items()
    ]
    return float(np.mean(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=250, help="fitted and asked examples a task")
    parser.add_argument("--sentence", action="store_true", help="also all-MiniLM-L6-v2 itself (minutes)")
    options = parser.parse_args()
    train = {
        task: load_examples(options.data / file, task, limit=options.limit, seed=2)
        for task, (file, _) in ADAPTERS.items()
    }
    held = {
        task: load_examples(options.data / file, task, limit=options.limit, seed=3) for task, file in HELD_OUT.items()
    }
    fitted = {
        "whole texts": {task: [e.prompt + e.completion for e in examples] for task, examples in train.items()},
        "prompts, parts and whole": {task: sample_texts(examples).texts for task, examples in train.items()},
        "these, with the template only": {
            task: sample_texts([replace(each, bare="") for each in examples]).texts for task, examples in train.items()
        },
    }
    embedders: dict[str, Embedder] = {
        "demo: 256 dimensions, int8": StaticEmbedder.load(BUNDLE / "embedder"),
        "384 dimensions, float32": raw_embedder(),
    }
    if options.sentence:
        embedders["all-MiniLM-L6-v2"] = SentenceEmbedder(str(minilm_folder()))
    print(f"n = {options.limit} a task\n\n| embedder | score | fitted on | with template | bare | first 16 words |")
    print("|---|---|---|---|---|---|")
    for name, embedder in embedders.items():
        for score in ("cosine", "centred", "lda"):
            for kind, texts in fitted.items():
                cells = [accuracy(embedder, texts, asked, score) for asked in views(held)]
                print(
                    f"| {name} | {score} | {kind} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |", flush=True
                )


def views(held: dict[str, list[Example]]) -> list[dict[str, list[str]]]:
    """Return the prompts as they are, without the template's words, and their first 16 words."""
    return [
        {task: [e.prompt for e in examples] for task, examples in held.items()},
        {task: [e.bare for e in examples] for task, examples in held.items()},
        {task: [" ".join(e.prompt.split()[:16]) for e in examples] for task, examples in held.items()},
    ]


if __name__ == "__main__":
    main()
