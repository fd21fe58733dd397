"""Whole processes for `treadle bench`: time to the first token and to `--help`, peak memory beside what it must be."""

import sys
from collections.abc import Sequence
from statistics import median

from treadle.common.files import locate
from treadle.engine.tokenization import prompt_ids
from treadle.experiments.processes import (
    IMPORTS,
    Spent,
    endless_command,
    measure_processes,
    plain_command,
    treadle_command,
)
from treadle.experiments.timing import Line, Table, lines
from treadle.experiments.workbench import PROBE, Lab, cache_bytes, weight_bytes

HELP, IMPORTED = "treadle --help", "import torch, transformers"
PLAIN, COMMAND, ENGINE = "transformers, base", "treadle generate", "treadle"
CLASS = "the same and the base's class"
NEEDED = "base + adapters + cache + imports"


def memory(lab: Lab) -> list[Table]:
    """Run processes that generate once: seconds to the first token, and peak memory."""
    rounds, setting = lab.params.rounds, lab.setting(1)
    base, bundle = locate(lab.bundle.base_model), str(lab.bundle.folder)
    device, prompt = str(lab.engine.model.device), _prompt(lab)
    first = {
        PLAIN: plain_command(base, device, lab.dtype, 1, prompt),
        COMMAND: treadle_command(bundle, device, lab.dtype, 1, prompt, pack=lab.has_packs),
    }
    whole = {
        IMPORTED: [sys.executable, "-c", IMPORTS],
        CLASS: [sys.executable, "-c", f"import torch; from transformers import {type(lab.engine.model).__name__}"],
        PLAIN: plain_command(base, device, lab.dtype, lab.params.tokens, prompt),
        ENGINE: endless_command(bundle, device, lab.dtype, lab.params.tokens, prompt, pack=lab.has_packs),
    }
    help_only = {HELP: [sys.executable, "-m", "treadle", "--help"]}
    return [
        _start("From the start of a process to its first token", measure_processes(first, rounds), setting),
        _start("From the start of a process to the end of its help", measure_processes(help_only, rounds), ""),
        peak_table(lab, measure_processes(whole, rounds)),
    ]


def _prompt(lab: Lab) -> str:
    return next((text for texts in lab.bundle.samples.values() for text in texts), PROBE)


def _start(title: str, spent: dict[str, list[Spent]], setting: str) -> Table:
    seconds = {name: [each.seconds for each in runs] for name, runs in spent.items()}
    return Table("memory", title, tuple(lines(seconds, setting)))


def peak_table(lab: Lab, spent: dict[str, list[Spent]]) -> Table:
    """Return the peaks of processes beside the sum of what a process must hold: ratios are to that sum."""
    length = len(prompt_ids(lab.engine.tokenizer, _prompt(lab))) + lab.params.tokens
    model = lab.engine.model
    needed = {
        "base": weight_bytes(model),
        "adapters": sum(adapter.num_bytes() for adapter in lab.bundle.adapters),
        "cache": cache_bytes(model) * length,
        IMPORTED: _middle(spent[IMPORTED]),
    }
    total, plain = sum(needed.values()), _middle(spent[PLAIN])
    parts = ", ".join(f"{name} {_mebibytes(size)}" for name, size in needed.items())
    elsewhere = "" if model.device.type == "cpu" else f"; memory of {model.device} not counted"
    more = _mebibytes(_middle(spent[CLASS]) - needed[IMPORTED])
    note = f"MiB: {parts}; importing the base's class takes {more} more, which are not counted"
    made = [Line(NEEDED, lab.setting(1), peak=total, ratio=1.0, note=note)]
    for name in (PLAIN, ENGINE):
        peak = _middle(spent[name])
        low, high = (_mebibytes(pick(each.peak for each in spent[name])) for pick in (min, max))
        note = f"{low} to {high} MiB in {len(spent[name])} processes; {peak / plain:.3f} of transformers'{elsewhere}"
        made.append(Line(name, lab.setting(1), peak=peak, ratio=peak / total, note=note))
    return Table("memory", f"Peak resident memory of a process that makes {lab.params.tokens} tokens", tuple(made))


def _middle(spent: Sequence[Spent]) -> int:
    return int(median(each.peak for each in spent))


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f}"
