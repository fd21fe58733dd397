"""Mixed streams: examples of different tasks joined into one text, whose domain changes midway.

This is where re-weighing while the text runs can matter. Two ways to read the same text:

- `stream`: only the first prompt is the prompt; all after it is running text, re-weighed as it comes.
- `conversation`: before each answer, everything so far is the prompt, as in a chat whose turns change domain.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from treadle.common.errors import OptionError
from treadle.common.params import RoutingParams
from treadle.engine.scoring import Pair, score_ids, score_under
from treadle.engine.tokenization import completion_ids, prompt_ids
from treadle.experiments.tasks import SEPARATOR, Example
from treadle.routing.centroids import Floats

if TYPE_CHECKING:
    from treadle.engine.engine import Engine

STREAMS = ("stream", "conversation")
PARTS = (2, 3, 4)
"""How many examples a stream joins; each number is equally likely."""


@dataclass(frozen=True)
class Part:
    """One example of a stream and the adapter that its task has for its own."""

    adapter: str
    example: Example


Stream = tuple[Part, ...]


def join_streams(pools: Mapping[str, Sequence[Example]], count: int, seed: int, max_chars: int = 3000) -> list[Stream]:
    """Return `count` streams of 2 to 4 examples, neighbours of different domains; no example appears twice.

    Args:
        pools: adapter -> examples of its task.
        count: fewer come back where the pools run dry.
        seed: of the choice.
        max_chars: examples longer than this over the number of parts are left out, so that a stream fits a context.
    """
    if len(pools) < 2:
        raise OptionError("mixed streams need the examples of at least two tasks")
    choose = random.Random(seed)
    left = {name: list(examples) for name, examples in pools.items()}
    for examples in left.values():
        choose.shuffle(examples)
    streams: list[Stream] = []
    while len(streams) < count:
        parts: list[Part] = []
        for _ in range(choose.choice(PARTS)):
            last = parts[-1].adapter if parts else ""
            names = [name for name, examples in left.items() if examples and name != last]
            if not names:
                return streams
            name = choose.choice(names)
            fitting = [each for each in left[name] if len(each.prompt + each.completion) <= max_chars / max(PARTS)]
            if not fitting:
                left[name] = []
                continue
            left[name].remove(fitting[0])
            parts.append(Part(name, fitting[0]))
        if len(parts) > 1 and all(a.adapter != b.adapter for a, b in pairwise(parts)):
            streams.append(tuple(parts))
    return streams


def score_streams(
    engine: "Engine", streams: Sequence[Stream], params: RoutingParams | None, kind: str
) -> list[list[Floats]]:
    """Return the log-probabilities (nats) of the tokens of each part's answer, one list a stream.

    Args:
        engine: the model and its adapters.
        streams: the texts.
        params: how the adapters are weighed; None = the oracle: each part under the one adapter of its own.
        kind: one of STREAMS.
    """
    if kind == "conversation":
        return _score_conversations(engine, streams, params)
    texts = [_Ids.of(engine, stream) for stream in streams]
    pairs: list[Pair] = [(ids.all[: ids.starts[0]], ids.all[ids.starts[0] :]) for ids in texts]
    if params is not None:
        scores = score_ids(engine, pairs, params)
    else:
        scores = [
            score_under(engine, [pair], [_own_weights(engine, stream, ids)], RoutingParams())[0]
            for pair, stream, ids in zip(pairs, streams, texts, strict=True)
        ]
    return [
        [row[start - ids.starts[0] : end - ids.starts[0]] for start, end in zip(ids.starts, ids.ends, strict=True)]
        for row, ids in zip(scores, texts, strict=True)
    ]


def _score_conversations(
    engine: "Engine", streams: Sequence[Stream], params: RoutingParams | None
) -> list[list[Floats]]:
    pairs: list[Pair] = []
    owners: list[tuple[int, str]] = []
    for index, stream in enumerate(streams):
        ids = _Ids.of(engine, stream)
        for part, start, end in zip(stream, ids.starts, ids.ends, strict=True):
            pairs.append((ids.all[:start], ids.all[start:end]))
            owners.append((index, part.adapter))
    scores: list[Floats | None] = [None] * len(pairs)
    for name in sorted({adapter for _, adapter in owners}) if params is None else [""]:
        chosen = [place for place, (_, adapter) in enumerate(owners) if params is not None or adapter == name]
        found = score_ids(engine, [pairs[place] for place in chosen], params or RoutingParams.one(name))
        for place, row in zip(chosen, found, strict=True):
            scores[place] = row
    results: list[list[Floats]] = [[] for _ in streams]
    for (index, _), row in zip(owners, scores, strict=True):
        if row is not None:
            results[index].append(row)
    return results


@dataclass(frozen=True)
class _Ids:
    """The token ids of a stream, and where the answer of each part starts and ends."""

    all: list[int]
    starts: list[int]
    ends: list[int]

    @classmethod
    def of(cls, engine: "Engine", stream: Stream) -> "_Ids":
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        for part in stream:
            text = part.example.prompt
            ids += completion_ids(engine.tokenizer, SEPARATOR + text) if ids else prompt_ids(engine.tokenizer, text)
            starts.append(len(ids))
            ids += completion_ids(engine.tokenizer, part.example.completion)
            ends.append(len(ids))
        return cls(ids, starts, ends)


def _own_weights(engine: "Engine", stream: Stream, ids: _Ids) -> Floats:
    """Return the weights (T, N) under which each part is read by the adapter of its own alone."""
    weights = np.zeros((len(ids.all) - 1, len(engine.router.names)), np.float32)
    start = 0
    for part, end in zip(stream, ids.ends, strict=True):
        weights[start:end, engine.router.names.index(part.adapter)] = 1.0
        start = end
    return weights
