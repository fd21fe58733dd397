"""The same calls by PEFT, for benchmarks/gpu.py: each peer has its own model, and is timed in turn with treadle."""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from gpu_clock import DEVICE, Report, free
from gpu_lab import (
    ADAPTERS,
    NUM_ADAPTERS,
    SHAPES,
    build_engine,
    build_model,
    draw_adapters,
    draw_prompts,
    save_adapters,
)
from peers.peers import arrow, next_token, one_adapter, xlora

from treadle.common.params import RoutingParams
from treadle.engine.engine import Engine
from treadle.experiments.decode import transformers_generate
from treadle.experiments.timing import interleave
from treadle.experiments.workbench import run

MakePeer = Callable[[Any, Mapping[str, Path]], Any]
CACHED: dict[str, MakePeer] = {"PEFT, one adapter": one_adapter, "PEFT Arrow, top 2": arrow}
UNCACHED: dict[str, MakePeer] = {"PEFT X-LoRA, untrained": xlora}
"""It reads the whole text for each token, of one row."""


def report_peers(shape: str, kind: str, rounds: int, report: Report) -> None:
    """Report calls of each peer next to treadle's."""
    rank, targets = ADAPTERS[kind]
    length, tokens = (40, 8) if shape == "small" else (512, 32)
    model = build_model(SHAPES[shape], DEVICE)
    adapters = draw_adapters(model, NUM_ADAPTERS, rank, targets)
    engine = build_engine(model, adapters)
    with tempfile.TemporaryDirectory() as root:
        folders = save_adapters(adapters, rank, targets, Path(root))
        for name, make in (CACHED | UNCACHED).items():
            for batch in (1, 8) if name in CACHED else (1,):
                with report.noting_out_of_memory(setting=f"{shape}, {kind}", arm=name, batch=batch):
                    peer = make(build_model(SHAPES[shape], DEVICE), folders)
                    prompts = draw_prompts(engine, batch, length)
                    made = tokens if name in CACHED else 1
                    whole = partial(transformers_generate, peer, prompts, tokens)
                    unit = whole if name in CACHED else partial(next_token, peer, prompts[0], only_last=True)
                    seconds = interleave({**treadle_calls(engine, prompts, tokens), name: unit}, rounds)
                    del peer, unit, whole
                    for arm, each in seconds.items():
                        report_call(report, arm, median(each), batch, length, made if arm == name else tokens)
                free()


def treadle_calls(engine: Engine, prompts: list[list[int]], tokens: int) -> dict[str, Callable[[], object]]:
    """Return treadle's arms, each a call that makes `tokens` tokens a row."""
    return {
        "treadle, routing off": partial(run, engine, prompts, tokens, RoutingParams.base()),
        "treadle, every 1": partial(run, engine, prompts, tokens, RoutingParams(every=1)),
    }


def report_call(report: Report, arm: str, seconds: float, batch: int, length: int, made: int) -> None:
    """Report a call that reads `length` tokens a row and makes `made`."""
    title = f"reads {length} tokens, makes {made}; per made token"
    report("call", title=title, batch=batch, arm=arm, ms=1e3 * seconds / made, tokens_s=batch * made / seconds)
