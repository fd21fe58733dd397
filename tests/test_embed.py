"""A running text is embedded as the whole text is, however it is cut; an append costs the same at any length."""

import json
import logging
import re
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from model2vec import StaticModel

from treadle.common.errors import BundleError, ModelError, OptionError
from treadle.common.params import RoutingParams
from treadle.routing.centroids import Centroids
from treadle.routing.embedder import SentenceEmbedder, StaticEmbedder, encode_views, load_embedder
from treadle.routing.router import Router
from treadle.routing.running_sum import MAX_TAIL_WORDS, WORD
from treadle.routing.schedule import DecisionCursor
from treadle.routing.sentence_embedder import MAX_WORD_CHARS, last_words

from conftest import byte_tokenizer

quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LETTERS = "ab é漢字😀ñ\u0301_1.,-\n\ufffd"
texts = st.text(max_size=60) | st.text(alphabet=LETTERS, max_size=150)
pieces_of = st.lists(st.text(max_size=8) | st.text(alphabet=LETTERS, max_size=50), max_size=8)


def byte_model(**options: object) -> StaticModel:
    """A vector for every byte, so that every visible character moves the embedding."""
    core = byte_tokenizer().backend_tokenizer
    vectors = np.random.default_rng(0).normal(size=(core.get_vocab_size(), 6)).astype(np.float32)
    return StaticModel(**{"vectors": vectors, "tokenizer": core, "max_length": None, **options})


class NotedModel:
    """A model that notes what it is asked for: each list of words to tokenise, each list of texts to encode."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.asked: list[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def tokenize(self, words: Sequence[str]) -> Any:
        self.asked.append(list(words))
        return self._model.tokenize(words)

    def encode(self, texts: list[str], **options: Any) -> Any:
        self.asked.append(texts)
        return self._model.encode(texts, **options)

    def tokenizer(self, text: str, **options: Any) -> Any:
        self.asked.append([text])
        return self._model.tokenizer(text, **options)


class NotedEmbedder(StaticEmbedder):
    """An embedder that notes how many words it sums up at a time."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.summed: list[int] = []

    def sum_words(self, words: Sequence[str]) -> np.ndarray:
        self.summed.append(len(words))
        return super().sum_words(words)


@pytest.fixture(scope="module")
def bytewise() -> StaticEmbedder:
    return StaticEmbedder(byte_model())


def total(embedder: StaticEmbedder, text: str) -> np.ndarray:
    """The sum (D,) of the vectors of a text's words, before it is normalised."""
    return embedder.sum_words(WORD.findall(text))


# The static embedder


every_tails = st.lists(st.integers(1, 12) | st.sampled_from([24, MAX_TAIL_WORDS]), max_size=3).map(tuple)


