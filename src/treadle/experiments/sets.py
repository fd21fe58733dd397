"""What is asked in an evaluation: the examples of tasks, and mixed streams of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from treadle.common.errors import DataError, OptionError, TreadleError, problem_list, unknown_name
from treadle.common.files import digest
from treadle.common.params import EvalParams
from treadle.experiments.data import load_examples
from treadle.experiments.streams import STREAMS, Stream, join_streams
from treadle.experiments.tasks import SEPARATOR, Example, Task, find_task


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
    streams: tuple[Stream, ...] = ()
    plain: tuple[Example, ...] = field(default=(), repr=False)

    @cached_property
    def rows(self) -> str:
        """What tells these rows, as they are asked, from others: a digest of all their texts."""
        joined = [[(part.adapter, asdict(part.example)) for part in stream] for stream in self.streams]
        asked = [asdict(example) for example in self.examples]
        return digest([asked, joined])

    @property
    def adapter(self) -> str:
        """The adapter that the task has for its own."""
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
    mixed = [spec for spec in specs if spec in STREAMS]
    for spec in [spec for spec in specs if spec not in STREAMS]:
        try:
            each = _load_set(spec, params)
            if each.name in sets or each.name in STREAMS:
                problems.append(f"task {each.name!r} is given twice")
            sets[each.name] = each
        except TreadleError as error:
            problems.append(str(error))
    pools: dict[str, tuple[Example, ...]] = {}
    for each in sets.values():
        pools[each.adapter] = pools.get(each.adapter, ()) + each.plain
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
    task = find_task(name, also=STREAMS)
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
    return EvalSet(task.name, source, task, tuple(shown), plain=tuple(examples))
