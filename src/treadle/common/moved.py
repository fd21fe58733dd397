"""Module names of 0.1, which still import for one release: each warns, and gives what the module has now."""

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "treadle.adapters": "treadle.lora.adapter",
    "treadle.arms": "treadle.experiments.arms",
    "treadle.blend": "treadle.lora.blend",
    "treadle.centroids": "treadle.routing.centroids",
    "treadle.data": "treadle.experiments.data",
    "treadle.embed": "treadle.routing.embedder",
    "treadle.errors": "treadle.common.errors",
    "treadle.generate": "treadle.engine.engine",
    "treadle.hf": "treadle.engine.hf",
    "treadle.lm_eval_model": "treadle.experiments.lm_eval_model",
    "treadle.models": "treadle.bundle.base_model",
    "treadle.params": "treadle.common.params",
    "treadle.samples": "treadle.routing.samples",
    "treadle.score": "treadle.engine.scoring",
    "treadle.tasks": "treadle.experiments.tasks",
}
PARTLY_MOVED = {
    "treadle.data": ("treadle.engine.sample_files",),
    "treadle.generate": ("treadle.engine.loading",),
    "treadle.params": ("treadle.experiments.params",),
}
"""Modules that have some names of an old module, beside the one that MOVED names."""


def names_of(old: str, *modules: str) -> Callable[[str], Any]:
    """Return a module's `__getattr__` that takes names of the module `old` from other modules, with a warning."""

    def get(name: str) -> Any:
        if name.startswith("__"):  # what Python itself asks a module for
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        new = next((module for module in modules if hasattr(import_module(module), name)), modules[0])
        value = getattr(import_module(new), name)
        warnings.warn(f"{old}.{name} is {new}.{name} now, or a name of treadle itself.", DeprecationWarning, 2)
        return value

    return get


class MovedModules(MetaPathFinder, Loader):
    """Finds modules under their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for an old name; None for any other."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Let the module give the names of the new one."""
        name = module.__name__
        module.__dict__["__getattr__"] = names_of(name, MOVED[name], *PARTLY_MOVED.get(name, ()))


def install() -> None:
    """Let old names import, once a process."""
    if not any(isinstance(each, MovedModules) for each in sys.meta_path):
        sys.meta_path.append(MovedModules())
