"""Embeds long texts so that it can be given up in between."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from treadle.routing.embedder import StaticEmbedder
from treadle.routing.router import Router
from treadle.serving.openai.lines import Check


class AttendedEmbedder(StaticEmbedder):
    """A static embedder that calls a check now and then while it reads a long text; its words are its own."""

    def __init__(self, embedder: StaticEmbedder, check: Check) -> None:
        self.model, self.id, self.dim = embedder.model, embedder.id, embedder.dim
        self._sums = {}
        self._check = check

    def _sum_some(self, words: Sequence[str]) -> NDArray[np.float64]:
        self._check()
        return super()._sum_some(words)


def attended(router: Router, check: Check) -> Router:
    """Return a router whose embedder calls a check now and then, where it is a static one."""
    embedder = router.embedder
    is_static = isinstance(embedder, StaticEmbedder)
    return replace(router, embedder=AttendedEmbedder(embedder, check)) if is_static else router
