"""Decoding on a GPU, random-weight models of known shapes: routing off against weights that change every token.

    python benchmarks/gpu.py --check                     # the laws, on small models
    python benchmarks/gpu.py --quick --output quick.jsonl
    python benchmarks/gpu.py --output gpu.jsonl          # the whole table, under six minutes on an H100

For each shape, set of four adapters, batch and context: milliseconds of a step with routing off and blended, in turn
(blocks of steps between two CUDA events; median and quartiles), their ratio, and the share of the bandwidth of a large
copy that reading weights, factors and cache once in this time takes. Then whole engine steps by the clock, router and
sampling included, and the same calls by PEFT: one adapter, Arrow, X-LoRA. Before anything is timed, logits are compared
with those of the model's own forward. Each result is printed, and written to --output as a line of JSON, as it comes.

Next to AdaFuse (arXiv 2603.11873): Llama-2-7B on an A100, 2.4 ms a token without adapters and 3.1 with.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from gpu_check import check, graph_of, random_cache, relative
from gpu_lab import ADAPTERS, SHAPES, build_engine, build_model, draw_adapters, save_adapters
from torch import Tensor

from treadle.cache import RowCache
from treadle.generate import Engine
from treadle.graph_step import GraphStep, StepOptions
from treadle.params import RoutingParams
from treadle.peers import arrow, next_token, one_adapter, transformers_generate, xlora
from treadle.suites import run, started, step_bytes
from treadle.timing import bandwidth, circumstances, interleave

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_ADAPTERS = 4
BLOCK = 6
"""Steps between two events: the host prepares a step while the device computes the one before."""
SPARE = 3 << 30
"""Bytes of the device's memory that a cache must leave."""
QUICK = [("Llama-2-7B", "r 64, q v", [1, 8, 32], [512])]
FULL = [
    ("Llama-2-7B", "r 64, q v", [1, 8, 32, 128], [512, 4096]),
    ("Llama-2-7B", "r 16, all linear", [1, 8, 32, 128], [512, 4096]),
    ("Llama-3-8B", "r 64, q v", [1, 8, 32, 128], [512, 4096]),
    ("Llama-3-8B", "r 16, all linear", [1, 8, 32, 128], [512, 4096]),
]
SMALL = [("small", "r 64, q v", [1, 3], [40]), ("small", "r 16, all linear", [1, 3], [40])]


@dataclass
class Report:
    """Prints results and writes them down as they come."""

    output: Path | None
    started: float = field(default_factory=time.perf_counter)

    def __call__(self, kind: str, **facts: Any) -> None:
        """Report one result."""
        seconds = time.perf_counter() - self.started
        shown = ", ".join(f"{key} {_shown(value)}" for key, value in facts.items())
        print(f"[{seconds:5.0f} s] {kind}: {shown}", flush=True)
        if self.output:
            with self.output.open("a") as file:
                file.write(json.dumps({"kind": kind, "at": round(seconds, 1), **facts}) + "\n")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="run the laws and nothing else")
    parser.add_argument("--quick", action="store_true", help="one shape, few repeats")
    parser.add_argument("--small", action="store_true", help="a tiny model: whether this script runs")
    parser.add_argument("--ways", action="store_true", help="also time A apart from W, and B by addmm")
    parser.add_argument("--no-products", action="store_true", help="do not choose the products by measurement")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--only", nargs="+", default=list(SHAPES), help="names of shapes")
    parser.add_argument("--rounds", type=int, default=0, help="blocks of steps of each arm")
    parser.add_argument("--limit", type=float, default=540, help="seconds after which nothing more is begun")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.check:
        exact_attention()
        raise SystemExit(check())
    measure(options, Report(options.output))


def exact_attention() -> None:
    """Let the reference compute attention in full float32."""
    torch.backends.cuda.enable_flash_sdp(enabled=False)
    torch.backends.cuda.enable_mem_efficient_sdp(enabled=False)
    torch.backends.cuda.enable_cudnn_sdp(enabled=False)


def measure(options: argparse.Namespace, report: Report) -> None:
    peak = copied()
    plan = SMALL if options.small else QUICK if options.quick else FULL
    rounds = options.rounds or (6 if options.quick or options.small else 12)
    model, name = None, ""
    for shape, kind, batches, contexts in plan:
        if shape not in options.only or time.perf_counter() - report.started > options.limit:
            continue
        if shape != name:
            model = None
            free()
            model, name = build_model(SHAPES[shape], DEVICE), shape
            report("machine", about=circumstances(model), copied_gb_s=peak / 1e9, shape=shape)
        rank, targets = ADAPTERS[kind]
        engine = build_engine(model, draw_adapters(model, NUM_ADAPTERS, rank, targets))
        lab = Lab(engine, f"{shape}, {kind}", peak, rounds, report, options)
        lab.run(batches, contexts)
        engine.detach()
        del engine, lab
        free()
    model = None
    free()
    if not options.no_peers and (
        options.quick or options.small or time.perf_counter() - report.started < options.limit
    ):
        peers(plan[0][0], plan[0][1], report, 3 if options.quick or options.small else 5)


