"""A lab of short measurements, for the tests of `treadle bench` and of benchmarks/peers."""

import gc
import json
from pathlib import Path

import pytest

from treadle.bundle.bundle import read_bundle
from treadle.experiments import router_speed, timing
from treadle.experiments.params import BenchParams
from treadle.experiments.workbench import Lab

SHORT = BenchParams(batch=(2,), prompt=12, tokens=8, rounds=2, long_prompt=20)


class SmallHeap:
    """Garbage collection of a process that holds little: here it would take far longer than what is timed."""

    isenabled, enable, disable = gc.isenabled, gc.enable, gc.disable

    @staticmethod
    def collect() -> None: ...

    freeze = unfreeze = collect


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Make large copies, long texts and garbage collection small until `patch` is undone."""
    patch.setattr(timing, "COPY_BYTES", 1 << 16)
    patch.setattr(timing, "gc", SmallHeap)
    patch.setattr(router_speed, "TEXT_TOKENS", (16, 64))


def open_lab(bundle: Path) -> Lab:
    """Return a lab of the bundle that measures for a short time."""
    return Lab.open(read_bundle(bundle), None, None, SHORT)


def endless(lab: Lab) -> None:
    """Let every token end the base's texts."""
    config = Path(lab.bundle.base_model) / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": list(range(260)), "pad_token_id": 258}))
