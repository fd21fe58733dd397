"""Times decoding on a GPU with random models of known shapes: routing off, and weights that change every token.

    python benchmarks/gpu.py --output gpu.jsonl             # all steps, some minutes on an H100
    python benchmarks/gpu.py --only Llama-3-8B              # a part of them

It runs each shape with two sets of four adapters, over batches and contexts. Before anything is timed, logits are
compared with those of the model's own forward; tests/test_graph_step.py has the laws. Then steps with routing off and
blended run in turn, in blocks between two CUDA events. A line has the median and quartiles in milliseconds, the ratio
to routing off, and the bandwidth: reading weights, factors and cache once in this time, as a share of a large copy's.
Last come whole engine steps by the clock, router and sampling included. Each result is printed, and written to --output
as a line of JSON. Without a GPU, --only small shows that the script runs. `python -m benchmarks.peers` times other
libraries.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from gpu_lab import (
    ADAPTERS,
    DEVICE,
    SHAPES,
    build_engine,
    build_model,
    draw_prompts,
    draw_weights,
    random_cache,
    step_of,
)
from torch import Tensor

from treadle.common.params import RoutingParams
from treadle.common.transformers_names import cache_argument
from treadle.engine.engine import Engine
from treadle.engine.kv_cache import RowCache
from treadle.engine.runners.cuda.step import GraphStep
from treadle.experiments.timing import Machine, bandwidth, interleave
from treadle.experiments.workbench import cache_bytes, start_batch, step_bytes

BATCHES, CONTEXTS = (1, 8, 32, 128), (512, 4096)
SMALL_BATCHES, SMALL_CONTEXTS = (1, 3), (40,)
BLOCK_STEPS = 6
"""Steps between two events: the host prepares a step while the device computes the one before."""
SPARE_BYTES = 3 << 30
"""Bytes of the device's memory that a cache must leave."""
MAX_COMPARED_ROWS = 8
"""Rows at most of a batch that is compared with forward."""


@dataclass
class ResultLog:
    """Prints results and writes them down as they come."""

    output: Path | None
    started: float = field(default_factory=time.perf_counter)

    def __call__(self, kind: str, **facts: Any) -> None:
        """Print one result, and write it down."""
        print(f"[{self.seconds:5.0f} s] {kind}: {', '.join(f'{k} {_shown(v)}' for k, v in facts.items())}", flush=True)
        if self.output:
            with self.output.open("a") as file:
                file.write(json.dumps({"kind": kind, "at": round(self.seconds, 1), **facts}) + "\n")

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
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
        return {
            arm: [each / BLOCK_STEPS for each in seconds] for arm, seconds in interleave(arms, rounds, warm_up).items()
        }
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
                seconds[name].append(begin.elapsed_time(end) / 1e3 / BLOCK_STEPS)
    return seconds


def copied() -> float:
    """Return the bytes a second of a large copy, read and written."""
    if DEVICE != "cuda":
        return bandwidth(torch.device(DEVICE))
    source = torch.empty(1 << 31, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)

    def block() -> None:
        for _ in range(BLOCK_STEPS):
            target.copy_(source)

    return 2 * source.nbytes / median(in_turn({"copy": block}, rounds=9)["copy"])


