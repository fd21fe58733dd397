"""Arms x tasks -> results with intervals, resumable: what the routed model is worth against the base and each adapter.

A cell is an arm on a task. Finished cells are on disk (`treadle.experiments.results`) and are not measured again;
beside them `settings.json` says what was asked, and a folder is only added to with the same settings.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.common.errors import OptionError, collect, problem_list
from treadle.common.params import RoutingParams, SamplingParams
from treadle.common.writing import write_text
from treadle.engine.scoring import Pair, check_context
from treadle.engine.tokenization import completion_ids, prompt_ids
from treadle.experiments.arms import Arm, read_routers
from treadle.experiments.metrics import METRICS, check_libraries
from treadle.experiments.params import EvalParams
from treadle.experiments.results import (
    SETTINGS_FILE,
    EvalResult,
    Fraction,
    interval,
    keep_whole,
    read_results,
    read_settings,
    write_cell,
    write_results,
)
from treadle.experiments.sets import EvalSet, score_streams, turns_of
from treadle.experiments.tasks import Example, Task
from treadle.routing.centroids import Floats
from treadle.routing.router import Router

if TYPE_CHECKING:
    from treadle.engine.engine import Engine, Prompts

SHARED_VERSIONS = ("base", "embedder", "fingerprint", "dtype", "device")
"""Versions that all results of a folder share."""


@dataclass
class Cell:
    """Measurements of an arm on a task: every list has one entry for each example."""

    values: dict[str, list[Fraction]] = field(default_factory=dict)
    texts: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    generation_seconds: float = 0.0


Progress = Callable[[str, int, bool], None]
"""Takes the name of a finished cell, its number of examples, and whether an earlier run measured it."""


def evaluate(
    engine: "Engine",
    sets: Sequence[EvalSet],
    arms: Sequence[Arm],
    output: Path,
    params: EvalParams,
    progress: Progress = lambda name, count, was_done: None,
) -> list[EvalResult]:
    """Measure every arm on every task and return all results, also those that `output` held before.

    Raises:
        TreadleError: an arm is not possible with these adapters, or `output` was made with other settings.
    """
    routers = _routers(engine, arms, sets)
    _check_sets(engine, sets, params)
    _check_settings(output, params, engine)
    done = {(result.arm, result.task): result for result in keep_whole(output)}
    _check_same(done, arms, sets, {name: fingerprint(engine, router) for name, router in routers.items()})
    for arm, each in _cells(arms, sets):
        was_done = (arm.name, each.name) in done
        if not was_done:
            started = time.perf_counter()
            with _routed_by(engine, routers[arm.bundle]):
                cell = measure(engine, arm, each, params)
                write_cell(output, arm.name, each.name, _rows(each, cell))
                seconds = time.perf_counter() - started
                write_results(output, _results(engine, arm, each, cell, seconds, params.seed), append=True)
        progress(f"{arm.name} on {each.name}", len(each), was_done)
    return read_results(output)


def _routers(engine: "Engine", arms: Sequence[Arm], sets: Sequence[EvalSet]) -> dict[str, Router]:
    """Return the router of each bundle that an arm names, once it is sure that every arm is possible."""
    problems: list[str] = []
    found = {"": engine.router, **read_routers(arms, engine.blend.adapters, engine.router, problems)}
    for folder, router in found.items():
        mine = [arm for arm in arms if arm.bundle == folder]
        asked = [params for arm, each in _cells(mine, sets) for params in _params_of(arm, each)]
        collect(problems, [lambda asked=asked, router=router: engine.check_routing(asked, router)])
    if problems:
        raise OptionError("\n".join(problems))
    return found


def _check_sets(engine: "Engine", sets: Sequence[EvalSet], params: EvalParams) -> None:
    """Refuse texts that the model cannot read and metrics whose library is missing, before hours of other cells."""
    problems: list[str] = []
    for each in sets:
        pairs = [pair for example in each.examples for pair in _scored(engine, example, params)]
        collect(found := [], [lambda pairs=pairs: check_context(engine, pairs)])
        problems += [f"task {each.name}: {problem}" for problem in found]
        if params.generate and each.task is not None:
            collect(problems, [lambda task=each.task: check_libraries(task.metrics)])
    if problems:
        raise OptionError("\n".join(dict.fromkeys(problems)))


def _scored(engine: "Engine", example: Example, params: EvalParams) -> list[Pair]:
    """Return (prompt ids, completion ids) for each completion of an example that is scored."""
    prompt = prompt_ids(engine.tokenizer, _prompts([example], params)[0])
    return [(prompt, completion_ids(engine.tokenizer, choice)) for choice in example.options or (example.completion,)]


@contextmanager
def _routed_by(engine: "Engine", router: Router) -> Generator[None]:
    own, engine.router = engine.router, router
    try:
        yield
    finally:
        engine.router = own


def _cells(arms: Sequence[Arm], sets: Sequence[EvalSet]) -> Iterator[tuple[Arm, EvalSet]]:
    return ((arm, each) for each in sets for arm in arms)


def _params_of(arm: Arm, each: EvalSet) -> list[RoutingParams]:
    """Return all params that an arm has on a task; those of the oracle on streams are each part's own."""
    owners = {part.adapter for stream in each.streams for part in stream} if each.task is None else {each.adapter}
    return [arm.params_for(owner) for owner in sorted(owners)]


