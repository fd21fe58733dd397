"""Lays the stacks beside vLLM's linear layers, as a linear method around the layer's own.

Every linear class of vLLM makes exactly one call, `quant_method.apply`, on the shard that the process holds: before a
column-parallel layer gathers and before a row-parallel one reduces. Wrapped there, the update is right under tensor
parallelism, and a quantised base stays as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from treadle.bundle.bundle import Bundle
from treadle.common.errors import ModelError, problem_list
from treadle.lora.adapter import Adapter
from treadle.lora.compatibility import check_fit, check_range
from treadle.serving.vllm.board import GateBoard
from treadle.serving.vllm.mixture import Mixture, by_router
from treadle.serving.vllm.params import PluginParams
from treadle.serving.vllm.products import Product
from treadle.serving.vllm.stacks import (
    Part,
    Place,
    Stack,
    Stacks,
    equal_room,
    held_here,
    largest_room,
    room_for,
)

TOLERANCE = {torch.float32: 1e-4}
COARSE_TOLERANCE = 2e-2
"""Of the self-test, relative to the largest value: what bfloat16 leaves of a sum over ranks."""


def blended_method(inner: Any, parent: type, stack: Stack) -> Any:
    """Return the linear method `inner`, a `parent` of vLLM's, with the gated update of a layer's stack behind it."""
    own, update = inner.apply, stack.update

    def apply(self: Any, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return update(own(layer, x, bias), x)

    def forward_attribute(self: Any, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def create_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the layer has its weights already")

    def process_weights_after_loading(self: Any, layer: nn.Module) -> None:
        self.inner.process_weights_after_loading(layer)  # of a base that is loaded again

    members = {
        "apply": apply,
        "create_weights": create_weights,
        "process_weights_after_loading": process_weights_after_loading,
        "__getattr__": forward_attribute,
    }
    method = type("TreadleLinearMethod", (parent,), members)()
    method.inner = inner
    return method


def attach(model: nn.Module, bundle: Bundle, mixture: Mixture, params: PluginParams, limits: "Limits") -> Stacks:
    """Lay stacks beside all layers that adapters target, fill them, and test them.

    Raises:
        TreadleError: an adapter does not fit the model, a layer is not called as others are, or does not compute what
            the plain formula says.
    """
    adapters = by_router(bundle)
    places = find_places(model, limits.linear)
    absent = [name for name, module in model.named_modules() if isinstance(module, limits.missing)]
    _check(adapters, places, absent, limits.dtype)
    rooms = {name: room for name, (_, place) in places.items() if any(room := _room(place, adapters, mixture, params))}
    _check_calls({name: places[name][0] for name in rooms}, limits)
    board = GateBoard(limits.num_tokens, limits.device, limits.dtype)
    stacks: dict[str, Stack] = {}
    for name, room in rooms.items():
        layer, place = places[name]
        stacks[name] = layer.treadle = stack = Stack(place, board, room)  # a module's buffers survive vLLM's sleep
        layer.quant_method = blended_method(layer.quant_method, limits.linear_method, stack)
        layer.requires_unquantized_input = True  # the factors read the activation itself
    made = Stacks(board, stacks, len(places), absent)
    for slot, adapter in zip(mixture.slots, adapters, strict=True):
        made.put(slot, adapter)
    if limits.pack is not None and not params.is_hot:
        for stack in stacks.values():
            stack.pack(limits.pack)
    _test(places, made, adapters, mixture)
    return made


@dataclass(frozen=True)
class Limits:
    """What `attach` must know of vLLM and of this process.

    Attributes:
        num_tokens: of a step at most.
        device: of the model.
        dtype: of the factors.
        linear: vLLM's base class of linear layers.
        forwards: of the classes whose `forward` calls the linear method, which is what the stack stands beside.
        unpacked: names of modules whose weights the model reads by itself, without calling them.
        linear_method: vLLM's base class of linear methods.
        missing: vLLM's class of layers that another pipeline stage holds.
        pack: makes a product of a weight (out, in) that never changes, where vLLM has a faster one than torch.
    """

    num_tokens: int
    device: torch.device
    dtype: torch.dtype
    linear: type
    forwards: tuple[Any, ...]
    unpacked: frozenset[str]
    linear_method: type
    missing: type
    pack: Callable[[Tensor], Product] | None


def _room(place: Place, adapters: Sequence[Adapter], mixture: Mixture, params: PluginParams) -> list[dict[int, int]]:
    """Return the ranks that each part of a layer has room for, by slot; see `Stack`."""
    if not params.is_hot:
        return room_for(place, adapters)
    targets = frozenset(path.rpartition(".")[2] for adapter in adapters for path in adapter.pairs)
    return equal_room(place, targets, mixture.num_slots, params.max_rank or largest_room(adapters))


def _check_calls(layers: Mapping[str, Any], limits: "Limits") -> None:
    """Raise a ModelError that lists the layers which may compute without their linear method, hence without a stack."""
    problems = [
        f"{name} ({type(layer).__name__}) has a forward of its own, which may pass the adapters by"
        for name, layer in layers.items()
        if type(layer).forward not in limits.forwards
    ]
    problems += [
        f"{name}: this model reads its weights by itself (multi-head latent attention), which passes the adapters by"
        for name in layers
        if name.rpartition(".")[2] in limits.unpacked
    ]
    if problems:
        raise ModelError(problem_list("adapters target layers that cannot be blended in vLLM:", problems))


def find_places(model: nn.Module, linear: type) -> dict[str, tuple[Any, Place]]:
    """Return vLLM's linear layers by name, each with what it holds of the checkpoint's layers."""
    packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", None) or {}
    return {
        name: (module, place_of(name, module, packed))
        for name, module in model.named_modules()
        if isinstance(module, linear)
    }


def place_of(name: str, layer: Any, packed: Mapping[str, Sequence[str]]) -> Place:
    """Return which part of which of the checkpoint's layers a linear layer of vLLM's holds."""
    parent, _, child = name.rpartition(".")
    children = packed.get(child, [child])
    paths = [f"{parent}.{each}" if parent else each for each in children]
    is_row = hasattr(layer, "input_size_per_partition") and layer.input_size_per_partition != layer.input_size
    sizes = [int(size) for size in layer.output_partition_sizes]
    size_in = int(getattr(layer, "input_size_per_partition", layer.input_size))
    if len(sizes) != len(paths):
        raise ModelError(f"{name} makes {len(sizes)} outputs, but stands for {', '.join(paths)}: this model is unknown")
    first = layer.tp_rank * size_in if is_row else 0
    parts: list[Part] = []
    start = 0
    for index, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        replicas = getattr(layer, "num_kv_head_replicas", 1) if len(paths) == 3 and index > 0 else 1
        whole, shard = _shard(layer, size, replicas, is_row)
        rows = slice(shard * size, (shard + 1) * size)
        parts.append(Part(path, (int(layer.input_size), whole), slice(first, first + size_in), rows, start))
        start += size
    return Place(tuple(parts), size_in, start)


def _shard(layer: Any, size: int, replicas: int, is_row: bool) -> tuple[int, int]:
    """Return the rows of a whole part, and which shard of `size` rows this process holds."""
    is_split = not is_row and hasattr(layer, "output_size_per_partition")
    if not is_split:
        return size, 0
    return size * layer.tp_size // replicas, layer.tp_rank // replicas


def _check(
    adapters: Sequence[Adapter], places: Mapping[str, tuple[Any, Place]], absent: Sequence[str], dtype: torch.dtype
) -> None:
    shapes = {part.path: part.shape for _, place in places.values() for part in place.parts}
    here = [replace(each, pairs=held_here(each, absent)) for each in adapters]
    check_fit(shapes, here)
    check_range(here, dtype)


@torch.inference_mode()
def _test(
    places: Mapping[str, tuple[Any, Place]], stacks: Stacks, adapters: Sequence[Adapter], mixture: Mixture
) -> None:
    """Compare one layer of each kind with the plain formula, on random inputs and weights; raise where it differs."""
    kinds = {name.rpartition(".")[2]: name for name in stacks.stacks}
    if not kinds:
        return  # a pipeline stage whose layers no adapter targets
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(3, len(adapters), generator=generator)  # (T, N)
    stacks.board.fill(mixture.gates(weights.numpy()), [1, 1, 1])
    for name in kinds.values():
        layer, place = places[name]
        x = torch.randn(3, place.size_in, generator=generator).to(stacks.board.device, stacks.board.dtype)
        base = layer.quant_method.inner.apply(layer, x, None)
        update = (layer.quant_method.apply(layer, x, None) - base).double().cpu()  # (T, out)
        expected = plain_update(place, adapters, weights, x)
        error = float((update - expected).abs().max())
        scale = float(expected.abs().max() + base.abs().max())
        if not error <= TOLERANCE.get(stacks.board.dtype, COARSE_TOLERANCE) * scale:
            raise ModelError(
                f"{name} does not compute the blend here: off by {error:.3g} where values reach {scale:.3g}"
            )
    stacks.board.fill(mixture.gates(weights.numpy() * 0), [1, 1, 1])


def plain_update(place: Place, adapters: Sequence[Adapter], weights: Tensor, x: Tensor) -> Tensor:
    """Return sum_i w_i s_i B_i A_i x, (T, out), adapter by adapter in float64: what a stack must agree with."""
    inputs = x.double().cpu()
    expected = torch.zeros(len(x), place.size_out, dtype=torch.float64)
    for part in place.parts:
        for index, adapter in enumerate(adapters):
            if (pair := adapter.pairs.get(part.path)) is not None:
                a, b = pair.a.double()[:, part.columns], pair.b.double()[part.rows]
                made = pair.scale * (inputs @ a.t() @ b.t())
                expected[:, part.start : part.start + part.size] += weights[:, index : index + 1].double() * made
    return expected