@given(texts, st.lists(st.integers(0, 150), max_size=12), every_tails)
@example("a" * 100 + "é" * 50, [40, 41, 80, 120], (1, 2, 3))  # words are at most 40 characters long
@example("", [0], (1,))
@example("one two thr", [9, 10], (1, 2))
@quick
def test_a_running_text_is_embedded_as_the_whole_however_it_is_cut(bytewise, text, cuts, tails):
    bounds = [0, *sorted(cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(bounds)]
    track, at_once = bytewise.follow(tails), bytewise.follow(tails)
    for piece in pieces:
        track.extend([piece])
    at_once.extend(pieces)
    words = WORD.findall(text)
    expected = [words, *(words[-count:] for count in tails)]
    for found, other, whole, own in zip(
        track.views(), at_once.views(), bytewise.views(text, tails), expected, strict=True
    ):
        np.testing.assert_allclose(found, bytewise.sum_words(own), atol=1e-4)
        np.testing.assert_allclose(other, bytewise.sum_words(own), atol=1e-4)
        np.testing.assert_array_equal(whole, bytewise.sum_words(own))
    vectors = encode_views(bytewise, [text], tails)[0]
    np.testing.assert_allclose(bytewise.finish(track.views()), vectors, atol=1e-4)
    np.testing.assert_allclose(vectors[0], bytewise.encode([text])[0], atol=1e-6)


def test_the_longest_tail_of_a_long_text_is_its_last_words(bytewise):
    words = [f"w{index}" for index in range(500)]
    for tails in ((MAX_TAIL_WORDS,), (1, MAX_TAIL_WORDS, 3)):
        for end in ("", " "):
            track = bytewise.follow(tails)
            track.extend([" ".join(words[:300]), " " + " ".join(words[300:]) + end])
            for found, count in zip(track.views()[1:], tails, strict=True):
                np.testing.assert_allclose(found, bytewise.sum_words(words[-count:]), atol=1e-4)


@given(pieces_of, st.integers(1, 5))
@quick
def test_a_window_holds_what_its_last_tokens_added(bytewise, pieces, window):
    track = bytewise.follow((2,), window)
    for number, piece in enumerate(pieces, 1):
        track.extend([piece])
        before, now = "".join(pieces[: max(0, number - window)]), "".join(pieces[:number])
        whole, tail = track.views()
        np.testing.assert_allclose(whole, total(bytewise, now) - total(bytewise, before), atol=1e-4)
        np.testing.assert_allclose(tail, bytewise.views(now, (2,))[1], atol=1e-4)  # of the text, whatever the window


@given(pieces_of, st.integers(1, 5))
@quick
def test_a_window_does_not_depend_on_how_its_tokens_came(bytewise, pieces, window):
    one_by_one, at_once = bytewise.follow((3, 1), window), bytewise.follow((3, 1), window)
    for piece in pieces:
        one_by_one.extend([piece])
    at_once.extend(pieces)
    for one, other in zip(one_by_one.views(), at_once.views(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_snapshot_does_not_move_with_the_text(bytewise):
    track = bytewise.follow((24, 8))
    track.extend(["one two ", "three"])
    before = track.views()
    kept = [view.copy() for view in before]
    track.extend([" four five" * 9])
    np.testing.assert_array_equal(before, kept)


@pytest.mark.parametrize("window", [None, 4])
def test_an_append_costs_the_same_at_any_length(bytewise, window):
    model = NotedModel(bytewise.model)
    embedder = NotedEmbedder(model)
    costs: list[tuple[int, int]] = []
    for length in (10, 3000):
        track = embedder.follow((24, 8), window)
        track.extend([f"w{index} " for index in range(length)])
        embedder.summed.clear()
        model.asked.clear()
        track.extend([f"new{length}"])
        track.extend([", and"])
        track.views()
        costs.append((sum(embedder.summed), sum(map(len, model.asked))))
    assert costs[1][0] <= costs[0][0] <= 5
    assert costs[1][1] <= costs[0][1] <= 4


def test_a_word_is_tokenised_once(bytewise):
    model = NotedModel(bytewise.model)
    StaticEmbedder(model).encode(["the cell and the atom", "the atom"])
    assert sorted(chain.from_iterable(model.asked)) == ["and", "atom", "cell", "the"]


@pytest.mark.parametrize("cap", [1, 3, 4])
def test_a_full_cache_changes_nothing(bytewise, cap):
    many = ["one two three", "two three four five", "six", "one two three four five six", ""]
    expected = bytewise.encode(many)
    embedder = StaticEmbedder(bytewise.model, max_cached_words=cap)
    for _ in range(2):
        np.testing.assert_array_equal(embedder.encode(many), expected)
    track = embedder.follow((24, 8))
    track.extend(["one two thr", "ee four ", "five", " six"])
    np.testing.assert_allclose(embedder.finish([track.views()[0]])[0], expected[3], atol=1e-6)


@given(st.lists(texts, max_size=4))
@quick
def test_vectors_are_of_length_one_and_zero_without_words(bytewise, many):
    vectors = bytewise.encode(many)
    assert vectors.shape == (len(many), 6)
    assert vectors.dtype == np.float32
    expected = [1.0 if text.strip() and WORD.search(text) else 0.0 for text in many]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), expected, atol=1e-5)


def test_it_is_what_model2vec_computes(embedder):
    many = ["add three plus four", "the planet, the heat", "unheard"]
    expected = embedder.model.encode(many, normalize=True)
    np.testing.assert_allclose(embedder.encode(many), expected, atol=1e-6)


def small_models() -> dict[str, StaticModel]:
    """Models as people shrink them: fewer bits, fewer dimensions, fewer rows than tokens."""
    vectors = byte_model().embedding
    random = np.random.default_rng(1)
    mapping, weights = random.integers(0, 40, len(vectors)), random.uniform(0.5, 2, len(vectors)).astype(np.float32)
    return {
        "int8": byte_model(vectors=np.clip(vectors * 30, -127, 127).astype(np.int8)),
        "float16": byte_model(vectors=vectors.astype(np.float16)),
        "quantised vocabulary": byte_model(vectors=vectors[:40], token_mapping=mapping, weights=weights),
    }


@pytest.mark.parametrize("model", small_models().values(), ids=small_models())
def test_small_models_embed_as_model2vec_does_and_survive_saving(model, tmp_path):
    embedder = StaticEmbedder(model)
    vectors = embedder.encode(["the cell", "é漢字😀", ""])
    rows = model.embedding.astype(np.float32)
    for text, vector in zip(["thecell", "é漢字😀"], vectors[:2], strict=True):
        (ids,) = model.tokenize([text])
        picked = rows[ids] if model.token_mapping is None else rows[model.token_mapping[ids]]
        expected = (picked if model.weights is None else picked * model.weights[ids, None]).sum(0)
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-3)
    assert embedder.save(tmp_path) == "embedder"
    loaded = load_embedder(tmp_path / "embedder")
    assert isinstance(loaded, StaticEmbedder)
    assert loaded.id == embedder.id
    assert loaded.model.embedding.dtype == model.embedding.dtype
    np.testing.assert_array_equal(loaded.encode(["the cell", "é漢字😀", ""]), vectors)


