"""Measures pools of adapters: steps with 4 to 256 of them, and loading 256 from PEFT folders."""

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from treadle.bundle.base_model import load_model, load_tokenizer, quiet_libraries
from treadle.bundle.bundle import read_bundle
from treadle.common.errors import OptionError, TreadleError, reason_of
from treadle.common.memory import trim
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.engine.sequence import TokenEvent, TokenSequence
from treadle.experiments.pools import random_adapters, random_router
from treadle.experiments.timing import Table, TableLine, lines
from treadle.experiments.workbench import SPARE_TOKENS, WARM_UP_STEPS, Lab, Steps, not_run, pooled, time_steps
from treadle.lora.adapter import Adapter, read_adapter
from treadle.lora.peft_folder import CONFIG_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from treadle.engine.sequence import Likeliest

ROOT = Path(__file__).parents[2]
"""The process that loads a pool finds this package here."""
POOL_SIZES = (4, 16, 64, 256)
"""Numbers of adapters in one engine."""
RANK, TARGETS = 16, ("q_proj", "v_proj")
TOP_K = 4
"""Adapters at most that a row uses."""
POOL_STEPS = 60
DOMAIN_TOKENS = 16
"""Tokens after which a text goes on with another sample."""
MAX_LOADS = 3
"""Times at most that the largest pool is loaded."""


def adapters(
    lab: Lab, *, pools: Sequence[int] = POOL_SIZES, num_steps: int = POOL_STEPS, targets: Sequence[str] = TARGETS
) -> list[Table]:
    """Step with pools of random adapters over texts whose domain changes, and load the largest."""
    where = f"adapters of rank {RANK} on {' and '.join(name[0] for name in targets)}"
    texts = f"a text of another domain every {DOMAIN_TOKENS} tokens"
    title = f"One step with a pool of {where}, top {TOP_K} of each row, {texts}"
    try:
        engines = {f"{count} adapters": lab.pool(count, rank=RANK, targets=targets) for count in pools}
    except OptionError as error:  # the base names its layers otherwise
        names = {f"{count} adapters": reason_of(error) for count in pools}
        return [Table("adapters", title, tuple(not_run(names, lab.dtype)))]
    made = [line for batch in lab.params.batch for line in _steps(lab, engines, batch, num_steps)]
    del engines
    gc.collect()
    return [Table("adapters", title, tuple(made)), _load_table(lab, max(pools), targets, where)]


def _steps(lab: Lab, engines: dict[str, Engine], batch: int, num_steps: int) -> list[TableLine]:
    arms: dict[str, Steps] = {}
    for name, engine in engines.items():
        arms[name] = Steps(engine, engine.new_batch(end_ids=frozenset()))
        arms[name].batch.join(dictated_rows(lab, engine, batch, num_steps + SPARE_TOKENS))
    spent = time_steps(lab, arms, num_steps, lab.setting(batch))
    total = num_steps + WARM_UP_STEPS
    layings = {name: f"laid out anew in {steps.num_layings} of {total} steps" for name, steps in arms.items()}
    return [replace(line, note=layings.get(line.arm, line.note)) for line in spent]


class DictatedRow(TokenSequence):
    """A row whose tokens are given: the model computes every step, and its own choice of token is ignored."""

    def dictate(self, text: Sequence[int]) -> "DictatedRow":
        """Set the tokens that come."""
        self._coming = iter(text)
        return self

    def accept(self, token_id: int, logprob: float, is_end: bool, likeliest: "Likeliest" = ()) -> TokenEvent:
        """Append the next token of the text in the place of the model's."""
        return super().accept(next(self._coming), logprob, False, likeliest)


def dictated_rows(lab: Lab, engine: Engine, batch: int, tokens: int) -> list[DictatedRow]:
    """Return rows whose texts go from one sample of the bundle to the next every DOMAIN_TOKENS tokens."""
    routing: RoutingParams = replace(pooled(lab.routing), rule="top_k", top_k=TOP_K)
    sampling = SamplingParams(max_tokens=tokens)
    samples = lab.sample_ids()
    rows: list[DictatedRow] = []
    for row in range(batch):
        text = drifting(samples, row, lab.params.prompt + tokens)
        made = DictatedRow(text[: lab.params.prompt], engine.router, routing, sampling, engine.tokenizer)
        rows.append(made.dictate(text[lab.params.prompt :]))
    return rows


def drifting(samples: Sequence[Sequence[int]], start: int, length: int) -> list[int]:
    """Return `length` ids: DOMAIN_TOKENS of each sample in turn, from the one at `start`, then the next of each."""
    text: list[int] = []
    index = start
    while len(text) < length:
        sample = samples[index % len(samples)]
        begin = index // len(samples) * DOMAIN_TOKENS % len(sample)
        text += [sample[(begin + place) % len(sample)] for place in range(DOMAIN_TOKENS)]
        index += 1
    return text[:length]


