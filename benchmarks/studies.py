"""Runs the studies of docs/results.md that take training or many rows, several at a time; made for a GPU.

    python benchmarks/studies.py --data ../shared/data --work work/full --jobs 14 [--limit 6000] [--only main-0 past]

Each job is a command of this repository with a log and a folder of its own under the work folder; `jobs.jsonl` there
says what each ran and how long it took. Jobs whose needs failed are left out. A job that is done is not repeated, one
that was stopped goes on where it was: run it again. The tables: `python benchmarks/claims.py work/full/main-0/*` ...
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

from recipe import SAMPLES, write_samples

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "demo" / "bundle"
FILES = {
    "math": "gsm8k-test-even.jsonl.gz",
    "science": "arc_challenge-test-even.jsonl.gz",
    "code": "code_alpaca-test-a.jsonl.gz",
    "reading": "squad-validation-even.jsonl.gz",
}
TREADLE = (sys.executable, "-m", "treadle")
SEEDS = (1, 2)
"""Of training, beside the demo's own 0."""
SOME, FEW = 600, 24
"""Rows a task of the studies that need many passes a row, or are run for each seed."""
EXAMPLES = {100: 37, 300: 112, 1000: 125}
"""Examples a task of the low-resource study, and the optimiser steps: three passes over few, one over many."""
SENTENCE = "sentence-transformers/all-MiniLM-L6-v2"
CLAIMED = ("base", "oracle", "routed", "prompt", "uniform", "boost-4")
FREQUENCIES = ("every-1", "every-3", "every-4", "every-6", "every-8", "every-16")
OPTIONS = (*(f"boost-{boost}" for boost in (1, 2, 3, 5, 6, 8)), "linear", "paper-combine", "unit-scale", "nearest")
SCORES = ("cosine", "centred", "lda")


