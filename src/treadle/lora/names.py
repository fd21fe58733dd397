"""Gives an adapter's modules the paths that they have in a model, and compares the names of base models.

Names say little: the same weights have a name on a hub, a quantised twin and a folder on a disk. So a base of another
name is a warning, and the shapes of the factors decide.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from treadle.common.errors import AdapterError, AdapterWarning
from treadle.common.transformers_names import checkpoint_renamer
from treadle.lora.adapter import Adapter
from treadle.lora.experts import modules_of, with_fused_experts

T = TypeVar("T")
LANGUAGE_PART = re.compile(
    r"(?:(?:model|language_model|text_model)\.)+(?=(?:layers|embed_tokens|norm|lm_head)(?:\.|$))"
)
"""The beginning of a module path in a text model, or in the language part of a larger one."""


def warn_of_bases(adapters: Sequence[Adapter], base: str) -> None:
    """Warn of adapters that name another base model than `base`; one warning names all."""
    names: dict[str, list[str]] = {}
    for adapter in adapters:
        if is_foreign(adapter, base):
            names.setdefault(adapter.base_model, []).append(repr(adapter.name))
    if names:
        trained = "; ".join(f"{', '.join(each)} on {named!r}" for named, each in names.items())
        what = f"the base is {base!r}, but by their configs adapters were trained on others: {trained}."
        warnings.warn(f"{what} The shapes decide whether they fit.", AdapterWarning, stacklevel=3)


def is_foreign(adapter: Adapter, base: str) -> bool:
    """Return whether an adapter names another base model; the same model may lie in different folders."""
    return bool(adapter.base_model) and _last_name(adapter.base_model) != _last_name(base)


def _last_name(base: str) -> str:
    """Return the last part of a base model's name; a cache's folder stands for the model it keeps.

    The hub's cache keeps org/model in models--org--model/snapshots/REVISION, treadle's in models/org--model.
    """
    parts = [part for part in base.replace("\\", "/").split("/") if part]
    if len(parts) >= 3 and parts[-2] == "snapshots":
        parts = parts[:-2]
    last = parts[-1] if parts else ""
    is_kept = last.startswith("models--") or (len(parts) >= 2 and parts[-2] == "models" and "--" in last)
    return (last.rpartition("--")[2] if is_kept else last).lower()


def with_model_names(model: nn.Module, adapter: Adapter) -> Adapter:
    """Return the adapter with the model's own module paths.

    A path that the model lacks gets the name that transformers' table of renamings has for it. Otherwise its beginning
    is exchanged for that of the model's language part: adapters of a model that reads images and of its text model
    differ in it. A path stays if the model has no such name either. Factors of single experts become factors of fused
    ones, where the model has these.

    Raises:
        AdapterError: two of its modules are one in this model, or factors of experts do not fit.
    """
    known = modules_of(model)
    if all(path in known for path in (*adapter.modules, *adapter.weights)):
        return adapter
    adapter = with_fused_experts(model, adapter)
    candidates = (checkpoint_renamer(model), _language_renamer(model))

    def name(path: str) -> str:
        return next((new for new in (path, *(rename(path) for rename in candidates)) if new in known), path)

    if len({name(path) for path in adapter.modules}) < len(adapter.modules):
        raise AdapterError(f"{adapter.name}: two of its modules are one in this model: old and new names are mixed.")
    return with_paths(adapter, name)


def with_paths(adapter: Adapter, name: Callable[[str], str | None]) -> Adapter:
    """Return the adapter with other module paths; a module whose `name` is None is left out."""

    def named(entries: Mapping[str, T]) -> dict[str, T]:
        return {new: each for path, each in entries.items() if (new := name(path)) is not None}

    return replace(adapter, pairs=named(adapter.pairs), vectors=named(adapter.vectors), weights=named(adapter.weights))


def _language_renamer(model: nn.Module) -> Callable[[str], str]:
    """Return a function that gives a module path of a language part the beginning that it has in this model."""
    outer: Any = model
    if not hasattr(model, "get_decoder"):
        return str
    paths = {id(module): path for path, module in model.named_modules()}
    decoder, head = paths.get(id(outer.get_decoder()), ""), paths.get(id(outer.get_output_embeddings()), "lm_head")

    def rename(path: str) -> str:
        rest = LANGUAGE_PART.sub("", path, count=1) if LANGUAGE_PART.match(path) else path
        return head if rest == "lm_head" else f"{decoder}.{rest}" if decoder else rest

    return rename
