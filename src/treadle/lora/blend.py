"""Adds a weighted mixture of LoRA adapters to the linear layers of a model, and removes it again.

The blended layers (`treadle.lora.layer`) hold the factors. The blend holds the data that changes between steps: one
small tensor of gates for each layout of ranks (`treadle.lora.gates`). Base weights are never written to.
"""

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from treadle.common.errors import AdapterError, OptionError, unknown_name
from treadle.common.params import Combine
from treadle.lora.adapter import Adapter
from treadle.lora.compatibility import check_combine, check_range, fit_adapters
from treadle.lora.experts import put_module
from treadle.lora.gates import GateMaker, Gates, StackLayout
from treadle.lora.layer import BlendedLinear, StackedA
from treadle.lora.names import with_model_names
from treadle.lora.stacking import Stacks, new_layers, stacked_views
from treadle.lora.virtual_attention import AttachedTokens, VirtualStates

ALWAYS_ACTIVE_ROWS = 128
"""Up to this many rows of a stack, all adapters are active even at weight 0."""
MAX_CHECKED_COMBINES = 1024
"""Pairs of a combine and a set of adapters that are remembered as checked."""
Weights = Tensor | np.ndarray[Any, Any] | Sequence[float]
Among = Sequence[Sequence[str]]
"""The names of the adapters that each row knows, or those of one row for all."""


