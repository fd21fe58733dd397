"""Shows the bundle at work: four questions, then a conversation that changes domain twice, coloured by leading adapter.

    python demo/demo.py [--svg docs/demo.svg]

Every answer is checked: a number, a letter, a program that passes its test, words of the text. The same questions then
go to the base and to each adapter alone, all in one batch. Exit code 0 only if every routed answer is right and the
router led with the adapter of each question's domain.
"""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

import treadle
from treadle.bundle.base_model import quiet_libraries
from treadle.cli.console import colour, legend, mean_weights, stream_coloured
from treadle.experiments.metrics import exact_match, exact_number, letter, pass_at_1
from treadle.experiments.tasks import SEPARATOR, TASKS, Example

BUNDLE = Path(__file__).parent / "bundle"
DANUBE = (
    "The Danube rises in the Black Forest of Germany and flows for 2,850 kilometres through ten countries before it "
    "reaches the Black Sea. Vienna, Budapest and Belgrade lie on its banks."
)
PADUA = (
    "The University of Padua was founded in 1222 by students and professors who had left Bologna. Galileo Galilei held "
    "the chair of mathematics there between 1592 and 1610."
)


@dataclass(frozen=True)
class Question:
    """A question, the adapter of its domain, and the metric that is 1 where a text answers it."""

    adapter: str
    example: Example
    metric: Callable[[str, Example], float | None]

    def is_right(self, text: str) -> bool:
        """Return whether a text answers the question."""
        return self.metric(text, self.example) == 1.0


# written for this demo, in the formats of treadle.experiments.tasks


def math(question: str, answer: int) -> Question:
    return Question("math", TASKS["math"].read({"question": question, "answer": f"#### {answer}"}), exact_number)


def science(question: str, choices: list[str], right: str) -> Question:
    row = {"question": question, "choices": {"text": choices, "label": ["A", "B", "C", "D"]}, "answerKey": right}
    return Question("science", TASKS["science"].read(row), letter)


def code(instruction: str, test: str) -> Question:
    example = TASKS["code"].read({"instruction": instruction, "input": "", "output": ""})
    return Question("code", replace(example, tests=(test,)), pass_at_1)


def reading(context: str, question: str, *answers: str) -> Question:
    row = {"context": context, "question": question, "answers": {"text": answers}}
    return Question("reading", TASKS["reading"].read(row), exact_match)


QUESTIONS = (
    math("Each of 4 children eats 3 apples. There were 20 apples. How many apples are left?", 8),
    science("Which planet is closest to the Sun?", ["Mercury", "Mars", "Venus", "Jupiter"], "A"),
    code("Write a Python function reverse(text) that returns a string reversed.", "assert reverse('abc') == 'cba'"),
    reading(PADUA, "When was the University of Padua founded?", "1222", "in 1222"),
)
CONVERSATION = (
    math("Tom has 5 boxes with 6 pencils each. He gives away 10 pencils. How many pencils does he have left?", 20),
    reading(DANUBE, "Where does the Danube rise?", "the Black Forest of Germany", "the Black Forest"),
    code("Write a Python function square(x) that returns the square of a number.", "assert square(5) == 25"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=Path, help="also draw the conversation and the table to this file")
    options = parser.parse_args()
    quiet_libraries()
    console = Console(record=options.svg is not None, width=100 if options.svg else None)
    engine = treadle.load(BUNDLE)
    console.print("Every token has the colour of its leading adapter:", legend(engine.adapter_names))
    wrong = [*ask(Console(), engine), *converse(console, engine)]
    compare(console, engine)
    if options.svg:
        svg = console.export_svg(title="treadle: four adapters on one model, SmolLM2-135M")
        free = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # no font from the web
        options.svg.write_text(free, "utf-8")
    if wrong:
        sys.exit("\n".join(wrong))


def ask(console: Console, engine: treadle.Engine) -> list[str]:
    """Show the routed answer to each question, and return what went wrong."""
    console.rule("four questions, routed", align="left")
    return [problem for question in QUESTIONS for problem in show_answer(console, engine, question)[1]]


def converse(console: Console, engine: treadle.Engine) -> list[str]:
    """Show a conversation: each question follows all that was said before, and its answer is generated."""
    console.rule("one conversation that changes domain twice", align="left")
    said = ""
    wrong: list[str] = []
    for question in CONVERSATION:
        said, problems = show_answer(console, engine, question, said)
        wrong += problems
    return wrong


def show_answer(console: Console, engine: treadle.Engine, question: Question, said: str = "") -> tuple[str, list[str]]:
    """Stream one answer and judge it; return all that was said, and what went wrong."""
    prompt = said + question.example.prompt
    console.print(question.example.prompt, style="dim", end="", highlight=False, markup=False)
    events = stream_coloured(console, engine.stream(prompt, sampling=sampling_of(question)))
    text = "".join(event.text for event in events)
    weights = mean_weights(events)
    led = engine.adapter_names[weights.argmax()]
    is_right = question.is_right(text)
    shares = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(engine.adapter_names, weights, strict=True))
    console.print(Text(f"{'✓' if is_right else '✗'} {shares}\n", "bold"))
    asked = question.example.bare
    wrong = [] if is_right else [f"a wrong answer to {asked!r}: {text!r}"]
    wrong += [] if led == question.adapter else [f"{led} led, not {question.adapter}, on {asked!r}"]
    return prompt + text.rstrip() + SEPARATOR, wrong


def compare(console: Console, engine: treadle.Engine) -> None:
    """Ask the base, each adapter alone and the routed mixture the same questions, in one batch."""
    asked = (*QUESTIONS, *CONVERSATION)
    arms = {"base": treadle.RoutingParams.base()}
    arms |= {name: treadle.RoutingParams.one(name) for name in engine.adapter_names}
    arms["routed"] = engine.router.params
    rows = [(name, routing, question) for name, routing in arms.items() for question in asked]
    done = engine.generate(
        [question.example.prompt for _, _, question in rows],
        sampling=[sampling_of(question) for _, _, question in rows],
        routing=[routing for _, routing, _ in rows],
    )
    table = Table(title=f"answered right, by domain ({len(rows)} rows, one batch)", title_justify="left")
    table.add_column("")
    for index, name in enumerate(engine.adapter_names):
        table.add_column(name, style=colour(index))
    table.add_column("right", justify="right")
    answers = iter(done)
    for name in arms:
        marks = {adapter: "" for adapter in engine.adapter_names}
        for question in asked:
            marks[question.adapter] += "✓" if question.is_right(next(answers).text) else "✗"
        table.add_row(name, *marks.values(), f"{''.join(marks.values()).count('✓')} of {len(asked)}")
    console.print(table)


def sampling_of(question: Question) -> treadle.SamplingParams:
    task = TASKS[question.adapter]
    return treadle.SamplingParams(max_tokens=min(96, task.max_tokens), stop=task.stop)


if __name__ == "__main__":
    main()
