"""The machine that something is measured on, and the versions that were measured."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from treadle.common.version import __version__
from treadle.engine.runners.cpu.packing import CPU_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Machine:
    """Where something is measured.

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
    def of(cls, model: "PreTrainedModel") -> "Machine":
        """Return the machine that a model lies on."""
        device = torch.cuda.get_device_name() if model.device.type == "cuda" else _cpu_name()
        versions = {"treadle": __version__, "python": platform.python_version()}
        versions |= {name: version(name) for name in ("torch", "transformers", "peft")}
        return cls(device, _num_cores(), torch.get_num_threads(), versions)

    def __str__(self) -> str:
        """Return one line: machine, threads, versions."""
        packages = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return f"{self.device}, {self.cores} cores, {self.threads} threads, {packages}"


def _cpu_name() -> str:
    text = CPU_FILE.read_text("utf-8") if CPU_FILE.exists() else ""
    lines = (line.partition(":") for line in text.splitlines())
    return next((name.strip() for key, _, name in lines if key.strip() == "model name"), platform.machine())


def _num_cores() -> int:
    """Return how many cores this process may use; not every system can say."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1
