"""Routers of some of the engine's adapters: the others are not even compared with the text."""

import threading
from collections import OrderedDict
from dataclasses import replace

from treadle.engine.engine import Engine
from treadle.routing.router import Router

MOST_BYTES, MOST_ROUTERS = 64 << 20, 256
"""Of routers that are kept: requests choose from 2**N sets of adapters."""


class Routers:
    """Makes routers of chosen adapters, and keeps those last used until the engine's adapters change."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._whole = engine.router
        self._made: OrderedDict[frozenset[str], Router] = OrderedDict()  # the last used last
        self._turn = threading.Lock()  # requests are prepared in several threads

    def among(self, names: frozenset[str] | None) -> Router:
        """Return the router of those of the engine's adapters that are named; None = of all."""
        whole = self._engine.router
        if names is None or names >= set(whole.names):
            return whole
        key = names & set(whole.names)
        with self._turn:
            if self._whole is not whole:
                self._whole = whole
                self._made.clear()
            router = self._made.pop(key, None) or replace(whole, centroids=whole.centroids.among(key))
            self._made[key] = router
            most = min(MOST_ROUTERS, max(1, MOST_BYTES // max(1, router.centroids.scatter.nbytes)))
            while len(self._made) > most:
                self._made.popitem(last=False)
        return router
