"""Samples become the same centroid wherever they come from, and messages count them as their owner does."""

import json

import numpy as np
import pytest

from treadle.common.errors import OptionError
from treadle.experiments.data import load_samples, load_texts
from treadle.routing.embedder import load_embedder
from treadle.routing.fitting import centroid_of
from treadle.routing.router import fit
from treadle.routing.samples import Sample, sample_texts

from conftest import SAMPLES, save_adapter

LONG = [f"add three plus four the sum plus three add four plus {i} add sum three the list" for i in range(6)]
ROWS = [{"prompt": text, "completion": " the sum", "bare": text[4:]} for text in LONG]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def same(one, other):
    for name in ("means", "counts", "scatter"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_every_way_in_makes_the_same_centroid(tmp_path, embedder, engine, run):
    adapter = save_adapter(tmp_path / "adapter", seed=9)
    file, base = write(tmp_path / "rows.jsonl", ROWS), str(tmp_path / "tiny-llama")
    embedder.save(tmp_path)
    samples = [Sample(**row) for row in ROWS]
    expected = fit({"new": samples}, load_embedder(tmp_path / "embedder")).centroids
    assert int(expected.counts[0]) > 3 * len(ROWS)  # each is there whole, as a prompt, and in parts
    same(expected, centroid_of("new", samples, embedder))
    same(expected, fit({"new": load_samples(file)}, embedder).centroids)
    engine.add_adapter("new", adapter, samples)
    added = engine.router.centroids
    np.testing.assert_array_equal(added.scatter[-1], expected.scatter[0])
    code, out, err = run("fit", "--base", base, "--adapter", f"new={adapter}", "--samples", f"new={file}",
                         "--embedder", str(tmp_path / "embedder"), "-o", str(tmp_path / "out"), "--json")  # fmt: skip
    assert code == 0, err
    counts = json.loads(out)
    assert (counts["samples"], counts["texts"]) == ({"new": len(ROWS)}, {"new": int(expected.counts[0])})


def test_a_short_text_counts_once():
    assert fit_counts(["add three", "the sum"]) == 2
    assert fit_counts([Sample("add", " three", "add")]) == 2  # whole and prompt


def fit_counts(samples):
    return len(sample_texts(samples).texts)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "\U0001f389", "completion": " the sum"},
        {"prompt": "\n", "completion": " the sum"},
        {"text": "add three " + "\U0001f389 " * 40 + "plus four"},
        {"prompt": "add", "completion": "\U0001f389"},
        {"prompt": "\U0001f389", "completion": "", "bare": "add"},
    ],
)
def test_a_sample_with_one_known_word_is_good(tmp_path, embedder, row):
    file = write(tmp_path / "rows.jsonl", [*ROWS, row])
    assert fit({"math": load_samples(file), "code": SAMPLES["code"]}, embedder).centroids.counts[0] > 0
    if "bare" not in row:
        assert fit({"math": load_texts(file), "code": SAMPLES["code"]}, embedder).names == ("math", "code")


def test_a_sample_without_a_known_word_is_named_as_its_row(tmp_path, embedder):
    rows = [*ROWS, {"text": "\U0001f389"}, ROWS[0], {"text": " "}]
    with pytest.raises(OptionError) as caught:
        fit({"math": load_samples(write(tmp_path / "rows.jsonl", rows)), "code": ["\U0001f389"]}, embedder)
    message = str(caught.value)
    assert "samples of 'math': 2 of 9 hold no word that the embedder knows (number 7, 9)" in message
    assert "samples of 'code': 1 of 1 hold no word" in message  # both adapters in one message


def test_no_samples_and_one_text_are_refused(embedder):
    with pytest.raises(OptionError, match="adapter 'math' has no sample texts"):
        fit({"math": []}, embedder)
    with pytest.raises(OptionError, match="samples of 'math' are one text; give a list"):
        centroid_of("math", "add three", embedder)
