"""The gates of the tokens of a step, which all stacks read, and room that they share. Nothing here imports vLLM."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from treadle.routing.centroids import Floats

KEPT = 64
"""Tokens up to which what a packed layer writes to is kept from step to step: at most 64 rows of each width."""


class GateBoard(nn.Module):
    """The gates of the tokens of a step, (T, R) for each layout of ranks, at addresses that never change."""

    def __init__(self, num_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.device, self.dtype = device, dtype
        self._layouts: dict[tuple[int, ...], int] = {}
        self._kept: dict[int, Tensor] = {}

    def kept(self, num_tokens: int, size: int) -> Tensor:
        """Return room (T, size) for what a layer is done with when it returns; all layers share it."""
        if size not in self._kept:
            self._kept[size] = torch.empty(KEPT * size, device=self.device, dtype=self.dtype)
        return self._kept[size][: num_tokens * size].view(num_tokens, size)

    def layout(self, owners: tuple[int, ...]) -> int:
        """Return the number of the layout whose columns belong to these slots, (R,)."""
        if owners not in self._layouts:
            index = self._layouts[owners] = len(self._layouts)
            self.register_buffer(f"owners_{index}", torch.tensor(owners, device=self.device), persistent=False)
            gates = torch.zeros(self.num_tokens, len(owners), device=self.device, dtype=self.dtype)
            self.register_buffer(f"gates_{index}", gates, persistent=False)
        return self._layouts[owners]

    def gates(self, layout: int) -> Tensor:
        """Return the gates (tokens at most, R) of a layout."""
        return self.get_buffer(f"gates_{layout}")

    @torch.inference_mode()
    def fill(self, rows: Floats, counts: Sequence[int]) -> None:
        """Set the gates of a step's tokens, from its runs.

        Args:
            rows: (S, slots), the gates of each run.
            counts: how many tokens each run has.
        """
        total = sum(counts)
        if total > self.num_tokens:
            raise RuntimeError(f"a step of {total} tokens; there are gates for {self.num_tokens}")
        step = torch.from_numpy(np.repeat(rows, counts, 0) if total != len(rows) else rows)  # (T, slots)
        if self.device.type == "cuda":
            step = step.pin_memory()  # a fresh one each step: the copy of the step before may still be running
        step = step.to(self.device, non_blocking=True).to(self.dtype)
        for layout in range(len(self._layouts)):
            chosen = step.index_select(1, self.get_buffer(f"owners_{layout}"))
            self.gates(layout)[:total].copy_(chosen)  # (T, R)
