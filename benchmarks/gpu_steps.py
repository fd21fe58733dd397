"""Steps of one engine on a GPU: compared with the model's own forward, timed on the device and by the clock."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import numpy as np
import torch
from gpu_check import graph_of, random_cache, relative
from gpu_clock import BLOCK, DEVICE, Report, in_turn
from gpu_lab import cache_bytes, draw_prompts, draw_weights, step_of
from torch import Tensor

from treadle.common.params import RoutingParams
from treadle.common.transformers_names import cache_argument
from treadle.engine.engine import Engine
from treadle.engine.kv_cache import RowCache
from treadle.engine.runners.cuda.step import GraphStep
from treadle.experiments.timing import interleave
from treadle.experiments.workbench import started, step_bytes

SPARE = 3 << 30
"""Bytes of the device's memory that a cache must leave."""
COMPARED = 8
"""Rows at most of a batch that is compared with forward."""


@dataclass(frozen=True)
class Lab:
    """One engine and how it is measured: `peak` are the bytes a second of a large copy."""

    engine: Engine
    name: str
    peak: float
    rounds: int
    report: Report

    @property
    def step(self) -> GraphStep:
        """The engine's own step."""
        return graph_of(self.engine)

    def run(self, batches: Sequence[int], contexts: Sequence[int], limit: float) -> None:
        """Compare with forward, then time every batch and context; begin nothing after `limit` seconds."""
        for batch in [each for each in batches if each <= COMPARED]:
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
            if need + SPARE > room:
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
            error = relative(logits, expected)
            agree = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
            self.report("compare", setting=self.name, batch=batch, arm=arm, relative_error=error, same_argmax=agree)

    def steps(self, batch: int, context: int) -> None:
        """Time steps of routing off and blended in turn."""
        cache = self.cache(batch, context)
        arms = {"routing off": RoutingParams.base(), "blended": RoutingParams(every=1)}
        blocks = {arm: Steps(self.step, batch, cache, is_blended=arm == "blended") for arm in arms}
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
        units = {arm: started(self.engine, prompts, tokens + 8, each).step for arm, each in routings.items()}
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


class Steps:
    """A block of steps, each with weights of its own."""

    def __init__(self, step: GraphStep, batch: int, cache: RowCache, *, is_blended: bool) -> None:
        self._step, self._cache, self._count = step, cache, 0
        self._ids: Tensor = torch.arange(batch)
        self._weights: list[np.ndarray | None] = [
            draw_weights(batch, seed) if is_blended else None for seed in range(16)
        ]

    def __call__(self) -> None:
        """Run the block."""
        for _ in range(BLOCK):
            self._count += 1
            weights = self._weights[self._count % 16]
            self._step.run(step_of(self._ids, [0] * len(self._ids), weights, self._cache))
