"""Makes src/treadle/routing/general_texts.jsonl.gz: texts of no domain in particular, written by the demo's base.

    python demo/general_texts.py work/general_texts.jsonl.gz [--batches 1]

The base writes by itself, without an adapter. After the words that begin a user's turn it writes a request, as in
Magpie (arXiv:2406.08464). After its end-of-text token it writes the beginning of a page. Texts that begin like another
one or have fewer than four words are left out. No row of any data set is read. It takes a quarter of an hour on one
core. Another machine's arithmetic gives other texts of the same kind.
"""

import argparse
import gzip
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import treadle
from treadle import RoutingParams, SamplingParams

BUNDLE = Path(__file__).parent / "bundle"
BATCH = 48
SEEDS = [*((1, number) for number in range(3)), *((2, number) for number in range(24))]
"""The run and number of each batch: they make the seeds of its texts."""
STOP = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
MAX_TEXTS = 1000
MIN_WORDS = 4
BEGINNING_CHARACTERS = 60
"""Texts that share so many are alike."""


class Beginning(NamedTuple):
    """The text that comes before a text, and the most tokens that follow."""

    prompt: str
    max_tokens: int


SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # the base's default
BEGINNINGS = (
    Beginning(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n", 96),
    Beginning("<|im_start|>user\n", 96),
    Beginning("<|endoftext|>", 128),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="file to write")
    parser.add_argument("--batches", type=int, default=len(SEEDS), help=f"of {BATCH} texts; fewer try the script out")
    options = parser.parse_args()
    engine = treadle.load(BUNDLE, dtype="bfloat16")
    written: list[str] = []
    for run, number in SEEDS[: options.batches]:
        written += write_batch(engine, run, number)
        print(f"{len(written)} texts", flush=True)
    kept = keep(written)
    save(kept, options.output)
    print(f"{len(kept)} of {len(written)} texts: {options.output}")


def write_batch(engine: treadle.Engine, run: int, number: int) -> list[str]:
    """Let the base write BATCH texts, each from a seed of its own."""
    beginning = BEGINNINGS[number % len(BEGINNINGS)]
    sampling = [
        SamplingParams(
            temperature=1.0,
            top_p=0.97,
            max_tokens=beginning.max_tokens,
            seed=run * 100_000 + number * 1000 + index,
            stop=STOP,
        )
        for index in range(BATCH)
    ]
    done = engine.generate([beginning.prompt] * BATCH, sampling=sampling, routing=RoutingParams.base())
    return [each.text for each in done]


def keep(written: Sequence[str]) -> list[str]:
    """Return at most MAX_TEXTS texts that do not begin alike, in random order."""
    texts: dict[str, str] = {}
    for each in written:
        text = re.sub(r"\s+\n", "\n", each).strip()
        if len(text.split()) >= MIN_WORDS:
            texts.setdefault(text[:BEGINNING_CHARACTERS], text)
    kept = list(texts.values())
    random.Random(0).shuffle(kept)
    return kept[:MAX_TEXTS]


def save(texts: Sequence[str], output: Path) -> None:
    """Write texts, one a line as JSON; the same texts give the same bytes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(output, "wb", mtime=0) as file:
        for text in texts:
            file.write((json.dumps(text, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    main()
