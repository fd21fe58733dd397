"""Blend LoRA adapters token by token, with a router that is computed, not trained.

A bundle is a base model's name, adapters, and a router made from samples of their domains:

    engine = treadle.load("demo/bundle")                                # or load(base=..., adapters=folder)
    done = engine.generate("What is 3 + 4?")                            # text, token_ids, weights (tokens, adapters)
    for event in engine.stream([{"role": "user", "content": "Hi"}]): ...
    engine.generate("...", routing=treadle.RoutingParams(every=1))      # options of one call

Without the engine, `attach` blends adapters in a model of transformers, and `Blend.using` sets their weights. `fit`
makes a router, `save_bundle` writes a bundle. Errors are TreadleError and what derives from it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from treadle.common import moved
from treadle.common.version import __version__

if TYPE_CHECKING:
    from treadle.bundle.bundle import Bundle, read_bundle, save_bundle
    from treadle.common.errors import (
        AdapterError,
        AdapterWarning,
        BundleError,
        DataError,
        ModelError,
        OptionError,
        TreadleError,
    )
    from treadle.common.params import RoutingParams, SamplingParams
    from treadle.engine.completion import Completion, GenerationError
    from treadle.engine.engine import Engine
    from treadle.engine.loading import load
    from treadle.engine.sequence import TokenEvent
    from treadle.lora.adapter import Adapter, LoraPair, read_adapter
    from treadle.lora.blend import Blend, attach
    from treadle.routing.centroids import Centroids
    from treadle.routing.embedder import Embedder, SentenceEmbedder, StaticEmbedder
    from treadle.routing.fitting import fit
    from treadle.routing.router import Router

_PUBLIC = {
    "lora.adapter": ("Adapter", "LoraPair", "read_adapter"),
    "lora.blend": ("Blend", "attach"),
    "bundle.bundle": ("Bundle", "read_bundle", "save_bundle"),
    "routing.centroids": ("Centroids",),
    "engine.completion": ("Completion", "GenerationError"),
    "routing.embedder": ("Embedder", "SentenceEmbedder", "StaticEmbedder"),
    "common.errors": (
        "AdapterError",
        "AdapterWarning",
        "BundleError",
        "DataError",
        "ModelError",
        "OptionError",
        "TreadleError",
    ),
    "engine.engine": ("Engine",),
    "engine.loading": ("load",),
    "common.params": ("RoutingParams", "SamplingParams"),
    "routing.fitting": ("fit",),
    "routing.router": ("Router",),
    "engine.sequence": ("TokenEvent",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

moved.install()

__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterWarning",
    "Blend",
    "Bundle",
    "BundleError",
    "Centroids",
    "Completion",
    "DataError",
    "Embedder",
    "Engine",
    "GenerationError",
    "LoraPair",
    "ModelError",
    "OptionError",
    "Router",
    "RoutingParams",
    "SamplingParams",
    "SentenceEmbedder",
    "StaticEmbedder",
    "TokenEvent",
    "TreadleError",
    "__version__",
    "attach",
    "fit",
    "load",
    "read_adapter",
    "read_bundle",
    "save_bundle",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import treadle` itself loads neither torch nor transformers."""
    if name not in _HOME:
        raise AttributeError(f"module 'treadle' has no attribute {name!r}")
    return getattr(import_module(f"treadle.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names, which completion and `help` show."""
    return [*__all__, "__doc__", "__file__", "__name__", "__path__"]
