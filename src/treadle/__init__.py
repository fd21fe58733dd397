"""Blend LoRA adapters token by token, with a router that is computed, not trained."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from treadle.adapters import Adapter, LoraPair, read_adapter
    from treadle.blend import Blend, attach
    from treadle.bundle import Bundle, read_bundle, save_bundle
    from treadle.centroids import Centroids
    from treadle.completion import Completion, GenerationError
    from treadle.embed import Embedder, SentenceEmbedder, StaticEmbedder
    from treadle.errors import AdapterError, BundleError, DataError, ModelError, OptionError, TreadleError
    from treadle.generate import Engine, load
    from treadle.params import RoutingParams, SamplingParams
    from treadle.routing import Router, fit
    from treadle.rows import TokenEvent

_PUBLIC = {
    "adapters": ("Adapter", "LoraPair", "read_adapter"),
    "blend": ("Blend", "attach"),
    "bundle": ("Bundle", "read_bundle", "save_bundle"),
    "centroids": ("Centroids",),
    "completion": ("Completion", "GenerationError"),
    "embed": ("Embedder", "SentenceEmbedder", "StaticEmbedder"),
    "errors": ("AdapterError", "BundleError", "DataError", "ModelError", "OptionError", "TreadleError"),
    "generate": ("Engine", "load"),
    "params": ("RoutingParams", "SamplingParams"),
    "routing": ("Router", "fit"),
    "rows": ("TokenEvent",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [
    "Adapter",
    "AdapterError",
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
