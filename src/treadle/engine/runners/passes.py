"""What a forward pass is given and what it makes: the protocol that all of our passes follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from treadle.common.params import Combine
from treadle.engine.kv_cache import RowCache
from treadle.routing.centroids import Floats


@dataclass(frozen=True)
class PassInput:
    """The newest tokens of some rows, which a pass reads behind what a cache holds.

    Attributes:
        ids: (B, T) tokens.
        pads: (B,) columns of padding before each row, counted in the whole text.
        weights: (B, 1 or T, N) of the blend's adapters; None where no adapter acts on any row.
        combines: (B,) how each row's adapters are combined.
        cache: of the same rows; the pass appends to it.
        among: (B,) the adapters that each row knows of.
        lengths: (B,) tokens of each row's whole text, read or yet to be read.
        num_logits: K, of how many of the last columns logits are asked for.
        layer: whose hidden states are asked for, counted as transformers' `hidden_states`: 0 is the embedding, and the
            last has passed the model's last norm.
    """

    ids: Tensor
    pads: Sequence[int]
    weights: Floats | None
    combines: Sequence[Combine]
    cache: RowCache
    among: Sequence[Sequence[str]]
    lengths: Sequence[int]
    num_logits: int = 1
    layer: int | None = None

    @property
    def is_step(self) -> bool:
        """Whether each row has one new token behind others."""
        return self.cache.length > 0 and self.ids.shape[1] == self.num_logits == 1

    @property
    def is_sum(self) -> bool:
        """Whether all rows that have weights combine them by `sum`."""
        if self.weights is None or set(self.combines) == {"sum"}:
            return True
        pairs = zip(self.combines, self.weights, strict=True)
        return all(combine == "sum" or not weights.any() for combine, weights in pairs)

    def positions(self) -> Tensor:
        """Return the place (B, T) of each token in its row's text; 0 in padding."""
        start, new = self.cache.length, self.ids.shape[1]
        return (torch.arange(start, start + new) - torch.tensor(self.pads)[:, None]).clamp(min=0)

    def mask(self) -> Tensor | None:
        """Return (B, L) int64, 0 where a row has padding, L counting the new tokens; None where there is none."""
        if not any(self.pads):
            return None
        columns = torch.arange(self.cache.length + self.ids.shape[1])
        return (columns >= torch.tensor(self.pads)[:, None]).long()


class PassOutput(NamedTuple):
    """What a pass makes: logits (B, K, V), and the hidden states (B, T, H) of the layer that was asked for.

    The next pass may overwrite both.
    """

    logits: Tensor
    hidden: Tensor | None = None


class ForwardPass(Protocol):
    """One way to run the model."""

    def takes(self, given: PassInput) -> bool:
        """Whether it computes this as the model's own `forward` would."""
        ...

    def run(self, given: PassInput) -> PassOutput:
        """Read the tokens, and append their keys and values to the cache."""
        ...
