"""Stacks the factors of adapters for the layers of a model. The layers change only when they are given their stacks."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from treadle.lora.adapter import Adapter
from treadle.lora.compatibility import is_routed, linear_shape
from treadle.lora.embedding import BlendedEmbedding
from treadle.lora.experts import ExpertFactors, ExpertWeight, modules_of
from treadle.lora.gates import Gates, StackLayout
from treadle.lora.layer import BlendedLinear, LayerRole, StackedA, VectorLinear
from treadle.lora.pair import LoraPair
from treadle.lora.vectors import LayerVectors

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Names of linear layers of a block that read one input; a layer given another input computes its own product."""


class Stacks:
    """The stacked factors of adapters: `build` them beside the passes if that takes long, `put` them between two.

    Attributes:
        adapters: the owners of the factors.
        layers: all that the adapters target, by path; some may not be in the model yet.
        attached: the adapters that the blend had when the stacks were planned.
        layouts: the layouts of the layers' stacks, each with its slot.
        stacked: each StackedA, with the paths of its layers.
    """

    def __init__(
        self,
        adapters: tuple[Adapter, ...],
        layers: Mapping[str, BlendedLinear],
        attached: tuple[Adapter, ...] = (),
        *,
        by_columns: bool,
    ) -> None:
        """Plan the stacks; `by_columns` as in `_stack_b`."""
        self.adapters = adapters
        self.attached = attached
        self.layers = dict(layers)
        self.layouts: dict[StackLayout, int] = {}
        self.stacked: list[tuple[StackedA, list[str]]] = []
        self._by_columns = by_columns
        self._b: dict[str, Tensor] = {}  # (out, R) of each layer
        self._vectors: dict[str, dict[str, Tensor]] = {}  # (K, size) of each layer that has some, by name

    def build(self) -> None:
        """Copy all factors into stacks, once. If that fails, the layers have not changed."""
        if len(self._b) == len(self.layers):
            return
        self.stacked.clear()
        self._vectors = {path: _stack_vectors(each) for path in self.layers if (each := self._vectors_at(path))}
        for paths in _same_input(self.layers, {path for each in self.adapters for path in each.pairs}):
            pairs = [self._pairs_at(path) for path in paths]
            first = self.layers[paths[0]]
            stacked_a = StackedA([torch.cat([pair.a for pair in each]) for each in pairs], first.device, first.dtype)
            self.stacked.append((stacked_a, paths))
            for path, each in zip(paths, pairs, strict=True):
                self._b[path] = _stack_b([pair.b for pair in each], by_columns=self._by_columns).to(first.device)

    def put(self) -> None:
        """Give the layers their stacks; each must `activate` before a pass."""
        for stacked_a, paths in self.stacked:
            for index, path in enumerate(paths):
                slot = self.layouts.setdefault(self._layout(path), len(self.layouts))
                layer = self.layers[path]
                layer.stack(self._b[path], stacked_a, index, slot)
                if isinstance(layer, ExpertFactors):
                    layer.put_ranks([pair.rank for pair in self._pairs_at(path)])
                if isinstance(layer, VectorLinear):
                    holders = tuple((index, 1, 1.0) for index, each in enumerate(self.adapters) if path in each.vectors)
                    slot = self.layouts.setdefault(StackLayout(holders), len(self.layouts))
                    layer.stack_vectors(self._vectors[path], slot)

    def _pairs_at(self, path: str) -> list[LoraPair]:
        """Return the factors of all adapters for a layer; where only vectors are, those of rank 0."""
        pairs = [each.pairs[path] for each in self.adapters if path in each.pairs]
        return pairs or [LoraPair.empty(*_sizes(self.layers[path].base))]

    def _vectors_at(self, path: str) -> list[LayerVectors]:
        return [each.vectors[path] for each in self.adapters if path in each.vectors]

    def _layout(self, path: str) -> StackLayout:
        pairs = [(index, each.pairs[path]) for index, each in enumerate(self.adapters) if path in each.pairs]
        return StackLayout(tuple((index, pair.rank, pair.scale) for index, pair in pairs))


