"""What `treadle bench` measures: decoding, prompts, decisions of the router, pools of adapters, memory and peers.

Each suite returns tables (`treadle.timing`). Tokens are counted, not judged: no row ends before its time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

from torch import nn

from treadle.batch import Batch
from treadle.bundle import Bundle
from treadle.embed import SentenceEmbedder
from treadle.errors import OptionError, problem_list, unknown_name
from treadle.generate import Engine
from treadle.machine import Machine
from treadle.models import load_model, load_tokenizer, locate
from treadle.params import BenchParams, RoutingParams, SamplingParams
from treadle.peers import Missing, Peers, cached_peers, transformers_generate, uncached_peers
from treadle.pools import random_adapters, random_router
from treadle.processes import measure_processes, plain_command, treadle_command
from treadle.routing import RunningText, finish_views
from treadle.rows import Row
from treadle.text import prompt_ids
from treadle.timing import Line, Table, Unit, bandwidth, interleave, lines

PROBE = "The answer to the question is as follows."
"""Read where a bundle keeps no samples of an adapter."""
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
POOLS = (4, 16, 64, 256)
"""Numbers of adapters in one engine."""
TEXT_LENGTHS = (64, 1024, 16384)
"""Tokens of the texts that a decision of the router is timed on."""


@dataclass(frozen=True)
class Lab:
    """What a suite measures with: a bundle, its engine, and what the machine can copy.

    Attributes:
        bundle: as read.
        engine: its base model with its adapters.
        dtype: name of the base's dtype.
        params: what was asked.
        peak: bytes a second of a large copy.
    """

    bundle: Bundle
    engine: Engine
    dtype: str
    params: BenchParams
    peak: float

    @property
    def machine(self) -> Machine:
        """What it is measured on."""
        return Machine.of(self.engine.model)

    @property
    def about(self) -> str:
        """One line: machine, versions, bandwidth."""
        return f"{self.machine}, {self.peak / 1e9:.1f} GB/s copied"

    @property
    def facts(self) -> dict[str, Any]:
        """The same and what was asked, for a file."""
        circumstances = {"dtype": self.dtype, **asdict(self.machine), "copied_bytes_per_second": self.peak}
        return {"about": self.about, **circumstances, **asdict(self.params)}

    @classmethod
    def open(cls, bundle: Bundle, device: str | None, dtype: str | None, params: BenchParams) -> "Lab":
        """Load the base model and measure the machine."""
        engine = bundle.engine(device=device, dtype=dtype)
        name = str(engine.model.dtype).removeprefix("torch.")
        return cls(bundle, engine, name, params, bandwidth(engine.model.device))

    def setting(self, batch: int) -> str:
        """Return how lines of this engine and batch size are called."""
        return f"{self.dtype}, batch {batch}"

    def prompts(self, batch: int, length: int) -> list[list[int]]:
        """Return ids (batch, length) of the bundle's own samples in turn, each repeated until it is long enough."""
        texts = [text for texts in self.bundle.samples.values() for text in texts[:1]] or [PROBE]
        ids = [prompt_ids(self.engine.tokenizer, texts[row % len(texts)]) for row in range(batch)]
        return [(each * (length // len(each) + 1))[:length] for each in ids]

    def pool(self, count: int, *, rank: int, targets: Sequence[str]) -> Engine:
        """Return an engine of random adapters on a base model of its own; see `random_adapters`."""
        base = self.bundle.base_model
        model = load_model(base, device=str(self.engine.model.device), dtype=self.dtype)
        adapters = random_adapters(model, base, count, rank=rank, targets=targets)
        router = random_router([adapter.name for adapter in adapters], self.engine.router.embedder)
        return Engine(model, load_tokenizer(base), adapters, router)


def decode(lab: Lab) -> list[Table]:
    """Compare whole calls with transformers' `generate` of the bare base, and single steps with routing off."""
    return [calls(lab), steps(lab)]


def calls(lab: Lab) -> Table:
    """Compare whole calls with transformers' own `generate` of the bare base."""
    plain = load_model(lab.bundle.base_model, device=str(lab.engine.model.device), dtype=lab.dtype)
    made = [line for batch in lab.params.batch for line in _calls(lab, plain, batch)]
    return Table("decode", _call_title(lab), tuple(made))


def _call_title(lab: Lab) -> str:
    return f"A call that reads {lab.params.prompt} tokens and makes {lab.params.tokens} a row, per made token"


def steps(lab: Lab) -> Table:
    """Compare single steps with those of routing off."""
    wide = _wide(lab)
    made = [line for batch in lab.params.batch for line in _steps(lab, wide, batch)]
    start, end = lab.params.prompt, lab.params.prompt + lab.params.tokens
    return Table("decode", f"One step, a token a row, at texts of {start} to {end} tokens", tuple(made))


def _calls(lab: Lab, plain: nn.Module, batch: int) -> list[Line]:
    prompts, tokens = lab.prompts(batch, lab.params.prompt), lab.params.tokens
    arms: dict[str, Unit] = {"transformers generate, base": partial(transformers_generate, plain, prompts, tokens)}
    arms |= {name: partial(run, lab.engine, prompts, tokens, each) for name, each in (routings() | late(lab)).items()}
    seconds = interleave(arms, lab.params.rounds)
    each = {name: [value / tokens for value in values] for name, values in seconds.items()}
    return lines(each, lab.setting(batch), tokens=batch)


def _steps(lab: Lab, wide: Engine | None, batch: int) -> list[Line]:
    prompts, tokens = lab.prompts(batch, lab.params.prompt), lab.params.tokens
    warm_up = 2
    arms: dict[str, tuple[Engine, RoutingParams]] = {name: (lab.engine, each) for name, each in routings().items()}
    for combine in ("linear", "paper"):
        params = RoutingParams(every=1, combine=combine)
        try:
            lab.engine.check_routing([params])
        except OptionError:  # unequal ranks: these adapters do not combine so
            continue
        arms[f"every 1, combine {combine}"] = lab.engine, params
    if wide is not None:
        arms["every 1, rank 8 on all linear layers"] = wide, RoutingParams(every=1)
    batches = {name: started(engine, prompts, tokens + warm_up, each) for name, (engine, each) in arms.items()}
    seconds = interleave({name: each.step for name, each in batches.items()}, tokens - 2, warm_up)
    length = lab.params.prompt + tokens // 2
    read = {name: step_bytes(engine, each, batch, length) for name, (engine, each) in arms.items()}
    return lines(seconds, lab.setting(batch), tokens=batch, read=read, peak=lab.peak)


def routings() -> dict[str, RoutingParams]:
    """Return the arms of the engine that every suite of speed has."""
    return {
        "treadle, routing off": RoutingParams.base(),
        "treadle, every 2": RoutingParams(every=2),
        "treadle, every 1": RoutingParams(every=1),
    }


def late(lab: Lab) -> dict[str, RoutingParams]:
    """Return arms of weights that come a decision late, for an embedder that takes long."""
    is_slow = isinstance(lab.engine.router.embedder, SentenceEmbedder)
    return {"treadle, every 2, lag 1": RoutingParams(every=2, lag=1)} if is_slow else {}


def started(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, routing: RoutingParams) -> Batch:
    """Return a batch that has read its prompts, whose rows end after `tokens` tokens and not before."""
    batch = engine.new_batch(end_ids=frozenset())
    sampling = SamplingParams(max_tokens=tokens)
    batch.join([Row(ids, engine.router, routing, sampling, engine.tokenizer) for ids in prompts])
    return batch


def run(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, routing: RoutingParams) -> None:
    """Make `tokens` tokens a row, prompts included in the time."""
    batch = started(engine, prompts, tokens, routing)
    while batch.rows:
        batch.step()


def prefill(lab: Lab) -> list[Table]:
    """Read a prompt, blended and not."""
    arms = {
        "treadle, routing off": RoutingParams.base(),
        "blended": RoutingParams(),
        "blended, prefill causal": RoutingParams(prefill="causal"),
    }
    length = lab.params.long_prompt
    made: list[Line] = []
    for batch in lab.params.batch:
        prompts = lab.prompts(batch, length)
        units = {name: partial(run, lab.engine, prompts, 1, each) for name, each in arms.items()}
        made += lines(interleave(units, max(lab.params.rounds, 5)), lab.setting(batch), tokens=batch * length)
    return [Table("prefill", f"Reading a prompt of {length} tokens a row, its first token included", tuple(made))]


def router(lab: Lab) -> list[Table]:
    """Decide weights after one more token, by the length of the text, against a step of the base."""
    steps = started(lab.engine, lab.prompts(1, lab.params.prompt), lab.params.tokens, RoutingParams.base())
    arms: dict[str, Unit] = {"a step of the base": steps.step}
    for length in TEXT_LENGTHS:
        for streams in (1, 64):
            arms[f"{streams} x one decision, text of {length} tokens"] = _Decisions(lab.engine, streams, length)
    seconds = interleave(arms, lab.params.tokens - 2, warm_up=1)
    name = lab.engine.router.embedder.id.partition(":")[0]
    return [Table("router", f"Decisions of the router, {name} embedder", tuple(lines(seconds, lab.setting(1))))]


class _Decisions:
    """Texts that grow by a token a call, and whose weights are decided each time."""

    def __init__(self, engine: Engine, streams: int, length: int) -> None:
        self._router = engine.router
        self._params = RoutingParams(every=1)
        piece = [" the", " sum", " of", " cells", " returns", "\n"]
        self._pieces = (piece * (length // len(piece) + 1))[:length]
        self._texts = [RunningText(engine.router, self._params) for _ in range(streams)]
        self()

    def __call__(self) -> None:
        self._pieces.append(" word")
        length = len(self._pieces)
        views = [text.decide(self._pieces, length, 1) for text in self._texts]
        self._router.weigh(
            finish_views(self._router.embedder, [each for each in views if each is not None]), self._params
        )


def adapters(lab: Lab) -> list[Table]:
    """Step with pools of random adapters of rank 16 on q and v, of which a row uses four at most."""
    routing = RoutingParams(every=1, rule="top_k", top_k=4)
    made: list[Line] = []
    for batch in lab.params.batch:
        engines = {f"{count} adapters": lab.pool(count, rank=16, targets=("q_proj", "v_proj")) for count in POOLS}
        prompts = lab.prompts(batch, lab.params.prompt)
        steps = {name: started(engine, prompts, 64, routing).step for name, engine in engines.items()}
        made += lines(interleave(steps, 48, warm_up=2), lab.setting(batch), tokens=batch)
    return [Table("adapters", "One step with a pool of adapters of rank 16 on q and v, top 4 of each row", tuple(made))]


def _wide(lab: Lab) -> Engine | None:
    """Return an engine with adapters of rank 8 on all linear layers; None for a base that names them otherwise."""
    try:
        return lab.pool(len(lab.bundle.adapters), rank=8, targets=ALL_LINEAR)
    except OptionError:
        return None


def step_bytes(engine: Engine, routing: RoutingParams, batch: int, length: int) -> int:
    """Return the bytes that a step reads at least: weights, factors if adapters act, keys and values of all rows."""
    model = engine.model
    config = model.config.get_text_config()
    width = next(model.parameters()).element_size()
    tied = bool(getattr(config, "tie_word_embeddings", False))
    unread = 0 if tied else sum(each.nbytes for each in model.get_input_embeddings().parameters())  # but a row a token
    weights = sum(parameter.nbytes for parameter in model.parameters()) - unread
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * layers * heads * head * width * length * batch
    is_blended = routing.rule != "fixed"
    factors = sum(buffer.nbytes for buffer in engine.blend.factors()) if is_blended else 0
    return weights + cache + factors


def peers(lab: Lab) -> list[Table]:
    """Run other libraries with the same adapters: whole calls, or single tokens where they keep no cache."""
    tokens, length = lab.params.tokens, lab.params.paper_text
    made: list[Line] = []
    for batch in lab.params.batch:
        prompts = lab.prompts(batch, lab.params.prompt)
        own: Peers = {name: partial(run, lab.engine, prompts, tokens, each) for name, each in routings().items()}
        made += _peer_lines({**own, **cached_peers(lab, prompts, tokens)}, lab, batch, tokens)
    [text] = lab.prompts(1, length)
    step = started(lab.engine, [text], lab.params.rounds + 3, RoutingParams(every=1)).step
    single = _peer_lines({"treadle, every 1": step, **uncached_peers(lab, text, lab.params.sentence)}, lab, 1, 1)
    return [
        Table("peers", _call_title(lab), tuple(made)),
        Table("peers", f"One token at a text of {length} tokens", tuple(single)),
    ]


def _peer_lines(arms: Peers, lab: Lab, batch: int, tokens: int) -> list[Line]:
    able = {name: unit for name, unit in arms.items() if not isinstance(unit, Missing)}
    seconds = interleave(able, lab.params.rounds)
    each = {name: [value / tokens for value in values] for name, values in seconds.items()}
    missing = {name: unit.reason for name, unit in arms.items() if isinstance(unit, Missing)}
    setting = lab.setting(batch)
    return [
        *lines(each, setting, tokens=batch),
        *(Line(name, setting, note=f"not run: {reason}") for name, reason in missing.items()),
    ]


def processes(lab: Lab) -> list[Table]:
    """Run processes that generate once: peak memory, and seconds to the first token."""
    folder = locate(lab.bundle.base_model)
    prompt = next((text for texts in lab.bundle.samples.values() for text in texts), PROBE)

    def commands(tokens: int) -> dict[str, list[str]]:
        return {
            "transformers, base": plain_command(folder, lab.dtype, tokens, prompt),
            "treadle generate": treadle_command(str(lab.bundle.folder), lab.dtype, tokens, prompt),
        }

    first = measure_processes(commands(1), lab.params.rounds)
    whole = measure_processes(commands(lab.params.tokens), 1)
    peaks = {name: int(median(each.peak for each in spent)) for name, spent in whole.items()}
    plain, setting = peaks["transformers, base"], lab.setting(1)
    return [
        Table(
            "memory",
            "From the start of a process to its first token",
            tuple(lines({name: [each.seconds for each in spent] for name, spent in first.items()}, setting)),
        ),
        Table(
            "memory",
            f"Peak resident memory of a process that makes {lab.params.tokens} tokens",
            tuple(Line(name, setting, peak=peak, ratio=peak / plain) for name, peak in peaks.items()),
        ),
    ]


SUITES: dict[str, Callable[[Lab], list[Table]]] = {
    "decode": decode,
    "prefill": prefill,
    "router": router,
    "adapters": adapters,
    "peers": peers,
    "memory": processes,
}
"""By the name that the command line takes."""


def check_suites(names: Sequence[str]) -> None:
    """Raise an OptionError that lists the names that are no suite."""
    if unknown := [unknown_name("suite", name, SUITES) for name in names if name not in SUITES]:
        raise OptionError(problem_list("suites:", unknown))


def measure(lab: Lab, names: Sequence[str]) -> Iterator[Table]:
    """Yield the tables of the suites `names` (`check_suites`) as they are measured."""
    return (table for name in names for table in SUITES[name](lab))
