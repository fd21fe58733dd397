"""The centroid of one adapter from its samples: one way for fit, training, the engine and the servers."""

from collections.abc import Sequence

import numpy as np

from treadle.common.errors import OptionError
from treadle.routing.centroids import Centroids, Floats
from treadle.routing.embedder import Embedder, num_words
from treadle.routing.samples import Sample, SampleTexts, sample_texts

MAX_LISTED_SAMPLES = 10
"""The most samples that a message names."""


def centroid_of(name: str, samples: Sequence[str | Sample], embedder: Embedder) -> Centroids:
    """Return the centroid of the adapter `name` from its samples; errors as in `centroid_from`."""
    if isinstance(samples, str):
        raise OptionError(f"samples of {name!r} are one text; give a list of texts.")
    made = sample_texts(samples)
    return centroid_from(name, made, embedder.encode(made.texts), embedder)


def centroid_from(name: str, made: SampleTexts, vectors: Floats, embedder: Embedder) -> Centroids:
    """Return the centroid of the adapter `name` from its samples' texts and their vectors (texts, D).

    A text without any word that the embedder knows has the vector 0 and counts for nothing.

    Raises:
        OptionError: there are no samples, or some have no known word in any text; lists them as their owner counts.
    """
    if not made.num_samples:
        raise OptionError(f"adapter {name!r} has no sample texts.")
    is_known = np.asarray(vectors.any(-1))  # (texts,)
    heard = {owner for owner, known in zip(made.owners, is_known, strict=True) if known}
    if silent := [index for index in range(made.num_samples) if index not in heard]:
        numbers = ", ".join(str(index + 1) for index in silent[:MAX_LISTED_SAMPLES])
        more = " ..." if len(silent) > MAX_LISTED_SAMPLES else ""
        raise OptionError(
            f"samples of {name!r}: {len(silent)} of {made.num_samples} hold no word that the embedder knows (number "
            f"{numbers}{more}); leave them out, or give other texts."
        )
    counts = num_words([text for text, known in zip(made.texts, is_known, strict=True) if known])
    return Centroids.empty(embedder.id, embedder.dim).add(name, vectors[np.flatnonzero(is_known)], counts)
