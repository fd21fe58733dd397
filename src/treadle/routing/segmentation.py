"""Where a text's domain changes for the last time: a conversation moves on, and what was said before must not decide.

Binary segmentation (Scott and Knott 1974) with the router's log-posteriors in place of means: a text is cut where its
two sides, each read by itself, are best explained by different adapters; then what follows the cut is looked at again.
Cuts are at the beginnings of lines: turns and examples begin there, sentences of one passage seldom do.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from treadle.routing.centroids import Floats

WORD = re.compile(r"\S+")
SHORTEST, LONGEST = 18, 400
"""Words that there must be behind a cut, and that are looked at most."""
APART, SHARE = 8, 6
"""Words between lines that are tried, at least; and the share (a sixth) of those behind, where that is more."""
BEFORE = 384
"""Words before a cut that are looked at."""
LEAST = 12
"""Words that there must be before a cut."""
SURE = 40
"""Words of a text whose log-posteriors count by half; those of fewer words count less."""
MOST_CUTS = 4
"""Of one text. The numbers here were chosen on validation rows (`9fff023:benchmarks/changes.py`)."""


def last_topic_start(text: str, log_posteriors: Callable[[Sequence[str]], Floats], nats: float) -> int:
    """Return where the last domain of a text begins, as an index of characters; 0 where it is of one domain.

    Args:
        text: any text; only the beginning of a line can be the beginning of a domain.
        log_posteriors: texts -> (B, N) log-probabilities of each adapter.
        nats: how much better two adapters must explain the two sides of a cut than any one adapter explains both.
    """
    starts = [found.start() for found in WORD.finditer(text)]
    lines = _lines(text, starts)
    first = 0  # the word that the last segment begins with
    for _ in range(MOST_CUTS):
        cuts = [line for line in lines if line - first >= LEAST]
        if not cuts:
            break
        begins = [max(first, cut - BEFORE) for cut in cuts]
        sides = [text[starts[begin] : starts[cut]] for begin, cut in zip(begins, cuts, strict=True)]
        sides += [text[starts[cut] :] for cut in cuts]
        lengths = np.array([cut - begin for begin, cut in zip(begins, cuts, strict=True)])
        lengths = np.concatenate([lengths, len(starts) - np.array(cuts)])
        scores = log_posteriors(sides) * (lengths / (lengths + SURE))[:, None]
        before, behind = scores[: len(cuts)], scores[len(cuts) :]
        gains = before.max(-1) + behind.max(-1) - (before + behind).max(-1)
        best = int(gains.argmax())
        if gains[best] <= nats:
            break
        first = cuts[best]
    return starts[first] if first else 0


def _lines(text: str, starts: Sequence[int]) -> list[int]:
    """Return the words that begin the lines to try, the last first; `starts` are where words begin."""
    chosen: list[int] = []
    for word in range(len(starts) - SHORTEST, max(0, len(starts) - LONGEST - 1), -1):
        is_first = "\n" in text[starts[word - 1] : starts[word]]
        if is_first and (not chosen or chosen[-1] - word >= max(APART, (len(starts) - chosen[-1]) // SHARE)):
            chosen.append(word)
    return chosen
