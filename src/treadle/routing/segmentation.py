"""Finds the last change of a text's topic, so that older topics do not decide.

Binary segmentation (Scott and Knott 1974) with the router's log-posteriors in place of means: a text is cut where
different adapters explain its two sides best. Then the text after the cut is looked at again. Cuts are at the
beginnings of lines: turns and examples begin there, sentences of one passage seldom do.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from treadle.routing.centroids import Floats

WORD = re.compile(r"\S+")
# The numbers here were chosen on validation rows (`9fff023:benchmarks/changes.py`).
MIN_TOPIC_WORDS, MAX_TOPIC_WORDS = 18, 400
"""The fewest and the most words after a cut."""
MIN_LINE_WORDS, LINE_SHARE = 8, 6
"""The fewest words between two lines to try, or a share of the words after, if that is more."""
MAX_WORDS_BEFORE, MIN_WORDS_BEFORE = 384, 12
"""The most words before a cut that are read, and the fewest that must be there."""
HALF_WEIGHT_WORDS = 40
"""The words of a text whose log-posteriors count by half; those of fewer words count less."""
MAX_CUTS = 4
"""The most cuts of one text."""


def last_topic_start(text: str, log_posteriors: Callable[[Sequence[str]], Floats], nats: float) -> int:
    """Return where the last topic of a text begins, in characters; 0 = the text has one topic.

    Args:
        text: any text; a topic begins with a line.
        log_posteriors: texts -> (B, N) log-probabilities of each adapter.
        nats: two adapters must explain the two sides of a cut this much better than any one adapter explains both.
    """
    starts = [found.start() for found in WORD.finditer(text)]
    lines = _lines(text, starts)
    first = 0  # the word that the last segment begins with
    for _ in range(MAX_CUTS):
        cuts = [line for line in lines if line - first >= MIN_WORDS_BEFORE]
        if not cuts:
            break
        begins = [max(first, cut - MAX_WORDS_BEFORE) for cut in cuts]
        sides = [text[starts[begin] : starts[cut]] for begin, cut in zip(begins, cuts, strict=True)]
        sides += [text[starts[cut] :] for cut in cuts]
        lengths = np.array([cut - begin for begin, cut in zip(begins, cuts, strict=True)])
        lengths = np.concatenate([lengths, len(starts) - np.array(cuts)])
        scores = log_posteriors(sides) * (lengths / (lengths + HALF_WEIGHT_WORDS))[:, None]
        before, behind = scores[: len(cuts)], scores[len(cuts) :]
        gains = before.max(-1) + behind.max(-1) - (before + behind).max(-1)
        best = int(gains.argmax())
        if gains[best] <= nats:
            break
        first = cuts[best]
    return starts[first] if first else 0


def _lines(text: str, starts: Sequence[int]) -> list[int]:
    """Return the first words of the lines to try, the last line first; `starts` are where words begin."""
    chosen: list[int] = []
    for word in range(len(starts) - MIN_TOPIC_WORDS, max(0, len(starts) - MAX_TOPIC_WORDS - 1), -1):
        is_first = "\n" in text[starts[word - 1] : starts[word]]
        if is_first and (
            not chosen or chosen[-1] - word >= max(MIN_LINE_WORDS, (len(starts) - chosen[-1]) // LINE_SHARE)
        ):
            chosen.append(word)
    return chosen
