"""Samples become the same centroid wherever they come from, and messages count them as their owner does."""

import json

import numpy as np
import pytest

from treadle.common.errors import OptionError
from treadle.engine.sample_files import load_samples, load_texts
from treadle.routing.embedder import load_embedder
from treadle.routing.fitting import centroid_of, fit, texts_of
from treadle.routing.samples import KINDS, MIN_WORDS_AFTER_CHANGE, PART_WORDS, STAGES, Sample, sample_texts

from conftest import SAMPLES, save_adapter

LONG = [f"add three plus four the sum plus three add four plus {i} add sum three the list" for i in range(6)]
ROWS = [{"prompt": text, "completion": " the sum", "bare": text[4:]} for text in LONG]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def same(one, other):
    for name in ("means", "counts"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for stage in STAGES:
        for part in ("means", "owners", "sizes", "factors", "rest"):
            np.testing.assert_array_equal(getattr(one.stages[stage], part), getattr(other.stages[stage], part))


def test_every_way_in_makes_the_same_centroid(tmp_path, embedder, engine, run):
    adapter = save_adapter(tmp_path / "adapter", seed=9)
    file, base = write(tmp_path / "rows.jsonl", ROWS), str(tmp_path / "tiny-llama")
    embedder.save(tmp_path)
    samples = [Sample(**row) for row in ROWS]
    expected = fit({"new": samples}, load_embedder(tmp_path / "embedder")).centroids
    assert expected.counts.tolist() == [len(ROWS)]
    for stage in STAGES:  # each is there whole, as a prompt, and in parts
        assert int(expected.stages[stage].sizes.sum()) >= 3 * len(ROWS)
    same(expected, centroid_of("new", samples, embedder))
    same(expected, fit({"new": load_samples(file)}, embedder).centroids)
    engine.add_adapter("new", adapter, samples)
    same(expected, engine.router.centroids.among(["new"]))
    code, out, err = run("fit", "--base", base, "--adapter", f"new={adapter}", "--samples", f"new={file}",
                         "--embedder", str(tmp_path / "embedder"), "-o", str(tmp_path / "out"), "--json")  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["samples"] == {"new": len(ROWS)}


def test_other_adapters_samples_change_texts_that_begin_with_them_not_prompts(embedder):
    """A text whose domain changes begins with general text where an adapter comes alone."""
    alone, both = fit({"new": LONG}, embedder).centroids, fit({"new": LONG, **SAMPLES}, embedder).centroids
    own, other = alone.stages["prompt"], both.among(["new"]).stages["prompt"]
    names = sorted({text.kind for text in texts_of("new", LONG) if text.stage == "prompt"})
    changed = [name for name, one, two in zip(names, own.means, other.means, strict=True) if (one != two).any()]
    assert "join" in changed
    assert "prompt" not in changed


# What a sample becomes

PROMPT, ANSWER = "How many atoms are in the loop of the list?", " Three and four, plus one."


def made_of(sample, others=("Before it.",)):
    return {(text.stage, text.kind): text.text for text in sample_texts([sample], others)}


def test_a_sample_becomes_prompts_and_running_texts_of_every_kind():
    made = made_of(Sample(PROMPT, ANSWER, "atoms in the loop"))
    assert [kind for _, kind in made] == [*dict.fromkeys(kind for _, kind in made)]  # each kind once
    assert {kind for _, kind in made} == set(KINDS)
    assert made["prompt", "prompt"] == PROMPT
    assert made["prompt", "bare"] == "atoms in the loop"
    assert made["running", "whole"] == PROMPT + ANSWER
    assert made["running", "bare-whole"] == "atoms in the loop" + ANSWER
    assert PROMPT.startswith(made["prompt", "begin"])
    assert made["prompt", "join"] == "Before it.\n\n" + PROMPT
    for kind in ("grow", "join-grow"):
        beginning = PROMPT if kind == "grow" else "Before it.\n\n" + PROMPT
        assert made["running", kind].startswith(beginning)
        assert (PROMPT + ANSWER).endswith(ANSWER.removeprefix(made["running", kind].removeprefix(beginning)))
        assert len(made["running", kind]) > len(beginning)
    after = made["running", "join-begin"].removeprefix("Before it.\n\n")
    assert len(after.split()) >= MIN_WORDS_AFTER_CHANGE
    assert (PROMPT).startswith(after) or "atoms in the loop".startswith(after)


def test_a_plain_text_has_the_stages_that_it_can_have():
    made = made_of(PROMPT, ())
    assert set(made) == {("prompt", "prompt"), ("prompt", "begin"), ("running", "whole"), ("running", "grow")}
    assert made["running", "whole"] == PROMPT
    assert PROMPT.startswith(made["running", "grow"])


def test_texts_are_the_same_every_time_and_know_their_sample():
    samples = [Sample(PROMPT, ANSWER), PROMPT]
    made = sample_texts(samples, LONG)
    assert made == sample_texts(samples, LONG)
    assert made != sample_texts(samples, LONG, seed=1)
    assert {text.owner for text in made} == {0, 1}
    words = sample_texts([" ".join(map(str, range(500)))], LONG)
    assert any(len(text.text.split()) in PART_WORDS for text in words if text.kind == "begin")
    assert [text.text for text in sample_texts([" "])] == [" ", "", " ", ""]


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
