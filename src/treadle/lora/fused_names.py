"""Reads the factors that PEFT's `target_parameters` makes for fused experts.

PEFT wraps a module once for each parameter, in the order of the model, and the file names only the wrappers: of two,
the inner one is `experts.base_layer`. The parameters' names are in the config alone.
"""

from collections.abc import Sequence

from torch import Tensor

from treadle.lora.pair import LoraPair

INNER = ".base_layer"
LAST = "down_proj"
"""The last parameter of all fused experts in transformers; its wrapper is the outer one."""


def fused_names(modules: Sequence[str], targets: Sequence[str]) -> dict[str, str]:
    """Return the path of the parameter for each wrapper's name, where the config's targets name parameters.

    Args:
        modules: names of wrappers and of ordinary modules, as in the file.
        targets: the config's `target_parameters`.
    """
    wrapped = {module.removesuffix(INNER) for module in modules if module.endswith(INNER)}
    names: dict[str, str] = {}
    for module in modules:
        holder = module.removesuffix(INNER)
        if holder.endswith(INNER) or not holder.rpartition(".")[2].endswith("experts"):
            continue
        found = {target.rpartition(".")[2] for target in targets if _is_named(holder, target)}
        if holder in wrapped:
            found = found - {LAST} if module.endswith(INNER) else found & {LAST}
        if len(found) == 1:
            names[module] = f"{holder}.{found.pop()}"
    return names


def of_experts(a: Tensor, b: Tensor, scale: float, rank: int) -> LoraPair:
    """Return the factors of all experts, one after the other, as this package keeps them.

    Args:
        a: (E * rank, in), one expert after the other.
        b: (out, rank * E), all experts' first columns before their second ones.
        scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        rank: of one expert.
    """
    num_experts = len(a) // rank
    b = b.view(len(b), rank, num_experts).transpose(1, 2).reshape(len(b), -1)
    return LoraPair(a, b, scale, num_experts)


def _is_named(holder: str, target: str) -> bool:
    """Return whether a target names a parameter of a module, as PEFT matches them."""
    path = f"{holder}.{target.rpartition('.')[2]}"
    return path == target or path.endswith(f".{target}")
