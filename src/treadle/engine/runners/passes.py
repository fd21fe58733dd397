"""The input and output of a forward pass, and the protocol that all passes implement."""

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
    """The newest tokens of some rows; a pass reads them after the tokens that a cache holds.

    Attributes:
        ids: (B, T) tokens.
        pads: (B,) columns of padding before each row, counted in the whole text.
        weights: (B, 1 or T, N) of the blend's adapters; None if no row uses an adapter.
        combines: (B,) each row's combine.
        cache: of the same rows; the pass appends to it.
        among: (B,) the adapters that each row knows.
        lengths: (B,) tokens of each row's whole text, read or not yet.
        num_logits: K, the number of last columns whose logits are returned.
        layer: return the hidden states of this layer, counted as transformers' `hidden_states`: 0 is the embedding, and
            the last has passed the last norm.
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
        """True if each row has one new token after cached ones."""
        return self.cache.length > 0 and self.ids.shape[1] == self.num_logits == 1

    @property
    def is_sum(self) -> bool:
        """True if all rows with weights combine by `sum`."""
        if self.weights is None or set(self.combines) == {"sum"}:
            return True
        pairs = zip(self.combines, self.weights, strict=True)
        return all(combine == "sum" or not weights.any() for combine, weights in pairs)

    def positions(self) -> Tensor:
        """Return the position (B, T) of each token in its row's text; 0 in padding."""
        start, new = self.cache.length, self.ids.shape[1]
        return (torch.arange(start, start + new) - torch.tensor(self.pads)[:, None]).clamp(min=0)

    def mask(self) -> Tensor | None:
        """Return (B, L) int64, 0 in padding, L including the new tokens; None if no layer would see padding."""
        if not any(self.pads) or (self.ids.shape[1] == 1 and not self.cache.has_keys):
            return None
        columns = torch.arange(self.cache.length + self.ids.shape[1])
        return (columns >= torch.tensor(self.pads)[:, None]).long()


class PassOutput(NamedTuple):
    """Logits (B, K, V), and the hidden states (B, T, H) of the requested layer. The next pass may overwrite both."""

    logits: Tensor
    hidden: Tensor | None = None


class ForwardPass(Protocol):
    """One way to run the model."""

    def takes(self, given: PassInput) -> bool:
        """Return whether this pass computes the same as the model's own `forward` would."""
        ...

    def run(self, given: PassInput) -> PassOutput:
        """Read the tokens, and append their keys and values to the cache."""
        ...
