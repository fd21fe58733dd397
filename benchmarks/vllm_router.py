"""Prints what the weights of a step cost in the scheduler of the vLLM plugin, by itself: no vLLM, no model.

    python benchmarks/vllm_router.py [--streams 64] [--steps 100] [--every 1 2] [--cold 64]

The texts are this repository's documentation, cut into as many streams, one token a step and stream; a decision falls
due at different steps of different streams. Medians of all steps: by the clock on the wall, and of the thread's own
time, which other work on the machine disturbs less. `benchmarks/vllm_speed.py` times the same inside the engine, where
the model has emptied the caches in between; `--cold MIB` writes this much before each step, which empties them too.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from time import perf_counter, thread_time

import numpy as np
from numpy.typing import NDArray

from treadle.bundle.base_model import load_tokenizer
from treadle.common.files import locate
from treadle.serving.vllm.mixture import open_bundle
from treadle.serving.vllm.params import PluginParams
from treadle.serving.vllm.schedule import Schedule

ROOT = Path(__file__).parents[1]
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT, ROUNDS = 20, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cold", type=int, default=0, metavar="MIB", help="written before each step; 0 = nothing")
    options = parser.parse_args()
    room = np.ones(options.cold << 20, np.uint8)
    _, mixture = open_bundle(PluginParams(bundle=str(ROOT / "demo" / "bundle")))
    tokenizer = load_tokenizer(locate(BASE))
    ids = tokenizer("\n".join(file.read_text("utf-8") for file in sorted((ROOT / "docs").glob("*.md")))).input_ids
    head = "| every | decisions a step | clock | ms a step | us a stream and step | us a decision |"
    print(f"{head}\n|---|---|---|---|---|---|")
    for every in options.every:
        once = partial(run, ids=ids, count=options.streams, steps=options.steps, every=every, room=room)
        once(Schedule(mixture, tokenizer))  # words are looked up once
        rounds = [once(Schedule(mixture, tokenizer)) for _ in range(ROUNDS)]
        taken = [step for each in rounds for step in each]
        due = options.streams / every
        for clock, seconds in zip(("wall", "thread"), zip(*taken, strict=True), strict=True):
            micros = 1e6 * mean_of_cycle(seconds, every)
            print(f"| {every} | {due:.0f} | {clock} | {micros / 1e3:.2f} | {micros / options.streams:.1f} | "
                  f"{micros / due:.1f} |", flush=True)  # fmt: skip


def mean_of_cycle(seconds: Sequence[float], every: int) -> float:
    """Return the median seconds of a step; where streams are due at different steps, the mean of each one's median."""
    return mean(median(seconds[phase::every]) for phase in range(every))


def run(
    schedule: Schedule, ids: list[int], count: int, steps: int, every: int, room: NDArray[np.uint8]
) -> list[tuple[float, float]]:
    """Return the seconds of each step: on the wall, and of the thread; `room` is written to before each."""
    streams = [(f"{index}", schedule.open({"every": every}, PROMPT + index % every)) for index in range(count)]
    stride = (len(ids) - PROMPT - every - steps) // count
    texts = [ids[index * stride :][: PROMPT + every + steps] for index in range(count)]
    first = PROMPT + every
    pairs = list(zip(streams, texts, strict=True))
    schedule.plan([(name, stream, text[:first], 0, first) for (name, stream), text in pairs])
    taken: list[tuple[float, float]] = []
    for end in range(first + 1, first + steps + 1):
        entries = [(name, stream, text[:end], end - 1, end) for (name, stream), text in pairs]  # as vLLM has them
        room += 1
        started, own = perf_counter(), thread_time()
        schedule.plan(entries)
        taken.append((perf_counter() - started, thread_time() - own))
    return taken


if __name__ == "__main__":
    main()
