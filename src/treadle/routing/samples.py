"""Samples of an adapter, and the texts that a router is fitted on. Nothing here loads numpy."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

PART_WORDS = (8, 16, 32, 64)
"""Words of a part of a sample; one of these is drawn."""


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
class SampleTexts:
    """The texts that some samples become, and which sample each is from.

    Attributes:
        num_samples: the samples, as their owner counts them.
        texts: what a router is fitted on.
        owners: of each text, its sample by index.
    """

    num_samples: int
    texts: list[str]
    owners: list[int]


def sample_texts(samples: Sequence[str | Sample], seed: int = 0) -> SampleTexts:
    """Make a router's texts: each sample whole, its prompt, a beginning and a part.

    A router meets prompts, running texts and windows of them; fitted on whole texts alone it takes the traits of the
    answers for those of the domain (0.740 against 0.966 of held-out bare prompts: `9fff023:benchmarks/embedders.py`).
    Where a sample has a `bare` form, its texts are there without the template's words too. No text of a sample comes
    twice.
    """
    choose = random.Random(seed)
    texts: list[str] = []
    owners: list[int] = []
    for index, each in enumerate(samples):
        made = _texts_of(each if isinstance(each, Sample) else Sample(each), choose)
        texts += made
        owners += [index] * len(made)
    return SampleTexts(len(samples), texts, owners)


def _texts_of(sample: Sample, choose: random.Random) -> list[str]:
    """Return the texts of one sample, each once."""
    texts: list[str] = []
    for prompt in filter(None, (sample.routed, sample.bare)) if sample.routed or sample.bare else ("",):
        whole = prompt + sample.completion
        texts += [whole, prompt] if sample.completion else [whole]
        texts.append(_part(prompt, choose, from_start=True))
        texts.append(_part(whole, choose, from_start=False))
    return list(dict.fromkeys(texts))


def _part(text: str, choose: random.Random, from_start: bool) -> str:
    """Return 8, 16, 32 or 64 words of a text, its first or any."""
    words = re.findall(r"\S+\s*", text)
    length = choose.choice(PART_WORDS)
    start = 0 if from_start else choose.randint(0, max(0, len(words) - length))
    return "".join(words[start : start + length])
