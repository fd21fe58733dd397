"""Engines with random adapters, as many and as large as wanted: their cost is that of trained ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from treadle.adapters import Adapter, LoraPair
from treadle.centroids import Centroids
from treadle.compatible import linear_shapes
from treadle.embed import Embedder
from treadle.errors import OptionError
from treadle.routing import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 8
"""Random embeddings behind each random centroid."""


def random_adapters(
    model: "PreTrainedModel", base: str, count: int, *, rank: int, targets: Sequence[str]
) -> list[Adapter]:
    """Return `count` adapters a0, a1 ... with bfloat16 factors for every linear layer called like one of `targets`.

    Raises:
        OptionError: the model has no such layer.
    """
    shapes = linear_shapes(model)
    shapes = {path: shape for path, shape in shapes.items() if path.rpartition(".")[2] in targets}
    if not shapes:
        raise OptionError(f"the base has no linear layer called {', '.join(targets)}")
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
    """Return a router whose centroids lie anywhere."""
    draw = np.random.default_rng(0)
    centroids = Centroids.empty(embedder.id, embedder.dim)
    for name in names:
        centroids = centroids.add(name, draw.standard_normal((SAMPLES, embedder.dim)).astype(np.float32))
    return Router(centroids, embedder)
