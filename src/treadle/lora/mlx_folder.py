"""Reads the folder that mlx-lm writes: `adapter_config.json`, and `adapters.safetensors` or the older `adapters.npz`.

Names and shapes are those of mlx_lm/tuner: `lora_a` (in, r), `lora_b` (r, out), DoRA's magnitude `m` (out). The
config's `scale` multiplies the update by itself, whatever the rank.
"""

import re
import warnings
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from treadle.common.documents import is_file, read_object
from treadle.common.errors import AdapterError, AdapterWarning, problem_list, shown
from treadle.common.tensor_files import read_npz, read_tensors
from treadle.lora.content import AdapterContent, content_problems
from treadle.lora.pair import LoraPair, number_problem
from treadle.lora.vectors import LayerVectors

MLX_CONFIG_FILE, MLX_FILES = "adapter_config.json", ("adapters.safetensors", "adapters.npz")
MAX_CONFIG_BYTES = 16 << 20
DEFAULT_SCALE = 20.0
"""The scale of mlx-lm where nothing says another one."""
TENSOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")
MATRIX_AXES, STACK_AXES = 2, 3


def mlx_file(folder: Path) -> Path | None:
    """Return the file of tensors in an MLX folder; None if it is no such folder."""
    return next((folder / name for name in MLX_FILES if is_file(folder / name)), None)


def read_mlx_folder(folder: Path, file: Path, name: str) -> AdapterContent:
    """Read an MLX folder whose tensors are in `file`.

    Raises:
        AdapterError: it is damaged, or cannot be blended; lists every problem.
    """
    try:
        config = _read_config(folder)
        tensors = (read_npz if file.suffix == ".npz" else read_tensors)(file, AdapterError).tensors
    except AdapterError as error:
        raise AdapterError(f"adapter {name!r}: {error}; save or download it again") from error
    problems: list[str] = []
    scale = _scale(config, name, problems)
    parts = _parts(tensors, problems)
    pairs: dict[str, LoraPair] = {}
    vectors: dict[str, LayerVectors] = {}
    for module, given in parts.items():
        if problem := _part_problem(module, given, needs_magnitude=config.get("fine_tune_type") == "dora"):
            problems.append(problem)
            continue
        pairs[module] = LoraPair(given["lora_a"].t().contiguous(), given["lora_b"].t().contiguous(), scale)
        if "m" in given:
            vectors[module] = LayerVectors(magnitude=given["m"])
    problems = problems or content_problems(pairs, vectors)
    if problems:
        raise AdapterError(problem_list(f"adapter {name!r} ({folder}) cannot be blended:", problems))
    return AdapterContent(config.get("model") or "", pairs, vectors)


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the config; the first releases wrote none."""
    file = folder / MLX_CONFIG_FILE
    config = read_object(file, AdapterError, MAX_CONFIG_BYTES) if is_file(file) else {}
    if not isinstance(config.get("model") or "", str):
        raise AdapterError(f"{file} is malformed: model must be a text, not {shown(config['model'])}")
    if config.get("fine_tune_type") == "full":
        raise AdapterError(
            f"{folder}: its fine_tune_type is full: it holds whole weights, and is no adapter. Train a LoRA."
        )
    return config


def _scale(config: dict[str, Any], name: str, problems: list[str]) -> float:
    """Return the scale of all updates; what is wrong with it is added to `problems`."""
    given = config.get("lora_parameters") or {}
    if not isinstance(given, dict):
        problems.append(f"lora_parameters must be an object, not {shown(given)}")
        return DEFAULT_SCALE
    options = cast(dict[str, Any], given)
    scale, alpha = options.get("scale"), options.get("alpha")
    if alpha is not None and alpha != options.get("rank"):
        problems.append(
            f"lora_parameters has alpha={shown(alpha)}: old releases of mlx-lm multiply by alpha / rank, new ones do "
            "not. Write the factor that it was trained with into scale, and delete alpha"
        )
    elif scale is None:
        what = f"adapter {name!r}: its config has no scale; mlx-lm's default is taken: {DEFAULT_SCALE:g}"
        warnings.warn(what, AdapterWarning, stacklevel=4)
    elif type(scale) not in (int, float) or not scale > 0:
        problems.append(f"lora_parameters: scale must be a positive number, not {shown(scale)}")
    else:
        return float(scale)
    return DEFAULT_SCALE


def _parts(tensors: dict[str, Tensor], problems: list[str]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each module by part; add the others to `problems`."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = TENSOR.fullmatch(key)
        if not found:
            problems.append(f"{key}: not lora_a, lora_b or m of an MLX adapter; save the adapter without it")
            continue
        parts.setdefault(found["module"], {})[found["part"]] = tensor
        if problem := number_problem(key, tensor):
            problems.append(problem)
    return parts


def _part_problem(module: str, given: dict[str, Tensor], *, needs_magnitude: bool) -> str | None:
    needed = ["lora_a", "lora_b", *(["m"] if needs_magnitude else [])]
    if missing := [part for part in needed if part not in given]:
        lacks = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        return f"{module}: {lacks}; save or download it again"
    a, b = given["lora_a"], given["lora_b"]
    shapes = f"{module}: lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)}"
    if a.dim() == STACK_AXES:
        return f"{shapes} are for a stack of experts, which is no linear layer; train without it"
    if a.dim() != MATRIX_AXES or b.dim() != MATRIX_AXES or a.shape[1] != b.shape[0] or a.shape[1] == 0:
        return f"{shapes} do not fit: need (in, r), (r, out); save it again"
    if "m" in given and not needs_magnitude:
        return f"{module}: it has a magnitude m, but the config's fine_tune_type is not dora; correct it"
    return None
