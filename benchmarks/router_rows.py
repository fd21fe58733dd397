"""Rows of eight domains for `benchmarks/router.py`: samples to fit on, validation rows and test rows, all apart.

The domains are those of the demo's four adapters and four more. SQuAD's rows are split by article, BoolQ's by passage:
no article of the samples is in the other rows.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from treadle.engine.sample_files import read_rows
from treadle.experiments.tasks import TASKS, Example, Row

FOUR = ("math", "science", "code", "reading")
MORE = ("yes-no", "commonsense", "translation", "dialogue")
EIGHT = FOUR + MORE
SPLITS = ("samples", "validation", "test")
NUM_SAMPLES, NUM_HELD_OUT = 600, 300
NUM_ARTICLES = 100
"""SQuAD's articles that are kept for validation."""

Rows = dict[str, dict[str, list[Example]]]
"""Split -> domain -> examples."""


def yes_no(row: Row) -> Example:
    passage, question = row["passage"].strip(), row["question"].strip().capitalize() + "?"
    return Example(
        f"Context: {passage}\n\nQuestion: {question}\n\nAnswer:",
        " yes" if row["answer"] else " no",
        bare=f"{passage} {question}",
    )


def translation(row: Row) -> Example:
    english = row["en"].strip()
    return Example(f"English: {english}\n\nGerman:", " " + row["de"].strip(), bare=english)


def dialogue(row: Row) -> Example:
    said = row["dialogue"].strip()
    return Example(f"Dialogue:\n{said}\n\nSummary:", " " + row["summary"].strip(), bare=said)


READERS: dict[str, Callable[[Row], Example]] = {
    **{name: TASKS[name].read for name in FOUR},
    "yes-no": yes_no,
    "commonsense": TASKS["science"].read,
    "translation": translation,
    "dialogue": dialogue,
}
SOURCES = {  # domain: of each split, file and first row after shuffling; rows of one file do not overlap
    "math": (("gsm8k-train", 0), ("gsm8k-train", 1000), ("gsm8k-test-even", 0)),
    "science": (("arc_challenge-train", 0), ("arc_challenge-validation", 0), ("arc_challenge-test-even", 0)),
    "code": (("code_alpaca-train", 0), ("code_alpaca-train", 1000), ("code_alpaca-test-a", 0)),
    "yes-no": (("boolq-train", 0), ("boolq-train", 1000), ("boolq-train", 1600)),
    "commonsense": (("commonsense_qa-train", 0), ("commonsense_qa-train", 1000), ("commonsense_qa-validation", 0)),
    "translation": (
        ("multi30k_en_de-train", 0),
        ("multi30k_en_de-train", 1000),
        ("multi30k_en_de-validation", 0),
    ),
    "dialogue": (("dialogsum-validation", 0), ("dialogsum-validation", 250), ("dialogsum-validation", 350)),
}
DIALOGUE_ROWS = {"samples": 250, "validation": 100, "test": 150}
"""DialogSum's file is short."""
UNIQUE = {"boolq-train": "passage"}
"""The field of a file whose rows may share it; one of these is kept."""


def load_rows(data: Path) -> Rows:
    """Return the examples of every split and domain; the choice is seeded."""
    files = {file for sources in SOURCES.values() for file, _ in sources}
    shuffled = {file: _shuffled(data, file) for file in sorted(files)}
    rows: Rows = {split: {} for split in SPLITS}
    for name, sources in SOURCES.items():
        for split, (file, start) in zip(SPLITS, sources, strict=True):
            wanted = NUM_SAMPLES if split == "samples" else NUM_HELD_OUT
            count = min(wanted, DIALOGUE_ROWS[split]) if name == "dialogue" else wanted
            rows[split][name] = _examples(shuffled[file][start:], name)[:count]
    for split, chosen in zip(SPLITS, _reading_rows(data), strict=True):
        rows[split]["reading"] = _examples(chosen, "reading")
    return {split: {name: rows[split][name] for name in EIGHT} for split in SPLITS}


def _shuffled(data: Path, file: str) -> Sequence[Row]:
    rows: list[Row] = list(read_rows(data / f"{file}.jsonl.gz"))
    if field := UNIQUE.get(file):
        rows = list({row[field]: row for row in rows}.values())
    random.Random(1).shuffle(rows)
    return rows


def _reading_rows(data: Path) -> tuple[Sequence[Row], ...]:
    """Return SQuAD's rows of each split, of articles that no other split has."""
    rows = _shuffled(data, "squad-train")
    titles = sorted({row["title"] for row in rows})
    held_out = set(random.Random(3).sample(titles, NUM_ARTICLES))
    samples = [row for row in rows if row["title"] not in held_out]
    validation = [row for row in rows if row["title"] in held_out]
    test = _shuffled(data, "squad-validation-even")
    return samples[:NUM_SAMPLES], validation[:NUM_HELD_OUT], test[:NUM_HELD_OUT]


def _examples(rows: Sequence[Row], name: str) -> list[Example]:
    """Return the examples of rows whose answer is not empty."""
    return [example for example in map(READERS[name], rows) if example.completion.strip()]