class Blend:
    """Adapters attached to a model; owns the replaced layers and the gates of the current forward pass.

    Use one blend from one thread at a time: the gates belong to the model, like its weights.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[Adapter],
        combine: Combine = "sum",
        *,
        always_active_rows: int = ALWAYS_ACTIVE_ROWS,
    ) -> None:
        """Attach the adapters; arguments as in `attach`."""
        if any(isinstance(module, BlendedLinear | VirtualStates) for module in model.modules()):
            raise AdapterError("the model has a blend attached already: detach() it, or add() to it.")
        self.model = model
        self.combine: Combine = combine
        self.adapters: tuple[Adapter, ...] = ()
        self.always_active_rows = always_active_rows
        """Takes effect when adapters come or go."""
        self._layers: dict[str, BlendedLinear] = {}
        self._gates: dict[int, Gates] = {}
        self._layouts: list[StackLayout] = []
        self._gate_makers: list[GateMaker] = []  # of the active adapters, by slot
        self._names: tuple[str, ...] = ()
        self._ranks: list[int] = []  # the largest of each adapter
        self._combinable: set[tuple[str, tuple[str, ...]]] = set()  # combines and adapters that were checked
        self._stacked: list[tuple[StackedA, list[int]]] = []  # and the slots of its layers
        self._has_vectors = False
        self._virtual: AttachedTokens | None = None
        self._with_virtual: list[int] = []  # indices of the adapters that have virtual tokens
        self._virtual_slot = -1  # of their weights
        self._active: frozenset[int] | None = None  # indices of adapters; None = all
        self._replace_all(tuple(adapters))

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order of every N axis."""
        return self._names

    @contextmanager
    def using(
        self, weights: Weights | None, combine: Combine | Sequence[Combine] | None = None, among: Among | None = None
    ) -> Generator[None]:
        """Run the forward passes inside with these weights, then restore the weights set before.

        Args:
            weights: (N,), (B, N) or (B|1, T|1, N), not negative; None = the base model alone, bit for bit.
            combine: one combine, or one a row; None takes the one given to `attach`.
            among: the adapters that each row knows: all with weights, and those that `paper` adds without one; None =
                all.
        """
        before, active, layouts = dict(self._gates), self._active, self._layouts
        self.set_weights(weights, combine, among)
        try:
            yield
        finally:
            self._put_gates({})
            if before and self._layouts is layouts:  # adapters that came or went inside have other gates
                self._activate(active)
                self._put_gates(before)

    def set_weights(
        self, weights: Weights | None, combine: Combine | Sequence[Combine] | None = None, among: Among | None = None
    ) -> None:
        """Set the weights of the forward passes that follow; arguments as in `using`; on an error nothing changes."""
        gates: dict[int, Gates] = {}
        if weights is not None and self._layouts:
            combines = _one_or_each(combine or self.combine)
            w = self.check_weights(weights)  # (B|1, T|1, N)
            self._check_combines(combines, among or [self.names])
            has_paper = "paper" in combines  # adds up the B of all adapters of a row
            self._activate(None if has_paper else self._active_for(w))
            device = next(self.model.parameters()).device
            has_virtual = self._virtual is not None
            if has_virtual and w.device.type == "cpu":  # on a GPU a look would synchronise
                has_virtual = bool(w[..., self._with_virtual].any())
            present = self._present(among or [self.names]).to(device) if has_paper else None
            w = w.to(device, non_blocking=True)
            makers = [(slot, maker) for slot, maker in enumerate(self._gate_makers) if maker.layout.parts]
            gates = {slot: maker.make(w, combines, present) for slot, maker in makers}
            if not has_virtual:
                gates.pop(self._virtual_slot, None)
        self._put_gates(gates)

    def _put_gates(self, gates: Mapping[int, Gates]) -> None:
        self._gates.clear()
        self._gates.update(gates)
        if self._virtual is not None:
            self._virtual.switch(on=self._virtual_slot in gates)

    @property
    def gates(self) -> Mapping[int, Gates]:
        """The current gates, by slot of their layout; empty = the base model alone."""
        return self._gates

    @property
    def has_all_active(self) -> bool:
        """True if the adapters are so few that all are active, even at weight 0."""
        return self._are_few(self._ranks)

    @property
    def has_vectors(self) -> bool:
        """True if adapters do more than add factors to linear layers; only the model's own `forward` computes that."""
        return self._has_vectors

    @property
    def active_stacks(self) -> object:
        """A new object whenever active factors were copied anew, so that views of the old ones are no longer valid."""
        return self._gate_makers

    def factors(self) -> list[Tensor]:
        """Return the stacked factors that a pass reads, each once."""
        active_a = [stacked_a.a_active for stacked_a, _ in self._stacked]
        return [*active_a, *(layer.b_active for layer in self._layers.values())]

    def gate_matrix(self, slot: int) -> Tensor:
        """Return the (N, R) matrix from weights to the gates of a slot, for the combine `sum`."""
        return self._gate_makers[slot].matrix(1.0, next(self.model.parameters()).device)

    def refresh_views(self) -> None:
        """Make the adapters' factors views of the stacks again, after the stacks moved."""
        self.adapters = stacked_views(self.adapters, self._layers)

    def check_weights(self, weights: Weights) -> Tensor:
        """Return weights as (B|1, T|1, N), or raise an OptionError that says what is wrong with them."""
        w = torch.as_tensor(weights, dtype=torch.float32)
        if w.dim() not in (1, 2, 3) or w.shape[-1] != len(self.adapters):
            expected = f"(N,), (B, N) or (B, T, N) with N = {len(self.adapters)}: {', '.join(self.names)}"
            raise OptionError(f"weights have shape {tuple(w.shape)}; expected {expected}.")
        if w.device.type == "cpu" and w.numel():  # on a GPU it would synchronise
            lowest, highest = w.aminmax()  # a NaN is both
            if not 0 <= lowest.item() <= highest.item() < float("inf"):
                raise OptionError("weights must be finite and not negative.")
        return w.view(1, 1, -1) if w.dim() == 1 else w[:, None] if w.dim() == 2 else w

    def _check_combines(self, combines: Sequence[Combine], among: Among) -> None:
        """Raise an OptionError if a row's adapters do not allow its combine; each pair is checked once."""
        if set(combines) == {"sum"}:
            return  # takes any adapters, and this is the path of every token
        is_each = len(combines) == len(among)  # else one of them is for all
        pairs = zip(combines, among, strict=True) if is_each else product(combines, among)
        for combine, names in {(combine, tuple(names)) for combine, names in pairs} - self._combinable:
            self.check_combine(combine, names)
            if len(self._combinable) >= MAX_CHECKED_COMBINES:  # requests choose from 2**N sets of adapters
                self._combinable.clear()
            self._combinable.add((combine, names))

    def _present(self, among: Among) -> Tensor:
        """Return (B|1, 1, N): 1 for each adapter that a row knows, else 0."""
        return torch.tensor([[[float(name in names) for name in self.names]] for names in among])

    def _active_for(self, w: Tensor) -> frozenset[int] | None:
        """Return the adapters to activate for weights (B|1, T|1, N); None = all.

        Adapters of few rows are all active, because copying costs more than computing. Otherwise active adapters stay
        while their rows are at most twice the needed ones: neighbouring steps need almost the same adapters, and a text
        between two domains alternates between them.
        """
        if w.device.type != "cpu" or self._keeps_all_active(self._ranks):
            return None
        used = frozenset(w.flatten(0, 1).any(0).nonzero()[:, 0].tolist())
        limit = 2 * self._rank_of(used)
        kept = used if self._active is None else used | self._active
        if self._rank_of(kept) > limit:
            kept = used
        return kept if kept == self._active or limit <= sum(self._ranks) else None

    def _rank_of(self, adapters: Collection[int]) -> int:
        return sum(self._ranks[index] for index in adapters)

    def _are_few(self, ranks: Sequence[int]) -> bool:
        return sum(ranks) <= self.always_active_rows

    def _keeps_all_active(self, ranks: Sequence[int]) -> bool:
        """Return whether adapters of these ranks are all active at all times.

        On a GPU always: choosing would synchronise, and a captured step contains all.
        """
        return self._are_few(ranks) or next(self.model.parameters()).device.type != "cpu"

    def _activate(self, active: frozenset[int] | None) -> None:
        """Activate some adapters, by index, for the passes that follow; None = all."""
        if active != self._active:
            self._copy_active(active)

    def _copy_active(self, active: frozenset[int] | None) -> None:
        """Copy the factors of some adapters, by index, to the stacks that passes read; None = of all."""
        rows = [None if active is None else layout.rows_of(active) for layout in self._layouts]
        for layer in self._layers.values():
            layer.activate(rows)
        for stacked_a, slots in self._stacked:
            chosen = [each for slot in slots if (each := rows[slot]) is not None]
            stacked_a.activate(chosen if active is not None else None)
        self._active = active
        layouts = [
            layout if active is None or slot == self._virtual_slot else layout.restrict(active)
            for slot, layout in enumerate(self._layouts)
        ]
        dtypes = {slot: layer.dtype for layer in self._layers.values() for slot in layer.slots}
        dtypes[self._virtual_slot] = torch.float32
        self._gate_makers = [GateMaker(each, len(self._names), dtypes[slot]) for slot, each in enumerate(layouts)]

    def check_combine(self, combine: str, among: Sequence[str] | None = None) -> None:
        """Raise an OptionError if adapters, by name (None = all), cannot be combined so, naming those that differ."""
        check_combine(combine, [adapter for adapter in self.adapters if among is None or adapter.name in among])

    def add(self, *adapters: Adapter) -> None:
        """Attach more adapters, at the end of the N axis; on an error nothing has changed."""
        self._replace_all((*self.adapters, *adapters))

    def remove(self, name: str) -> None:
        """Remove one adapter; the adapters after it move up on the N axis."""
        if name not in self.names:
            raise AdapterError(unknown_name("adapter", name, self.names))
        self._replace_all(tuple(adapter for adapter in self.adapters if adapter.name != name))

    def detach(self) -> None:
        """Put the model's own layers back, the same objects; the blend is empty afterwards."""
        self._replace_all(())

    def plan(self, adapters: Sequence[Adapter]) -> Stacks:
        """Return stacks for these adapters, to `build` and to `take`; nothing changes.

        Raises:
            AdapterError: lists every way in which adapters do not fit the model or each other.
            OptionError: the adapters cannot be combined so.
        """
        with self.using(None):  # the base reads virtual tokens
            adapters = fit_adapters(self.model, [with_model_names(self.model, adapter) for adapter in adapters])
        check_combine(self.combine, adapters)
        new = [adapter for adapter in adapters if adapter.identity not in {old.identity for old in self.adapters}]
        layers = new_layers(self.model, adapters, self._layers, self._gates)
        for dtype in {layer.dtype for layer in layers.values()}:
            check_range(new, dtype)
        return Stacks(adapters, layers, self.adapters, by_columns=not self._keeps_all_active(_ranks(adapters)))

    def is_current(self, stacks: Stacks) -> bool:
        """Return whether a plan still holds: no adapter has come, gone or moved in memory since."""
        return stacks.attached is self.adapters

    def take(self, stacks: Stacks) -> None:
        """Attach the adapters of a plan and no others; if stacks cannot be built, nothing has changed."""
        stacks.build()
        for path in self._layers.keys() - stacks.layers.keys():
            put_module(self.model, path, self._layers[path].base)
        for path, layer in stacks.layers.items():
            if layer is not self._layers.get(path):
                put_module(self.model, path, layer)
        stacks.put()
        self._attach_virtual(stacks)
        self._layers = stacks.layers
        self._names = tuple(adapter.name for adapter in stacks.adapters)
        self._ranks = _ranks(stacks.adapters)
        self._stacked = [(each, [self._layers[path].slot for path in paths]) for each, paths in stacks.stacked]
        self.adapters = stacked_views(stacks.adapters, self._layers)
        self._layouts = list(stacks.layouts)
        self._has_vectors = any(type(layer) is not BlendedLinear for layer in self._layers.values())
        self._has_vectors |= bool(self._with_virtual)
        # many adapters are activated by the first step
        self._copy_active(None if self._keeps_all_active(self._ranks) else frozenset())
        self._combinable.clear()
        self._put_gates({})

    def _attach_virtual(self, stacks: Stacks) -> None:
        """Put the virtual tokens of a plan's adapters in the place of those that are attached."""
        if self._virtual is not None:
            self._virtual.remove()
        tokens = {index: each.virtual for index, each in enumerate(stacks.adapters) if each.virtual}
        self._virtual, self._with_virtual, self._virtual_slot = None, list(tokens), -1
        if tokens:
            layout = StackLayout(tuple((index, 1, 1.0) for index in tokens))
            self._virtual_slot = stacks.layouts.setdefault(layout, len(stacks.layouts))
            self._virtual = AttachedTokens(self.model, list(tokens.values()), self._gates, self._virtual_slot)

    def _replace_all(self, adapters: Sequence[Adapter]) -> None:
        self.take(self.plan(adapters))


def attach(
    model: nn.Module,
    adapters: Sequence[Adapter],
    combine: Combine = "sum",
    *,
    always_active_rows: int = ALWAYS_ACTIVE_ROWS,
) -> Blend:
    """Attach adapters to any causal LM whose targeted modules are linear layers.

    Until weights are set, the model answers as the base, bit for bit.

    Args:
        model: the base.
        adapters: the order gives the N axis of weights.
        combine: how the adapters' updates are combined where weights are set without a combine.
        always_active_rows: on a CPU, adapters whose ranks sum to more are computed only if some row uses them.

    Raises:
        AdapterError: an adapter does not fit the model; lists every problem of every adapter.
        OptionError: the adapters cannot be combined by `combine`.
    """
    return Blend(model, adapters, combine, always_active_rows=always_active_rows)


def _one_or_each(combine: Combine | Sequence[Combine]) -> Sequence[Combine]:
    return [combine] if isinstance(combine, str) else combine


def _ranks(adapters: Sequence[Adapter]) -> list[int]:
    """Return the largest rank of each adapter."""
    return [max((pair.rank for pair in adapter.pairs.values()), default=0) for adapter in adapters]
