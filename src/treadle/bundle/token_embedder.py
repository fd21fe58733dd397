"""Makes a static embedder from a base model's own token vectors, so that a plain install can route.

Each token's vector gets length 1; then all are projected onto the directions that matter most for the tokens of
general text, and rounded to int8. Nothing is trained, and the base model itself is not run.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle.bundle.base_model import load_model, load_tokenizer
from treadle.bundle.bundle import read_bundle
from treadle.bundle.bundle_files import BUNDLE_FILE
from treadle.common.documents import is_file, read_object
from treadle.common.errors import ModelError, OptionError, problem_list
from treadle.common.files import digest, home, locate
from treadle.common.writing import locked, put, workplace
from treadle.routing.embedder import Embedder, StaticEmbedder, load_embedder
from treadle.routing.embedder_files import table_problems
from treadle.routing.general_text import general_texts
from treadle.routing.running_sum import WORD

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENS = "tokens"
"""The name of the embedder of a base's token vectors."""
FORMAT = 1
"""Part of the cache's key: another way to make the vectors needs another number."""
MAX_DIM = 256
UNSEEN_COUNT = 0.01
"""Stands for how often a token occurs in general text that does not occur there."""
ROWS_AT_ONCE = 8192
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"
TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight")
"""Ends of the names under which checkpoints keep the vectors of their tokens."""


def find_embedder(name: str, base: str) -> Embedder:
    """Load an embedder by its name: `tokens`, a bundle's folder, or what `load_embedder` takes.

    Args:
        name: `tokens` = made from the base's own token vectors; of a bundle, its embedder.
        base: the base model.
    """
    if name == TOKENS:
        return token_embedder(base)
    if is_file(Path(name, BUNDLE_FILE)):
        return read_bundle(name).router.embedder
    return load_embedder(name)


def token_embedder(base: str) -> StaticEmbedder:
    """Return the static embedder of a base model's token vectors, from treadle's cache where it was made before.

    Args:
        base: a folder or hub id.

    Raises:
        ModelError: the base or its tokenizer cannot be loaded, or gives no usable vectors.
    """
    table = _table_place(base)
    folder = home() / "embedders" / digest([FORMAT, *base_identity(base)])
    if not folder.exists():
        made = _make(base, table)
        with workplace(folder.parent) as place:
            made.save(place)
            with locked(folder.parent):
                if not folder.exists():  # another process may have been faster
                    put(place / "embedder", folder)
    return StaticEmbedder.load(folder)  # also where it was just made: rounding and all


def base_identity(base: str) -> list[Any]:
    """Return the name of a base, with place, size and time of the files that tell it from another."""
    files = [file for name in (CONFIG_FILE, TOKENIZER_FILE) if (file := _base_file(base, name))]
    table = _table_place(base)
    return [base, *map(_identity, [*files, *(table[:1] if table else ())])]


def _make(base: str, table: tuple[Path, str] | None) -> StaticEmbedder:
    from model2vec import StaticModel
    from model2vec.quantization import DType, quantize_embeddings

    core = _word_tokenizer(base)
    vectors = _read_table(*table) if table else _loaded_table(base)  # (V, H)
    ids = list(core.get_vocab().values())
    size = 1 + max(ids, default=-1)
    if not ids or len(vectors) < size:
        raise ModelError(f"base {base!r}: its tokenizer has ids up to {size - 1}; there are vectors for {len(vectors)}")
    counts = np.full(size, UNSEEN_COUNT)  # (V,)
    for token, count in _tokens_of(core, list(general_texts())).items():
        counts[token] += count
    rounded = quantize_embeddings(_project(vectors[:size], counts), DType.Int8)  # the common factor does not matter
    mapping = None if len(ids) == size else np.arange(size)  # a vocabulary with holes
    config = {"model_type": "model2vec", "architectures": ["StaticModel"], "hidden_dim": rounded.shape[1]}
    model = StaticModel(rounded, core, config, normalize=True, token_mapping=mapping, max_length=None)
    if problems := table_problems(model):
        raise ModelError(problem_list(f"the token vectors of base {base!r} cannot be used:", problems))
    return StaticEmbedder(model)


