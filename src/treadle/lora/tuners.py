"""Turns adapters of PEFT's other tuners (LoHa, LoKr, VeRA, OFT, AdaLoRA ...) into factors, with PEFT itself.

PEFT merges the adapter into the base, module by module; what each weight gained is the update. Its singular value
decomposition gives the factors, as in PEFT's own `convert_to_lora`. So every tuner that merges is converted, those that
`convert_to_lora` refuses (OFT, BOFT, HRA, AdaLoRA) too, and the error is known.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from treadle.common.errors import REASON_CHARACTERS, AdapterError, problem_list
from treadle.lora.mixture import Mixture
from treadle.lora.pair import LoraPair

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TINY = 1e-5
"""The share of an update's norm that counts as rounding: what is below it is left out, and called exact."""

PEFT_ERRORS = (
    ValueError, TypeError, RuntimeError, KeyError, AttributeError, OSError, ImportError, AssertionError, UserWarning
)  # fmt: skip
"""PEFT has no error of its own: each tuner fails in its own way on what does not fit."""


@torch.no_grad()
def merged_update(model: "PreTrainedModel", folder: Path, rank: int | None = None) -> Mixture:
    """Return the update that an adapter of any PEFT tuner makes to the linear layers of its base.

    Args:
        model: the base in float32; the adapter is merged into it, so it is of no further use.
        folder: of PEFT, with safetensors.
        rank: the largest rank of a module; None = as large as it takes.

    Raises:
        AdapterError: PEFT cannot load it or merge it, or it changes more than weights of linear layers.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            tuned = PeftModel.from_pretrained(model, str(folder))
    except PEFT_ERRORS as error:
        raise AdapterError(f"{folder}: PEFT cannot load it onto this base: {_short(error)}") from error
    if (config := tuned.active_peft_config).is_prompt_learning:
        kind = str(config.peft_type).removeprefix("PeftType.")
        raise AdapterError(f"{folder}: {kind} adds virtual tokens and changes no weight, so it is no LoRA.")
    pairs, squares, problems = dict[str, LoraPair](), dict[str, tuple[float, float]](), list[str]()
    for path, layer in _layers(tuned):
        try:
            change = _change(layer)
        except AdapterError as error:
            problems.append(f"{path}: {error}")
            continue
        pair, lost = _factors(change, rank)
        if pair.rank:
            pairs[path], squares[path] = pair, (lost, float(change.square().sum()))
    if problems:
        raise AdapterError(problem_list(f"{folder} cannot be converted to a LoRA:", problems))
    if not pairs:
        raise AdapterError(f"{folder}: it changes no weight of this base (was it saved before training?).")
    return Mixture.with_losses(pairs, squares)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that a tuner has wrapped, with their paths inside the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path.removeprefix("base_model.model."), module


def _change(layer: Any) -> Tensor:
    """Return the change of a layer's weight (out, in) by merging."""
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear) and not hasattr(base, "nx"):
        raise AdapterError("it is no linear layer")
    before, bias = base.weight.detach().clone(), getattr(base, "bias", None)
    bias = None if bias is None else bias.detach().clone()
    try:
        layer.merge()
    except PEFT_ERRORS as error:
        raise AdapterError(f"PEFT cannot merge it: {_short(error)}") from error
    if bias is not None and not torch.equal(bias, base.bias):
        raise AdapterError("its bias is changed, too")
    change = base.weight.detach() - before
    return change if isinstance(base, nn.Linear) else change.T


def _factors(change: Tensor, rank: int | None) -> tuple[LoraPair, float]:
    """Return the nearest factors of at most a rank, and the squared norm of what they leave out."""
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    tails = values.square().flip(0).cumsum(0).flip(0)  # (n,), what is lost from each place on
    needed = int((tails > TINY**2 * tails[0]).sum()) if tails[0] > 0 else 0
    kept = needed if rank is None else min(needed, rank)
    lost = float(tails[kept]) if kept < needed else 0.0
    root = values[:kept].sqrt()
    return LoraPair(root[:, None] * right[:kept], left[:, :kept] * root, 1.0), lost


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:REASON_CHARACTERS] or type(error).__name__