@dataclass(frozen=True)
class Job:
    """One command; `needs` are the jobs whose results it reads."""

    name: str
    command: Sequence[object]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is asked for: where the data is, where results go, how many rows at most."""

    data: Path
    work: Path
    limit: int

    def jobs(self) -> Iterator[Job]:
        """Yield all jobs, the most wanted first."""
        yield from self._trainings()
        yield from self._evals("main-0", BUNDLE, CLAIMED, self.limit)
        for arm in CLAIMED:
            yield from self._evals(f"answers-0/{arm}", BUNDLE, (arm,), self.limit, "--generate")
        yield self._streams("streams-0", BUNDLE, (*CLAIMED, *FILES))
        yield from self._evals("seeds/0", BUNDLE, CLAIMED, SOME)
        for seed in SEEDS:
            home, needs = self.work / f"seed-{seed}" / "bundle", (f"train-{seed}",)
            yield from self._evals(f"seeds/{seed}", home, CLAIMED, SOME, needs=needs)
            yield self._streams(f"streams-{seed}", home, (*CLAIMED, *FILES), needs)
        yield from self._baselines()
        for one, other in (("routed", "recompute"), ("boost-4", "paper")):
            yield self._four(f"past/{other}", BUNDLE, (one, other), FEW)
        yield self._streams("past-streams", BUNDLE, ("routed", "recompute"), limit=FEW)
        for pool in ("six", "eight"):
            yield from self._pool(pool)
        for examples in EXAMPLES:
            home = self.work / f"examples-{examples}" / "bundle"
            yield self._four(f"few-{examples}", home, CLAIMED[:5], 300, needs=(f"train-few-{examples}",))
        yield from self._embedders()
        yield self._streams("frequency", BUNDLE, ("routed", *FREQUENCIES, *OPTIONS, "window-32", "window-64"))
        yield from self._evals("sensitivity", BUNDLE, ("oracle", "routed", "boost-4", *FREQUENCIES, *OPTIONS), 300)
        for seed in SEEDS:
            home, needs = self.work / f"seed-{seed}" / "bundle", (f"train-{seed}",)
            yield self._four(f"answers-{seed}", home, ("oracle", "routed"), 300, "--generate", needs=needs)
        yield self._conversations()
        yield self._eval("shots/math", BUNDLE, ["math"], ("base", "oracle", "routed"), 300, "--generate", "--shots=4")
        mbpp = ["--tasks", f"mbpp={self.data / 'mbpp-validation.jsonl.gz'}"]
        yield self._eval("mbpp", BUNDLE, [], ("base", "oracle", "routed", "uniform"), 90, "--generate", *mbpp)

    def _trainings(self) -> Iterator[Job]:
        python, data = sys.executable, ("--data", self.data)
        for seed in SEEDS:
            home = self.work / f"seed-{seed}"
            yield Job(f"train-{seed}", [python, "demo/recipe.py", *data, "--seed", seed, "--work", home, "--bundle",
                                        home / "bundle"])  # fmt: skip
        yield Job("train-multitask", [python, "benchmarks/multitask.py", *data, "--work", self.work / "multitask"])
        yield Job("train-pools", [python, "benchmarks/pools.py", *data, "--work", self.work / "pools"])
        for examples, steps in EXAMPLES.items():
            home = self.work / f"examples-{examples}"
            few = ("--examples", examples, "--steps", steps, "--work", home, "--bundle", home / "bundle")
            yield Job(f"train-few-{examples}", [python, "demo/recipe.py", *data, *few])
        validation = self.work / "validation"
        yield Job("validation", [python, "benchmarks/validation.py", *data, "-o", validation])
        yield Job("weights", [python, "benchmarks/baselines.py", "weights", "--validation", validation, "-o",
                              self.work / "weights.toml"], ("validation",))  # fmt: skip

    def _baselines(self) -> Iterator[Job]:
        for peer in ("arrow", "xlora"):
            yield Job(peer, [sys.executable, "benchmarks/baselines.py", peer, "--data", self.data, "--limit",
                             min(SOME, self.limit), "-o", self.work / peer])  # fmt: skip
        multitask = self.work / "multitask" / "bundle"
        yield self._four("multitask", multitask, ("multitask",), SOME, needs=("train-multitask",))
        yield self._four("fixed-weights", BUNDLE, (str(self.work / "weights.toml"),), SOME, needs=("weights",))

    def _pool(self, pool: str) -> Iterator[Job]:
        folder, needs = self.work / "pools", ("train-pools",)
        more = ("commonsense", "translation", "yes-no", "dialogue")[: 2 if pool == "six" else 4]
        arms = ("oracle", "routed", "prompt", "uniform", "boost-4")
        also = [entry for name in more for entry in ("--tasks", f"{folder / name}.json={folder / name}-test.jsonl")]
        yield self._four(f"pool-{pool}", folder / pool, arms, 300, "--no-generate", *also, needs=needs)

    def _embedders(self) -> Iterator[Job]:
        home = self.work / "sentence"
        adapters = [f"--adapter={name}={BUNDLE / 'adapters' / name}" for name in FILES]
        samples = [f"--samples={name}={self.work / 'samples' / name}.jsonl" for name in FILES]
        fit = [*TREADLE, "fit", "--base", "HuggingFaceTB/SmolLM2-135M-Instruct", *adapters, *samples, "--embedder",
               SENTENCE, "--keep-samples", 0, "--overwrite", "-o", home]  # fmt: skip
        yield Job("fit-sentence", fit)
        arms = ("routed", "prompt", "boost-4", *SCORES)
        yield self._four("sentence", home, arms, 300, needs=("fit-sentence",))
        yield self._four("sentence-paper", home, ("paper",), FEW, needs=("fit-sentence",))
        yield self._streams("sentence-streams", home, arms, ("fit-sentence",))
        yield self._four("static", BUNDLE, arms, 300)
        for name, bundle in {"static": BUNDLE, "sentence": home}.items():
            command = [*TREADLE, "route", bundle, "--eval", "--limit", min(1000, self.limit), "-o",
                       self.work / f"route-{name}", *self._tasks(FILES)]  # fmt: skip
            yield Job(f"route-{name}", command, ("fit-sentence",) if name == "sentence" else ())

    def _streams(
        self, name: str, bundle: Path, arms: Sequence[str], needs: tuple[str, ...] = (), limit: int = 300
    ) -> Job:
        also = ("--tasks", "stream", "--only", "stream")
        return self._eval(name, bundle, list(FILES), arms, limit, "--no-generate", *also, needs=needs)

    def _conversations(self) -> Job:
        also = ("--tasks", "conversation", "--only", "conversation")
        return self._eval("conversations", BUNDLE, list(FILES), CLAIMED, 300, "--no-generate", *also)

    def _evals(
        self,
        name: str,
        bundle: Path,
        arms: Sequence[str],
        limit: int,
        generate: str = "--no-generate",
        *,
        needs: tuple[str, ...] = (),
    ) -> Iterator[Job]:
        """Yield a job for each of the four tasks, the longest first."""
        for task in reversed(FILES):
            yield self._eval(f"{name}/{task}", bundle, [task], arms, limit, generate, needs=needs)

    def _four(
        self,
        name: str,
        bundle: Path,
        arms: Sequence[str],
        limit: int,
        *flags: str,
        needs: tuple[str, ...] = (),
    ) -> Job:
        """Return one job for all four tasks."""
        return self._eval(name, bundle, list(FILES), arms, limit, *(flags or ("--no-generate",)), needs=needs)

    def _eval(
        self,
        name: str,
        bundle: Path,
        tasks: Sequence[str],
        arms: Sequence[str],
        limit: int,
        *flags: str,
        needs: tuple[str, ...] = (),
    ) -> Job:
        asked = ("--arms", ",".join(arms), "--limit", min(limit, self.limit), "--dtype", "bfloat16", *flags)
        return Job(name, [*TREADLE, "eval", bundle, *self._tasks(tasks), *asked, "-o", self.work / name], needs)

    def _tasks(self, tasks: Sequence[str]) -> list[str]:
        return [entry for task in tasks for entry in ("--tasks", f"{task}={self.data / FILES[task]}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "full")
    parser.add_argument("--jobs", type=int, default=1, help="at a time")
    parser.add_argument("--limit", type=int, default=6000, help="rows a task of the main tables; the default takes all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no job after these, and end all")
    parser.add_argument("--only", nargs="+", default=[], help="jobs whose name begins so, and what they need")
    options = parser.parse_args()
    plan = Plan(options.data.resolve(), options.work.resolve(), options.limit)
    jobs = {job.name: job for job in plan.jobs()}
    chosen = wanted(jobs, options.only)
    plan.work.mkdir(parents=True, exist_ok=True)
    for home in [f"seed-{seed}" for seed in SEEDS] + [f"examples-{examples}" for examples in EXAMPLES]:
        shutil.copytree(BUNDLE / "embedder", plan.work / home / "embedder", dirs_exist_ok=True)
    write_samples(plan.data, plan.work, SAMPLES)
    sys.exit(run([jobs[name] for name in jobs if name in chosen], plan.work, options.jobs, options.seconds))


def wanted(jobs: dict[str, Job], only: Sequence[str]) -> set[str]:
    """Return the names of the jobs to run, with what they need."""
    names = {name for name in jobs if not only or name.startswith(tuple(only))}
    for name in reversed(list(jobs)):  # what is needed comes before what needs it
        if name in names:
            names |= set(jobs[name].needs)
    return names


def run(jobs: Sequence[Job], work: Path, at_a_time: int, seconds: float) -> int:
    """Run jobs in their order, as soon as what they need is done; return how many failed or were left out."""
    end = time.monotonic() + seconds
    waiting, done, failed = list(jobs), set[str](), set[str]()
    running: dict[Future[bool], Job] = {}
    with ThreadPoolExecutor(at_a_time) as pool:
        while waiting or running:
            for job in [job for job in waiting if failed & set(job.needs)]:
                failed.add(job.name)
                waiting.remove(job)
            ready = [job for job in waiting if done >= set(job.needs)]
            for job in ready[: at_a_time - len(running)] if time.monotonic() < end else []:
                waiting.remove(job)
                running[pool.submit(execute, job, work, end)] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                (done if future.result() else failed).add(job.name)
    left = [*sorted(failed), *(job.name for job in waiting)]
    print(f"{len(done)} done, {len(left)} not: {' '.join(left)}", flush=True)
    return min(len(left), 1)


def execute(job: Job, work: Path, end: float) -> bool:
    """Run one job, unless it is done; return whether it succeeded."""
    mark = work / "done" / job.name
    if mark.exists():
        return True
    log = work / "logs" / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    left = None if end == float("inf") else max(end - started, 1)
    with log.open("a") as lines:
        try:
            code = subprocess.run(
                list(map(str, job.command)), cwd=ROOT, stdout=lines, stderr=subprocess.STDOUT, timeout=left, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    took = round(time.monotonic() - started, 1)
    print(f"{job.name}: {'done' if code == 0 else f'exit {code}'}, {took} s", flush=True)
    with (work / "jobs.jsonl").open("a") as lines:
        entry = {"job": job.name, "exit": code, "seconds": took, "command": [*map(str, job.command)]}
        lines.write(json.dumps(entry | {"cpus": os.cpu_count()}) + "\n")
    if code == 0:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    return code == 0


if __name__ == "__main__":
    main()
