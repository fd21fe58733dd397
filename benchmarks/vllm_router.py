"""Prints what the weights of a step cost in the scheduler of the vLLM plugin, by itself: no vLLM, no model.

    python benchmarks/vllm_router.py [--streams 64] [--steps 100] [--every 1 2]

The texts are this repository's documentation, cut into as many streams, one token a step and stream; a decision falls
due at different steps of different streams. `benchmarks/vllm_speed.py` times the same inside the engine, where the
model has emptied the caches in between.
"""

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter

from treadle.models import load_tokenizer, locate
from treadle.vllm_plugin.mixture import open_bundle
from treadle.vllm_plugin.params import PluginParams
from treadle.vllm_plugin.schedule import Schedule

ROOT = Path(__file__).parents[1]
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT, ROUNDS = 20, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    _, mixture = open_bundle(PluginParams(bundle=str(ROOT / "demo" / "bundle")))
    tokenizer = load_tokenizer(locate(BASE))
    ids = tokenizer("\n".join(file.read_text("utf-8") for file in sorted((ROOT / "docs").glob("*.md")))).input_ids
    print("| every | decisions a step | ms a step | us a stream and step | us a decision |\n|---|---|---|---|---|")
    for every in options.every:
        run(Schedule(mixture, tokenizer), ids, options.streams, options.steps, every)  # words are looked up once
        taken = median(
            run(Schedule(mixture, tokenizer), ids, options.streams, options.steps, every) for _ in range(ROUNDS)
        )
        due, micros = options.streams / every, 1e6 * taken
        print(f"| {every} | {due:.0f} | {micros / 1e3:.2f} | {micros / options.streams:.1f} | {micros / due:.1f} |")


def run(schedule: Schedule, ids: list[int], count: int, steps: int, every: int) -> float:
    """Return the seconds of a step, the mean over all."""
    streams = [(f"{index}", schedule.open({"every": every}, PROMPT + index % every)) for index in range(count)]
    stride = (len(ids) - PROMPT - every - steps) // count
    texts = [ids[index * stride :][: PROMPT + every + steps] for index in range(count)]
    first = PROMPT + every
    schedule.plan([(name, stream, text, 0, first) for (name, stream), text in zip(streams, texts, strict=True)])
    started = perf_counter()
    for end in range(first + 1, first + steps + 1):
        schedule.plan([(name, stream, text, end - 1, end) for (name, stream), text in zip(streams, texts, strict=True)])
    return (perf_counter() - started) / steps


if __name__ == "__main__":
    main()
