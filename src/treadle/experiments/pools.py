"""Engines with random adapters, as many and as large as wanted: their cost is that of trained ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from treadle.common.errors import OptionError
from treadle.lora.adapter import Adapter, LoraPair
from treadle.lora.compatibility import linear_shapes
from treadle.routing.centroids import Centroids
from treadle.routing.embedder import Embedder
from treadle.routing.router import Router
from treadle.routing.samples import KINDS, STAGES
from treadle.routing.statistics import Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES_PER_CENTROID = 8
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


def random_router(names: Sequence[str], embedder: Embedder) -> Router:
    """Return a router whose samples lie anywhere."""
    draw = np.random.default_rng(0)
    tails = embedder.tails
    centroids = Centroids.empty(embedder.id, embedder.dim, tails)
    for name in names:
        samples = draw.standard_normal((SAMPLES_PER_CENTROID, embedder.dim * (1 + len(tails))), np.float32)
        own = Statistics.of(samples, KINDS[:1] * len(samples))
        mean = samples[:, : embedder.dim].mean(0)[None]
        counts, stages = np.array([len(samples)]), dict.fromkeys(STAGES, own)
        centroids = centroids.join(Centroids((name,), mean, counts, stages, embedder.id, tails))
    return Router(centroids, embedder)
