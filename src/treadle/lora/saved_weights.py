"""Turns whole weights that an adapter holds (`modules_to_save`) into factors of their difference to the base's.

The difference of a linear layer is B A with A = 1, that of an embedding the other way round: factors of full rank,
which are weighted like all others.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from treadle.lora.adapter import Adapter
from treadle.lora.layer import BlendedLinear
from treadle.lora.pair import LoraPair


def weight_problem(module: nn.Module, weight: Tensor, *, is_alone: bool) -> str | None:
    """Return why the difference of a saved weight to the base's cannot be blended; None if it can.

    It is not alone if the adapter holds something for the module that was trained against the saved weight.
    """
    return next(_weight_problems(module, weight, is_alone), None)


def _weight_problems(module: nn.Module, weight: Tensor, is_alone: bool) -> Iterator[str]:
    """Yield the problems of a saved weight; those behind the first may not be asked for."""
    own, base = getattr(module, "weight", None), _base(module)
    sizes = f"of shape {tuple(getattr(own, 'shape', ()))} by one of {tuple(weight.shape)}"
    if not isinstance(own, Tensor):
        yield "which this module does not have"
    elif not isinstance(base, nn.Linear | nn.Embedding) and not hasattr(base, "nx"):
        yield "of a module that is neither linear nor an embedding"
    elif not own.is_floating_point() or own.element_size() < 2 or type(own) not in (nn.Parameter, Tensor):
        yield "which is quantised, so that nothing tells whether it is the base's own"
    elif own.shape[1:] != weight.shape[1:]:
        yield sizes
    elif own.shape != weight.shape and not is_own(*(each[: min(len(own), len(weight))] for each in (own, weight))):
        yield f"{sizes} whose rows differ, too"
    elif not is_alone and own.shape == weight.shape and not is_own(own, weight):
        yield "by another one, against which DoRA or the initial factors were computed"
    elif not torch.isfinite(weight).all():
        yield "by one with NaN or infinite values"


def is_own(own: Tensor, weight: Tensor) -> bool:
    """Return whether a saved weight is the base's own.

    They are compared in the coarser of both dtypes, because training and running may use different ones.
    """
    dtypes = sorted({own.dtype, weight.dtype}, key=lambda dtype: (dtype.itemsize, dtype == torch.float16))
    saved, held = (each.to(own.device, dtypes[0]) for each in (weight, own.detach()))
    return torch.equal(saved, held)


def with_differences(modules: Mapping[str, nn.Module], adapter: Adapter) -> Adapter:
    """Return an adapter whose whole weights, checked by `weight_problem`, are factors; the base's own are dropped."""
    if not adapter.weights:
        return adapter
    return replace(adapter, pairs={**adapter.pairs, **dict(_differences(modules, adapter))}, weights={})


def resized(modules: Mapping[str, nn.Module], adapter: Adapter) -> list[str]:
    """Return the paths of whole weights that have more or fewer rows than the base's."""
    sizes = ((path, len(weight), _own(modules[path])) for path, weight in adapter.weights.items())
    return [path for path, rows, own in sizes if rows != len(own)]


def _differences(modules: Mapping[str, nn.Module], adapter: Adapter) -> Iterator[tuple[str, LoraPair]]:
    for path, weight in adapter.weights.items():
        module, own = _base(modules[path]), _own(modules[path])
        if own.shape != weight.shape or is_own(own, weight):
            continue
        change = weight.float() - own.float().cpu()  # where adapters are read to
        if isinstance(module, nn.Embedding):
            made = LoraPair(change.t(), torch.eye(own.shape[1]), 1.0)  # (H, V), (H, H)
        else:
            change = change if isinstance(module, nn.Linear) else change.t()  # (out, in)
            made = LoraPair(torch.eye(change.shape[1]), change, 1.0)
        yield path, made if (pair := adapter.pairs.get(path)) is None else pair.joined(made)


def _base(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, BlendedLinear) else module


def _own(module: nn.Module) -> Tensor:
    """Return the base's weight of a module that `weight_problem` has checked."""
    return _base(module).get_parameter("weight").detach()
