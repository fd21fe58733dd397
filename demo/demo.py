"""Shows the bundle at work: one prompt of each domain and one that changes domain midway, coloured by leading adapter.

    python demo/demo.py [--max-tokens 96] [--svg docs/demo.svg]

Ends with a table of mean weights. Exit code 0 only if every prompt was answered and the router led with the adapter of
the prompt's domain.
"""

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

import treadle
from treadle.bundle.base_model import quiet_libraries
from treadle.cli.console import legend, mean_weights, print_coloured, stream_coloured, weights_table
from treadle.common.params import SamplingParams
from treadle.engine.scoring import trace_weights
from treadle.engine.tokenization import Detokenizer, prompt_ids
from treadle.experiments.tasks import TASKS

WINDOW = 24  # tokens
BUNDLE = Path(__file__).parent / "bundle"
# written for this demo, in the formats of treadle.experiments.tasks
PROMPTS = {
    "math": TASKS["math"].read({
        "question": "A farmer has 3 fields with 12 rows of corn each. She sells the corn of 10 rows. "
        "How many rows of corn are left?",
        "answer": "",
    }),
    "science": TASKS["science"].read({
        "question": "Which of these makes plants green?",
        "choices": {"text": ["iron", "chlorophyll", "sugar", "oxygen"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    }),
    "code": TASKS["code"].read({
        "instruction": "Write a Python function that returns the largest number in a list.", "input": "", "output": "",
    }),
    "reading": TASKS["reading"].read({
        "context": "The University of Padua was founded in 1222 by students and professors who had left Bologna. "
        "Galileo Galilei held the chair of mathematics there between 1592 and 1610. In 1678 Elena Cornaro Piscopia "
        "became the first woman to be awarded a doctoral degree by the university.",
        "question": "Who was the first woman to be awarded a doctoral degree?",
        "answers": {"text": [""]},
    }),
}  # fmt: skip
CHANGE = (PROMPTS["math"].prompt + " There are 3 * 12 = 36 rows. 36 - 10 = 26 rows are left.\n#### 26\n\n"
          + PROMPTS["code"].prompt)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--svg", type=Path, help="also draw what was shown to this file")
    options = parser.parse_args()
    quiet_libraries()
    console = Console(record=options.svg is not None, width=124 if options.svg else None)
    engine = treadle.load(BUNDLE)
    sampling = SamplingParams(max_tokens=options.max_tokens)

    console.print("Every token has the colour of its leading adapter:", legend(engine.adapter_names))
    rows: list[tuple[str, np.ndarray]] = []
    for name, example in PROMPTS.items():
        console.rule(name, align="left")
        console.print(example.prompt, style="dim", end="", highlight=False, markup=False)
        rows.append((name, mean_weights(stream_coloured(console, engine.stream(example.prompt, sampling=sampling)))))

    # a window lets go of what has been; causal weighs each token of the prompt by the text up to it, so it has colours
    routing = replace(engine.router.params, window=WINDOW, prefill="causal")
    console.rule(Text(f"math, then code (window={WINDOW}, prefill=causal)"), align="left")
    ids = prompt_ids(engine.tokenizer, CHANGE)
    text = Detokenizer(engine.tokenizer)
    print_coloured(console, [text.push(each) for each in ids], trace_weights(engine, ids, len(ids), routing))
    events = stream_coloured(console, engine.stream(CHANGE, sampling=sampling, routing=routing))
    rows.append(("math, then code", mean_weights(events)))
    console.print(weights_table("mean weights while answering", engine.adapter_names, rows))
    if options.svg:
        svg = console.export_svg(title="treadle: four adapters, one model")
        options.svg.write_text(
            re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), "utf-8"
        )  # no font from the web

    lost = [name for name, weights in rows if engine.adapter_names[weights.argmax()] != name.split(" ")[-1]]
    if lost:
        sys.exit(f"the router led with another adapter on: {', '.join(lost)}")


if __name__ == "__main__":
    main()
