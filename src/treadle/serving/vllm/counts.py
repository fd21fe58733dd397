"""What the scheduler counts for vLLM's metrics. Nothing here imports vLLM."""

from collections.abc import Sequence
from typing import cast

import numpy as np


class Counts:
    """What has been decided and generated; for the adapters that are there now.

    Attributes:
        decisions: how often weights were made from a text.
        seconds: spent on that.
        tokens: that were generated.
        base_tokens: those under which no adapter acted.
        weights: adapter -> the sum of its weights over generated tokens.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.decisions = 0
        self.seconds = 0.0
        self.tokens = 0
        self.base_tokens = 0
        self.weights = dict.fromkeys(names, 0.0)

    def rename(self, names: Sequence[str]) -> None:
        """Count for these adapters from now on; those that stay keep their sums."""
        self.weights = {name: self.weights.get(name, 0.0) for name in names}

    def add(self, names: Sequence[str], keys: Sequence[bytes]) -> None:
        """Count generated tokens by the keys of the weights under which they were made."""
        acting = [key for key in keys if key]
        self.tokens += len(keys)
        self.base_tokens += len(keys) - len(acting)
        if acting:
            weights = np.frombuffer(b"".join(acting), np.float32).reshape(-1, len(names))
            for name, weight in zip(names, cast(list[float], weights.sum(0, np.float64).tolist()), strict=True):
                if name in self.weights:  # not of one that has left, which a request may have still
                    self.weights[name] += weight
