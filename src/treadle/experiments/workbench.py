"""Tools of the suites of `treadle bench`: an engine, prompts, steps of a batch, and the bytes that steps read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import TYPE_CHECKING, Any

from treadle.bundle.base_model import load_model, load_tokenizer
from treadle.bundle.bundle import Bundle
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.batch import Batch
from treadle.engine.engine import Engine
from treadle.engine.loading import load
from treadle.engine.sequence import TokenSequence
from treadle.engine.tokenization import prompt_ids
from treadle.experiments.params import BenchParams
from treadle.experiments.pools import random_adapters, random_router
from treadle.experiments.timing import COPY_BYTES, Machine, TableLine, Unit, bandwidth, copies, interleave, lines
from treadle.routing.embedder import SentenceEmbedder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TEXT = "The answer to the question is as follows."
"""Text to read if a bundle keeps no samples of an adapter."""
WARM_UP_STEPS = 2
"""Steps of each arm before a clock runs."""
SPARE_TOKENS = WARM_UP_STEPS + 2
"""Tokens that rows have left when the last step has been timed, and the one that reading the prompt makes."""
OFF_ARM = "treadle, routing off"
EVERY_ARM = "treadle, every 1"
COPY_ARM = "a large copy"


@dataclass(frozen=True)
class LabSizes:
    """Sizes of what the suites measure, which no flag sets.

    Attributes:
        copy_bytes: of the copy that measures bandwidth.
        text_tokens: tokens of the texts that a decision of the router is timed on.
        max_slow_tokens: limit on the tokens of an arm's texts together, for an embedder that reads every text anew.
    """

    copy_bytes: int = COPY_BYTES
    text_tokens: tuple[int, ...] = (64, 1024, 16384)
    max_slow_tokens: int = 16384


@dataclass(frozen=True)
class Lab:
    """A bundle, its engine, and the bandwidth of the machine, for the suites.

    Attributes:
        bundle: as read.
        engine: its base model with its adapters.
        dtype: name of the base's dtype.
        params: what was asked.
        peak: bytes a second of a large copy.
        sizes: of what is measured.
    """

    bundle: Bundle
    engine: Engine
    dtype: str
    params: BenchParams
    peak: float
    sizes: LabSizes = LabSizes()

    @property
    def machine(self) -> Machine:
        """The machine that the engine runs on."""
        return Machine.of(self.engine.model)

    @property
    def about(self) -> str:
        """One line: machine, versions, bandwidth."""
        return f"{self.machine}, {'packed weights, ' if self.has_packs else ''}{self.peak / 1e9:.1f} GB/s copied"

    @property
    def has_packs(self) -> bool:
        """Whether the engine's steps may read weights that oneDNN has packed."""
        return self.engine.runner.has_packs

    @property
    def facts(self) -> dict[str, Any]:
        """Machine, versions and options, for a file."""
        own = {"dtype": self.dtype, "packed": self.has_packs, "copied_bytes_per_second": self.peak}
        asked = {"base_model": self.bundle.base_model, "adapters": self.engine.adapter_names, **asdict(self.params)}
        return {"about": self.about, **asdict(self.machine), **own, **asked}

    @property
    def routing(self) -> RoutingParams:
        """The bundle's own routing."""
        return self.engine.router.params

    @property
    def is_slow(self) -> bool:
        """Whether the embedder reads the text anew for each decision."""
        return isinstance(self.engine.router.embedder, SentenceEmbedder)

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        device: str | None,
        dtype: str | None,
        params: BenchParams,
        *,
        pack: bool | None = None,
        sizes: LabSizes = LabSizes(),
    ) -> "Lab":
        """Load the base model and measure the machine."""
        engine = load(bundle, device=device, dtype=dtype, pack=pack)
        name = str(engine.model.dtype).removeprefix("torch.")
        peak = bandwidth(engine.model.device, sizes.copy_bytes)
        return cls(bundle, engine, name, params, peak, sizes)

    def setting(self, batch: int) -> str:
        """Return how lines of this engine and batch size are called."""
        return f"{self.dtype}, batch {batch}"

    def base(self) -> "PreTrainedModel":
        """Return another base model, on the same device and in the same dtype, without end tokens."""
        model = load_model(self.bundle.base_model, device=str(self.engine.model.device), dtype=self.dtype)
        model.generation_config.eos_token_id = None  # transformers fills in what a call's own config leaves out
        return model

    def sample_ids(self) -> list[list[int]]:
        """Return the ids of the bundle's own samples, the first of each adapter before the second of any."""
        samples = self.bundle.samples.values()
        count = max(map(len, samples), default=0)
        texts = [each[index] for index in range(count) for each in samples if index < len(each)] or [PROBE_TEXT]
        return [prompt_ids(self.engine.tokenizer, text) for text in texts]

    def prompts(self, batch: int, length: int) -> list[list[int]]:
        """Return ids (batch, length) of a sample of each adapter in turn, each repeated until it is long enough."""
        ids = self.sample_ids()[: sum(map(bool, self.bundle.samples.values())) or 1]
        return [(each * (length // len(each) + 1))[:length] for each in (ids[row % len(ids)] for row in range(batch))]

    def pool(self, count: int, *, rank: int, targets: Sequence[str]) -> Engine:
        """Return an engine of random adapters on a base model of its own; see `random_adapters`."""
        model = self.base()
        adapters = random_adapters(model, self.bundle.base_model, count, rank=rank, targets=targets)
        router = random_router([adapter.name for adapter in adapters], self.engine.router.embedder)
        return Engine(model, load_tokenizer(self.bundle.base_model), adapters, router, pack=self.has_packs)

    def context_problem(self, tokens: int, flags: str) -> str:
        """Return a message if texts of `tokens` tokens exceed the model's context, else an empty text."""
        limit = self.engine.context
        is_long = limit is not None and tokens > limit
        return f"{flags}: texts of {tokens} tokens; the model reads at most {limit}" if is_long else ""


class Steps:
    """Rows that have read their prompts; a call makes a token a row.

    Attributes:
        engine: that they run in.
        batch: of the rows.
        num_layings: how often a step laid out the factors of other adapters than the one before.
    """

    def __init__(self, engine: Engine, batch: Batch) -> None:
        self.engine = engine
        self.batch = batch
        self.num_layings = 0

    def __call__(self) -> None:
        """Make a token a row."""
        before = self.engine.blend.active_stacks
        self.batch.step()
        self.num_layings += self.engine.blend.active_stacks is not before

    @property
    def read(self) -> int:
        """Bytes that the next step reads at least."""
        is_blended = any(is_acting(row.routing) for row in self.batch.rows)
        return step_bytes(self.engine, sum(len(row.ids) for row in self.batch.rows), is_blended=is_blended)


def time_steps(lab: Lab, arms: Mapping[str, Steps], rounds: int, setting: str) -> list[TableLine]:
    """Return the lines of steps, each with its share of a large copy's bandwidth; the copy comes last."""
    copy, copied = copies(lab.engine.model.device, lab.sizes.copy_bytes)
    before = {arm: steps.read for arm, steps in arms.items()}
    units: dict[str, Unit] = {**arms, COPY_ARM: copy}
    seconds = interleave(units, rounds, WARM_UP_STEPS)
    [copying] = lines({COPY_ARM: seconds.pop(COPY_ARM)}, setting)
    peak = copied / (copying.seconds or 1.0)
    read = {arm: (before[arm] + steps.read) // 2 for arm, steps in arms.items()}  # the texts have grown
    batch = len(next(iter(arms.values())).batch.rows)
    made = lines(seconds, setting, tokens=batch, read=read, peak=peak)
    note = f"{peak / 1e9:.1f} GB/s read and written"
    return [*(replace(line, mean=mean(seconds[line.arm])) for line in made), replace(copying, ratio=None, note=note)]


def not_run(arms: Mapping[str, str], setting: str) -> list[TableLine]:
    """Return a line for each arm that could not run, by name with the reason."""
    return [TableLine(name, setting, note=f"not run: {reason}") for name, reason in arms.items()]


def routings(own: RoutingParams) -> dict[str, RoutingParams]:
    """Return the arms of every suite of speed: routing off, then the bundle's own every 2 tokens and every token."""
    if own.rule == "fixed":
        return {OFF_ARM: RoutingParams.base(), "treadle, fixed weights": own}
    return {OFF_ARM: RoutingParams.base(), "treadle, every 2": replace(own, every=2), EVERY_ARM: replace(own, every=1)}


def blended(own: RoutingParams) -> RoutingParams:
    """Return the bundle's own routing with a decision a token; fixed weights as they are."""
    return own if own.rule == "fixed" else replace(own, every=1)


def pooled(own: RoutingParams) -> RoutingParams:
    """Return the bundle's own routing for random adapters: a decision a token, no fixed weights."""
    rule = "softmax" if own.rule == "fixed" else own.rule
    return replace(own, every=1, rule=rule, fixed=None)


def is_acting(routing: RoutingParams) -> bool:
    """Return whether any adapter acts under these params."""
    return routing.rule != "fixed" or any((routing.fixed or {}).values())


def start_batch(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    routing: RoutingParams | Iterable[RoutingParams],
) -> Batch:
    """Return a batch that has read its prompts, whose rows end after `tokens` tokens and not before.

    Args:
        engine: that runs them.
        prompts: ids of each row.
        tokens: that a row makes; reading the prompts makes the first.
        routing: of all rows, or one a row.
    """
    each = [routing] * len(prompts) if isinstance(routing, RoutingParams) else list(routing)
    batch = engine.new_batch(end_ids=frozenset())
    sampling = SamplingParams(max_tokens=tokens)
    rows = [
        TokenSequence(ids, engine.router, params, sampling, engine.tokenizer)
        for ids, params in zip(prompts, each, strict=True)
    ]
    batch.join(rows)
    return batch


def run_call(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, routing: RoutingParams) -> None:
    """Make `tokens` tokens a row, prompts included in the time."""
    batch = start_batch(engine, prompts, tokens, routing)
    while batch.rows:
        batch.step()


def cache_bytes(model: "PreTrainedModel") -> int:
    """Return the bytes of one token's keys and values in all layers."""
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head * next(model.parameters()).element_size()


def weight_bytes(model: "PreTrainedModel") -> int:
    """Return the bytes of a model's own parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


def step_bytes(engine: Engine, cached: int, *, is_blended: bool) -> int:
    """Return the bytes that a step reads at least.

    Args:
        engine: whose weights are read, and if `is_blended` the factors that are laid out.
        cached: tokens of all rows together, whose keys and values are read.
        is_blended: whether adapters act.
    """
    model = engine.model
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    unread = 0 if tied else sum(each.nbytes for each in model.get_input_embeddings().parameters())  # but a row a token
    factors = sum(buffer.nbytes for buffer in engine.blend.factors()) if is_blended else 0
    return weight_bytes(model) - unread + cache_bytes(model) * cached + factors