def new_layers(
    model: nn.Module, adapters: Sequence[Adapter], known: Mapping[str, BlendedLinear], gates: dict[int, Gates]
) -> dict[str, BlendedLinear]:
    """Return the layer of each path that adapters target: the known one, or a new one that reads `gates`."""
    outer: Any = model
    head = outer.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers: dict[str, BlendedLinear] = {}
    modules = modules_of(model)
    for path in sorted({module for adapter in adapters for module in adapter.modules}):
        found = known.get(path)
        base = modules[path] if found is None else found.base
        has_vectors = any(path in adapter.vectors for adapter in adapters)
        kind = _kind(base, has_vectors=has_vectors)
        if found is not None and type(found) is kind:
            layers[path] = found
        else:
            role = LayerRole(path, is_head=found.role.is_head if found else base is head, is_routed=is_routed(path))
            layers[path] = kind(base, _factor_dtype(base, model), gates, role)
    return layers


def _kind(base: nn.Module, *, has_vectors: bool) -> type[BlendedLinear]:
    if isinstance(base, ExpertWeight):
        return ExpertFactors
    return BlendedEmbedding if isinstance(base, nn.Embedding) else VectorLinear if has_vectors else BlendedLinear


def stacked_views(adapters: Sequence[Adapter], layers: Mapping[str, BlendedLinear]) -> tuple[Adapter, ...]:
    """Return the adapters with factors that are views of the stacks, so that memory holds them once."""
    taken: dict[str, int] = dict.fromkeys(layers, 0)
    views: list[Adapter] = []
    for adapter in adapters:
        pairs: dict[str, LoraPair] = {}
        for path, pair in adapter.pairs.items():
            layer, start = layers[path], taken[path]
            taken[path] = end = start + pair.rank
            first = layer.stacked_a.start_of(layer.index)
            a = layer.stacked_a.a_all[first + start : first + end]
            pairs[path] = replace(pair, a=a, b=layer.b_all[:, start:end])
        views.append(replace(adapter, pairs=pairs, weights={}))  # whole weights were compared already
    return tuple(views)


def _stack_b(factors: Sequence[Tensor], *, by_columns: bool) -> Tensor:
    """Return the B (out, r) of all adapters as one (out, R).

    Either each column is contiguous, so that some are soon chosen, or each row, as products read them.
    """
    return torch.cat([each.t() for each in factors]).t() if by_columns else torch.cat(list(factors), 1)


def _stack_vectors(vectors: Sequence[LayerVectors]) -> dict[str, Tensor]:
    """Return the scales less 1 and the biases (K, size) of K adapters, by name; 0 where one has none."""
    stacked: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for each in vectors for name in each.given):
        given = [each.given.get(name) for each in vectors]
        first = next(each for each in given if each is not None)
        less = 0 if name == "bias" else 1
        stacked[name] = torch.stack(
            [torch.zeros_like(first).float() if each is None else each.float() - less for each in given]
        )
    return stacked


def _sizes(base: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a layer with vectors: a linear one, or a norm with a bias."""
    outer: Any = base
    return linear_shape(base) or (len(outer.bias), len(outer.bias))


def _same_input(layers: Mapping[str, BlendedLinear], with_factors: Collection[str]) -> list[list[str]]:
    """Group the paths of layers of one block that read the same input, judged by their names.

    A layer without factors makes no product, so it is in a group of its own.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path in sorted(layers):
        parent, _, child = path.rpartition(".")
        names = next((names for names in SAME_INPUT if child in names and path in with_factors), path)
        groups.setdefault((parent, names, layers[path].dtype, layers[path].device), []).append(path)
    return list(groups.values())


def _factor_dtype(base: nn.Module, model: nn.Module) -> torch.dtype:
    """Return the dtype to compute updates in: the layer's own, or the model's if the layer is quantised.

    On a CPU it is always float32: a step's thin products take three times as long in bfloat16. PEFT keeps adapters in
    float32 too.
    """
    if next(chain(base.parameters(), base.buffers())).device.type == "cpu":
        return torch.float32
    for candidate in (getattr(base, "weight", None), model):
        dtype = getattr(candidate, "dtype", None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    return torch.float32
