"""Measures the baselines that a reviewer asks for, on the rows and with the metric (nll) of `treadle eval`.

    python benchmarks/baselines.py arrow xlora --data ../shared/data -o work/studies/baselines [--limit 300]
    python benchmarks/baselines.py weights --validation work/validation2 -o work/studies/weights.toml

- `arrow`: PEFT's Arrow over the same adapters (training-free, per token and module; top 2 of 4).
- `xlora`: PEFT's X-LoRA with the same adapters and its classifier as it is initialised: its untrained limit.
- `weights`: nevergrad looks for fixed weights on validation examples: LoRAHub's way for each task (`lorahub-TASK`), and
  the best for all four together (`fixed-best`: more examples and steps, no penalty); written as arms for `treadle eval
  --arms`. Combined by `sum`, where LoRAHub weighs A and B.

Arrow and X-LoRA run in PEFT itself; their results lie in a folder that `benchmarks/claims.py` reads beside others.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
from nevergrad.optimization import registry
from nevergrad.parametrization.parameter import Array
from peers.peers import arrow, xlora

import treadle
from treadle.bundle.base_model import load_model, load_tokenizer, quiet_libraries
from treadle.common.params import EvalParams, RoutingParams
from treadle.engine.engine import Engine
from treadle.engine.scoring import BATCH
from treadle.engine.tokenization import completion_ids, prompt_ids
from treadle.experiments.results import EvalResult, interval, write_cell, write_results
from treadle.experiments.sets import load_sets
from treadle.experiments.tasks import PAPER, Example

BUNDLE = Path(__file__).parents[1] / "demo" / "bundle"
FILES = {
    "math": "gsm8k-test-even.jsonl.gz",
    "science": "arc_challenge-test-even.jsonl.gz",
    "code": "code_alpaca-test-a.jsonl.gz",
    "reading": "squad-validation-even.jsonl.gz",
}


@dataclass(frozen=True)
class Search:
    """How fixed weights are looked for: examples of each of some tasks, evaluations, factor of an L1 penalty."""

    tasks: Sequence[str]
    examples: int
    steps: int
    penalty: float


SEARCHES = {
    **{f"lorahub-{task}": Search([task], 5, 40, 0.05) for task in PAPER},  # as in LoRAHub's README
    "fixed-best": Search(PAPER, 24, 80, 0.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", choices=[*PEERS, "weights"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    if "weights" in options.arms and len(options.arms) > 1:
        parser.error("weights writes a file of arms, the others a folder of results: ask for it alone")
    missing = "--validation" if "weights" in options.arms else "--data"
    if getattr(options, missing[2:]) is None:
        parser.error(f"{options.arms[0]} needs {missing}")
    quiet_libraries()
    if "weights" in options.arms:
        search_weights(options.validation, options.output, options.dtype)
        return
    bundle = treadle.read_bundle(BUNDLE)
    folders = {adapter.name: adapter.source for adapter in bundle.adapters}
    tokenizer = load_tokenizer(bundle.base_model)
    specs = [f"{task}={options.data / FILES[task]}" for task in PAPER]
    for arm in options.arms:
        model = PEERS[arm](load_model(bundle.base_model, dtype=options.dtype), folders)
        for each in load_sets(specs, EvalParams(limit=options.limit)):
            started = time.perf_counter()
            scores = score(model, tokenizer, each.examples)
            seconds = time.perf_counter() - started
            values = [(-float(row.sum()), float(len(row))) for row in scores]
            value, low, high = interval(values, seed=0)
            rows = [{"index": index, "values": {"nll": list(pair)}} for index, pair in enumerate(values)]
            write_cell(options.output, arm, each.name, rows)
            common = {"routing": None, "source": each.source, "tokens": 0, "tokens_per_second": 0.0, "seed": 0,
                      "rows": each.rows}  # fmt: skip
            versions = {"treadle": treadle.__version__, "torch": torch.__version__, "peft": peft.__version__,
                        "base": bundle.base_model, "dtype": options.dtype}  # fmt: skip
            result = EvalResult(arm=arm, task=each.name, metric="nll", value=value, low=low, high=high, n=len(values),
                                seconds=seconds, versions=versions, **common)  # fmt: skip
            write_results(options.output, [result], append=True)
            print(f"{arm} on {each.name}: {value:.3f} ({low:.3f} to {high:.3f}), {seconds:.0f} s", flush=True)


PEERS: dict[str, Callable] = {"arrow": arrow, "xlora": xlora}


@torch.inference_mode()
def score(model: torch.nn.Module, tokenizer: object, examples: Sequence[Example]) -> list[np.ndarray]:
    """Return the log-probabilities (nats) of each completion's tokens, in plain forward passes."""
    pairs = [(prompt_ids(tokenizer, each.prompt), completion_ids(tokenizer, each.completion)) for each in examples]
    order = sorted(range(len(pairs)), key=lambda index: sum(map(len, pairs[index])))
    scores: dict[int, np.ndarray] = {}
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        rows = [pairs[index][0] + pairs[index][1][:-1] for index in chosen]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=model.device)
        mask = (torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]).long().to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for place, index in enumerate(chosen):
            prompt, answer = pairs[index]
            found = torch.log_softmax(logits[place, len(prompt) - 1 : len(prompt) - 1 + len(answer)].float(), -1)
            scores[index] = found[torch.arange(len(answer)), torch.tensor(answer)].cpu().numpy()
    return [scores[index] for index in range(len(pairs))]


def search_weights(validation: Path, output: Path, dtype: str) -> None:
    """Write arms of the fixed weights that nevergrad found."""
    engine = treadle.load(BUNDLE, dtype=dtype)
    names = engine.adapter_names
    specs = [f"{task}={validation / task}.jsonl.gz" for task in PAPER]
    lines: list[str] = []
    for arm, search in SEARCHES.items():
        sets = load_sets(specs, EvalParams(limit=search.examples))
        chosen = [each.examples for each in sets if each.name in search.tasks]

        def loss(weights: np.ndarray, chosen: Sequence[Sequence[Example]] = chosen, search: Search = search) -> float:
            fixed = RoutingParams(rule="fixed", fixed=dict(zip(names, weights.tolist(), strict=True)), every=None)
            nll = np.mean([nats_per_token(engine, examples, fixed) for examples in chosen])
            return float(nll + search.penalty * np.abs(weights).sum() / len(weights))

        start = Array(init=np.full(len(names), 1 / len(names))).set_bounds(0.0, 1.5)
        start.random_state.seed(0)
        best = registry["NGOpt"](start, budget=search.steps).minimize(loss).value
        found = ", ".join(f"{name} = {weight:.4f}" for name, weight in zip(names, best, strict=True))
        lines += [f"[arms.{arm}]", f"fixed = {{ {found} }}", 'every = "none"', ""]
        print(f"{arm}: {found}, loss {loss(best):.3f}", flush=True)
    output.write_text("\n".join(lines), "utf-8")


def nats_per_token(engine: Engine, examples: Sequence[Example], routing: RoutingParams) -> float:
    """Return the NLL of a task as `treadle eval` reports it: nats over tokens, of all examples together."""
    rows = engine.score([e.prompt for e in examples], [e.completion for e in examples], routing=routing)
    return -float(np.concatenate(rows).mean())


if __name__ == "__main__":
    main()