def _project(vectors: Tensor, counts: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return vectors (V, H) of length 1 in their directions of largest weighted second moment: (V, dim)."""
    moment = np.zeros((vectors.shape[1],) * 2)  # (H, H)
    for rows, units in _unit_rows(vectors):
        moment += (units * counts[rows, None].astype(np.float32)).T @ units
    if not np.isfinite(moment).all():
        raise ModelError("the base's token vectors hold NaN or infinity")
    _, directions = np.linalg.eigh(moment)  # (H, H), ascending
    directions = directions[:, : -MAX_DIM - 1 : -1]  # (H, dim)
    largest = np.take_along_axis(directions, np.abs(directions).argmax(0)[None], axis=0)  # (1, dim)
    directions = (directions * np.sign(largest)).astype(np.float32)  # an eigenvector's sign is arbitrary
    return np.concatenate([units @ directions for _, units in _unit_rows(vectors)])


def _unit_rows(vectors: Tensor) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Yield some rows at a time, each of length 1 in float32: of a large model, all together take gigabytes."""
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        yield rows, torch.nn.functional.normalize(vectors[rows].float(), dim=1).numpy()


def _word_tokenizer(base: str) -> "Tokenizer":
    """Return the base's tokenizer for single words: without special tokens, and as words stand behind a space."""
    from tokenizers import Tokenizer, normalizers

    backend = getattr(load_tokenizer(base), "backend_tokenizer", None)
    if backend is None:
        raise OptionError(
            f"base {base!r}: its tokenizer is not one of the library tokenizers, so its token vectors embed no texts; "
            "name another --embedder."
        )
    state: dict[str, Any] = json.loads(backend.to_str())
    state.update(truncation=None, padding=None, post_processor=None, added_tokens=[])
    plain, spaced = (Tokenizer.from_str(json.dumps(state)) for _ in range(2))
    own = [spaced.normalizer] if spaced.normalizer else []
    spaced.normalizer = normalizers.Sequence([normalizers.Prepend(" "), *own])
    # some tokenizers put the space there themselves: whichever knows words as fewer tokens is right
    probe = list(general_texts())[:100]
    return min((plain, spaced), key=lambda core: _tokens_of(core, probe).total())


def _tokens_of(core: "Tokenizer", texts: list[str]) -> Counter[int]:
    """Return how often each token occurs in the words of texts."""
    words = Counter(word for text in texts for word in WORD.findall(text))
    encoded = core.encode_batch_fast(list(words), add_special_tokens=False)
    counts: Counter[int] = Counter()
    for each, count in zip(encoded, words.values(), strict=True):
        for token in each.ids:
            counts[token] += count
    return counts


def _table_place(base: str) -> tuple[Path, str] | None:
    """Return the file and the name of the tensor (V, H) of token vectors; None = no file shows it."""
    from safetensors import SafetensorError, safe_open

    names: dict[str, str] = {}
    if index := _base_file(base, INDEX_FILE):
        listed = read_object(index, ModelError).get("weight_map")
        names = {str(key): str(file) for key, file in listed.items()} if isinstance(listed, dict) else {}
    elif file := _base_file(base, WEIGHTS_FILE):
        try:
            with safe_open(file, "pt") as tensors:
                names = dict.fromkeys(tensors.keys(), WEIGHTS_FILE)
        except (SafetensorError, OSError):
            return None
    found = [name for name in names if name.endswith(TABLES)]
    file = _base_file(base, names[found[0]]) if len(found) == 1 else None
    return (file, found[0]) if file else None


def _read_table(file: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)  # (V, H)


def _loaded_table(base: str) -> Tensor:
    model = load_model(base, device="cpu", dtype="bfloat16")
    return model.get_input_embeddings().weight.detach()  # type: ignore[union-attr, return-value]


def _base_file(base: str, name: str) -> Path | None:
    """Return a file of the base, in a folder, a cache or on the hub; None = it has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    found = locate(base)
    if os.path.isdir(found):
        file = Path(found, name)
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(base, name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def _identity(file: Path) -> list[Any]:
    """Return place, size and time of a file: to read it would take long, as a base has gigabytes."""
    state = file.stat()
    return [os.path.realpath(file), state.st_size, state.st_mtime_ns]