def free() -> None:
    """Give back the device's memory that nothing uses."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class GpuLab:
    """One engine and how it is measured: `peak` are the bytes a second of a large copy."""

    engine: Engine
    name: str
    peak: float
    rounds: int
    report: ResultLog

    @property
    def step(self) -> GraphStep:
        """The engine's own step."""
        return next(each for each in self.engine.runner.own if isinstance(each, GraphStep))

    def run(self, batches: Sequence[int], contexts: Sequence[int], limit: float) -> None:
        """Compare with forward, then time every batch and context; begin nothing after `limit` seconds."""
        for batch in [each for each in batches if each <= MAX_COMPARED_ROWS]:
            with self.report.noting_out_of_memory(setting=self.name, batch=batch):
                self.compare(batch)
        for context in contexts:
            for batch in batches:
                if self.report.seconds < limit:
                    with self.report.noting_out_of_memory(setting=self.name, batch=batch, context=context):
                        self.steps(batch, context)
        for batch in batches[:2]:
            with self.report.noting_out_of_memory(setting=self.name, batch=batch):
                self.whole_steps(batch, contexts[0])

    def cache(self, batch: int, context: int) -> RowCache:
        """Return a random cache; OutOfMemoryError where it would not fit."""
        need = batch * (context + max(256, context // 4)) * cache_bytes(self.engine.model)
        if DEVICE == "cuda":
            room = torch.cuda.mem_get_info()[0]
            if need + SPARE_BYTES > room:
                raise torch.OutOfMemoryError(f"the cache needs {need / 1e9:.1f} GB, {room / 1e9:.1f} GB are free")
        return random_cache(self.engine.model, batch, context)

    def compare(self, batch: int, context: int = 64) -> None:
        """Compare a step's logits with those of the model's own forward."""
        model = self.engine.model
        ids = torch.arange(batch) * 7 % model.config.vocab_size
        for arm, weights in {"routing off": None, "blended": draw_weights(batch, 0)}.items():
            given = step_of(ids, [0] * batch, weights, self.cache(batch, context))
            logits = self.step.run(given).logits[:, 0].clone()
            inputs, past = ids[:, None].to(DEVICE), {cache_argument(model): self.cache(batch, context)}
            with torch.inference_mode(), self.engine.blend.using(weights):
                expected = model(input_ids=inputs, use_cache=True, **past).logits[:, -1]
            error = float((logits.double() - expected.double()).norm() / expected.double().norm())
            agree = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
            self.report("compare", setting=self.name, batch=batch, arm=arm, relative_error=error, same_argmax=agree)

    def steps(self, batch: int, context: int) -> None:
        """Time steps of routing off and blended in turn."""
        cache = self.cache(batch, context)
        arms = {"routing off": RoutingParams.base(), "blended": RoutingParams(every=1)}
        blocks = {arm: StepBlock(self.step, batch, cache, is_blended=arm == "blended") for arm in arms}
        seconds = in_turn(blocks, self.rounds)
        for arm, each in seconds.items():
            low, middle, high = quantiles(each, n=4, method="inclusive")
            self.report(
                "step",
                setting=self.name,
                batch=batch,
                context=context,
                arm=arm,
                ms=1e3 * middle,
                low=1e3 * low,
                high=1e3 * high,
                ratio=middle / median(seconds["routing off"]),
                bandwidth=step_bytes(self.engine, batch * context, is_blended=arm == "blended") / middle / self.peak,
                tokens_s=batch / middle,
            )

    def whole_steps(self, batch: int, context: int) -> None:
        """Time the engine's steps by the clock: router, sampling and host included."""
        prompts, tokens = draw_prompts(self.engine, batch, context), 8 * self.rounds
        routings = {"routing off": RoutingParams.base(), "every 1": RoutingParams(every=1)}
        units = {arm: start_batch(self.engine, prompts, tokens + 8, each).step for arm, each in routings.items()}
        before = self.step.num_captures
        seconds = interleave(units, tokens, warm_up=4)
        for arm, each in seconds.items():
            self.report(
                "engine step",
                setting=self.name,
                batch=batch,
                context=context,
                arm=arm,
                ms=1e3 * median(each),
                ratio=median(each) / median(seconds["routing off"]),
                tokens_s=batch / median(each),
                captures=self.step.num_captures - before,
            )


class StepBlock:
    """A block of steps, each with weights of its own."""

    def __init__(self, step: GraphStep, batch: int, cache: RowCache, *, is_blended: bool) -> None:
        self._step, self._cache, self._count = step, cache, 0
        self._ids: Tensor = torch.arange(batch)
        self._weights: list[np.ndarray | None] = [
            draw_weights(batch, seed) if is_blended else None for seed in range(16)
        ]

    def __call__(self) -> None:
        """Run the block."""
        for _ in range(BLOCK_STEPS):
            self._count += 1
            weights = self._weights[self._count % 16]
            self._step.run(step_of(self._ids, [0] * len(self._ids), weights, self._cache))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=["Llama-2-7B", "Llama-3-8B"], choices=SHAPES, help="`small` = a try"
    )
    parser.add_argument("--rounds", type=int, default=12, help="blocks of steps of each arm")
    parser.add_argument("--limit", type=float, default=540, help="seconds after which nothing more is begun")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if DEVICE != "cuda" and options.only != ["small"]:
        parser.error("there is no GPU here: give --only small, which shows that the script runs")
    measure(options, ResultLog(options.output))


def measure(options: argparse.Namespace, report: ResultLog) -> None:
    peak = copied()
    for shape in options.only:
        model = build_model(SHAPES[shape], DEVICE)
        report("machine", about=str(Machine.of(model)), copied_gb_s=peak / 1e9, shape=shape)
        for kind, (rank, targets) in ADAPTERS.items():
            if report.seconds > options.limit:
                continue
            engine = build_engine(model, rank, targets)
            lab = GpuLab(engine, f"{shape}, {kind}", peak, options.rounds, report)
            batches, contexts = (SMALL_BATCHES, SMALL_CONTEXTS) if shape == "small" else (BATCHES, CONTEXTS)
            lab.run(batches, contexts, options.limit)
            engine.detach()
            del engine, lab
            free()
        del model
        free()


if __name__ == "__main__":
    main()
