"""Samples of an adapter, and the texts that a router is fitted on. Nothing here loads numpy."""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

Stage = Literal["prompt", "running"]
"""`prompt`: a prompt is decided as a whole. `running`: the text grows by an answer."""
STAGES: tuple[Stage, Stage] = ("prompt", "running")
KINDS = ("prompt", "bare", "begin", "bare-begin", "join", "bare-join", "whole", "bare-whole", "grow", "bare-grow",
         "join-grow", "join-begin")  # fmt: skip
"""Every kind of text that a sample becomes."""
JOINED = "join"
"""Part of the names of kinds whose text begins with another domain's."""
PART_WORDS = (8, 16, 32, 64)
"""Words of a prompt's beginning; one of these is drawn."""
MIN_WORDS_AFTER_CHANGE = 4
"""The fewest words of a sample behind a text of another domain."""
TOPIC_GAP = "\n\n"
"""Between two texts of different domains."""


@dataclass(frozen=True)
class Sample:
    """One text of the kind an adapter was trained for.

    Attributes:
        prompt: what the model reads; a text that is no prompt stands here too.
        completion: the answer; `prompt + completion` is the running text.
        bare: the prompt without the template's words (`Question:`, `Choices:` ...); a router that is fitted on both
            forms learns the domain, not the template.
    """

    prompt: str
    completion: str = ""
    bare: str = ""

    @property
    def routed(self) -> str:
        """The part of the prompt that a router reads."""
        return self.prompt

    @property
    def whole(self) -> str:
        """The prompt and its completion."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class SampleText:
    """One text that a router is fitted on.

    Attributes:
        text: the text.
        stage: when a router meets such a text.
        kind: one of KINDS; texts of one kind are compared with their own mean.
        owner: the sample that it was made of, by index.
    """

    text: str
    stage: Stage
    kind: str
    owner: int


def sample_texts(samples: Sequence[str | Sample], others: Sequence[str] = (), seed: int = 0) -> list[SampleText]:
    """Make the texts of one adapter that a router is fitted on.

    A router meets prompts, running texts, beginnings of both, and texts whose domain has changed. A sample becomes one
    text of each of these kinds. A sample with a `bare` form becomes texts without the template's words too.

    Args:
        samples: of the adapter.
        others: texts of other domains, which joined texts begin with; without any, there are no joined texts.
        seed: of the choices.
    """
    choose = random.Random(seed)
    made: list[SampleText] = []
    for owner, each in enumerate(samples):
        sample = each if isinstance(each, Sample) else Sample(each)
        made += [SampleText(text, stage, kind, owner) for stage, kind, text in _texts_of(sample, others, choose)]
    return made


def _texts_of(sample: Sample, others: Sequence[str], choose: random.Random) -> Iterator[tuple[Stage, str, str]]:
    """Yield the stage, kind and text of each text that a sample becomes."""
    forms = [("", sample.routed), ("bare-", sample.bare)] if sample.bare else [("", sample.routed)]
    answer = re.findall(r"\s*\S+", sample.completion)
    for prefix, prompt in forms:
        yield "prompt", f"{prefix}prompt" if not prefix else "bare", prompt
        yield "prompt", f"{prefix}begin", _first_words(prompt, choose.choice(PART_WORDS))
        yield "running", f"{prefix}whole", prompt + sample.completion
        grown = "".join(answer[: choose.randint(1, len(answer))]) if answer else ""
        yield "running", f"{prefix}grow", prompt + grown if answer else _first_words(prompt, choose.choice(PART_WORDS))
        if others:
            yield "prompt", f"{prefix}join", choose.choice(others) + TOPIC_GAP + prompt
    if others:
        grown = "".join(answer[: choose.randint(1, len(answer))]) if answer else ""
        yield "running", "join-grow", choose.choice(others) + TOPIC_GAP + sample.routed + grown
        words = re.findall(r"\S+\s*", choose.choice(forms)[1])
        count = choose.randint(min(MIN_WORDS_AFTER_CHANGE, len(words)), len(words))
        yield "running", "join-begin", choose.choice(others) + TOPIC_GAP + "".join(words[:count])


def _first_words(text: str, count: int) -> str:
    """Return the first words of a text."""
    return "".join(re.findall(r"\S+\s*", text)[:count])


def as_text(value: Any, name: str) -> str:
    """Return a field's value as text; a ValueError where it is none (null, NaN as pandas leaves it, a list)."""
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not isfinite(value)):
        raise ValueError(f"{name} is {json.dumps(value, default=repr)[:40]}, not a text")
    return str(value)
