"""Side-by-side timings: arms run in turn in one process and are compared with the first."""

import gc
import os
import platform
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING

import torch

from treadle.common.version import __version__
from treadle.engine.runners.cpu.packing import CPU_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Unit = Callable[[], object]
"""One unit of an arm's work: a step, a call, a decision."""
COPY_BYTES = 1 << 28
"""Bytes of the copy that measures bandwidth: far more than any cache holds."""
GPU_COPIES = 8
"""Copies between two synchronisations of a GPU, so that the waiting does not count."""


class Elsewhere(float):
    """Seconds that a unit took in another process, by the clock of that process; they count instead of ours."""


@dataclass(frozen=True)
class TableLine:
    """One row of a table: the time or memory of one arm.

    Attributes:
        arm: what was measured.
        setting: under which circumstances, such as `float32, batch 8`; ratios hold within one setting.
        seconds: median of a unit (see the table's title); None where the arm could not run.
        low: first quartile.
        high: third quartile.
        ratio: of the medians, against the first arm of the setting.
        tokens_per_second: of all rows together; None where a unit makes no token.
        bandwidth: share of the measured memory bandwidth that reading each byte once in this time takes; None where
            the bytes are not known.
        peak: bytes of resident memory; where it is given, the ratio is that of peaks.
        mean: of a unit's seconds, where single units take much longer than the median; else None.
        note: why the arm could not run, what it does differently, or what else was seen.
    """

    arm: str
    setting: str
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    tokens_per_second: float | None = None
    bandwidth: float | None = None
    peak: int | None = None
    mean: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Lines of one kind: `title` says what a unit is."""

    suite: str
    title: str
    lines: tuple[TableLine, ...]


@dataclass(frozen=True)
class Machine:
    """The machine and the versions of a measurement.

    Attributes:
        device: name of the GPU, or of the CPU's model where the system tells it.
        cores: of the CPU that this process may use.
        threads: that torch computes with.
        versions: of treadle, Python and the libraries, by name.
    """

    device: str
    cores: int
    threads: int
    versions: dict[str, str]

    @classmethod
    def of(cls, model: "PreTrainedModel", cpu_file: Path = CPU_FILE) -> "Machine":
        """Return the machine that a model lies on; `cpu_file` names its CPU."""
        device = torch.cuda.get_device_name() if model.device.type == "cuda" else _cpu_name(cpu_file)
        versions = {"treadle": __version__, "python": platform.python_version()}
        versions |= {name: version(name) for name in ("torch", "transformers", "peft")}
        return cls(device, _num_cores(), torch.get_num_threads(), versions)

    def __str__(self) -> str:
        """Return one line: machine, threads, versions."""
        packages = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return f"{self.device}, {self.cores} cores, {self.threads} threads, {packages}"


def _cpu_name(file: Path) -> str:
    text = file.read_text("utf-8") if file.exists() else ""
    lines = (line.partition(":") for line in text.splitlines())
    return next((name.strip() for key, _, name in lines if key.strip() == "model name"), platform.machine())


def _num_cores() -> int:
    """Return how many cores this process may use; not every system can say."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def interleave(
    arms: Mapping[str, Unit], rounds: int, warm_up: int = 1, *, before: Mapping[str, Unit] | None = None
) -> dict[str, list[float]]:
    """Return the seconds of each arm in each round, after `warm_up` rounds without a clock; all run once a round.

    Each round begins with the next arm, and Python collects no garbage while a clock runs.

    Args:
        arms: name -> its unit.
        rounds: that count.
        warm_up: rounds before them.
        before: what runs before an arm, by its name, without a clock: so that it finds the caches as work leaves them.
    """
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with _without_garbage():
        for index in range(warm_up + rounds):
            gc.collect()  # quick: only what the rounds made
            first = index % max(len(names), 1)
            for name in [*names[first:], *names[:first]]:
                if before and name in before:
                    before[name]()
                taken = _seconds(arms[name])
                if index >= warm_up:
                    seconds[name].append(taken)
    return seconds


