"""Checks an embedder's folder before a library loads it: nothing in it is run, unpickled or fetched.

sentence-transformers makes objects of the classes that a folder names, loads pickles where safetensors are missing, and
transformers loads another model where the folder holds an adapter.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from treadle.common.documents import is_file, is_inside, read_json, read_object
from treadle.common.errors import ModelError, TreadleError, problem_list, shown

if TYPE_CHECKING:
    from model2vec import StaticModel

MODULES_FILE, CONFIG_FILE = "modules.json", "config.json"
CLASSES = ("Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "StaticEmbedding")
"""Modules of sentence-transformers that hold weights or arithmetic and nothing else."""
WITH_WEIGHTS = ("Transformer", "Dense", "LayerNorm", "StaticEmbedding")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flex_attention")
"""Values of `attn_implementation`; others are code on the hub."""
PROBES = ("a" * 40, "1" * 40, "_" * 40, "Tr3adle", "\u00e9\u4e2d", "!")
"""Words on which a tokenizer is tried when it is loaded: as long as words get."""
LARGEST = 1e15
"""Largest number of a vector: squares and sums of these are finite."""
MOST_FILES = 1000
MOST_BYTES = 64 << 20
"""Size limit of a JSON file, the tokenizer's too."""


def check_folder(folder: Path) -> None:
    """Raise a ModelError that lists everything in an embedder's folder that is not plain data to be read."""
    problems = list(_file_problems(folder))
    if not problems:
        problems += _module_problems(folder)
    if problems:
        raise ModelError(problem_list(f"embedder {str(folder)!r} cannot be loaded:", problems))


def _file_problems(folder: Path) -> Iterator[str]:
    """Yield which files are no regular files: opening a pipe would wait for ever."""
    count = 0
    for parent, _, names in os.walk(folder):
        count += len(names)
        if count > MOST_FILES:
            yield f"it holds more than {MOST_FILES} files"
            return
        for path in (Path(parent, name) for name in names):
            place = path.relative_to(folder)
            if not is_file(path):
                yield f"{place} is not a file, or a link to nowhere"
            elif path.name == "adapter_config.json":
                yield f"{place} would load another model; save the embedder as a whole model"
            elif path.suffix == ".json" and os.path.getsize(path) > MOST_BYTES:
                yield f"{place} has more than {MOST_BYTES} bytes"


def _module_problems(folder: Path) -> Iterator[str]:
    """Yield what the modules of a sentence-transformers folder would run, unpickle or fetch."""
    modules = [("", "Transformer")]
    if is_file(folder / MODULES_FILE):
        listed: Any = read_json(folder / MODULES_FILE, ModelError)
        if not isinstance(listed, list) or not all(_is_module(each) for each in listed):
            yield f"{MODULES_FILE} must be a list of objects with the texts 'type' and 'path'"
            return
        foreign = [each["type"] for each in listed if not _is_known(each["type"])]
        yield from (f"{MODULES_FILE} names the class {shown(kind)}; allowed: {', '.join(CLASSES)}" for kind in foreign)
        modules = [(each["path"], each["type"].rpartition(".")[2]) for each in listed]
    for path, kind in modules:
        if is_inside(folder, path):
            yield from _weight_problems(folder, folder / path, kind)
        else:
            yield f"the path {shown(path)} of a module leaves the folder"


def _is_module(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(cast(Any, entry).get(key), str) for key in ("type", "path"))


def _is_known(kind: str) -> bool:
    return kind.startswith("sentence_transformers.") and kind.rpartition(".")[2] in CLASSES


def _weight_problems(folder: Path, place: Path, kind: str) -> Iterator[str]:
    """Yield what is wrong with the folder of one module."""
    if kind in WITH_WEIGHTS and is_file(place / "pytorch_model.bin") and not any(place.glob("*.safetensors")):
        pickled = place.relative_to(folder) / "pytorch_model.bin"
        yield f"{pickled} is a pickle, which can run code; save it as safetensors"
    if not is_file(place / CONFIG_FILE):
        return
    config = read_object(place / CONFIG_FILE, ModelError)
    if (attention := config.get("attn_implementation")) is not None and attention not in ATTENTIONS:
        yield f"attn_implementation {shown(attention)} is code of somebody else's; allowed: {', '.join(ATTENTIONS)}"
    if not str(config.get("activation_function", "torch.nn.")).startswith("torch.nn."):
        yield f"activation_function {shown(config['activation_function'])} is none of torch.nn"


def table_problems(model: "StaticModel") -> list[str]:
    """Return the problems of a static model's arrays, such as an index beyond them."""
    vectors, mapping, weights = model.embedding, model.token_mapping, model.weights
    tokens = 1 + max(model.tokenizer.get_vocab().values(), default=0)
    problems: list[str] = []
    if vectors.ndim != 2 or not vectors.size or vectors.dtype.kind not in "fiu":
        return [f"its embeddings are {vectors.dtype} of shape {vectors.shape}, expected numbers (tokens, dimensions)"]
    if not _largest(vectors) <= LARGEST:
        problems.append(f"its embeddings hold NaN, infinity or numbers beyond {LARGEST:.0e}")
    rows = len(vectors)
    if mapping is not None:
        rows = len(mapping) if mapping.ndim == 1 and mapping.dtype.kind in "iu" else 0
        if not rows or mapping.min() < 0 or mapping.max() >= len(vectors):
            problems.append(f"its mapping must hold one of {len(vectors)} rows for each token")
    if rows < tokens:
        problems.append(f"its tokenizer has ids up to {tokens - 1}; there are vectors for {rows}")
    if weights is not None and not (weights.shape == (rows,) and _largest(weights) <= LARGEST):
        problems.append(f"its weights must be {rows} finite numbers")
    return problems


def _largest(array: NDArray[Any]) -> float:
    """Return the largest absolute value of an array; NaN where it holds one."""
    low, high = array.min().astype(np.float64), array.max().astype(np.float64)
    return float(np.maximum(high, -low))


def is_foreign_fault(error: BaseException) -> bool:
    """Return whether an error comes from files that a library read: not ours, and no exit.

    The libraries document none: a damaged tokenizer or config ends in whatever their code meets first, and tokenizers
    (written in Rust) panics with an error that is not even an Exception.
    """
    if isinstance(error, TreadleError):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