def copied() -> float:
    """Return the bytes a second of a large copy, read and written."""
    if DEVICE != "cuda":
        return bandwidth(torch.device(DEVICE))
    source = torch.empty(1 << 31, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)

    def block() -> None:
        for _ in range(BLOCK):
            target.copy_(source)

    return 2 * source.nbytes / median(in_turn({"copy": block}, rounds=9)["copy"])


def free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def noting_out_of_memory(report: Report, **facts: Any) -> Iterator[None]:
    """Report a lack of memory as a result."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        report("out of memory", **facts, note=str(error).splitlines()[0][:160])
    free()


@dataclass
class Lab:
    """One engine and how it is measured."""

    engine: Engine
    name: str
    peak: float
    rounds: int
    report: Report
    options: argparse.Namespace

    def run(self, batches: Sequence[int], contexts: Sequence[int]) -> None:
        """Compare with forward, then time every batch and context."""
        if not self.options.no_products and DEVICE == "cuda":
            self.choose_products(batches)
        for batch in [each for each in batches if each <= 8]:
            with noting_out_of_memory(self.report, setting=self.name, batch=batch):
                self.compare(batch)
        for context in contexts:
            for batch in batches:
                if time.perf_counter() - self.report.started < self.options.limit:
                    with noting_out_of_memory(self.report, setting=self.name, batch=batch, context=context):
                        self.steps(batch, context)
        for batch in batches[:2]:
            with noting_out_of_memory(self.report, setting=self.name, batch=batch):
                self.whole_steps(batch)

    @property
    def step(self) -> GraphStep:
        """The engine's own step."""
        return graph_of(self.engine)

    def new_step(self, options: StepOptions) -> GraphStep:
        """Let the engine compute in another way."""
        capture = None if DEVICE == "cuda" else lambda run: run
        self.engine._fast_step = GraphStep(self.engine.model, self.engine.blend, capture=capture, options=options)
        return self.engine._fast_step

    def cache(self, batch: int, context: int) -> RowCache:
        """Return a random cache; OutOfMemoryError where it would not fit."""
        need = batch * (context + max(256, context // 4)) * cache_bytes(self.engine.model)
        if DEVICE == "cuda":
            room = torch.cuda.mem_get_info()[0]
            if need + SPARE > room:
                raise torch.OutOfMemoryError(f"the cache needs {need / 1e9:.1f} GB, {room / 1e9:.1f} GB are free")
        return random_cache(self.engine.model, batch, context)

    def compare(self, batch: int, context: int = 64) -> None:
        """Compare a step's logits with those of the model's own forward."""
        model = self.engine.model
        ids = torch.arange(batch) * 7 % model.config.vocab_size
        for arm, weights in {"routing off": None, "blended": draw_weights(batch, 0)}.items():
            logits = self.step(ids, [0] * batch, weights, self.cache(batch, context)).clone()
            with torch.inference_mode(), self.engine.blend.using(weights):
                output = model(
                    input_ids=ids[:, None].to(DEVICE), past_key_values=self.cache(batch, context), use_cache=True
                )
            error = relative(logits, output.logits[:, -1])
            agree = float((logits.argmax(-1) == output.logits[:, -1].argmax(-1)).float().mean())
            self.report("compare", setting=self.name, batch=batch, arm=arm, relative_error=error, same_argmax=agree)

    def steps(self, batch: int, context: int) -> None:
        """Time steps of routing off and blended in turn, and with `--ways` the other ways to blend."""
        cache = self.cache(batch, context)
        ids = torch.arange(batch) % self.engine.model.config.vocab_size
        arms: dict[str, Callable[[], object]] = {
            "routing off": Steps(self.step, ids, cache, blended=False),
            "blended": Steps(self.step, ids, cache, blended=True),
        }
        if self.options.ways:
            own = self.step
            for name, (shrink, expand) in WAYS.items():
                product = own._options.product
                arms[name] = Steps(self.new_step(StepOptions(shrink, expand, product)), ids, cache, blended=True)
            self.engine._fast_step = own
        seconds = in_turn(arms, self.rounds)
        reference = median(seconds["routing off"])
        for arm, each in seconds.items():
            routing = RoutingParams.base() if arm == "routing off" else RoutingParams(every=1)
            read = step_bytes(self.engine, routing, batch, context)
            middle = median(each)
            low, _, high = quantiles(each, n=4)
            self.report(
                "step",
                setting=self.name,
                batch=batch,
                context=context,
                arm=arm,
                ms=1e3 * middle,
                low=1e3 * low,
                high=1e3 * high,
                ratio=middle / reference,
                bandwidth=read / middle / self.peak,
                tokens_s=batch / middle,
            )

    def whole_steps(self, batch: int, context: int = 512) -> None:
        """Time the engine's steps by the clock: router, sampling and host included."""
        prompts = draw_prompts(self.engine, batch, 40 if self.options.small else context)
        routings = {"routing off": RoutingParams.base(), "every 1": RoutingParams(every=1)}
        tokens = 8 * self.rounds
        units = {arm: started(self.engine, prompts, tokens + 8, each).step for arm, each in routings.items()}
        before = self.step.num_captures
        seconds = interleave(units, tokens, warm_up=4)
        reference = median(seconds["routing off"])
        for arm, each in seconds.items():
            self.report(
                "engine step",
                setting=self.name,
                batch=batch,
                context=context,
                arm=arm,
                ms=1e3 * median(each),
                ratio=median(each) / reference,
                tokens_s=batch / median(each),
                captures=self.step.num_captures - before,
            )

    def choose_products(self, batches: Sequence[int]) -> None:
        """Time the forms of every product of a step, and let the step take the fastest of each."""
        chosen: dict[tuple[int, int, int], Callable[[Tensor, Tensor], Tensor]] = {}
        for batch in batches:
            rows = self.step._kernels.bucket(batch)
            for name, weights in step_weights(self.step).items():
                forms = product_forms(rows)
                seconds = time_products(forms, weights, rows)
                best = min(seconds, key=lambda form: seconds[form])
                chosen[rows, *weights[0].shape] = forms[best]
                speeds = {form: round(weights[0].nbytes / each / self.peak, 3) for form, each in seconds.items()}
                self.report("product", setting=self.name, batch=batch, weight=name, best=best, of_bandwidth=speeds)
        own = self.step._kernels.product
        self.new_step(StepOptions(product=lambda x, w: chosen.get((len(x), *w.shape), own)(x, w)))


WAYS = {
    "blended, A apart": ("separate", "fused"),
    "blended, B by addmm": ("stacked", "addmm"),
    "blended, both": ("separate", "addmm"),
}


class Steps:
    """A block of steps, each with weights of its own."""

    def __init__(self, step: GraphStep, ids: Tensor, cache: RowCache, *, blended: bool) -> None:
        self._step, self._ids, self._cache = step, ids, cache
        self._weights = [draw_weights(len(ids), seed) if blended else None for seed in range(16)]
        self._count = 0

    def __call__(self) -> None:
        """Run the block."""
        for _ in range(BLOCK):
            self._count += 1
            self._step(self._ids, [0] * len(self._ids), self._weights[self._count % 16], self._cache)


def in_turn(arms: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Return the seconds a step of each arm in each round, between two events on the device; all run once a round."""
    if DEVICE != "cuda":
        return {arm: [each / BLOCK for each in seconds] for arm, seconds in interleave(arms, rounds, warm_up).items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(warm_up + rounds):
        for name, unit in arms.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            unit()
            end.record()
            end.synchronize()
            if index >= warm_up:
                seconds[name].append(begin.elapsed_time(end) / 1e3 / BLOCK)
    return seconds


def draw_weights(rows: int, seed: int) -> np.ndarray:
    """Return weights (B, N) whose rows sum to 1."""
    weights = np.random.default_rng(seed).random((rows, NUM_ADAPTERS), np.float32) + 0.05
    return weights / weights.sum(1, keepdims=True)


def draw_prompts(engine: Engine, batch: int, length: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, engine.model.config.vocab_size, (batch, length)).tolist()


def cache_bytes(model: Any) -> int:
    """Return the bytes of one token's keys and values."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize


def step_weights(step: GraphStep) -> dict[str, list[Tensor]]:
    """Return the matrices of a step, of all layers, by name; those with A below W too."""
    found: dict[str, list[Tensor]] = {"head": [step._head.weight]}
    for block in step._blocks:
        for name, group in (("qkv", block.qkv), ("o", block.output), ("gate up", block.gate_up), ("down", block.down)):
            found.setdefault(name, []).append(group.weight)
            if group.slots:
                found.setdefault(f"{name} + A", []).append(group.whole)
    return found


def product_forms(rows: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return the ways to compute a product of so many rows."""
    from treadle.kernels import thin_product, torch_product, vector_product

    forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch": torch_product}
    if rows == 1:
        for size in ((4, 1024, 4), (8, 512, 4), (16, 256, 4), (2, 2048, 8)):
            forms[f"vector {size}"] = partial(vector_product, outs=size[0], columns=size[1], warps=size[2])
    if rows <= 32:
        for size in ((32, 128, 4, 4), (16, 256, 4, 4), (64, 128, 4, 3)):
            forms[f"thin {size}"] = partial(thin_product, outs=size[0], columns=size[1], warps=size[2], stages=size[3])
    return forms


@torch.inference_mode()
def time_products(
    forms: Mapping[str, Callable[[Tensor, Tensor], Tensor]], weights: Sequence[Tensor], rows: int
) -> dict[str, float]:
    """Return the seconds of one product, over graphs that go through several layers' weights, larger than the cache."""
    x = torch.randn(rows, weights[0].shape[1], device=DEVICE, dtype=weights[0].dtype)
    expected = forms["torch"](x, weights[0])
    replays: dict[str, Callable[[], object]] = {}
    for name, form in forms.items():
        try:
            error = relative(form(x, weights[0]), expected)
        except Exception as failed:  # a form that cannot be compiled here is no candidate
            print(f"   {name}: {type(failed).__name__}: {str(failed)[:200]}", flush=True)
            continue
        assert error < 1e-2, f"{name}: relative error {error:.1e}"
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight in (weights * 12)[:12]:
                form(x, weight)
        replays[name] = graph.replay
    seconds = in_turn(replays, rounds=7)
    return {name: median(each) * BLOCK / 12 for name, each in seconds.items()}


def peers(shape: str, kind: str, report: Report, rounds: int) -> None:
    """Make the same calls with PEFT: each peer has a model of its own, and is timed in turn with treadle."""
    rank, targets = ADAPTERS[kind]
    small = shape == "small"
    model = build_model(SHAPES[shape], DEVICE)
    adapters = draw_adapters(model, NUM_ADAPTERS, rank, targets)
    with tempfile.TemporaryDirectory() as root:
        folders = save_adapters(adapters, rank, targets, Path(root))
        engine = build_engine(model, adapters)
        length, tokens = (40, 8) if small else (512, 32)
        for name, make in PEERS.items():
            for batch in (1, 8) if name != "PEFT X-LoRA, untrained" else (1,):
                with noting_out_of_memory(report, setting=f"{shape}, {kind}", arm=name, batch=batch):
                    try:
                        peer = make(build_model(SHAPES[shape], DEVICE), folders)
                    except (ImportError, ValueError, RuntimeError) as error:
                        report("peer", arm=name, note=f"not run: {type(error).__name__}: {str(error)[:200]}")
                        continue
                    _time_peer(engine, name, peer, draw_prompts(engine, batch, length), tokens, rounds, report)
                    del peer
                free()


def _time_peer(  # noqa: PLR0913, PLR0917 - all of it differs from call to call
    engine: Engine, name: str, peer: Any, prompts: list[list[int]], tokens: int, rounds: int, report: Report
) -> None:
    """Time whole calls; X-LoRA keeps no cache, so of it single tokens."""
    is_uncached = "X-LoRA" in name
    unit = (
        partial(next_token, peer, prompts[0]) if is_uncached else partial(transformers_generate, peer, prompts, tokens)
    )
    arms: dict[str, Callable[[], object]] = {
        "treadle, routing off": partial(run, engine, prompts, tokens, RoutingParams.base()),
        "treadle, every 1": partial(run, engine, prompts, tokens, RoutingParams(every=1)),
        name: unit,
    }
    seconds = interleave(arms, rounds)
    for arm, each in seconds.items():
        made = 1 if arm == name and is_uncached else tokens
        report(
            "call",
            title=f"reads {len(prompts[0])} tokens, makes {made}; per made token",
            batch=len(prompts),
            arm=arm,
            ms=1e3 * median(each) / made,
            tokens_s=len(prompts) * made / median(each),
        )


PEERS: dict[str, Callable[[Any, Mapping[str, Path]], Any]] = {
    "PEFT, one adapter": one_adapter,
    "PEFT Arrow, top 2": arrow,
    "PEFT X-LoRA, untrained": xlora,
}

if __name__ == "__main__":
    main()