def measure(engine: "Engine", arm: Arm, each: EvalSet, params: EvalParams) -> Cell:
    """Measure an arm on the examples of one task."""
    if each.task is None:
        return _measure_streams(engine, arm, each, params)
    cell, routing = Cell(), arm.params_for(each.adapter)
    examples = each.examples
    if all(example.options for example in examples):
        _measure_options(engine, examples, routing, params, cell)
    else:
        completions = [example.completion for example in examples]
        scores = engine.score(_prompts(examples, params), completions, routing=routing)
        cell.values["nll"] = [_nll(row) for row in scores]
    if params.generate and each.task.metrics:
        _measure_texts(engine, each.task, examples, routing, params, cell)
    return cell


def _prompts(examples: Sequence[Example], params: EvalParams) -> "Prompts":
    """Return the prompts of examples: texts, or chats of one message each."""
    texts = [example.prompt for example in examples]
    return [[{"role": "user", "content": text}] for text in texts] if params.chat else texts


def _nll(logprobs: Floats) -> Fraction:
    return -float(logprobs.sum()), float(len(logprobs))


def _measure_options(
    engine: "Engine", examples: Sequence[Example], routing: RoutingParams, params: EvalParams, cell: Cell
) -> None:
    """Score every option of every example: the reference's gives the NLL, the likeliest (a token) the choice."""
    pairs = [(example, choice) for example in examples for choice in example.options]
    prompts = _prompts([example for example, _ in pairs], params)
    scores = engine.score(prompts, [choice for _, choice in pairs], routing=routing)
    rows = iter(scores)
    cell.values |= {"nll": [], "option": []}
    for example in examples:
        found = dict(zip(example.options, rows, strict=False))
        cell.values["nll"].append(_nll(found[example.completion]))
        best = max(found, key=lambda choice: float(found[choice].mean()))
        cell.values["option"].append((float(best == example.completion), 1.0))


def _measure_texts(
    engine: "Engine", task: Task, examples: Sequence[Example], routing: RoutingParams, params: EvalParams, cell: Cell
) -> None:
    """Generate an answer to every example, greedily, and judge it."""
    sampling = SamplingParams(max_tokens=params.max_tokens or task.max_tokens, stop=task.stop)
    started = time.perf_counter()
    done = engine.generate(_prompts(examples, params), sampling=sampling, routing=routing)
    cell.generation_seconds = time.perf_counter() - started
    cell.tokens = sum(len(each.token_ids) for each in done)
    for name in task.metrics:
        points = [METRICS[name](each.text, example) for each, example in zip(done, examples, strict=True)]
        cell.values[name] = [(point or 0.0, float(point is not None)) for point in points]
    cell.texts = [
        {"text": each.text, "finish_reason": each.finish_reason, "weights": _rounded(each.weights)} for each in done
    ]


def _rounded(weights: Floats) -> list[list[float]]:
    return weights.astype(np.float64).round(3).tolist()  # of float32, 0.047 would be written with 17 digits


def _measure_streams(engine: "Engine", arm: Arm, each: EvalSet, params: EvalParams) -> Cell:
    """Score the answers of each stream, or of each conversation, whose answers are judged too."""
    cell = Cell()
    if each.name == "conversation":
        scores, cell.values["answer"] = _measure_turns(engine, arm, each, params)
    else:
        found = score_streams(engine, each.streams, arm.params)
        scores = [[_nll(row) for row in rows] for rows in found]
    cell.values["nll"] = [_summed(rows) for rows in scores]
    for part in range(max(len(rows) for rows in scores)):
        cell.values[f"nll-{part + 1}"] = [rows[part] if part < len(rows) else (0.0, 0.0) for rows in scores]
    return cell


def _measure_turns(
    engine: "Engine", arm: Arm, each: EvalSet, params: EvalParams
) -> tuple[list[list[Fraction]], list[Fraction]]:
    """Return, for each conversation, the NLL of each answer, and the points of all answers that are judged.

    An answer's point is that of its task: whether the option is right, else the task's first metric.
    """
    turns = [
        (place, part, turn)
        for place, stream in enumerate(each.streams)
        for part, turn in zip(stream, turns_of(stream), strict=True)
    ]
    scores: list[dict[int, Fraction]] = [{} for _ in each.streams]
    points: list[list[Fraction]] = [[] for _ in each.streams]
    for task in dict.fromkeys(part.task for _, part, _ in turns):
        chosen = [index for index, (_, part, _) in enumerate(turns) if part.task is task]
        asked = EvalSet(task.name, "", task, tuple(turns[index][2] for index in chosen))
        values = measure(engine, arm, asked, params).values
        judged = values.get("option", values.get(task.metrics[0], [])) if task.metrics else []
        for nth, index in enumerate(chosen):
            place = turns[index][0]
            scores[place][index] = values["nll"][nth]
            points[place] += judged[nth : nth + 1]
    return [[row[index] for index in sorted(row)] for row in scores], [_summed(row) for row in points]