def test_other_vectors_have_another_id(bytewise):
    vectors = bytewise.model.embedding.copy()
    vectors[7, 3] += 1e-3
    assert StaticEmbedder(byte_model(vectors=vectors)).id != bytewise.id
    assert StaticEmbedder(byte_model()).id == bytewise.id


# Loading


def test_a_folder_that_is_missing_is_not_looked_up_on_the_hub(tmp_path):
    for name in (str(tmp_path / "nowhere"), "./nowhere", "../nowhere"):
        with pytest.raises(OptionError, match="no such folder"):
            load_embedder(name)


def test_a_folder_that_holds_no_embedder_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"config\.json cannot be read"):
        load_embedder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BundleError, match=r"config\.json cannot be read"):
        load_embedder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "model2vec"}))
    with pytest.raises(ModelError, match=r"static embedder .* cannot be loaded"):
        load_embedder(tmp_path)


# The sentence embedder

SENTENCE = "the cell add heat loop"
LIMIT = 10
"""Word pieces that the tiny model reads, of a maximum of 12."""


@pytest.fixture(scope="module")
def sentence_folder(tmp_path_factory) -> Path:
    """A sentence-transformers model of one random layer that reads 12 word pieces, two of them its own."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    root = tmp_path_factory.mktemp("sentence")
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SENTENCE.split(), *letters, *(f"##{c}" for c in letters)]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(root / "bert")
    BertTokenizerFast(vocab={piece: index for index, piece in enumerate(pieces)}).save_pretrained(root / "bert")
    modules = [Transformer(str(root / "bert"), max_seq_length=LIMIT + 2), Pooling(16)]
    SentenceTransformer(modules=modules, device="cpu").save(str(root / "tiny"), create_model_card=False)
    return root / "tiny"


@pytest.fixture(scope="module")
def sentences(sentence_folder) -> SentenceEmbedder:
    embedder = load_embedder(sentence_folder)
    assert isinstance(embedder, SentenceEmbedder)
    return embedder


@pytest.fixture
def noted(sentence_folder) -> SentenceEmbedder:
    """An embedder whose model notes what it is asked for."""
    embedder = SentenceEmbedder(str(sentence_folder))
    embedder.model = NotedModel(embedder.model)
    return embedder


def test_sentence_vectors_are_of_length_one(sentences):
    vectors = sentences.encode([SENTENCE, "loop", SENTENCE])
    assert vectors.shape == (3, 16)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3
    assert sentences.encode([]).shape == (0, 16)


def test_of_a_long_text_the_last_pieces_count_and_it_says_so_once(sentence_folder, caplog):
    embedder = load_embedder(sentence_folder)
    tail = "the cell add heat loop the cell add heat loop"
    with caplog.at_level(logging.WARNING, logger="treadle"):
        short = embedder.encode([tail])
        assert not caplog.records  # LIMIT pieces fit
        long = embedder.encode(["heat heat heat " + tail, "loop " * 500 + tail])
    np.testing.assert_allclose(long, np.repeat(short, 2, 0), atol=1e-6)
    assert len(caplog.records) == 1
    assert f"reads {LIMIT} word pieces; of longer texts it sees the last" in caplog.text


@pytest.mark.parametrize("window", [None, 3])
def test_a_running_sentence_is_encoded_as_its_text(sentences, window):
    pieces = ["the ", "ce", "ll", " add", " heat"]
    router = Router(Centroids.empty(sentences.id, sentences.dim, (2,)), sentences)
    cursor = DecisionCursor(router, RoutingParams(every=1, window=window), pieces[:1], 1)
    for number, piece in enumerate(pieces, 1):
        cursor.add([piece] if number > 1 else [])
        ((_, views),) = cursor.decide(number)
        text = "".join(pieces[:number])
        words = re.findall(r"\S+\s*", text)
        assert views.parts == ("".join(pieces[:number][-(window or number) :]), "".join(words[-2:]))
        assert views.is_running == (number > 1)


def test_the_last_words_of_a_sentence_are_a_view_and_a_long_text_is_not_read_for_them(sentences):
    assert sentences.views("the cell add  heat\nloop", (3, 1, 9)) == [
        "the cell add  heat\nloop", "add  heat\nloop", "loop", "the cell add  heat\nloop"
    ]  # fmt: skip
    long = "heat " * 10_000 + "cell"
    assert last_words(long, 3) == "heat heat cell"
    assert len(last_words("x" * 10_000, 2)) <= 2 * MAX_WORD_CHARS
    views = encode_views(sentences, [SENTENCE, "loop"], (2,))
    assert views.shape == (2, 2, 16)
    np.testing.assert_allclose(views[0, 1], sentences.encode(["heat loop"])[0], atol=1e-6)


def test_all_rows_that_are_due_are_one_call(noted):
    noted.finish(["the cell"] * 5)
    assert [len(each) for each in noted.model.asked] == [1] * 5 + [5]  # each is cut, then all are encoded


def test_of_a_very_long_text_only_the_end_is_looked_at(sentences, noted):
    tail = "the cell add heat loop the cell add heat loop"
    long = noted.encode(["heat " * 5000 + tail, "the" * 9000 + " " + tail, tail, "the\n" + "loop" * 5000])
    np.testing.assert_allclose(long[:3], np.repeat(sentences.encode([tail]), 3, 0), atol=1e-6)
    np.testing.assert_allclose(long[3], sentences.encode(["the " + "loop" * 5000])[0], atol=1e-6)
    assert max(len(text) for (text,) in noted.model.asked[:2]) <= 20 * LIMIT


def test_short_texts_are_not_padded_to_long_ones(sentences, noted):
    texts = ["cell", SENTENCE, "the cell add heat", "heat loop", SENTENCE + " cell"]
    vectors = noted.encode(texts)
    assert noted.model.asked[len(texts) :] == [[texts[4], texts[1], texts[2]], [texts[3], texts[0]]]
    np.testing.assert_allclose(vectors, np.concatenate([sentences.encode([text]) for text in texts]), atol=1e-6)


def test_a_sentence_embedder_is_saved_into_the_bundle_and_keeps_its_id(sentences, tmp_path):
    assert sentences.save(tmp_path) == "embedder"
    loaded = load_embedder(tmp_path / "embedder")
    assert loaded.id == sentences.id
    np.testing.assert_allclose(loaded.encode([SENTENCE]), sentences.encode([SENTENCE]), atol=1e-6)


def test_a_sentence_embedder_that_is_a_pickle_is_refused(sentences, sentence_folder, tmp_path):
    shutil.copytree(sentence_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(sentences.model[0].auto_model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"(?s)cannot be loaded:.*pytorch_model\.bin is a pickle, which can run code"):
        load_embedder(tmp_path / "pickled")


class SlowModel(NotedModel):
    """A model that notes how many threads are in it at a time."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.inside: list[int] = []
        self.most = 0

    def encode(self, texts: list[str], **options: Any) -> Any:
        self.inside.append(1)
        self.most = max(self.most, len(self.inside))
        time.sleep(0.02)
        found = super().encode(texts, **options)
        self.inside.pop()
        return found


def test_threads_take_turns_with_the_sentence_model(noted):
    """A decision that comes late is embedded beside the model, while another row's prompt is decided."""
    noted.model = model = SlowModel(noted.model)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(noted.encode, [["add three"]] * 8))
    assert model.most == 1
    for each in found[1:]:
        np.testing.assert_array_equal(each, found[0])
