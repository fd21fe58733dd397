"""Tries targets, ranks and learning rates with a few steps of training, and prints what held-back rows think of them.

    python benchmarks/targets.py --base BASE --task science --train ROWS --held OTHER_ROWS

All runs see the same sequences in the same order. Five thousand tokens a run: about three minutes on two idle cores.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel

from treadle.bundle.base_model import load_model, load_tokenizer
from treadle.experiments.data import load_examples
from treadle.experiments.params import TrainParams
from treadle.experiments.train import IGNORED_LABEL, train_adapter, training_rows

QV = ("q_proj", "v_proj")
ALL = ("all-linear",)
# targets, rank, learning rate; rank 2 of all linear layers has as many bytes as rank 16 of q and v
TRIALS = [(QV, 16, 1e-3), (QV, 16, 5e-4), (ALL, 2, 1e-3), (ALL, 4, 1e-3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--train", type=Path, required=True, help="rows of the task to train on")
    parser.add_argument("--held", type=Path, required=True, help="rows of the task that measure")
    parser.add_argument("--steps", type=int, default=10, help="of 8 sequences")
    parser.add_argument("--limit", type=int, default=64, help="held-back rows")
    parser.add_argument("--work", type=Path, default=Path("work/targets"))
    options = parser.parse_args()
    held = load_examples(options.held, options.task, limit=options.limit, seed=1)
    rows = list(training_rows(load_tokenizer(options.base), held, (), TrainParams(join=0, max_tokens=1024)))
    print("| targets | rank | learning rate | NLL |\n|---|---|---|---|")
    print(f"| none | | | {nll(options.base, None, rows):.3f} |", flush=True)
    examples = load_examples(options.train, options.task, limit=options.steps * 8)
    for targets, rank, rate in TRIALS:
        params = TrainParams(targets=targets, rank=rank, alpha=2 * rank, learning_rate=rate, steps=options.steps)
        output = options.work / options.task / f"{targets[0]}-{rank}-{rate}"
        train_adapter(options.base, examples, output, params=params)
        print(f"| {', '.join(targets)} | {rank} | {rate} | {nll(options.base, output, rows):.3f} |", flush=True)


@torch.inference_mode()
def nll(base: str, adapter: Path | None, rows: list[dict[str, list[int]]]) -> float:
    """Return the mean negative log-likelihood (nats per token) of the answers of rows."""
    model = load_model(base, device="cpu", dtype="bfloat16")
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor(row["labels"][1:])
        learned = labels != IGNORED_LABEL
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1][learned].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels[learned], reduction="sum"))
        count += int(learned.sum())
    return total / count


if __name__ == "__main__":
    main()
