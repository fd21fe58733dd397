"""Whole processes for `treadle bench`: time to the first token and to `--help`, peak memory beside what it must be."""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from treadle.common.errors import TreadleError
from treadle.common.files import locate
from treadle.engine.loading import load
from treadle.engine.tokenization import prompt_ids
from treadle.experiments.timing import Table, TableLine, lines
from treadle.experiments.workbench import PROBE_TEXT, Lab, cache_bytes, start_batch, weight_bytes

HELP_ARM, IMPORTS_ARM = "treadle --help", "import torch, transformers"
BASE_ARM, COMMAND_ARM, ENGINE_ARM = "transformers, base", "treadle generate", "treadle"
CLASS_ARM = "the same and the base's class"
NEEDED_ARM = "base + adapters + cache + imports"
IMPORTS_CODE = "import torch, transformers"
PLAIN_CODE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, device, dtype, tokens, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
model.generation_config.eos_token_id = None
ids = tokenizer(prompt, return_tensors="pt").to(device)
made = model.generate(**ids, max_new_tokens=int(tokens), do_sample=False)
print(tokenizer.decode(made[0]))
"""
"""Generates as a user of transformers would; no token ends the text early."""
ENDLESS_CODE = """
import sys
from treadle.experiments.memory_use import answer
answer(*sys.argv[1:])
"""

LAUNCH_CODE = """
import os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
print(time.perf_counter() - started, usage.ru_maxrss)
sys.exit(process.returncode)
"""
"""A small process starts the measured one, because a process also counts its parent's memory."""


class ProcessCost(NamedTuple):
    """Seconds and peak memory of a process."""

    seconds: float
    peak: int  # bytes of resident memory


MeasureProcesses = Callable[[Mapping[str, Sequence[str]], int], dict[str, list[ProcessCost]]]
"""(commands, rounds) -> what each command spent in each round."""


def memory(lab: Lab, measure: "MeasureProcesses | None" = None) -> list[Table]:
    """Run processes that generate once, by default with `measure_processes`: seconds to a token, and peak memory."""
    measure = measure or measure_processes
    rounds, setting = lab.params.rounds, lab.setting(1)
    base, bundle = locate(lab.bundle.base_model), str(lab.bundle.folder)
    device, prompt = str(lab.engine.model.device), _prompt(lab)
    first = {
        BASE_ARM: plain_command(base, device, lab.dtype, 1, prompt),
        COMMAND_ARM: treadle_command(bundle, device, lab.dtype, 1, prompt, pack=lab.has_packs),
    }
    whole = {
        IMPORTS_ARM: [sys.executable, "-c", IMPORTS_CODE],
        CLASS_ARM: [sys.executable, "-c", f"import torch; from transformers import {type(lab.engine.model).__name__}"],
        BASE_ARM: plain_command(base, device, lab.dtype, lab.params.tokens, prompt),
        ENGINE_ARM: endless_command(bundle, device, lab.dtype, lab.params.tokens, prompt, pack=lab.has_packs),
    }
    help_only = {HELP_ARM: [sys.executable, "-m", "treadle", "--help"]}
    return [
        _start("From the start of a process to its first token", measure(first, rounds), setting),
        _start("From the start of a process to the end of its help", measure(help_only, rounds), ""),
        peak_table(lab, measure(whole, rounds)),
    ]


def _prompt(lab: Lab) -> str:
    return next((text for texts in lab.bundle.samples.values() for text in texts), PROBE_TEXT)


def _start(title: str, spent: dict[str, list[ProcessCost]], setting: str) -> Table:
    seconds = {name: [each.seconds for each in runs] for name, runs in spent.items()}
    return Table("memory", title, tuple(lines(seconds, setting)))


