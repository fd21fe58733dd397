"""A lab of short measurements, for the tests of `treadle bench` and of benchmarks/peers."""

import json
from pathlib import Path

from treadle.bundle.bundle import read_bundle
from treadle.experiments.params import BenchParams
from treadle.experiments.workbench import Lab, LabSizes

SHORT = BenchParams(batch=(2,), prompt=12, tokens=8, rounds=2, long_prompt=20)
SMALL = LabSizes(copy_bytes=1 << 16, text_tokens=(16, 64))


def open_lab(bundle: Path) -> Lab:
    """Return a lab of the bundle that measures for a short time."""
    return Lab.open(read_bundle(bundle), None, None, SHORT, sizes=SMALL)


def endless(lab: Lab) -> None:
    """Let every token end the base's texts."""
    config = Path(lab.bundle.base_model) / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": list(range(260)), "pad_token_id": 258}))
