"""Writes an adapter as PEFT has it: `adapter_config.json` and `adapter_model.safetensors`, both or none."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from treadle.common.errors import OptionError
from treadle.common.writing import check_writable, put_all, workplace
from treadle.lora.pair import LoraPair
from treadle.lora.peft_folder import CONFIG_FILE, WEIGHTS_FILE

PREFIX = "base_model.model."
"""PEFT writes it before each module path."""


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raise an OptionError if a folder cannot be written to, or holds an adapter that may not be replaced."""
    check_writable(folder / CONFIG_FILE)
    if not overwrite and any((folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        raise OptionError(f"{folder} holds an adapter already; name another folder, or --overwrite it.")


def lora_config(pairs: Mapping[str, LoraPair], base: str, *, use_dora: bool = False) -> dict[str, Any]:
    """Return PEFT's config of these factors, by module path inside the base called `base` ("" = unknown)."""
    from peft import LoraConfig, TaskType

    ranks = {module: pair.rank for module, pair in pairs.items()}
    alphas = {module: pair.scale * pair.rank for module, pair in pairs.items()}
    ((rank, alpha), _), *_ = Counter(zip(ranks.values(), alphas.values(), strict=True)).most_common(1)
    others = [module for module in pairs if (ranks[module], alphas[module]) != (rank, alpha)]
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base or None,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  PEFT takes fractions, too
        rank_pattern={module: ranks[module] for module in others},
        alpha_pattern={module: alphas[module] for module in others},
        target_modules=sorted(pairs),
        use_dora=use_dora,
        inference_mode=True,
    )
    return {name: sorted(each) if isinstance(each, set) else each for name, each in config.to_dict().items()}


def factor_tensors(pairs: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """Return the factors under PEFT's names."""
    return {
        f"{PREFIX}{module}.lora_{side}.weight": factor.contiguous()
        for module, pair in pairs.items()
        for side, factor in (("A", pair.a), ("B", pair.b))
    }


def save_peft(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a PEFT folder, made where it is missing; an adapter that is there is replaced (see `check_free`).

    Raises:
        OptionError: the system refuses to write there.
    """
    with workplace(folder) as place:
        made = place / "adapter"
        made.mkdir()
        (made / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        save_file({name: each.contiguous() for name, each in tensors.items()}, made / WEIGHTS_FILE, {"format": "pt"})
        put_all(made, folder, CONFIG_FILE)