def peak_table(lab: Lab, spent: dict[str, list[ProcessCost]]) -> Table:
    """Return the peaks of processes beside the sum of what a process must hold: ratios are to that sum."""
    length = len(prompt_ids(lab.engine.tokenizer, _prompt(lab))) + lab.params.tokens
    model = lab.engine.model
    needed = {
        "base": weight_bytes(model),
        "adapters": sum(adapter.num_bytes() for adapter in lab.bundle.adapters),
        "cache": cache_bytes(model) * length,
        IMPORTS_ARM: _middle(spent[IMPORTS_ARM]),
    }
    total, plain = sum(needed.values()), _middle(spent[BASE_ARM])
    parts = ", ".join(f"{name} {_mebibytes(size)}" for name, size in needed.items())
    elsewhere = "" if model.device.type == "cpu" else f"; memory of {model.device} not counted"
    more = _mebibytes(_middle(spent[CLASS_ARM]) - needed[IMPORTS_ARM])
    note = f"MiB: {parts}; importing the base's class takes {more} more, which are not counted"
    made = [TableLine(NEEDED_ARM, lab.setting(1), peak=total, ratio=1.0, note=note)]
    for name in (BASE_ARM, ENGINE_ARM):
        peak = _middle(spent[name])
        low, high = (_mebibytes(pick(each.peak for each in spent[name])) for pick in (min, max))
        note = f"{low} to {high} MiB in {len(spent[name])} processes; {peak / plain:.3f} of transformers'{elsewhere}"
        made.append(TableLine(name, lab.setting(1), peak=peak, ratio=peak / total, note=note))
    return Table("memory", f"Peak resident memory of a process that makes {lab.params.tokens} tokens", tuple(made))


def _middle(spent: Sequence[ProcessCost]) -> int:
    return int(median(each.peak for each in spent))


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f}"


def measure_processes(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[ProcessCost]]:
    """Run each command `rounds` times, in turn, after a first round that only fills the file cache."""
    spent: dict[str, list[ProcessCost]] = {name: [] for name in commands}
    for round_index in range(rounds + 1):
        for name, command in commands.items():
            each = run_process(command)
            if round_index:
                spent[name].append(each)
    return spent


def run_process(command: Sequence[str]) -> ProcessCost:
    """Run one command to its end; a TreadleError with its last line where it fails."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCH_CODE, *command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise TreadleError(f"{' '.join(command[:4])} ... failed: {said[-1]}")
    seconds, peak = done.stdout.split()
    return ProcessCost(float(seconds), int(peak) * 1024)


def plain_command(folder: str, device: str, dtype: str, tokens: int, prompt: str) -> list[str]:
    """Return the command that generates with transformers and the bare base."""
    return [sys.executable, "-c", PLAIN_CODE, folder, device, dtype, str(tokens), prompt]


def treadle_command(bundle: str, device: str, dtype: str, tokens: int, prompt: str, *, pack: bool) -> list[str]:
    """Return the command that generates with treadle and a bundle; the end of the text may come first."""
    command = [sys.executable, "-m", "treadle", "generate", bundle, "--prompt", prompt, "--max-tokens", str(tokens)]
    return [*command, "--device", device, "--dtype", dtype, "--pack" if pack else "--no-pack"]


def endless_command(bundle: str, device: str, dtype: str, tokens: int, prompt: str, *, pack: bool) -> list[str]:
    """Return the command that generates with treadle's engine and a bundle; no token ends the text."""
    return [sys.executable, "-c", ENDLESS_CODE, bundle, device, dtype, str(int(pack)), str(tokens), prompt]


def answer(bundle: str, device: str, dtype: str, pack: str, tokens: str, prompt: str) -> int:
    """Print what a bundle's engine makes of a prompt: `tokens` tokens, whatever they are; return how many they were."""
    engine = load(bundle, device=device, dtype=dtype, pack=pack == "1")
    batch = start_batch(engine, [prompt_ids(engine.tokenizer, prompt)], int(tokens), engine.router.params)
    [row] = batch.rows
    while batch.rows:
        batch.step()
    print("".join(event.text for event in row.events))
    return len(row.events)
