"""Writes a fixed mixture of adapters as one ordinary PEFT adapter, exactly or at a smaller rank.

Factors of several adapters side by side, the scales and weights in B, are the sum of their updates (PEFT's `cat`). At a
smaller rank it is the nearest sum: the largest singular values of each module's update.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from treadle.common.errors import AdapterError, OptionError, problem_list, unknown_name
from treadle.lora.adapter import Adapter
from treadle.lora.pair import LoraPair
from treadle.lora.peft_writing import check_free, factor_tensors, lora_config, save_peft


@dataclass(frozen=True)
class Mixture:
    """The update of a fixed mixture: factors whose scale is 1.

    Attributes:
        pairs: module path -> its factors in float32.
        error: |exact - written| / |exact|, Frobenius norms over all modules; 0 = nothing was cut.
        worst: the module with the largest error of its own, and that error; None = nothing was cut.
    """

    pairs: Mapping[str, LoraPair]
    error: float = 0.0
    worst: tuple[str, float] | None = None

    @classmethod
    def with_losses(cls, pairs: Mapping[str, LoraPair], squares: Mapping[str, tuple[float, float]]) -> "Mixture":
        """Return a mixture with its error; `squares` are each module's squared norms of what was cut, and of all."""
        off, total = (sum(each[index] for each in squares.values()) for index in (0, 1))
        own = {module: (lost / whole) ** 0.5 for module, (lost, whole) in squares.items() if lost}
        worst = max(own, key=lambda module: own[module]) if own else None
        return cls(pairs, (off / total) ** 0.5 if total else 0.0, (worst, own[worst]) if worst else None)


def mix(adapters: Sequence[Adapter], weights: Mapping[str, float], rank: int | None = None) -> Mixture:
    """Return the sum of adapters' updates, each times its weight.

    Args:
        adapters: of one base model.
        weights: name -> weight; adapters that are not named take no part.
        rank: the largest rank of a module; None = that of all factors side by side, which is exact.

    Raises:
        AdapterError: a name is no adapter's, or an adapter does more than add factors.
        OptionError: no adapter has a weight, or the rank is below 1.
    """
    names = [adapter.name for adapter in adapters]
    if unknown := [unknown_name("adapter", name, names) for name in weights if name not in names]:
        raise AdapterError("; ".join(unknown))
    acting = [(adapter, weights[adapter.name]) for adapter in adapters if weights.get(adapter.name)]
    if not acting:
        raise OptionError("no adapter has a weight above 0; give fixed weights such as math=0.7,code=0.3.")
    more = [
        each.name
        for each, _ in acting
        if each.vectors or each.initial or each.weights or each.has_experts or each.virtual
    ]
    if more:
        kinds = "a DoRA, IA3, PiSSA, OLoRA, trained biases, whole weights, fused experts or virtual tokens"
        raise AdapterError(f"{', '.join(more)}: {kinds}, whose update is more than the factors; export plain LoRA.")
    if rank is not None and rank < 1:
        raise OptionError(f"rank must be at least 1, or none, not {rank}.")
    modules = dict.fromkeys(module for adapter, _ in acting for module in adapter.pairs)
    exact = {
        module: _side_by_side([(each.pairs[module], weight) for each, weight in acting if module in each.pairs])
        for module in modules
    }
    return Mixture(exact) if rank is None else _cut(exact, rank)


def check_linear(mixture: Mixture, linear: Collection[str]) -> None:
    """Raise an AdapterError that lists the modules whose paths are none of the base's `linear` layers."""
    if others := [module for module in mixture.pairs if module not in linear]:
        raise AdapterError(problem_list("export writes linear layers; these modules of the base are none:", others))


def _side_by_side(weighted: Sequence[tuple[LoraPair, float]]) -> LoraPair:
    """Return the factors of one module, A (R, in) and B (out, R); scales and weights are in B."""
    a = torch.cat([pair.a.float() for pair, _ in weighted])
    b = torch.cat([pair.b.float() * (pair.scale * weight) for pair, weight in weighted], 1)
    return LoraPair(a, b, 1.0)


def _cut(exact: Mapping[str, LoraPair], rank: int) -> Mixture:
    """Return the nearest update of at most this rank, module by module."""
    cut: dict[str, LoraPair] = {}
    squares: dict[str, tuple[float, float]] = {}  # of what was cut off, and of all
    for module, pair in exact.items():
        if pair.rank <= rank:
            cut[module], values = pair, torch.linalg.svdvals(_core(pair)[0])
            squares[module] = 0.0, float((values**2).sum())
            continue
        core, left, right = _core(pair)
        u, values, vh = torch.linalg.svd(core)  # values fall
        root = values[:rank].sqrt()
        a = (root[:, None] * vh[:rank]) @ right.T  # (rank, in)
        b = left @ (u[:, :rank] * root)  # (out, rank)
        cut[module] = LoraPair(a.float(), b.float(), 1.0)
        squares[module] = float((values[rank:] ** 2).sum()), float((values**2).sum())
    return Mixture.with_losses(cut, squares)


def _core(pair: LoraPair) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return B A = left core right^T with orthonormal columns: the core is (r, r) or smaller, in float64."""
    left, upper_b = torch.linalg.qr(pair.b.double())
    right, upper_a = torch.linalg.qr(pair.a.double().T)
    return upper_b @ upper_a.T, left, right


def save_mixture(mixture: Mixture, folder: Path, base: str, *, overwrite: bool = False) -> None:
    """Write a mixture as a PEFT folder.

    Args:
        mixture: to write.
        folder: made where it is missing.
        base: named as the adapter's base model.
        overwrite: replace an adapter that is there.

    Raises:
        OptionError: the system refuses to write there, or an adapter is there.
    """
    check_free(folder, overwrite=overwrite)
    save_peft(folder, lora_config(mixture.pairs, base), factor_tensors(mixture.pairs))
