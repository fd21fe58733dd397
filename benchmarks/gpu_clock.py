"""The clock of benchmarks/gpu.py: steps between two CUDA events, and where its results go."""

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from treadle.experiments.timing import bandwidth, interleave

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 6
"""Steps between two events: the host prepares a step while the device computes the one before."""


@dataclass
class Report:
    """Prints results and writes them down as they come."""

    output: Path | None
    started: float = field(default_factory=time.perf_counter)

    def __call__(self, kind: str, **facts: Any) -> None:
        """Report one result."""
        print(f"[{self.seconds:5.0f} s] {kind}: {', '.join(f'{k} {_shown(v)}' for k, v in facts.items())}", flush=True)
        if self.output:
            with self.output.open("a") as file:
                file.write(json.dumps({"kind": kind, "at": round(self.seconds, 1), **facts}) + "\n")

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.started

    @contextmanager
    def noting_out_of_memory(self, **facts: Any) -> Iterator[None]:
        """Report a lack of memory as a result."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self("out of memory", **facts, note=str(error).splitlines()[0][:160])
        free()


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def in_turn(arms: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Return the seconds a step of each arm in each round, between two events on the device; all run once a round."""
    if DEVICE != "cuda":
        return {arm: [each / BLOCK for each in seconds] for arm, seconds in interleave(arms, rounds, warm_up).items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(warm_up + rounds):
        for name, unit in arms.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            unit()
            end.record()
            end.synchronize()
            if index >= warm_up:
                seconds[name].append(begin.elapsed_time(end) / 1e3 / BLOCK)
    return seconds


def copied() -> float:
    """Return the bytes a second of a large copy, read and written."""
    if DEVICE != "cuda":
        return bandwidth(torch.device(DEVICE))
    source = torch.empty(1 << 31, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)

    def block() -> None:
        for _ in range(BLOCK):
            target.copy_(source)

    return 2 * source.nbytes / median(in_turn({"copy": block}, rounds=9)["copy"])


def free() -> None:
    """Give back the device's memory that nothing uses."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
