"""Names that transformers changes from release to release, found by looking at the code that runs, not at its version.

A model of the library, one from remote code and another release may each use another name; nothing else in treadle
spells them.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn
    from transformers import Cache

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the key-value cache in calls and outputs, newest first: transformers 5.24 renamed it."""

WEIGHT = ".weight"
"""The end of a parameter's name; the tables of old names are of parameters."""
EXPERT_NUMBER = re.compile(r"\.experts\.(\d+)\.")


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
    try:
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # another release, without a table
        return str
    renamings = [each for each in _conversions(model) if isinstance(each, WeightRenaming)]
    return lambda path: rename_source_key(path + WEIGHT, renamings, [])[0].removesuffix(WEIGHT)


class FusedPlace(NamedTuple):
    """The place of one expert's linear layer in a parameter of all experts.

    Attributes:
        path: of the parameter.
        expert: number of the expert.
        part: number of the layer among those that lie below one another there, such as 1 of gate and up.
        num_parts: how many these are.
    """

    path: str
    expert: int
    part: int
    num_parts: int


def expert_fuser(model: "nn.Module") -> "Callable[[str], FusedPlace | None]":
    """Return a function that finds the place of an older release's layer of one expert; None for other paths."""
    try:
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return lambda _: None
    conversions = _conversions(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    kinds = {("MergeModulelist",), ("MergeModulelist", "Concatenate")}
    converters = [
        each
        for each in conversions
        if isinstance(each, WeightConverter) and tuple(type(op).__name__ for op in each.operations) in kinds
    ]

    def place(path: str) -> FusedPlace | None:
        number = EXPERT_NUMBER.search(path)
        if number is None:
            return None
        new, pattern = rename_source_key(path + WEIGHT, renamings, converters)
        sources = next((each.source_patterns for each in converters if pattern in each.source_patterns), None)
        if pattern is None or sources is None:
            return None
        return FusedPlace(new, int(number[1]), sources.index(pattern), len(sources))

    return place


def _conversions(model: "nn.Module") -> list[Any]:
    """Return the table by which transformers loads checkpoints of other releases."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
