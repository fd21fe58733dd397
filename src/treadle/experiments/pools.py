"""Engines with random adapters, as many and as large as wanted: their cost is that of trained ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from treadle.common.errors import OptionError
from treadle.lora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, LoraPair
from treadle.lora.compatibility import linear_shapes
from treadle.routing.centroids import Centroids
from treadle.routing.embedder import Embedder
from treadle.routing.router import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 8
"""Random embeddings behind each random centroid."""


def random_adapters(
    model: "PreTrainedModel", base: str, count: int, *, rank: int, targets: Sequence[str]
) -> list[Adapter]:
    """Return `count` adapters a0, a1 ... with bfloat16 factors for every linear layer called like one of `targets`.

    Raises:
        OptionError: the model has no layer called like one of them.
    """
    shapes = {path: shape for path, shape in linear_shapes(model).items() if path.rpartition(".")[2] in targets}
    there = {path.rpartition(".")[2] for path in shapes}
    if missing := [name for name in targets if name not in there]:
        raise OptionError(f"the base has no linear layer called {', '.join(missing)}")
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).mul_(0.02).to(torch.bfloat16)

    return [
        Adapter(
            f"a{index}",
            base,
            {path: LoraPair(noise(rank, inner), noise(outer, rank), 1.0) for path, (inner, outer) in shapes.items()},
            Path(),
        )
        for index in range(count)
    ]


def save_adapter(folder: Path, adapter: Adapter, targets: Sequence[str]) -> Path:
    """Write an adapter of one rank as PEFT does, in float32; return the folder."""
    folder.mkdir(parents=True)
    tensors = {
        f"base_model.model.{path}.lora_{side}.weight": factor.float().cpu().contiguous()
        for path, pair in adapter.pairs.items()
        for side, factor in (("A", pair.a), ("B", pair.b))
    }
    save_file(tensors, folder / WEIGHTS_FILE)
    pair = next(iter(adapter.pairs.values()))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": adapter.base_model}
    config |= {"r": pair.rank, "lora_alpha": pair.scale * pair.rank, "target_modules": list(targets), "bias": "none"}
    (folder / CONFIG_FILE).write_text(json.dumps(config), "utf-8")
    return folder


def random_router(names: Sequence[str], embedder: Embedder) -> Router:
    """Return a router whose centroids lie anywhere."""
    draw = np.random.default_rng(0)
    samples = draw.standard_normal((len(names), SAMPLES, embedder.dim), np.float32)
    means = samples.mean(1)
    around = samples - means[:, None]
    scatter = around.transpose(0, 2, 1) @ around  # (N, D, D)
    counts = np.full(len(names), SAMPLES)
    return Router(Centroids(tuple(names), means, counts, scatter, embedder.id), embedder)