def _seconds(unit: Unit) -> float:
    synchronise()
    started = time.perf_counter()
    result = unit()
    synchronise()
    taken = time.perf_counter() - started
    return float(result) if isinstance(result, Elsewhere) else taken


@contextmanager
def _without_garbage() -> Generator[None]:
    """Collect Python's garbage now; inside, it is collected on request only, and what is there now is not looked at.

    Objects that somebody else has frozen stay frozen.
    """
    was_enabled, is_frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if not is_frozen:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


def synchronise() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def lines(
    seconds: Mapping[str, Sequence[float]],
    setting: str,
    *,
    tokens: int = 0,
    read: Mapping[str, int] | None = None,
    peak: float = 0.0,
    notes: Mapping[str, str] | None = None,
) -> list[TableLine]:
    """Return a line an arm, compared with the first.

    Args:
        seconds: of each arm's units.
        setting: of all of them.
        tokens: that a unit makes, of all rows together.
        read: bytes that a unit has to read at least, by arm.
        peak: bytes a second that the machine copies.
        notes: of arms, by name.
    """
    reference = median(next(iter(seconds.values())))
    made: list[TableLine] = []
    for arm, each in seconds.items():
        middle = median(each)
        low, _, high = quantiles(each, n=4, method="inclusive") if len(each) > 1 else (middle, middle, middle)
        bandwidth = read[arm] / middle / peak if read and arm in read and peak else None
        rate = tokens / middle if tokens else None
        note = (notes or {}).get(arm, "")
        made.append(TableLine(arm, setting, middle, low, high, middle / reference, rate, bandwidth, note=note))
    return made


def copies(device: torch.device, num_bytes: int = COPY_BYTES) -> tuple[Unit, int]:
    """Return a copy of `num_bytes` as a unit, on a GPU several, and the bytes that it reads and writes."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    count = GPU_COPIES if device.type == "cuda" else 1

    def copy() -> None:
        for _ in range(count):
            target.copy_(source)

    return copy, 2 * count * num_bytes


def bandwidth(device: torch.device, num_bytes: int = COPY_BYTES) -> float:
    """Return the bytes a second of a large copy, read and written (median of nine)."""
    copy, copied = copies(device, num_bytes)
    return copied / median(interleave({"copy": copy}, rounds=9, warm_up=2)["copy"])


def markdown(table: Table) -> str:
    """Return a table as markdown, in milliseconds; columns that no line fills are left out."""
    columns: dict[str, Callable[[TableLine], str]] = {
        "setting": lambda line: line.setting,
        "arm": lambda line: line.arm,
        "ms (quartiles)": _milliseconds,
        "mean": lambda line: "" if line.mean is None else f"{1000 * line.mean:.1f}",
        "ratio": lambda line: _number(line.ratio, 3),
        "tokens/s": lambda line: _number(line.tokens_per_second, 1),
        "of bandwidth": lambda line: "" if line.bandwidth is None else f"{line.bandwidth:.0%}",
        "MiB": lambda line: "" if line.peak is None else f"{line.peak / 2**20:.0f}",
        "note": lambda line: line.note.replace("|", "\\|"),
    }
    shown = {name: [cell(line) for line in table.lines] for name, cell in columns.items()}
    shown = {name: cells for name, cells in shown.items() if any(cells)}
    rows = ["| " + " | ".join(row) + " |" for row in zip(*shown.values(), strict=True)]
    return "\n".join([f"{table.title}:", "", "| " + " | ".join(shown) + " |", "|---" * len(shown) + "|", *rows])


def _milliseconds(line: TableLine) -> str:
    if line.seconds is None or line.low is None or line.high is None:
        return ""
    digits = 1 if line.seconds >= 0.01 else 3
    return f"{1000 * line.seconds:.{digits}f} ({1000 * line.low:.{digits}f}-{1000 * line.high:.{digits}f})"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
