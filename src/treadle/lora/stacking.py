"""Stacks the factors of adapters for the layers of a model, which notice nothing until they are given their stacks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from treadle.lora.adapter import Adapter
from treadle.lora.layer import BlendedLinear, StackedA, StackLayout

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Names of the linear layers of a block that read one input; a layer given another input computes its own product."""


class Stacks:
    """The stacked factors of adapters; `build` them beside the passes if it takes long, `put` them between two.

    Attributes:
        adapters: whose factors they are.
        layers: all that the adapters target, by path; some may not be in the model yet.
        attached: the adapters that the blend had when the stacks were planned.
        layouts: of the layers' stacks, each with its slot.
        shrinks: the first products, and the layers of each.
    """

    def __init__(
        self,
        adapters: tuple[Adapter, ...],
        layers: Mapping[str, BlendedLinear],
        attached: tuple[Adapter, ...] = (),
        *,
        by_columns: bool,
    ) -> None:
        """Plan the stacks; `by_columns` says how the B lie (`_stack_b`)."""
        self.adapters = adapters
        self.attached = attached
        self.layers = dict(layers)
        self.layouts: dict[StackLayout, int] = {}
        self.stacked: list[tuple[StackedA, list[str]]] = []
        self._by_columns = by_columns
        self._b: dict[str, Tensor] = {}  # (out, R) of each layer

    def build(self) -> None:
        """Copy all factors into stacks, unless that is done; where it fails, nothing has changed for the layers."""
        if len(self._b) == len(self.layers):
            return
        self.stacked.clear()
        for paths in _same_input(self.layers):
            pairs = [[each.pairs[path] for each in self.adapters if path in each.pairs] for path in paths]
            first = self.layers[paths[0]]
            stacked_a = StackedA([torch.cat([pair.a for pair in each]) for each in pairs], first.device, first.dtype)
            self.stacked.append((stacked_a, paths))
            for path, each in zip(paths, pairs, strict=True):
                self._b[path] = _stack_b([pair.b for pair in each], by_columns=self._by_columns).to(first.device)

    def put(self) -> None:
        """Give the layers their stacks; then each has to `choose`."""
        for stacked_a, paths in self.stacked:
            for index, path in enumerate(paths):
                slot = self.layouts.setdefault(self._layout(path), len(self.layouts))
                self.layers[path].stack(self._b[path], stacked_a, index, slot)

    def _layout(self, path: str) -> StackLayout:
        pairs = [(index, each.pairs[path]) for index, each in enumerate(self.adapters) if path in each.pairs]
        return StackLayout(tuple((index, pair.rank, pair.scale) for index, pair in pairs))


def _stack_b(factors: Sequence[Tensor], *, by_columns: bool) -> Tensor:
    """Return the B (out, r) of all adapters as one (out, R).

    Either each column lies in one piece, from which some are soon chosen, or each row, as products read.
    """
    return torch.cat([each.t() for each in factors]).t() if by_columns else torch.cat(list(factors), 1)


def _same_input(layers: Mapping[str, BlendedLinear]) -> list[list[str]]:
    """Group the paths of layers that read the same input: of one block, by the names that models give them."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path in sorted(layers):
        parent, _, child = path.rpartition(".")
        names = next((names for names in SAME_INPUT if child in names), path)
        groups.setdefault((parent, names, layers[path].dtype, layers[path].device), []).append(path)
    return list(groups.values())
