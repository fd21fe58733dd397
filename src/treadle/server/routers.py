"""Routers of some of the engine's adapters: the others are not even compared with the text."""

from dataclasses import replace

from treadle.generate import Engine
from treadle.routing import Router


class Routers:
    """Makes routers of chosen adapters, and keeps them until the engine's adapters change."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._made: tuple[Router, dict[frozenset[str], Router]] = (engine.router, {})

    def among(self, names: frozenset[str] | None) -> Router:
        """Return the router of those of the engine's adapters that are named; None = of all."""
        whole = self._engine.router
        if names is None or names >= set(whole.names):
            return whole
        if self._made[0] is not whole:
            self._made = (whole, {})
        made = self._made[1]
        key = names & set(whole.names)
        if key not in made:
            centroids = whole.centroids
            for name in set(whole.names) - key:
                centroids = centroids.remove(name)
            made[key] = replace(whole, centroids=centroids)
        return made[key]
