"""An adapter: its factors, whatever format they were read from.

It does not know models: `treadle.lora.compatibility` compares an adapter with one. Each format has a module of its own,
which reads a folder into an `AdapterContent`.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from uuid import uuid4

import torch

from treadle.common.documents import is_file
from treadle.lora.content import AdapterContent
from treadle.lora.mlx_folder import MLX_FILES, mlx_file, read_mlx_folder
from treadle.lora.pair import LoraPair
from treadle.lora.peft_folder import CONFIG_FILE, WEIGHTS_FILE, read_peft_folder
from treadle.lora.vectors import LayerVectors
from treadle.lora.virtual_tokens import VirtualTokens

__all__ = ["Adapter", "LoraPair", "read_adapter"]


@dataclass(frozen=True)
class Adapter:
    """One adapter: a named set of factor pairs, and of vectors where it is more than plain LoRA.

    Attributes:
        name: used by routing, results and the command line.
        base_model: named in its config.
        pairs: module path inside the base model -> its factors.
        source: the folder it was read from.
        vectors: module path -> what it does beside the factors, as DoRA, IA3 and trained biases do.
        initial: how training began from a part of the base's weight (`treadle.lora.initial`); "" = it did not.
        weights: module path -> whole weight as the base stores it; the base's own is dropped, another one is blended.
        virtual: tokens before every text, as prefix and prompt tuning train them; None = there are none.
        identity: a digest of factors and scales, whatever the name; unique for an adapter made in memory.
    """

    name: str
    base_model: str
    pairs: Mapping[str, LoraPair]
    source: Path
    vectors: Mapping[str, LayerVectors] = field(default_factory=dict[str, LayerVectors], compare=False, repr=False)
    initial: str = ""
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor], compare=False, repr=False)
    virtual: VirtualTokens | None = field(default=None, compare=False, repr=False)
    identity: str = field(default_factory=lambda: uuid4().hex, compare=False, repr=False)

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of all modules that it changes."""
        return tuple(dict.fromkeys((*self.pairs, *self.vectors)))

    @property
    def has_experts(self) -> bool:
        """Whether it changes weights of fused experts."""
        return any(pair.num_experts > 1 for pair in self.pairs.values())

    def num_bytes(self) -> int:
        """Return the size of all factors, vectors and virtual tokens in bytes."""
        tensors = _tensors(self.pairs, self.vectors, self.virtual)
        return sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)


def read_adapter(path: str | Path, name: str | None = None) -> Adapter:
    """Read an adapter's folder.

    Args:
        path: a folder that PEFT or mlx-lm wrote.
        name: the adapter's name; None takes the folder's name.

    Raises:
        AdapterError: it is incomplete, damaged, or cannot be blended; lists every problem.
    """
    folder = Path(path)
    name = name or folder.resolve().name
    mlx = None if is_file(folder / WEIGHTS_FILE) else mlx_file(folder)
    content = read_mlx_folder(folder, mlx, name) if mlx else read_peft_folder(folder, name)
    return Adapter(
        name=name,
        base_model=content.base_model,
        pairs=content.pairs,
        source=folder,
        vectors=content.vectors,
        initial=content.initial,
        weights=content.weights,
        virtual=content.virtual,
        identity=_identity(content),
    )


def files_of(adapter: Path) -> tuple[Path, ...]:
    """Return the files in an adapter's folder that make the adapter; none if the folder holds no adapter."""
    tensors = [adapter / name for name in (WEIGHTS_FILE, *MLX_FILES) if is_file(adapter / name)][:1]
    config = adapter / CONFIG_FILE
    return (config, *tensors) if is_file(config) else tuple(tensors)


def _identity(content: AdapterContent) -> str:
    """Return a digest of all tensors and scales."""
    digest = hashlib.sha256(content.initial.encode())
    weights = sorted((f"{path} weight", weight) for path, weight in content.weights.items())
    for name, tensor in chain(_tensors(content.pairs, content.vectors, content.virtual), weights):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)  # hashed without a copy
    return digest.hexdigest()


def _tensors(
    pairs: Mapping[str, LoraPair], vectors: Mapping[str, LayerVectors], virtual: VirtualTokens | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor with a name that says all about it."""
    for module, pair in sorted(pairs.items()):
        yield f"{module} A {pair.scale}", pair.a
        yield f"{module} B", pair.b
    for module, each in sorted(vectors.items()):
        for name, vector in each.given.items():
            yield f"{module} {name}", vector
    yield from (virtual.given.items() if virtual else ())
