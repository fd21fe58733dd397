"""Writes a fixed mixture for programs that do not read PEFT folders: llama.cpp (GGUF) and mlx-lm.

    adapter.gguf                                   names and rows as llama.cpp's convert_lora_to_gguf.py writes them
    adapters.safetensors, adapter_config.json      mlx-lm's: (in, r) and (r, out), one rank for all modules

Both have one scale for all modules; here it is 1, and what a module needs is in its B.
"""

import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from treadle.common.errors import OptionError, problem_list
from treadle.common.writing import check_writable, put, put_all, workplace
from treadle.lora.mixture import Mixture
from treadle.lora.rotary_rows import num_heads, to_pairs

GGUF_FILE, MLX_FILE, MLX_CONFIG_FILE = "adapter.gguf", "adapters.safetensors", "adapter_config.json"
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""transformers' model types whose layers llama.cpp keeps as they are, but for the order of rows in its LLAMA."""
LAYER = re.compile(r"(?P<stack>.*\blayers)\.(?P<index>\d+)\.(?P<key>.+)")


def save_gguf(mixture: Mixture, folder: Path, config: Any, *, overwrite: bool = False) -> None:
    """Write a mixture as a GGUF adapter of llama.cpp.

    Args:
        mixture: to write.
        folder: made where it is missing.
        config: transformers' configuration of the base.
        overwrite: replace a file that is there.

    Raises:
        OptionError: the base's kind is not known here, a module has no name in GGUF, or the file cannot be written.
    """
    _check_free(folder / GGUF_FILE, overwrite)
    architecture, found = gguf_names(list(mixture.pairs), config)
    import gguf

    if unknown := [module for module, name in found.items() if name is None]:
        raise OptionError(problem_list("GGUF has no name for these modules of the base:", unknown))
    most = max(pair.rank for pair in mixture.pairs.values())
    with workplace(folder) as place:
        writer = gguf.GGUFWriter(place / GGUF_FILE, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(most))
        for module, pair in mixture.pairs.items():
            b = pair.b * (pair.rank / most)  # llama.cpp multiplies by alpha / rank of each module
            if architecture == "llama" and (heads := num_heads(module, config)):
                b = to_pairs(b, heads)
            writer.add_tensor(f"{found[module]}.lora_a", pair.a.contiguous().numpy())
            writer.add_tensor(f"{found[module]}.lora_b", b.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        put(place / GGUF_FILE, folder / GGUF_FILE)


def gguf_names(modules: Sequence[str], config: Any) -> tuple[str, dict[str, str | None]]:
    """Return llama.cpp's name of a base's architecture, and module path -> name in GGUF; None where it has none.

    Raises:
        OptionError: the base's kind is not known here, or the package gguf is missing.
    """
    if find_spec("gguf") is None:
        raise OptionError("GGUF files need: pip install 'treadle[gguf]'")
    import gguf

    kind = str(config.model_type)
    if kind not in ARCHITECTURES:
        raise OptionError(f"GGUF: a base of type {kind!r} is not known; known are {', '.join(ARCHITECTURES)}.")
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[kind]]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found = {module: names.get_name(f"{module}.weight", try_suffixes=(".weight",)) for module in modules}
    return gguf.MODEL_ARCH_NAMES[architecture], found


def save_mlx(mixture: Mixture, folder: Path, config: Any, *, overwrite: bool = False) -> None:
    """Write a mixture as an adapter of mlx-lm; arguments as in `save_gguf`.

    Raises:
        OptionError: a module lies outside the numbered layers, or the folder cannot be written.
    """
    _check_free(folder / MLX_FILE, overwrite)
    _check_free(folder / MLX_CONFIG_FILE, overwrite)
    places = {module: LAYER.fullmatch(module) for module in mixture.pairs}
    if outside := [module for module, place in places.items() if place is None]:
        raise OptionError(problem_list("mlx-lm adapts modules of numbered layers; these are none:", outside))
    rank = max(pair.rank for pair in mixture.pairs.values())
    tensors: dict[str, Tensor] = {}
    for module, pair in mixture.pairs.items():
        tensors[f"{module}.lora_a"] = _padded(pair.a, rank).T.contiguous()  # (in, rank)
        tensors[f"{module}.lora_b"] = _padded(pair.b.T, rank).contiguous()  # (rank, out)
    keys = sorted({place["key"] for place in places.values() if place})
    document = {
        "fine_tune_type": "lora",
        "num_layers": config.num_hidden_layers,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
    }
    with workplace(folder) as place:
        made = place / "adapter"
        made.mkdir()
        save_file(tensors, made / MLX_FILE, {"format": "mlx"})
        (made / MLX_CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
        put_all(made, folder, MLX_CONFIG_FILE)


def _padded(rows: Tensor, count: int) -> Tensor:
    """Return rows, and rows of zeros behind them up to a count."""
    return torch.nn.functional.pad(rows, (0, 0, 0, count - len(rows)))


def _check_free(file: Path, overwrite: bool) -> None:
    check_writable(file)
    if file.exists() and not overwrite:
        raise OptionError(f"{file} exists already; name another folder, or --overwrite it.")
