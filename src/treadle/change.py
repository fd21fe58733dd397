"""Where a text's domain changes for the last time: a conversation moves on, and what was said before must not decide.

Binary segmentation (Scott and Knott 1974) with the router's log-posteriors in place of means: a text is cut where its
two sides, each read by itself, are best explained by different adapters; then what follows the cut is looked at again.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from treadle.centroids import Floats

WORD = re.compile(r"\S+")
LENGTHS = (18, 24, 36, 48, 72, 96, 144)
"""Words behind a cut that are tried; of a longer segment the last so many are found, which is enough of it."""
BEFORE = 384
"""Words before a cut that are looked at."""
LEAST = 12
"""Words that there must be before a cut."""
SURE = 70
"""Words of a text whose log-posteriors count by half; those of fewer words count less."""
MOST_CUTS = 4
"""Of one text. The numbers here were chosen on validation rows (`benchmarks/changes.py`)."""


def last_change(text: str, log_posteriors: Callable[[Sequence[str]], Floats], nats: float) -> int:
    """Return where the last domain of a text begins, as an index of characters; 0 where it is of one domain.

    Args:
        text: any text.
        log_posteriors: texts -> (B, N) log-probabilities of each adapter.
        nats: how much better two adapters must explain the two sides of a cut than any one adapter explains both.
    """
    starts = [found.start() for found in WORD.finditer(text)]
    first = 0  # the word that the last segment begins with
    for _ in range(MOST_CUTS):
        cuts = [len(starts) - length for length in LENGTHS if len(starts) - length - first >= LEAST]
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
