"""Metrics compare a generated text with its references: pure functions of texts.

Each metric takes a text and the Reference of its example. It returns a number from 0 to 1, or None where it does not
apply to the example (an answer that is not Python need not parse). Libraries score where they are the standard:
rouge-score, sacrebleu.
"""

import ast
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Protocol

from treadle.common.errors import TreadleError
from treadle.experiments.sandbox import passes

NUMBER_PATTERN = re.compile(r"(?:(?<![\w.)])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<!\d)\.\d+)")
FENCE_PATTERN = re.compile(r"```[\w+-]*[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)
LETTER_PATTERN = re.compile(r"\b(?!A (?!(?:is|was|or|and|because)\b)[a-z])([A-E])\b")
ARTICLE_PATTERN = re.compile(r"\b(a|an|the)\b")
CODE_NODES = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.For, ast.While, ast.Call)
"""A text that parses but holds none of these ("yes" is an expression) is not taken for a program."""


class Reference(Protocol):
    """The right answer of an example."""

    @property
    def completion(self) -> str:
        """The text that a model should give."""
        ...

    @property
    def references(self) -> tuple[str, ...]:
        """All accepted answers."""
        ...

    @property
    def tests(self) -> tuple[str, ...]:
        """Statements that a generated program must pass."""
        ...


def exact_number(text: str, example: Reference) -> float:
    """Whether the final number of the text is that of the reference: the one after `####`, else the last."""
    found = final_number(text)
    return float(found is not None and found == final_number(example.completion))


def final_number(text: str) -> float | None:
    """Return the number after the first `####`, or the last number, of a text; None where it has none."""
    _, mark, after = text.partition("####")
    numbers = NUMBER_PATTERN.findall(after)[:1] if mark else []
    numbers = numbers or NUMBER_PATTERN.findall(text)[-1:]
    return float(numbers[0].replace(",", "").replace("$", "")) if numbers else None


def letter(text: str, example: Reference) -> float:
    """Whether the first lone capital A-E of the text, but for the article before a word, is the reference's."""
    found = LETTER_PATTERN.search(text)
    return float(found is not None and found.group(1) == example.completion.strip())


def squad_words(text: str) -> list[str]:
    """Return the words of a text as SQuAD's official script compares them: no case, punctuation or articles."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return ARTICLE_PATTERN.sub(" ", kept).split()


def exact_match(text: str, example: Reference) -> float:
    """SQuAD's exact match against the best of the accepted answers."""
    return float(any(squad_words(text) == squad_words(answer) for answer in example.references))


def f1(text: str, example: Reference) -> float:
    """SQuAD's F1 of words against the best of the accepted answers."""
    return max(_f1(squad_words(text), squad_words(answer)) for answer in example.references)


def _f1(found: list[str], wanted: list[str]) -> float:
    common = sum((Counter(found) & Counter(wanted)).values())
    if not common:
        return 0.0  # of two empty texts too, as SQuAD's script has it
    return 2 * common / (len(found) + len(wanted))


def rouge_l(text: str, example: Reference) -> float:
    """ROUGE-L F-measure (rouge-score, no stemming) against the best of the accepted answers."""
    return max(_rouge().score(answer, text)["rougeL"].fmeasure for answer in example.references)


def chrf(text: str, example: Reference) -> float:
    """Sentence chrF (sacrebleu) over 100, against the accepted answers."""
    return _chrf().sentence_score(text.strip(), [answer.strip() for answer in example.references]).score / 100


def parses(text: str, example: Reference) -> float | None:
    """Whether the text is Python; None where the reference is not a Python program."""
    if not is_python(example.completion):
        return None
    return float(is_python(text))


def is_python(text: str) -> bool:
    """Whether a text, or the first fenced block in it, is a Python program."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a generated "\d": made an error, it would not parse
            tree = ast.parse(program(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what ast.parse raises on texts
        return False
    return any(isinstance(node, CODE_NODES) for node in ast.walk(tree))


def program(text: str) -> str:
    """Return the first fenced block of a text, or the text where it has none."""
    fenced = FENCE_PATTERN.search(text)
    return (fenced.group(1) if fenced else text).strip()


def pass_at_1(text: str, example: Reference) -> float | None:
    """Whether the program passes all tests of the example, in a process with limits (`treadle.experiments.sandbox`).

    None where the example has no tests.
    """
    return float(passes(program(text), example.tests)) if example.tests else None


@lru_cache(1)
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise TreadleError("the metric rouge_l needs: pip install 'treadle[eval]'") from error
    return RougeScorer(["rougeL"])


@lru_cache(1)
def _chrf() -> Any:
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise TreadleError("the metric chrf needs: pip install 'treadle[eval]'") from error
    return CHRF()


def check_libraries(metrics: Iterable[str]) -> None:
    """Raise a TreadleError where a library that one of these metrics needs is not installed."""
    for name in metrics:
        if name in LIBRARIES:
            LIBRARIES[name]()


LIBRARIES = {"rouge_l": _rouge, "chrf": _chrf}
METRICS: dict[str, Callable[[str, Reference], float | None]] = {
    metric.__name__: metric for metric in (exact_number, letter, exact_match, f1, rouge_l, chrf, parses, pass_at_1)
}
"""By name, as tasks and task files name them; all compare a generated text."""
