"""Names that transformers changes from release to release, found by looking at the code that runs, not at its version.

A model of the library, one from remote code and another release may each use another name; nothing else in treadle
spells them.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import Cache

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the key-value cache in calls and outputs, newest first: transformers 5.24 renamed it."""


def cache_argument(model: "nn.Module") -> str:
    """Return the name under which `model.forward` and `model.generate` take the key-value cache."""
    return _cache_argument(type(model))


@cache
def _cache_argument(kind: "type[nn.Module]") -> str:
    from transformers import GenerationMixin

    # a wrapper such as PEFT's passes on what it is given: there the installed library's own name counts
    for function in (kind.forward, vars(GenerationMixin)["prepare_inputs_for_generation"]):
        found = _present(inspect.signature(function).parameters)
        if found:
            return found
    raise RuntimeError(f"{kind.__name__} takes a cache under none of the names {', '.join(CACHE_NAMES)}.")


def find_cache(values: Mapping[str, Any]) -> "Cache | None":
    """Return the key-value cache among the arguments of a call or in a model's output; None where there is none."""
    name = _present(list(values))  # an output warns if it is asked whether it has an old name
    return values[name] if name else None


def _present(names: Iterable[str]) -> str | None:
    return next((name for name in CACHE_NAMES if name in names), None)


def checkpoint_renamer(model: "nn.Module") -> Callable[[str], str]:
    """Return a function that takes a module's path of an older release to its path in this model.

    The table is the one by which transformers loads old checkpoints, and PEFT old adapters.
    """
    from transformers import PreTrainedModel

    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # another release, without a table
        return str
    if not isinstance(model, PreTrainedModel):
        return str
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    suffix = ".weight"  # the table is of parameters
    return lambda path: rename_source_key(path + suffix, renamings, [])[0].removesuffix(suffix)
