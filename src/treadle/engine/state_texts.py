"""The texts that classes of states are fitted on, and the places in them at which the states are taken.

A causal model's state at a token says the same whatever follows. So one pass over a prompt and its answer gives the
states of the prompt, of its beginnings, and of the answer as it grows.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from treadle.common.errors import ModelError, OptionError
from treadle.engine.tokenization import completion_ids, prompt_ids
from treadle.routing.general_text import general_texts
from treadle.routing.samples import TOPIC_GAP, Sample, SampleText, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SAMPLES = 120
"""The most samples of an adapter that are read."""
DRIFT_SAMPLES = 8
"""The samples of an adapter that are read once more, under the adapter."""
MAX_GENERAL_TEXTS = 160
PROMPT_TOKENS, ANSWER_TOKENS, BEFORE_TOKENS = 160, 32, 48
"""The tokens that are read: a prompt's last, an answer's first, the last of another domain's text."""
AFTER_CHANGE_TOKENS = (2, 4, 8, 16)
"""A text is seen so many tokens after its domain has changed."""


@dataclass(frozen=True)
class Place:
    """A place in a text at which its states are taken: after `count` tokens."""

    count: int
    stage: Stage
    kind: str
    owner: int


@dataclass(frozen=True)
class ReadText:
    """Tokens to be read, and the places at which states are taken."""

    ids: Sequence[int]
    places: Sequence[Place]

    @property
    def sample_texts(self) -> list[SampleText]:
        """The places, as texts that a router is fitted on."""
        return [SampleText("", place.stage, place.kind, place.owner) for place in self.places]


def texts_of_samples(
    tokenizer: "PreTrainedTokenizerBase", samples: Sequence[str | Sample], others: Sequence[str] = ()
) -> list[ReadText]:
    """Return the texts of some of an adapter's samples; without `others`, general text stands for other domains."""
    return list(_texts(tokenizer, _some(samples), others))


def texts_read_twice(texts: Sequence[ReadText]) -> list[ReadText]:
    """Return the texts that are read once more, under the adapter: those of the first samples."""
    return [text for text in texts if all(place.owner < DRIFT_SAMPLES for place in text.places)]


def texts_of_nobody(tokenizer: "PreTrainedTokenizerBase") -> list[ReadText]:
    """Return general texts, seen as prompts and as running text of any length."""
    choose = random.Random(0)
    texts: list[ReadText] = []
    for owner, text in enumerate(general_texts()[:MAX_GENERAL_TEXTS]):
        ids = prompt_ids(tokenizer, text)[:PROMPT_TOKENS]
        if len(ids) > 1:
            grown = choose.randint(2, len(ids))
            places = [Place(len(ids), "prompt", "general", owner), Place(grown, "running", "general", owner)]
            texts.append(ReadText(ids, places))
    return texts


def _some(samples: Sequence[str | Sample]) -> list[Sample]:
    """Return at most MAX_SAMPLES samples, spread evenly."""
    step = -(-len(samples) // MAX_SAMPLES)
    return [each if isinstance(each, Sample) else Sample(each) for each in samples[::step]]


def _texts(
    tokenizer: "PreTrainedTokenizerBase", samples: Sequence[Sample], others: Sequence[str]
) -> Iterator[ReadText]:
    """Yield the readings of each sample: its forms with the answer, and one after another domain's text."""
    choose = random.Random(0)
    befores = others or general_texts()
    for owner, sample in enumerate(samples):
        answer = completion_ids(tokenizer, sample.completion)[:ANSWER_TOKENS] if sample.completion else []
        forms = [("", prompt_ids(tokenizer, sample.prompt))] if sample.prompt else []
        if sample.bare:
            forms.append(("bare-", prompt_ids(tokenizer, sample.bare)))
        with suppress(ModelError, OptionError):  # no chat template, or one that refuses a single message
            forms.append(("chat-", prompt_ids(tokenizer, [{"role": "user", "content": sample.bare or sample.prompt}])))
        if not forms:  # nothing but an answer
            continue
        for prefix, prompt in forms:
            kept = prompt[-PROMPT_TOKENS:]
            yield ReadText([*kept, *answer], list(_places(len(kept), len(answer), prefix, owner, choose)))
        before = prompt_ids(tokenizer, choose.choice(befores) + TOPIC_GAP)[-BEFORE_TOKENS:]
        own = choose.choice(forms)[1][: PROMPT_TOKENS // 2]
        start, end = len(before), len(before) + len(own)
        places = [Place(end, "prompt", "join", owner), Place(end + len(answer), "running", "join-grow", owner)]
        after = [count for count in AFTER_CHANGE_TOKENS if count <= len(own)]
        places += [Place(start + choose.choice(after), "running", "join-begin", owner)] if after else []
        yield ReadText([*before, *own, *answer], places)


def _places(prompt: int, answer: int, prefix: str, owner: int, choose: random.Random) -> Iterator[Place]:
    """Yield the places in a prompt of so many tokens and its answer."""
    yield Place(prompt, "prompt", f"{prefix}prompt", owner)
    yield Place(choose.randint(min(4, prompt), prompt), "prompt", f"{prefix}begin", owner)
    yield Place(prompt + answer, "running", f"{prefix}whole", owner)
    if answer:
        yield Place(prompt + choose.randint(1, answer), "running", f"{prefix}grow", owner)
