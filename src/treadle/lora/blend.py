"""Adds a weighted mixture of LoRA adapters to the linear layers of a model, and takes it away again.

The blended layers (`treadle.lora.layer`) hold the factors; the blend holds what changes between steps, a small tensor
of gates for each layout of ranks, computed once a step. Base weights are never written to.
"""

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from treadle.common.errors import AdapterError, OptionError, unknown_name
from treadle.common.params import Combine
from treadle.lora.adapter import Adapter, LoraPair
from treadle.lora.compatibility import check_adapters, check_combine, check_range, is_routed, with_model_names
from treadle.lora.layer import BlendedLinear, Gates, LayerRole, StackedA, StackLayout
from treadle.lora.stacking import Stacks

ALWAYS_ACTIVE_ROWS = 128
"""Rows of a stack up to which all adapters are laid out, used or not."""
MAX_CHECKED_COMBINES = 1024
"""Combines and sets of adapters that are remembered as checked."""
Weights = Tensor | np.ndarray[Any, Any] | Sequence[float]
Among = Sequence[Sequence[str]]
"""The names of the adapters that each row knows of, or those of one row for all."""


class Blend:
    """Adapters attached to a model; owns the replaced layers and the gates of the current forward pass.

    Use one blend from one thread at a time: the gates belong to the model, like its weights.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter], combine: Combine = "sum") -> None:
        if any(isinstance(module, BlendedLinear) for module in model.modules()):
            raise AdapterError("the model has a blend attached already: detach() it, or add() to it.")
        self.model = model
        self.combine: Combine = combine
        self.adapters: tuple[Adapter, ...] = ()
        self._layers: dict[str, BlendedLinear] = {}
        self._gates: dict[int, Gates] = {}
        self._layouts: list[StackLayout] = []
        self._acting_layouts: list[StackLayout] = []  # of those adapters whose factors are laid out
        self._names: tuple[str, ...] = ()
        self._ranks: list[int] = []  # of each adapter, its largest
        self._spreads: dict[tuple[int, float], Tensor] = {}
        self._folds: dict[int, Tensor | None] = {}
        self._combinable: set[tuple[str, tuple[str, ...]]] = set()  # combines and adapters that have been checked
        self._stacked: list[tuple[StackedA, list[int]]] = []  # and the slots of its layers
        self._acting: frozenset[int] | None = None  # adapters whose factors are laid out; None = all
        self._replace_all(tuple(adapters))

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order of every N axis."""
        return self._names

    @contextmanager
    def using(
        self, weights: Weights | None, combine: Combine | Sequence[Combine] | None = None, among: Among | None = None
    ) -> Generator[None]:
        """Run the forward passes inside with these weights, then restore what was set before.

        Args:
            weights: (N,), (B, N) or (B|1, T|1, N), not negative; None = the base model alone, bit for bit.
            combine: one combine, or one a row; None takes the one given to `attach`.
            among: the adapters that are there for a row, whatever others are attached: all with weights, and those
                that `paper` adds without one; None = all.
        """
        before, acting, layouts = dict(self._gates), self._acting, self._layouts
        self.set_weights(weights, combine, among)
        try:
            yield
        finally:
            self._gates.clear()
            if before and self._layouts is layouts:  # adapters that came or went inside have other gates
                self._choose(acting)
                self._gates.update(before)

    def set_weights(
        self, weights: Weights | None, combine: Combine | Sequence[Combine] | None = None, among: Among | None = None
    ) -> None:
        """Set the weights of the forward passes that follow; arguments as in `using`; on an error nothing changes."""
        gates: dict[int, Gates] = {}
        if weights is not None and self._layouts:
            combines = _one_or_each(combine or self.combine)
            w = self.checked(weights)  # (B|1, T|1, N)
            self._check_combines(combines, among or [self.names])
            has_paper = "paper" in combines  # adds up the B of all adapters of a row
            self._choose(None if has_paper else self._needed(w))
            device = next(self.model.parameters()).device
            present = self._present(among or [self.names]).to(device) if has_paper else None
            w = w.to(device, non_blocking=True)
            slots = [slot for slot in range(len(self._layouts)) if self._acting_layouts[slot].parts]
            gates = {slot: self._gates_of(slot, w, combines, present) for slot in slots}
        self._gates.clear()
        self._gates.update(gates)

    @property
    def gates(self) -> Mapping[int, Gates]:
        """The gates in force, by layout; none = the base model alone."""
        return self._gates

    @property
    def has_few(self) -> bool:
        """Whether the adapters are so few that all are laid out, used or not."""
        return _are_few(self._ranks)

    @property
    def arrangement(self) -> object:
        """Another object whenever factors have been laid out anew, for whoever keeps views of them."""
        return self._acting_layouts

    def factors(self) -> list[Tensor]:
        """Return the stacked factors that a pass reads, each once."""
        return [
            *(stacked_a.a_active for stacked_a, _ in self._stacked),
            *(layer.b_active for layer in self._layers.values()),
        ]

    def spread(self, slot: int) -> Tensor:
        """Return the (N, R) matrix from weights to the gates of a layout, by its slot, where the combine is `sum`."""
        return self._spread(slot, 1.0)

    def renew(self) -> None:
        """See again where the stacked factors lie, after somebody moved them."""
        self.adapters = self._views(self.adapters)

    def checked(self, weights: Weights) -> Tensor:
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
        """Raise an OptionError if the adapters of a row cannot be combined in its way; each kind is checked once."""
        if set(combines) == {"sum"}:
            return  # takes any, and this is the path of every token
        is_each = len(combines) == len(among)  # else one of them is for all
        pairs = zip(combines, among, strict=True) if is_each else product(combines, among)
        for combine, names in {(combine, tuple(names)) for combine, names in pairs} - self._combinable:
            self.check_combine(combine, names)
            if len(self._combinable) >= MAX_CHECKED_COMBINES:  # requests choose from 2**N sets of adapters
                self._combinable.clear()
            self._combinable.add((combine, names))

    def _present(self, among: Among) -> Tensor:
        """Return 1 for each adapter that is there for a row, else 0: (B|1, 1, N)."""
        return torch.tensor([[[float(name in names) for name in self.names]] for names in among])

    def _needed(self, w: Tensor) -> frozenset[int] | None:
        """Return the adapters to lay out for weights (B|1, T|1, N); None = all.

        Where all of them are few rows, that is cheaper than to choose; and those that are laid out stay while they
        and the needed ones are not many more than what is needed: neighbouring steps need almost the same, and a text
        between two domains needs now these, now those.
        """
        if w.device.type != "cpu" or self._lays_out_all(self._ranks):
            return None
        used = frozenset(w.flatten(0, 1).any(0).nonzero()[:, 0].tolist())
        most = 2 * self._rank_of(used)
        kept = used if self._acting is None else used | self._acting
        if self._rank_of(kept) > most:
            kept = used
        return kept if kept == self._acting or most <= sum(self._ranks) else None

    def _rank_of(self, adapters: Collection[int]) -> int:
        return sum(self._ranks[index] for index in adapters)

    def _lays_out_all(self, ranks: Sequence[int]) -> bool:
        """Whether all adapters of these ranks are laid out at all times.

        On a GPU choosing would wait, and a captured step has all.
        """
        return _are_few(ranks) or next(self.model.parameters()).device.type != "cpu"

    def _choose(self, acting: frozenset[int] | None) -> None:
        """Lay out the factors of some adapters, by index, for the passes that follow; None = of all."""
        if acting != self._acting:
            self._lay_out(acting)

    def _lay_out(self, acting: frozenset[int] | None) -> None:
        """Copy the factors of some adapters, by index, to where the passes read them; None = those of all."""
        rows = [None if acting is None else layout.rows(acting) for layout in self._layouts]
        for layer in self._layers.values():
            layer.choose(rows[layer.slot])
        for stacked_a, slots in self._stacked:
            chosen = [each for slot in slots if (each := rows[slot]) is not None]
            stacked_a.choose(chosen if acting is not None else None)
        self._acting = acting
        self._acting_layouts = [layout if acting is None else layout.only(acting) for layout in self._layouts]
        self._spreads.clear()
        self._folds.clear()

    def _gates_of(self, slot: int, w: Tensor, combines: Sequence[Combine], present: Tensor | None) -> Gates:
        """Return the gates of one layout, in the dtype of its factors; rows with different combines may mix.

        Args:
            slot: of the layout.
            w: (B|1, T|1, N) weights.
            combines: one, or one a row.
            present: (B|1, 1, N) which adapters are there; only `paper` asks.
        """
        kinds = set(combines)
        dtype = self._dtype

        def rows(name: Combine) -> Tensor | float:
            if len(kinds) == 1:
                return 1.0
            return torch.tensor([float(kind == name) for kind in combines], device=w.device).view(-1, 1, 1)

        num_blocks = len(self._acting_layouts[slot].parts)
        scaled = w @ self._spread(slot, 1.0) if kinds & {"sum", "paper"} else None  # (B|1, T|1, R)
        if scaled is not None and kinds == {"sum"}:
            return Gates(scaled.to(dtype), None, None, num_blocks)
        gate = (scaled * rows("sum")).to(dtype) if scaled is not None and "sum" in kinds else None
        cross_in: Tensor | float = 0.0
        cross_out: Tensor | float = 0.0
        if "linear" in kinds:
            root = w.sqrt() @ self._spread(slot, 0.5)
            cross_in, cross_out = root * rows("linear"), root * rows("linear")
        if present is not None and scaled is not None:
            cross_in = cross_in + scaled * rows("paper")
            cross_out = cross_out + present @ self._spread(slot, 0.0) * rows("paper")
        gates = (gate, torch.as_tensor(cross_in).to(dtype), torch.as_tensor(cross_out).to(dtype))
        return Gates(*gates, num_blocks, self._fold(slot))

    def _spread(self, slot: int, power: float) -> Tensor:
        key = (slot, power)
        if key not in self._spreads:
            matrix = self._acting_layouts[slot].spread(len(self.adapters), power)
            self._spreads[key] = matrix.to(next(self.model.parameters()).device)
        return self._spreads[key]

    def _fold(self, slot: int) -> Tensor | None:
        if slot not in self._folds:
            fold = self._acting_layouts[slot].fold()
            self._folds[slot] = None if fold is None else fold.to(next(self.model.parameters()).device, self._dtype)
        return self._folds[slot]

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self._layers.values())).dtype

    def check_combine(self, combine: str, among: Sequence[str] | None = None) -> None:
        """Raise an OptionError if adapters, by name (None = all), cannot be combined so, naming those that differ."""
        check_combine(combine, [adapter for adapter in self.adapters if among is None or adapter.name in among])

    def add(self, *adapters: Adapter) -> None:
        """Attach more adapters, at the end of the N axis; on an error nothing has changed."""
        self._replace_all((*self.adapters, *adapters))

    def remove(self, name: str) -> None:
        """Take one adapter out; the adapters behind it move up on the N axis."""
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
        adapters = tuple(with_model_names(self.model, adapter) for adapter in adapters)
        check_adapters(self.model, adapters)
        check_combine(self.combine, adapters)
        new = [adapter for adapter in adapters if adapter.identity not in {old.identity for old in self.adapters}]
        model: Any = self.model
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        layers: dict[str, BlendedLinear] = {}
        for path in sorted({module for adapter in adapters for module in adapter.pairs}):
            if path in self._layers:
                layers[path] = self._layers[path]
            else:
                base = self.model.get_submodule(path)
                role = LayerRole(path, is_head=base is head, is_routed=is_routed(path))
                layers[path] = BlendedLinear(base, _factor_dtype(base, self.model), self._gates, role)
        for dtype in {layer.dtype for layer in layers.values()}:
            check_range(new, dtype)
        return Stacks(adapters, layers, self.adapters, by_columns=not self._lays_out_all(_ranks(adapters)))

    def is_current(self, stacks: Stacks) -> bool:
        """Return whether a plan still holds: no adapter has come, gone or moved in memory since."""
        return stacks.attached is self.adapters

    def take(self, stacks: Stacks) -> None:
        """Attach the adapters of a plan and no others; where stacks cannot be built, nothing has changed."""
        stacks.build()
        for path in self._layers.keys() - stacks.layers.keys():
            self._put(path, self._layers[path].base)
        for path in stacks.layers.keys() - self._layers.keys():
            self._put(path, stacks.layers[path])
        stacks.put()
        self._layers = stacks.layers
        self._names = tuple(adapter.name for adapter in stacks.adapters)
        self._ranks = _ranks(stacks.adapters)
        self._stacked = [
            (stacked_a, [self._layers[path].slot for path in paths]) for stacked_a, paths in stacks.stacked
        ]
        self.adapters = self._views(stacks.adapters)
        self._layouts = list(stacks.layouts)
        # of many, those that act: the first step knows
        self._lay_out(None if self._lays_out_all(self._ranks) else frozenset())
        self._combinable.clear()
        self._gates.clear()

    def _replace_all(self, adapters: Sequence[Adapter]) -> None:
        self.take(self.plan(adapters))

    def _views(self, adapters: Sequence[Adapter]) -> tuple[Adapter, ...]:
        """Return the adapters with factors that are views of the stacks: in memory they are there once."""
        taken: dict[str, int] = dict.fromkeys(self._layers, 0)
        views: list[Adapter] = []
        for adapter in adapters:
            pairs: dict[str, LoraPair] = {}
            for path, pair in adapter.pairs.items():
                layer, start = self._layers[path], taken[path]
                taken[path] = end = start + pair.rank
                first = layer.stacked_a.start_of(layer.index)
                pairs[path] = replace(
                    pair, a=layer.stacked_a.a_all[first + start : first + end], b=layer.b_all[:, start:end]
                )
            views.append(replace(adapter, pairs=pairs, weights={}))  # compared, and let go
        return tuple(views)

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, child = path.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)


