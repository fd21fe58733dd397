"""General text: what texts of no adapter's kind are like.

`general_texts.jsonl.gz` holds texts that SmolLM2-135M-Instruct wrote by itself: requests of users, and beginnings of
pages (`demo/general_texts.py`).
"""

import gzip
import json
import random
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from treadle.routing.embedder import Embedder, Floats, encode_views
from treadle.routing.running_sum import Tails
from treadle.routing.samples import Stage
from treadle.routing.statistics import Statistics

MIN_KNOWN_SHARE = 0.5
"""The least share of the texts with a known word; with fewer, an embedder knows nothing of general text."""
TEXTS_FILE = Path(__file__).with_name("general_texts.jsonl.gz")


@cache
def general_texts() -> tuple[str, ...]:
    """Return all texts."""
    with gzip.open(TEXTS_FILE, "rt", encoding="utf-8") as lines:
        return tuple(json.loads(line) for line in lines)


def staged_texts() -> dict[Stage, list[str]]:
    """Return texts as a router meets them: whole as prompts, and grown to any length as running text."""
    choose = random.Random(0)
    grown: list[str] = []
    for text in general_texts():
        words = re.findall(r"\s*\S+", text)
        grown.append("".join(words[: choose.randint(1, len(words))]))
    return {"prompt": list(general_texts()), "running": grown}


def general_views(embedder: Embedder, tails: Tails) -> Mapping[Stage, Floats] | None:
    """Return the views (texts, K, D) of general text at each stage; None = the embedder knows little of it."""
    made: dict[Stage, Floats] = {}
    for stage, texts in staged_texts().items():
        views = encode_views(embedder, texts, tails)
        made[stage] = views[views[:, 0].any(-1)]
        if len(made[stage]) < MIN_KNOWN_SHARE * len(texts):
            return None
    return made


def general_statistics(views: Mapping[Stage, Floats]) -> Mapping[Stage, Statistics]:
    """Return the statistics of general text at each stage, as those of one adapter with one group."""
    return {stage: Statistics.of(each.reshape(len(each), -1), ["general"] * len(each)) for stage, each in views.items()}
