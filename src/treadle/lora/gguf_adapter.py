"""Reads llama.cpp's GGUF adapters: the inverse of `other_formats.save_gguf`, which names the rules."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treadle.common.documents import open_file
from treadle.common.errors import AdapterError, problem_list, shown
from treadle.lora.other_formats import gguf_names
from treadle.lora.pair import LoraPair
from treadle.lora.rotary_rows import num_heads, to_halves

MATRIX_AXES = 2
SIDES = {"lora_a": "A", "lora_b": "B"}


def read_gguf(file: Path, modules: list[str], config: Any) -> dict[str, LoraPair]:
    """Return the factors of a GGUF adapter by module path.

    Args:
        file: as llama.cpp's convert_lora_to_gguf.py or `treadle export --format gguf` writes it.
        modules: paths of the base's linear layers.
        config: transformers' configuration of the base.

    Raises:
        AdapterError: it is damaged or no LoRA, or is for another kind of base; lists every problem.
        OptionError: the base's kind is not known here, or the package gguf is missing.
    """
    architecture, names = gguf_names(modules, config)
    fields, tensors = _read(file)
    kind = fields.get("general.type"), fields.get("adapter.type")
    if kind != ("adapter", "lora"):
        raise AdapterError(f"{file}: its type is {shown(kind[0])} and {shown(kind[1])}, not an adapter and lora.")
    if (trained := fields.get("general.architecture")) != architecture:
        raise AdapterError(f"{file}: it is for a base of architecture {shown(trained)}, this one is {architecture!r}.")
    alpha = fields.get("adapter.lora.alpha") or 0.0
    if type(alpha) not in (int, float):
        raise AdapterError(f"{file}: adapter.lora.alpha must be a number, not {shown(alpha)}.")
    found = {name: module for module, name in names.items() if name is not None}
    sides: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        name, _, side = key.rpartition(".")
        if (module := found.get(name)) is None or side not in SIDES:
            problems.append(f"{key} {tuple(tensor.shape)}: the base has no linear layer of this name")
        else:
            sides.setdefault(module, {})[SIDES[side]] = tensor
    pairs: dict[str, LoraPair] = {}
    for module, factors in sides.items():
        heads = num_heads(module, config) if architecture == "llama" else None
        if problem := _pair_problem(module, factors, heads):
            problems.append(problem)
        else:
            pairs[module] = _pair(factors["A"], factors["B"], alpha, heads)
    if problems:
        raise AdapterError(problem_list(f"{file} cannot be converted for this base:", problems))
    return pairs


def _pair_problem(module: str, factors: dict[str, Tensor], heads: int | None) -> str | None:
    if missing := {"A", "B"} - factors.keys():
        return f"{module}: lora_{min(missing).lower()} is missing"
    a, b = factors["A"], factors["B"]
    if a.dim() != MATRIX_AXES or b.dim() != MATRIX_AXES or a.shape[0] != b.shape[1] or not a.shape[0]:
        return f"{module}: lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)} do not fit: need (r, in), (out, r)"
    if heads and len(b) % (2 * heads):
        return f"{module}: lora_b {tuple(b.shape)} does not divide into the base's {heads} heads"
    return None


def _pair(a: Tensor, b: Tensor, alpha: float, heads: int | None) -> LoraPair:
    """Return the factors of one module; llama.cpp multiplies by alpha / rank, and by 1 if alpha is 0."""
    return LoraPair(a, to_halves(b, heads) if heads else b, alpha / a.shape[0] if alpha else 1.0)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fields of a GGUF file and its tensors (rows, columns) in float32."""
    import gguf

    with open_file(file, AdapterError):
        pass  # a regular file that may be read
    try:
        reader = gguf.GGUFReader(file)
        wanted = ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")
        fields = {name: each.contents() for name in wanted if (each := reader.get_field(name)) is not None}
        tensors = {
            each.name: torch.from_numpy(np.array(gguf.dequantize(each.data, each.tensor_type), np.float32))
            for each in reader.tensors
        }
    except (ValueError, KeyError, IndexError, TypeError, OSError, OverflowError, MemoryError) as error:
        raise AdapterError(f"{file} cannot be read as GGUF: {error}") from error
    return fields, tensors