def attach(model: nn.Module, adapters: Sequence[Adapter], combine: Combine = "sum") -> Blend:
    """Attach adapters to any causal LM whose targeted modules are linear layers.

    Until weights are set, the model answers as the base, bit for bit.

    Raises:
        AdapterError: an adapter does not fit the model; lists every problem of every adapter.
        OptionError: the adapters cannot be combined by `combine`.
    """
    return Blend(model, adapters, combine)


def _are_few(ranks: Sequence[int]) -> bool:
    return sum(ranks) <= ALWAYS_ACTIVE_ROWS


def _ranks(adapters: Sequence[Adapter]) -> list[int]:
    """Return the largest rank of each adapter."""
    return [max(pair.rank for pair in adapter.pairs.values()) for adapter in adapters]


def _one_or_each(combine: Combine | Sequence[Combine]) -> Sequence[Combine]:
    return [combine] if isinstance(combine, str) else combine


def _factor_dtype(base: nn.Module, model: nn.Module) -> torch.dtype:
    """Return the dtype to compute an update in: the layer's own, or the model's where the layer is quantised.

    On a CPU always float32: products as thin as a step's take three times as long in bfloat16, and PEFT too keeps
    adapters in float32.
    """
    if next(chain(base.parameters(), base.buffers())).device.type == "cpu":
        return torch.float32
    for candidate in (getattr(base, "weight", None), model):
        dtype = getattr(candidate, "dtype", None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    return torch.float32
