"""The embedder of a base's own token vectors: made once, the same each time, from whatever files the base has."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from treadle.bundle.token_embedder import find_embedder, token_embedder
from treadle.common.errors import ModelError, OptionError
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.fitting import fit
from treadle.routing.general_text import general_texts
from treadle.routing.running_sum import WORD

from conftest import SAMPLES, byte_tokenizer, tiny_llama

SPACE = "\u2581"
TEXTS = ["add three plus four", "heat of the planet", "\U0001f600 caf\u00e9", "x"]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TREADLE_HOME", str(tmp_path / "home"))
    tiny_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def spaced_words(**backend: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that knows general text's commonest words, only as they stand behind a space."""
    counts = Counter(word for text in general_texts() for word in WORD.findall(text))
    letters = [chr(code) for code in range(33, 127)] + [SPACE]
    scores = [("<unk>", 0.0), *((each, -9.0) for each in letters)]
    scores += [(f"{SPACE}{word}", -1.0) for word, _ in counts.most_common(300) if len(word) > 1]
    core = Tokenizer(models.Unigram(scores, 0))
    for name, value in backend.items():
        setattr(core, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_it_is_made_once_and_knows_every_word(base: Path) -> None:
    made = token_embedder(str(base))
    file = base / "tokenizer.json"
    state = file.stat()
    file.write_bytes(b" " * state.st_size)  # it cannot be made again
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    again = token_embedder(str(base))
    assert made.id == again.id == find_embedder("tokens", str(base)).id
    vectors = made.encode(TEXTS)
    np.testing.assert_array_equal(vectors, again.encode(TEXTS))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert made.dim == tiny_llama().config.hidden_size


def test_texts_are_as_near_as_the_vectors_of_their_tokens(base: Path) -> None:
    """All directions are kept here, so that cosines are those of the table, but for the rounding to int8."""
    table = torch.nn.functional.normalize(tiny_llama().model.embed_tokens.weight.detach(), dim=1)
    tokenizer = byte_tokenizer()

    def mean(text: str) -> np.ndarray[Any, Any]:
        # the byte tokenizer knows no words, so that a space before them would only add a token
        ids = [token for word in text.split() for token in tokenizer(word, add_special_tokens=False).input_ids]
        return torch.nn.functional.normalize(table[ids].sum(0), dim=0).numpy()

    vectors = token_embedder(str(base)).encode(TEXTS)
    expected = np.stack([mean(text) for text in TEXTS])
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=0.03)


def test_a_changed_base_makes_a_new_one(base: Path) -> None:
    before = token_embedder(str(base))
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(1).contiguous() ** 3
    save_file(tensors, file, {"format": "pt"})
    assert token_embedder(str(base)).id != before.id


def test_the_files_of_a_base_do_not_matter(base: Path) -> None:
    whole = token_embedder(str(base))
    tiny_llama().save_pretrained(base, max_shard_size="20KB")
    (base / "model.safetensors").unlink()
    assert (base / "model.safetensors.index.json").is_file()
    assert token_embedder(str(base)).id == whole.id
    model = tiny_llama()
    for file in base.glob("model*"):
        file.unlink()
    save_file({f"odd.{key}": value for key, value in model.state_dict().items()}, base / "model.safetensors")
    assert token_embedder(str(base)).id == whole.id


def test_a_table_that_no_name_tells_comes_from_the_loaded_model(base: Path) -> None:
    tiny_llama().bfloat16().save_pretrained(base)
    whole = token_embedder(str(base))
    file = base / "model.safetensors"
    save_file({**load_file(file), "other.wte.weight": torch.ones(2, 2)}, file, {"format": "pt"})  # which of the two?
    assert token_embedder(str(base)).id == whole.id


@pytest.mark.parametrize(
    "backend",
    [
        {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="always")},  # puts the space there itself
        {"normalizer": normalizers.Replace(" ", SPACE)},  # does not
    ],
)
def test_words_are_read_as_they_stand_in_a_text(base: Path, backend: Any) -> None:
    model = tiny_llama()
    model.resize_token_embeddings(500)
    model.save_pretrained(base)
    spaced_words(**backend).save_pretrained(base)
    assert [len(ids) for ids in token_embedder(str(base)).model.tokenize(["the", "and"])] == [1, 1]


def test_a_vocabulary_may_have_holes(base: Path) -> None:
    state = json.loads((base / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    del vocabulary["a"]
    (base / "tokenizer.json").write_text(json.dumps(state))
    made = token_embedder(str(base))
    assert made.encode(["bcd"]).any()
    assert fit(SAMPLES, made).weights(["add the sum"]).shape == (1, 3)


def test_what_cannot_be_used_is_named(base: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        token_embedder(str(base / "nowhere"))
    file = base / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:9].clone()}, file)
    with pytest.raises(ModelError, match="its tokenizer has ids up to 255; there are vectors for 9"):
        token_embedder(str(base))
    save_file({**tensors, "model.embed_tokens.weight": tensors["model.embed_tokens.weight"] * float("nan")}, file)
    with pytest.raises(ModelError, match="NaN or infinity"):
        token_embedder(str(base))
    (base / "tokenizer.json").unlink()
    ByT5Tokenizer().save_pretrained(base)
    with pytest.raises(OptionError, match="name another --embedder"):
        token_embedder(str(base))


def test_names_mean_what_they_say(base: Path, bundle_folder: Path, embedder: StaticEmbedder) -> None:
    assert find_embedder(str(bundle_folder), "nowhere").id == embedder.id
    assert find_embedder(str(bundle_folder / "embedder"), "nowhere").id == embedder.id
    with pytest.raises(OptionError, match="no such folder"):
        find_embedder("./nowhere", str(base))
