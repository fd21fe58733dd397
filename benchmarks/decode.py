"""Measures decoding with four blended adapters against transformers' own `generate` of the bare base.

    python benchmarks/decode.py [--tokens 64] [--rounds 5]

Interleaved runs in one process (A B C A B C ...) after a warm-up; prints medians and quartiles of seconds a step, and
the ratio of each median to that of transformers. All arms generate the same number of tokens greedily; a step's time is
that of the whole call, prompt included, over the tokens.
"""

import argparse
import platform
import time
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
import transformers

import treadle
from treadle.models import load_model, quiet_libraries
from treadle.params import RoutingParams, SamplingParams

BUNDLE = Path(__file__).parents[1] / "demo" / "bundle"
PROMPT = "Question: A farmer has 3 fields with 12 rows of corn each. How many rows are there?\n\nAnswer:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    quiet_libraries()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}, {options.tokens} tokens, "
          f"{options.rounds} rounds\n")  # fmt: skip
    print("| dtype | batch | arm | ms a step (quartiles) | against transformers |\n|---|---|---|---|---|")
    for dtype in options.dtype:
        engine = treadle.load(options.bundle, dtype=dtype)
        plain = load_model(treadle.read_bundle(options.bundle).base_model, dtype=dtype)
        for batch in options.batch:
            treadle_arm = partial(treadle_generate, engine, batch, options.tokens)
            arms = {
                "transformers generate, base": partial(transformers_generate, plain, engine, batch, options.tokens),
                "treadle, routing off": partial(treadle_arm, RoutingParams.base()),
                "treadle, four adapters, every 2": partial(treadle_arm, RoutingParams(every=2)),
                "treadle, four adapters, every 1": partial(treadle_arm, RoutingParams(every=1)),
            }
            report(dtype, batch, measure(arms, options.rounds, options.tokens))


def measure(arms: dict, rounds: int, tokens: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in arms}
    for round_index in range(rounds + 1):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm()
            if round_index:  # the first round warms up
                times[name].append((time.perf_counter() - started) / tokens)
    return times


def report(dtype: str, batch: int, times: dict[str, list[float]]) -> None:
    reference = median(next(iter(times.values())))
    for name, seconds in times.items():
        low, _, high = (1000 * value for value in quantiles(seconds, n=4))
        middle = median(seconds)
        print(f"| {dtype} | {batch} | {name} | {middle * 1000:.1f} ({low:.1f}-{high:.1f}) | {middle / reference:.3f} |",
              flush=True)  # fmt: skip


def treadle_generate(engine: treadle.Engine, batch: int, tokens: int, routing: RoutingParams) -> None:
    engine.model.generation_config.eos_token_id = None  # no arm may end early
    engine.tokenizer.eos_token = None
    done = engine.generate([PROMPT] * batch, sampling=SamplingParams(max_tokens=tokens), routing=routing)
    assert all(len(each.token_ids) == tokens for each in done)


def transformers_generate(model: torch.nn.Module, engine: treadle.Engine, batch: int, tokens: int) -> None:
    ids = torch.tensor([engine.tokenizer(PROMPT).input_ids] * batch)
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    assert output.shape[1] == ids.shape[1] + tokens


if __name__ == "__main__":
    main()
