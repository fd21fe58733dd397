"""Prints how often the nearest adapter is right for bare questions and for the same questions as chats.

    python benchmarks/chats.py --data ../shared/data

A chat is a user's message, alone or behind a system message of the user's own. "rendered" is what the base's chat
template makes of the message, read as a plain text: how chats were routed at first. No base model is run; only its
tokenizer is loaded. ARC's questions are asked without their choices too.
"""

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import treadle
from treadle.bundle.base_model import load_tokenizer
from treadle.common.params import SamplingParams
from treadle.engine.chat import contents_of, joined, read_prompt
from treadle.engine.decisions import update_weights
from treadle.engine.sample_files import read_rows
from treadle.engine.sequence import TokenSequence
from treadle.engine.tokenization import chat_text
from treadle.experiments.data import load_examples
from treadle.routing.router import Router

BUNDLE = Path(__file__).parents[1] / "demo" / "bundle"
FILES = {
    "math": "gsm8k-test-even",
    "science": "arc_challenge-test-even",
    "code": "code_alpaca-test-a",
    "reading": "squad-validation-even",
}
ROWS = 200
SYSTEM = "You are a helpful assistant."
PERSONA = (
    "You are Ada, the assistant of a small company that sells garden tools. You are friendly and patient, you answer "
    "in short and simple sentences, you never use slang, and you say so when you do not know something."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    options = parser.parse_args()
    bundle = treadle.read_bundle(options.bundle)
    tokenizer, router = load_tokenizer(bundle.base_model), bundle.router
    print("| task | bare | rendered | chat | chat, short system message | chat, persona |\n|---|---|---|---|---|---|")
    shares: list[list[float]] = []
    for task, file in FILES.items():
        examples = load_examples(options.data / f"{file}.jsonl.gz", task, limit=ROWS, seed=0)
        shares.append(measure(router, tokenizer, task, [each.bare for each in examples]))
        print_row(task, shares[-1])
    print_row("mean", np.mean(shares, 0).tolist())
    rows = islice(read_rows(options.data / f"{FILES['science']}.jsonl.gz"), ROWS)
    questions = [str(row["question"]) for row in rows]
    print_row("science, questions alone", measure(router, tokenizer, "science", questions))


def measure(router: Router, tokenizer: Any, task: str, asked: list[str]) -> list[float]:
    """Return the share of questions whose nearest adapter is the task's, of each form of them."""
    users = [[{"role": "user", "content": text}] for text in asked]
    forms: list[list[Any]] = [asked, [chat_text(tokenizer, each) for each in users], users]
    forms += [[[{"role": "system", "content": said}, *each] for each in users] for said in (SYSTEM, PERSONA)]
    weights = [weigh(router, tokenizer, form) for form in forms]
    np.testing.assert_array_equal(weights[0], weights[2])  # the law: a chat of one message is routed as its text
    for form, found in zip(forms[3:], weights[3:], strict=True):
        texts = [joined(contents_of(messages)) for messages in form]
        np.testing.assert_array_equal(found, weigh(router, tokenizer, texts))
    own = router.names.index(task)
    return [float((each.argmax(-1) == own).mean()) for each in weights]


def weigh(router: Router, tokenizer: Any, prompts: list[Any]) -> np.ndarray:
    """Return the weights (B, N) under which the engine would read prompts."""
    sampling = SamplingParams()
    rows = [TokenSequence(read_prompt(tokenizer, each), router, router.params, sampling, tokenizer) for each in prompts]
    update_weights(rows)
    return np.stack([row.weights for row in rows])


def print_row(name: str, shares: list[float]) -> None:
    print(f"| {name} | " + " | ".join(f"{share:.3f}" for share in shares) + " |", flush=True)


if __name__ == "__main__":
    main()
