"""The texts of an evaluation: examples of tasks, and mixed streams of them.

A mixed stream joins examples of different tasks into one text, whose domain changes midway. This is where re-weighing
while the text runs can matter. Two ways to read the same text:

- `stream`: only the first prompt is the prompt; all after it is running text, re-weighed as it comes.
- `conversation`: before each answer, everything so far is the prompt, as in a chat whose turns change domain.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from treadle.common.errors import DataError, OptionError, TreadleError, problem_list, unknown_name
from treadle.common.files import digest
from treadle.common.params import RoutingParams
from treadle.engine.scoring import Pair, score_ids, score_under
from treadle.engine.tokenization import completion_ids, prompt_ids
from treadle.experiments.data import load_examples
from treadle.experiments.params import EvalParams
from treadle.experiments.tasks import ANSWER_CUE, SEPARATOR, Example, Task, find_task
from treadle.routing.centroids import Floats

if TYPE_CHECKING:
    from treadle.engine.engine import Engine

STREAM_TASKS = ("stream", "conversation")
PART_COUNTS = (2, 3, 4)
"""How many examples a stream joins; each number is equally likely."""


@dataclass(frozen=True)
class StreamPart:
    """One example of a stream, the adapter that its task has for its own, and the task, which judges answers."""

    adapter: str
    example: Example
    task: Task


MixedStream = tuple[StreamPart, ...]


@dataclass(frozen=True)
class EvalSet:
    """The examples of one task, or mixed streams of several.

    Attributes:
        name: of the task; `stream` and `conversation` are mixed streams.
        source: the file or hub data set of its rows; for streams, the tasks that they join.
        task: how texts are judged; None for streams.
        examples: with their shots, if any.
        streams: where `task` is None.
        plain: the examples without shots, which streams join.
    """

    name: str
    source: str
    task: Task | None
    examples: tuple[Example, ...] = ()
    streams: tuple[MixedStream, ...] = ()
    plain: tuple[Example, ...] = field(default=(), repr=False)

    @cached_property
    def rows(self) -> str:
        """Digest of all texts, shots included: other rows have another digest."""
        joined = [[(part.adapter, asdict(part.example)) for part in stream] for stream in self.streams]
        asked = [asdict(example) for example in self.examples]
        return digest([asked, joined])

    @property
    def adapter(self) -> str:
        """The task's own adapter."""
        return "" if self.task is None else self.task.adapter or self.task.name

    def __len__(self) -> int:
        """Return how many examples or streams it holds."""
        return len(self.examples) or len(self.streams)


def load_sets(specs: Sequence[str], params: EvalParams, only: Sequence[str] = ()) -> list[EvalSet]:
    """Return the examples that specifications name.

    Each is `TASK` (rows of the hub), `TASK=FILE`, a task's JSON file (`treadle.experiments.tasks.read_task`), that with
    `=FILE`, or `stream` or `conversation`, which join the examples of the other tasks. Where `only` names some of them,
    the others are left out, and only lend their examples.

    Raises:
        TreadleError: lists everything that cannot be read.
    """
    problems: list[str] = []
    sets: dict[str, EvalSet] = {}
    mixed = [spec for spec in specs if spec in STREAM_TASKS]
    for spec in [spec for spec in specs if spec not in STREAM_TASKS]:
        try:
            each = _load_set(spec, params)
            if each.name in sets or each.name in STREAM_TASKS:
                problems.append(f"task {each.name!r} is given twice")
            sets[each.name] = each
        except TreadleError as error:
            problems.append(str(error))
    pools = _pools(sets.values())
    if mixed and params.chat:
        problems.append(f"{', '.join(mixed)}: a running text has no chat template; leave chat out")
    if mixed and len(pools) < 2 and not problems:
        problems.append(f"{', '.join(mixed)}: name the tasks whose examples are joined, two at least")
    if problems:
        raise DataError(problem_list("tasks:", problems))
    streams = tuple(join_streams(pools, params.limit, params.seed)) if mixed else ()
    if mixed and not streams:
        raise DataError(f"{', '.join(mixed)}: no two examples are short enough to be joined")
    joined = " + ".join(each.source for each in sets.values())
    loaded = [*sets.values(), *(EvalSet(name, joined, None, streams=streams) for name in dict.fromkeys(mixed))]
    names = [each.name for each in loaded]
    if unknown := [unknown_name("task in only", name, names) for name in only if name not in names]:
        raise OptionError(problem_list("tasks:", unknown))
    return [each for each in loaded if each.name in only or not only]