def _summed(fractions: Sequence[Fraction]) -> Fraction:
    return sum(above for above, _ in fractions), sum(below for _, below in fractions)


def _results(engine: "Engine", arm: Arm, each: EvalSet, cell: Cell, seconds: float, seed: int) -> list[EvalResult]:
    speed = cell.tokens / cell.generation_seconds if cell.generation_seconds else 0.0
    versions = _versions(engine)
    results: list[EvalResult] = []
    for metric, fractions in cell.values.items():
        count = sum(denominator > 0 for _, denominator in fractions)
        if not count:
            continue  # it applies to none of these examples
        value, low, high = interval(fractions, seed)
        results.append(
            EvalResult(
                arm=arm.name,
                task=each.name,
                metric=metric,
                value=value,
                low=low,
                high=high,
                n=count,
                routing=None if arm.params is None else asdict(arm.params),
                source=each.source,
                seconds=seconds,
                tokens=cell.tokens,
                tokens_per_second=speed,
                seed=seed,
                versions=versions,
                rows=each.rows,
            )
        )
    return results


def _rows(each: EvalSet, cell: Cell) -> list[dict[str, Any]]:
    """Return the lines of a cell's file, one for each example."""
    rows: list[dict[str, Any]] = []
    for index in range(len(each)):
        row: dict[str, Any] = {"index": index, "values": {name: points[index] for name, points in cell.values.items()}}
        if each.task is None:
            row["adapters"] = [part.adapter for part in each.streams[index]]
            row["parts"] = [[part.example.prompt, part.example.completion] for part in each.streams[index]]
        else:
            row["prompt"] = each.examples[index].prompt
            row["reference"] = each.examples[index].completion
        rows.append({**row, **(cell.texts[index] if cell.texts else {})})
    return rows


def _versions(engine: "Engine") -> dict[str, str]:
    packages = {name: version(name) for name in ("treadle", "torch", "transformers")}
    base = str(getattr(engine.model.config, "name_or_path", ""))
    return {
        **packages,
        "python": platform.python_version(),
        "base": Path(base).name,
        "embedder": engine.router.embedder.id,
        "fingerprint": fingerprint(engine, engine.router),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "device": engine.model.device.type,
    }


def fingerprint(engine: "Engine", router: Router) -> str:
    """Return a digest of an engine's adapters and a router's centroids."""
    digest = hashlib.sha256()
    for adapter in engine.blend.adapters:
        digest.update(f"{adapter.name} {adapter.identity}".encode())
    centroids = router.centroids
    stages = [*centroids.stages.values(), *(centroids.general or {}).values()]
    arrays = [each for stage in stages for each in (stage.means, stage.owners, stage.sizes, stage.factors, stage.rest)]
    digest.update(repr((centroids.tails, centroids.shrinkage, sorted(centroids.calibrations.items()))).encode())
    for array in (centroids.means, *arrays):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _check_settings(output: Path, params: EvalParams, engine: "Engine") -> None:
    """Write the settings into a new folder, or refuse a folder that was made with others."""
    what = {key: value for key, value in _versions(engine).items() if key in SHARED_VERSIONS}
    settings = {**asdict(params), "adapters": list(engine.adapter_names), **what}
    file = output / SETTINGS_FILE
    if not file.exists():
        write_text(file, json.dumps(settings, indent=2) + "\n")
        return
    before = read_settings(output)
    changed = [
        f"{key} was {before.get(key)!r}, is {value!r}" for key, value in settings.items() if before.get(key) != value
    ]
    if changed:
        raise OptionError(problem_list(f"{output} holds results of other settings; name another folder:", changed))


def _check_same(
    done: Mapping[tuple[str, str], EvalResult],
    arms: Sequence[Arm],
    sets: Sequence[EvalSet],
    fingerprints: Mapping[str, str],
) -> None:
    """Refuse names that stand for something else than in the results that are there; fingerprints are by bundle."""
    problems: list[str] = []
    for arm, each in _cells(arms, sets):
        before = done.get((arm.name, each.name))
        routing = None if arm.params is None else json.loads(json.dumps(asdict(arm.params)))
        if before and before.routing != routing:
            problems.append(f"arm {arm.name} had other options on {each.name}")
        if before and before.versions.get("fingerprint") != fingerprints[arm.bundle]:
            problems.append(f"arm {arm.name} had other centroids on {each.name}")
        if before and before.source != each.source:
            problems.append(f"task {each.name} had the rows of {before.source}, not {each.source}")
        elif before and before.rows != each.rows:
            problems.append(f"task {each.name} had other rows of {each.source}, or another form of them")
    if problems:
        raise OptionError(
            problem_list("results are there already, but of something else:", list(dict.fromkeys(problems)))
        )
