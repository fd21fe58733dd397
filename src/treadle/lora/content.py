"""The content of an adapter, whichever format its folder has, and the checks that all formats share."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from treadle.lora.pair import LoraPair, range_problems
from treadle.lora.vectors import LayerVectors
from treadle.lora.virtual_tokens import VirtualTokens


@dataclass(frozen=True)
class AdapterContent:
    """The tensors of an adapter's folder, by module path inside the base model.

    Attributes:
        base_model: named in its config; "" if it names none.
        pairs: the factors.
        vectors: what it does beside them.
        initial: how training began from a part of the base's weight (`treadle.lora.initial`); "" = it did not.
        weights: whole weights as the base stores them, saved beside the factors or trained in their place.
        virtual: tokens before every text; None = there are none.
    """

    base_model: str
    pairs: Mapping[str, LoraPair]
    vectors: Mapping[str, LayerVectors] = field(default_factory=dict[str, LayerVectors])
    initial: str = ""
    weights: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    virtual: VirtualTokens | None = None


def content_problems(
    pairs: Mapping[str, LoraPair], vectors: Mapping[str, LayerVectors], weights: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Return the problems of readable tensors: there are none, they overflow, or they change nothing."""
    if not pairs and not vectors and not weights:
        return ["it holds no factors; save it again after training"]
    problems = range_problems(pairs, torch.float32)
    if weights:
        return problems  # the base's own, or trained ones: the base tells
    if not any(pair.b.any() for pair in pairs.values()) and not any(each.has_effect for each in vectors.values()):
        what = "all its B factors are zero" if pairs else "all its scales are 1"
        problems.append(f"{what}: it changes nothing (was it saved before training?)")
    return problems