def _load_set(spec: str, params: EvalParams) -> EvalSet:
    name, given, file = spec.partition("=")
    task = find_task(name, also=STREAM_TASKS)
    if given and not file:
        raise DataError(f"{spec} names no file; without = the rows come from the hub")
    source = file or task.dataset
    if not source:
        raise DataError(f"{name}: it names no source; write {name}=FILE")
    rows = load_examples(source, task, limit=params.limit + params.shots, seed=params.seed)
    shots, examples = rows[: params.shots], rows[params.shots :]
    if not examples:
        raise DataError(f"{source}: {len(rows)} examples are not more than the {params.shots} shots")
    before = "".join(f"{shot.prompt}{shot.completion}{SEPARATOR}" for shot in shots)
    shown = [replace(each, prompt=before + each.prompt) for each in examples]
    if params.chat:
        shown = [_message(each) for each in shown]
    return EvalSet(task.name, source, task, tuple(shown), plain=tuple(examples))


def _pools(sets: Iterable[EvalSet]) -> dict[str, list[StreamPart]]:
    pools: dict[str, list[StreamPart]] = {}
    for each in sets:
        if each.task is not None:
            pools.setdefault(each.adapter, []).extend(StreamPart(each.adapter, one, each.task) for one in each.plain)
    return pools


def _message(example: Example) -> Example:
    """Return an example as somebody asks it in a chat, without the prompt's cue and the answer's blank."""
    return replace(
        example,
        prompt=example.prompt.removesuffix(ANSWER_CUE),
        completion=example.completion.lstrip(),
        options=tuple(option.lstrip() for option in example.options),
    )


def join_streams(
    pools: Mapping[str, Sequence[StreamPart]], count: int, seed: int, max_chars: int = 3000
) -> list[MixedStream]:
    """Return `count` streams of 2 to 4 examples, neighbours of different domains; no example appears twice.

    Args:
        pools: adapter -> examples of its tasks.
        count: fewer come back where the pools run dry.
        seed: of the choice.
        max_chars: examples longer than this over the number of parts are left out, so that a stream fits a context.
    """
    if len(pools) < 2:
        raise OptionError("mixed streams need the examples of at least two tasks")
    choose = random.Random(seed)
    left = {name: list(pool) for name, pool in pools.items()}
    for pool in left.values():
        choose.shuffle(pool)
    streams: list[MixedStream] = []
    while len(streams) < count:
        parts: list[StreamPart] = []
        for _ in range(choose.choice(PART_COUNTS)):
            last = parts[-1].adapter if parts else ""
            names = [name for name, pool in left.items() if pool and name != last]
            if not names:
                return streams
            name = choose.choice(names)
            longest = max_chars / max(PART_COUNTS)
            fitting = [part for part in left[name] if len(part.example.prompt + part.example.completion) <= longest]
            if not fitting:
                left[name] = []
                continue
            left[name].remove(fitting[0])
            parts.append(fitting[0])
        if len(parts) > 1 and all(a.adapter != b.adapter for a, b in pairwise(parts)):
            streams.append(tuple(parts))
    return streams


def turns_of(stream: MixedStream) -> list[Example]:
    """Return the parts of a stream as the turns of a conversation: everything before an answer is its prompt."""
    turns: list[Example] = []
    before = ""
    for part in stream:
        turns.append(replace(part.example, prompt=before + part.example.prompt))
        before = turns[-1].prompt + part.example.completion + SEPARATOR
    return turns


def score_streams(engine: "Engine", streams: Sequence[MixedStream], params: RoutingParams | None) -> list[list[Floats]]:
    """Return the log-probabilities (nats) of the tokens of each part's answer, one list a stream.

    Args:
        engine: the model and its adapters.
        streams: each is one text, and the first part's prompt is its prompt.
        params: how the adapters are weighed; None = the oracle: each part under the one adapter of its own.
    """
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


@dataclass(frozen=True)
class _Ids:
    """The token ids of a stream, and where the answer of each part starts and ends."""

    all: list[int]
    starts: list[int]
    ends: list[int]

    @classmethod
    def of(cls, engine: "Engine", stream: MixedStream) -> "_Ids":
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


def _own_weights(engine: "Engine", stream: MixedStream, ids: _Ids) -> Floats:
    """Return the weights (T, N) under which each part is read by the adapter of its own alone."""
    weights = np.zeros((len(ids.all) - 1, len(engine.router.names)), np.float32)
    start = 0
    for part, end in zip(stream, ids.ends, strict=True):
        weights[start:end, engine.router.names.index(part.adapter)] = 1.0
        start = end
    return weights
