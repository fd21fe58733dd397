"""Captures a step as a CUDA graph, and holds the data that changes between its replays."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from treadle.engine.runners.passes import PassOutput

Replay = Callable[[], PassOutput]


class CudaGraphs:
    """Captures GPU work as graphs, which share one memory pool because one runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Replay) -> Replay:
        """Return a function that replays `run`; it returns the same tensors each time, with new values."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # compiles kernels and allocates workspaces, which a capture cannot
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()

        def replay() -> PassOutput:
            graph.replay()
            return result

        return replay


class StepInputs:
    """The data that changes between steps, on the device, and its staging memory on the host.

    Attributes:
        ids: (B,) tokens.
        positions: (B, 1).
        first: (B,) the first column of each row.
        place: (3,) the number of columns of a buffer, the column to write to, and the number of real rows.
        weights: (B, N) of the adapters.
        pointers: (layers, 2) addresses of the cache's buffers.
    """

    def __init__(self, rows: int, num_adapters: int, num_layers: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        sizes = [rows, rows, rows, 3, 2 * num_layers]
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=is_cuda)
        self._host_weights = torch.zeros(rows, num_adapters, pin_memory=is_cuda)
        self._numbers = self._host.to(device)
        self.weights = self._host_weights.to(device)
        self.ids, positions, self.first, self.place, pointers = self._numbers.split(sizes)
        self.positions, self.pointers = positions[:, None], pointers.view(num_layers, 2)
        self._parts = self._host.split(sizes)
        self._copied = torch.cuda.Event() if is_cuda else None

    def set(
        self, ids: Tensor, pads: Sequence[int], weights: Tensor | None, place: tuple[int, int, int], pointers: list[int]
    ) -> None:
        """Copy the data of a step of `ids` (B,) to the device.

        `pads` counts the padding columns of each row; `place` is (columns of a buffer, column to write to, first one).
        """
        if self._copied:
            self._copied.synchronize()  # the last step's copies may still read the host memory
        rows, (columns, column, start) = len(ids), place
        left = torch.tensor(pads)  # (B,)
        host_ids, positions, first, where, addresses = self._parts
        host_ids[:rows], positions[:rows], first[:rows] = ids, column - start - left, start + left
        where[0], where[1], where[2] = columns, column, rows
        addresses.copy_(torch.tensor(pointers))
        self._numbers.copy_(self._host, non_blocking=True)
        if weights is not None:
            self._host_weights[:rows] = weights
            self.weights.copy_(self._host_weights, non_blocking=True)
        if self._copied:
            self._copied.record()