@dataclass(frozen=True)
class LoadCost:
    """What it took a process to load a pool.

    Attributes:
        seconds: from the first folder to an engine that can generate.
        resident: bytes that the process holds more than before.
        trimmed: of these, once the allocator has given back what it keeps of freed memory; None = it cannot be asked.
        own: bytes of all adapters as they are read.
    """

    seconds: float
    resident: int
    trimmed: int | None
    own: int


def _load_table(lab: Lab, count: int, targets: Sequence[str], where: str) -> Table:
    """Load the largest pool from PEFT folders, each time in a process of its own."""
    name = f"{count} {where}"
    title = "Loading PEFT folders into an engine; MiB: resident memory that they add, the ratio is to their bytes"
    with tempfile.TemporaryDirectory() as root:
        made = random_adapters(lab.engine.model, lab.bundle.base_model, count, rank=RANK, targets=targets)
        for adapter in made:
            save_adapter(Path(root) / adapter.name, adapter, targets)
        del made
        try:
            loads = [load_apart(lab, Path(root)) for _ in range(min(lab.params.rounds, MAX_LOADS))]
        except TreadleError as error:  # the steps have been measured
            return Table("adapters", title, tuple(not_run({name: reason_of(error)}, lab.dtype)))
    [line] = lines({name: [each.seconds for each in loads]}, lab.dtype)
    resident, own = int(median(each.resident for each in loads)), loads[0].own
    note = f"their own bytes: {own / 2**20:.0f} MiB"
    trimmed = [each.trimmed for each in loads if each.trimmed is not None]
    if trimmed:
        share = median(trimmed) / own
        note += f"; {share:.3f} of them once the allocator has given back what it keeps (malloc_trim)"
    return Table("adapters", title, (replace(line, peak=resident, ratio=resident / own, note=note),))


def save_adapter(folder: Path, adapter: Adapter, targets: Sequence[str]) -> Path:
    """Write an adapter of one rank as PEFT does, in float32; return the folder."""
    folder.mkdir(parents=True)
    tensors = {
        f"base_model.model.{path}.lora_{side}.weight": factor.float().cpu().contiguous()
        for path, pair in adapter.pairs.items()
        for side, factor in (("A", pair.a), ("B", pair.b))
    }
    save_file(tensors, folder / WEIGHTS_FILE)
    pair = next(iter(adapter.pairs.values()))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": adapter.base_model}
    config |= {"r": pair.rank, "lora_alpha": pair.scale * pair.rank, "target_modules": list(targets), "bias": "none"}
    (folder / CONFIG_FILE).write_text(json.dumps(config), "utf-8")
    return folder


def load_apart(lab: Lab, root: Path) -> LoadCost:
    """Return what `load_pool` takes in a process of its own; a TreadleError with its last line where it fails."""
    code = "import sys; from benchmarks.peers.suite_adapters import load_pool; load_pool(*sys.argv[1:])"
    given = [str(lab.bundle.folder.resolve()), str(root), str(lab.engine.model.device), lab.dtype]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise TreadleError(f"loading adapters in a process of its own failed: {said[-1]}")
    return LoadCost(**json.loads(done.stdout.splitlines()[-1]))


def load_pool(bundle: str, root: str, device: str, dtype: str) -> None:
    """Load a bundle's base, then every PEFT folder in `root` into an engine; print what the adapters took as JSON.

    What an engine with one adapter makes of the base (its weights in one piece) comes before; the router counts.
    """
    quiet_libraries()
    found = read_bundle(bundle)
    model, tokenizer = load_model(found.base_model, device=device, dtype=dtype), load_tokenizer(found.base_model)
    first = read_adapter(min(Path(root).iterdir()))
    Engine(model, tokenizer, [first], random_router([first.name], found.router.embedder)).detach()
    gc.collect()
    trim()  # what any engine makes of the base is no adapter's, and adapters would move into what was freed
    before = resident_bytes()
    begun = time.perf_counter()
    read = [read_adapter(folder) for folder in sorted(Path(root).iterdir())]
    own = sum(adapter.num_bytes() for adapter in read)
    engine = Engine(model, tokenizer, read, random_router([each.name for each in read], found.router.embedder))
    seconds = time.perf_counter() - begun
    del read
    gc.collect()
    resident = resident_bytes() - before
    trimmed = resident_bytes() - before if trim() else None
    print(json.dumps(asdict(LoadCost(seconds, resident, trimmed, own))))
    engine.detach()


def resident_bytes() -> int:
    """Return this process's resident memory; where the system keeps no such file, the most that it has been."""
    file = Path("/proc/self/statm")
    if file.exists():
        return int(file.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
