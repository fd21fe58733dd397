"""Lays the stacks beside vLLM's linear layers, as a linear method around the layer's own.

Every linear class of vLLM makes exactly one call, `quant_method.apply`, on the shard that the process holds: before a
column-parallel layer gathers and before a row-parallel one reduces. Wrapped there, the update is right under tensor
parallelism, and a quantised base stays as it is. At the start, one layer of each kind is compared with the plain
formula, `treadle.serving.vllm.shards.plain_update`.
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
from treadle.serving.vllm.cpu import Product
from treadle.serving.vllm.mixture import Mixture, by_router, largest_rank
from treadle.serving.vllm.params import PluginParams
from treadle.serving.vllm.shards import (
    LayerShard,
    equal_ranks,
    factors_here,
    find_shards,
    own_ranks,
    plain_update,
)
from treadle.serving.vllm.stacks import GateBoard, LayerStack, ModelStacks

TOLERANCES = {torch.float32: 1e-4}
"""The error that the comparison allows, relative to the largest value, by dtype."""
COARSE_TOLERANCE = 2e-2
"""The same for other dtypes: a sum over ranks in bfloat16 is as coarse."""


@dataclass(frozen=True)
class AttachContext:
    """Tells `attach` about vLLM and this process.

    Attributes:
        num_tokens: the most tokens of a step.
        device: where the model lies.
        dtype: the dtype of the factors.
        linear: vLLM's base class of linear layers.
        forwards: the `forward` functions that call the linear method, beside which a stack stands.
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


def attach(
    model: nn.Module, bundle: Bundle, mixture: Mixture, params: PluginParams, context: AttachContext
) -> ModelStacks:
    """Lay stacks beside all layers that adapters target, fill them, and test them.

    Raises:
        TreadleError: an adapter does not fit the model, a layer is not called as others are, or a layer does not
            compute the plain formula.
    """
    adapters = by_router(bundle)
    shards = find_shards(model, context.linear)
    absent = [name for name, module in model.named_modules() if isinstance(module, context.missing)]
    _check_adapters(adapters, shards, absent, context.dtype)
    ranks = {name: each for name, (_, shard) in shards.items() if any(each := _ranks(shard, adapters, mixture, params))}
    _check_calls({name: shards[name][0] for name in ranks}, context)
    board = GateBoard(context.num_tokens, context.device, context.dtype)
    stacks: dict[str, LayerStack] = {}
    for name, each in ranks.items():
        layer, shard = shards[name]
        stacks[name] = layer.treadle = stack = LayerStack(shard, board, each)  # buffers of modules survive vLLM's sleep
        layer.quant_method = blended_method(layer.quant_method, context.linear_method, stack)
        layer.requires_unquantized_input = True  # the factors read the activation itself
    made = ModelStacks(board, stacks, len(shards), absent)
    for slot, adapter in zip(mixture.slots, adapters, strict=True):
        made.put(slot, adapter)
    if context.pack is not None and not params.is_hot:
        for stack in stacks.values():
            stack.pack(context.pack)
    _compare(shards, made, adapters, mixture)
    return made


def blended_method(inner: Any, parent: type, stack: LayerStack) -> Any:
    """Return the linear method `inner`, of vLLM's class `parent`, with the gated update of a stack behind it."""
    own, update = inner.apply, stack.update

    def apply(self: Any, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return update(own(layer, x, bias), x)

    def forward_attribute(self: Any, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def create_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the layer has its weights already")

    def process_weights_after_loading(self: Any, layer: nn.Module) -> None:
        self.inner.process_weights_after_loading(layer)  # when the base is loaded again

    members = {
        "apply": apply,
        "create_weights": create_weights,
        "process_weights_after_loading": process_weights_after_loading,
        "__getattr__": forward_attribute,
    }
    method = type("TreadleLinearMethod", (parent,), members)()
    method.inner = inner
    return method


def _ranks(
    shard: LayerShard, adapters: Sequence[Adapter], mixture: Mixture, params: PluginParams
) -> list[dict[int, int]]:
    """Return the ranks that each part of a layer has room for, by slot."""
    if not params.is_hot:
        return own_ranks(shard, adapters)
    targets = frozenset(path.rpartition(".")[2] for adapter in adapters for path in adapter.pairs)
    return equal_ranks(shard, targets, mixture.num_slots, params.max_rank or max(map(largest_rank, adapters)))


def _check_calls(layers: Mapping[str, Any], context: AttachContext) -> None:
    """Raise a ModelError that lists the layers which may compute without their linear method, hence without a stack."""
    problems = [
        f"{name} ({type(layer).__name__}) has a forward of its own, which may pass the adapters by"
        for name, layer in layers.items()
        if type(layer).forward not in context.forwards
    ]
    problems += [
        f"{name}: this model reads its weights by itself (multi-head latent attention), which passes the adapters by"
        for name in layers
        if name.rpartition(".")[2] in context.unpacked
    ]
    if problems:
        raise ModelError(problem_list("adapters target layers that cannot be blended in vLLM:", problems))


def _check_adapters(
    adapters: Sequence[Adapter], shards: Mapping[str, tuple[Any, LayerShard]], absent: Sequence[str], dtype: torch.dtype
) -> None:
    shapes = {part.path: part.shape for _, shard in shards.values() for part in shard.parts}
    here = [replace(each, pairs=factors_here(each, absent)) for each in adapters]
    check_fit(shapes, here)
    check_range(here, dtype)


@torch.inference_mode()
def _compare(
    shards: Mapping[str, tuple[Any, LayerShard]], stacks: ModelStacks, adapters: Sequence[Adapter], mixture: Mixture
) -> None:
    """Compare one layer of each kind with the plain formula, on random inputs and weights; raise where it differs."""
    kinds = {name.rpartition(".")[2]: name for name in stacks.stacks}
    if not kinds:
        return  # a pipeline stage whose layers no adapter targets
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(3, len(adapters), generator=generator)  # (T, N)
    stacks.board.fill(mixture.gates(weights.numpy()), [1, 1, 1])
    for name in kinds.values():
        layer, shard = shards[name]
        x = torch.randn(3, shard.size_in, generator=generator).to(stacks.board.device, stacks.board.dtype)
        base = layer.quant_method.inner.apply(layer, x, None)
        update = (layer.quant_method.apply(layer, x, None) - base).double().cpu()  # (T, out)
        expected = plain_update(shard, adapters, weights, x)
        error = float((update - expected).abs().max())
        scale = float(expected.abs().max() + base.abs().max())
        if not error <= TOLERANCES.get(stacks.board.dtype, COARSE_TOLERANCE) * scale:
            raise ModelError(
                f"{name} does not compute the blend here: off by {error:.3g} where values reach {scale:.3g}"
            )
    stacks.board.fill(mixture.gates(weights.numpy() * 0), [1, 1, 1])
