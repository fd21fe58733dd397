"""Kills treadle at random moments with kill -9, then looks whether anything is lost and whether the command resumes.

    python benchmarks/kills.py [--kills 200] [--only fit train eval]

Each command runs in a forked process, so that a run takes as long as its own work and kills fall everywhere in it.
After each kill the bundle of `fit --overwrite` is read (old or new, whole). Then the command is run again to its end.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from treadle.bundle.bundle import read_bundle
from treadle.cli.main import app
from treadle.common.errors import TreadleError
from treadle.experiments.results import read_results
from treadle.lora.adapter import read_adapter
from treadle.routing.embedder import StaticEmbedder

import conftest

BASE = conftest.BASE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of fit; the slower commands get a tenth each")
    parser.add_argument("--only", nargs="*", default=["fit", "eval", "sweep", "train"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as root:
        commands = prepare(Path(root))
        print("| command | kills | dead before its end | lost or broken | resumed |\n|---|---|---|---|---|", flush=True)
        for name in options.only:
            count = options.kills if name == "fit" else max(1, options.kills // 10)
            print(f"| {name} | {' | '.join(map(str, tried(*commands[name], count, draw)))} |", flush=True)


def prepare(root: Path) -> dict[str, tuple[list[str], Callable[[], None], Callable[[], None]]]:
    """Return for each command its arguments, the check of a state that a kill left, and the check of the end."""
    conftest.tiny_llama().save_pretrained(root / BASE)
    conftest.byte_tokenizer().save_pretrained(root / BASE)
    embedder: StaticEmbedder = conftest.embedder.__wrapped__()
    embedder.save(root)
    fit = ["fit", "--base", str(root / BASE), "--embedder", str(root / "embedder"), "-o", str(root / "bundle")]
    for index, (name, texts) in enumerate(conftest.SAMPLES.items(), 1):
        folder = conftest.save_adapter(root / name, seed=index, r=4)
        (root / f"{name}.txt").write_text("\n".join(texts))
        fit += [f"--adapter={name}={folder}", f"--samples={name}={root / name}.txt"]
    run([*fit, "--overwrite"])
    rows = [{"prompt": f"add {i} plus three", "completion": " the sum", "question": f"add {i}"} for i in range(24)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "rows", "prompt": "{prompt}", "completion": "{completion}", "adapter": "math"}
    (root / "rows.json").write_text(json.dumps(task))
    (root / "sweep.toml").write_text(
        f'tasks = ["{root}/rows.json={root}/rows.jsonl"]\nlimit = 8\ngenerate = false\n'
        "[grid.often]\nevery = [1, 2, 4]\n"
    )
    tasks = [
        f"--tasks={root}/rows.json={root}/rows.jsonl",
        "--limit",
        "8",
        "--no-generate",
        "--arms",
        "base,routed,uniform",
    ]
    train = ["train", "--base", str(root / BASE), "--data", str(root / "rows.jsonl"), "--steps", "20", "--rank", "2",
             "--dtype", "float32", "-o"]  # fmt: skip

    def bundle_is_whole() -> None:
        assert read_bundle(root / "bundle").router.names == tuple(conftest.SAMPLES)

    def results_are_whole(folder: str) -> None:
        assert len(read_results(root / folder)) >= 3

    return {
        "fit": ([*fit, "--overwrite"], bundle_is_whole, bundle_is_whole),
        "eval": (["eval", str(root / "bundle"), *tasks, "-o", str(root / "eval")],
                 lambda: read_results(root / "eval") and None, lambda: results_are_whole("eval")),
        "sweep": (["sweep", str(root / "bundle"), str(root / "sweep.toml"), "-o", str(root / "sweep")],
                  lambda: read_results(root / "sweep") and None, lambda: results_are_whole("sweep")),
        "train": ([*train, str(root / "trained")], lambda: None, lambda: read_adapter(root / "trained") and None),
    }  # fmt: skip


def tried(
    arguments: list[str], look: Callable[[], None], look_at_end: Callable[[], None], count: int, draw: random.Random
) -> tuple[int, int, int, int]:
    """Return kills, those that found the process alive, states that were broken, and runs that then ended well."""
    output = Path(arguments[arguments.index("-o") + 1])
    is_replaced = "--overwrite" in arguments
    remove(output)
    with contextlib.redirect_stdout(sys.stderr):
        app(arguments, standalone_mode=False)  # here, so that the forked ones import nothing
    started = time.perf_counter()
    run_to_end(arguments, output, is_replaced)
    seconds = time.perf_counter() - started
    killed = broken = resumed = 0
    for _ in range(count):
        if not is_replaced:
            remove(output)
        killed += run(arguments, kill_after=draw.uniform(0, seconds)) == -signal.SIGKILL
        try:
            look()
            fine = run(arguments) == 0 or (not is_replaced and (output / "adapter_config.json").exists())
            look_at_end()
        except (AssertionError, TreadleError) as error:
            print(f"broken: {error}", file=sys.stderr)
            broken += 1
        else:
            resumed += fine
        hidden = [each.name for each in output.rglob(".treadle-*")]
        if hidden:
            print(f"left over: {hidden}", file=sys.stderr)
            broken += 1
    return count, killed, broken, resumed


def run_to_end(arguments: list[str], output: Path, is_replaced: bool) -> None:
    """Run a command that must end well, into a new folder where it replaces none."""
    if not is_replaced:
        remove(output)
    if code := run(arguments):
        raise SystemExit(f"treadle {arguments[0]} ended with {code} by itself")


def remove(folder: Path) -> None:
    """Remove a folder, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def run(arguments: list[str], kill_after: float | None = None) -> int:
    """Run a command in a forked process, killed after some seconds; return its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        if "KILLS_SHOW" not in os.environ:
            os.dup2(quiet, 2)
        with contextlib.suppress(BaseException):
            app(arguments, standalone_mode=False)
            code = 0
        os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main()
