"""Checks the laws of the step that a GPU replays, on small random models: `benchmarks/gpu.py --check`.

Each law compares `treadle.engine.runners.cuda.step` with the model's own forward in float32, and prints the largest
difference.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gpu_lab import ALL_LINEAR, DEVICE, SMALL, build_engine, build_model, draw_adapters, step_of

from treadle.common.params import RoutingParams, SamplingParams
from treadle.common.transformers_names import cache_argument
from treadle.engine.engine import Engine
from treadle.engine.kv_cache import RowCache
from treadle.engine.runners.cuda.step import GraphStep
from treadle.engine.sequence import TokenSequence

from reference_kernels import PlainKernels

VARIANTS = {
    "Llama, 8 heads on 2": SMALL,
    "Llama, 8 heads on 8": SMALL | {"num_key_value_heads": 8},
    "Llama, head 128": SMALL | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128},
    "Qwen2, biases": SMALL | {"model_type": "qwen2", "head_dim": 32},
    "Qwen3, head norms": SMALL | {"model_type": "qwen3"},
}
ROUTINGS = [
    RoutingParams(every=1),
    RoutingParams.base(),
    RoutingParams(rule="fixed", fixed={"a0": 0.7, "a2": 0.5}),
    RoutingParams(every=2, combine="linear"),
    RoutingParams(every=2, combine="paper"),
    RoutingParams(every=3, past="recompute"),
]
SUMS = [each for each in ROUTINGS if each.combine == "sum"]
LOGPROB_TOLERANCE = 2e-4
"""Nats, in float32."""
KINDS = [("q_proj", "v_proj"), ALL_LINEAR]


def check() -> int:
    """Run every law; return how many failed."""
    failures = 0
    for name, law in LAWS.items():
        try:
            said = law()
        except (AssertionError, RuntimeError) as error:  # the other laws are still to be seen
            failures += 1
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
        else:
            print(f"ok {name}: {said}", flush=True)
    return failures


def engines(shape: dict[str, Any], targets: Sequence[str] = ALL_LINEAR, count: int = 3, rank: int = 8) -> list[Engine]:
    """Return an engine that replays graphs and one that calls the model's forward, with the same weights."""
    made = []
    for is_fast in (True, False):
        model = build_model(shape, DEVICE, torch.float32)
        made.append(build_engine(model, draw_adapters(model, count, rank, targets), is_fast=is_fast))
    return made


def prompts(lengths: Sequence[int]) -> list[list[int]]:
    draw = np.random.default_rng(3)
    return [draw.integers(0, SMALL["vocab_size"], length).tolist() for length in lengths]


def generated(
    engine: Engine, lengths: Sequence[int], routings: Sequence[RoutingParams], tokens: int = 12
) -> list[TokenSequence]:
    """Generate in one batch whose rows join one step after the other, and leave at different times."""
    rows = [
        TokenSequence(
            ids, engine.router, routing, SamplingParams(max_tokens=tokens + 3 * (index % 3)), engine.tokenizer
        )
        for index, (ids, routing) in enumerate(zip(prompts(lengths), routings, strict=True))
    ]
    batch, waiting = engine.new_batch(end_ids=frozenset()), list(rows)
    while waiting or batch.rows:
        if batch.rows:
            batch.step()
        if waiting:
            batch.join([waiting.pop(0)])
    return rows


def difference(some: Sequence[TokenSequence], others: Sequence[TokenSequence]) -> float:
    """Return the largest difference of log-probabilities; fail if tokens differ or it is too large."""
    worst = 0.0
    for index, (one, other) in enumerate(zip(some, others, strict=True)):
        assert one.ids == other.ids, f"row {index}: tokens differ"
        pairs = zip(one.events, other.events, strict=True)
        worst = max([worst, *(abs(a.logprob - b.logprob) for a, b in pairs)])
    assert worst < LOGPROB_TOLERANCE, f"log-probabilities differ by {worst:.2e}"
    return worst


def graph_of(engine: Engine) -> GraphStep:
    step = next((each for each in engine.runner.own if isinstance(each, GraphStep)), None)
    assert step, "the engine does not use the graph step"
    return step


def same_as_forward(shape: dict[str, Any], targets: Sequence[str]) -> Callable[[], str]:
    def law() -> str:
        made = engines(shape, targets)
        lengths, routings = [5, 70, 1, 33, 200, 12], [SUMS[index % len(SUMS)] for index in range(6)]
        worst = difference(*(generated(engine, lengths, routings) for engine in made))
        alone = max(difference(*(generated(each, [40], [routing]) for each in made)) for routing in SUMS)
        return f"{max(worst, alone):.1e} nats, {graph_of(made[0]).num_captures} captures"

    return law


def other_combines() -> str:
    made = engines(SMALL)
    return f"{difference(*(generated(engine, [5, 70, 1, 33, 9, 12], ROUTINGS) for engine in made)):.1e} nats"


def adapters_come_and_go() -> str:
    made = engines(SMALL, ("q_proj", "v_proj"))
    worst = difference(*(generated(engine, [9, 30], SUMS[:2]) for engine in made))
    for engine in made:
        engine.blend.add(
            *[each for each in draw_adapters(engine.model, 4, 24, ALL_LINEAR, seed=5) if each.name == "a3"]
        )
    worst = max(worst, difference(*(generated(engine, [9, 30], SUMS[:2]) for engine in made)))
    for engine in made:
        engine.blend.remove("a3")
    return f"{max(worst, difference(*(generated(engine, [9, 30], SUMS[:2]) for engine in made))):.1e} nats"


def weights_without_capture() -> str:
    engine = engines(SMALL)[0]
    for length in (20, 300, 700):  # other buffers each time
        rows = generated(engine, [length] * 4, [RoutingParams(every=1)] * 4, tokens=300)
    seen = {tuple(event.weights.tolist()) for event in rows[0].events}
    assert len(seen) > 200, f"only {len(seen)} different weights"
    captures = graph_of(engine).num_captures
    assert captures == 3 or DEVICE != "cuda", f"{captures} captures for 1, 2 and 4 rows"
    return f"{len(seen)} different weights, {captures} captures for 1, 2 and 4 rows"


def batch_is_singles() -> str:
    engine = engines(SMALL)[0]
    routings = [SUMS[index % 3] for index in range(6)]
    rows = generated(engine, [5, 70, 1, 33, 200, 12], routings)
    worst = 0.0
    for row in rows:
        single = TokenSequence(row.ids[: row.prompt_tokens], engine.router, row.routing, row.sampling, engine.tokenizer)
        batch = engine.new_batch(end_ids=frozenset())
        batch.join([single])
        while batch.rows:
            batch.step()
        worst = max(worst, difference([row], [single]))
    return f"{worst:.1e} nats"


def kernels_agree() -> str:
    """Compare a step by Triton's kernels, one by the plain ones and the model's forward, for few rows and many."""
    worst = 0.0
    for rows in (1, 3, 40, 130):
        model = build_model(SMALL, DEVICE, torch.float32)
        engine = build_engine(model, draw_adapters(model, 3, 40, ALL_LINEAR))
        plain = GraphStep(model, engine.blend, PlainKernels(), None if DEVICE == "cuda" else lambda run: run)
        expected = one_step(None, engine, rows)
        for name, step in {"the engine's": graph_of(engine), "plain": plain}.items():
            error = relative(one_step(step, engine, rows), expected)
            assert error < 1e-4, f"{rows} rows, {name} kernels: relative error {error:.1e}"
            worst = max(worst, error)
    return f"relative error {worst:.1e}"


def one_step(step: GraphStep | None, engine: Engine, rows: int, length: int = 37) -> torch.Tensor:
    """Return the logits (B, V) of one step after a random cache; None = by the model's forward."""
    model, cache = engine.model, random_cache(engine.model, rows, length)
    draw = np.random.default_rng(rows)
    ids = torch.from_numpy(draw.integers(0, model.config.vocab_size, rows))
    weights = draw.random((rows, len(engine.blend.names)), np.float32)
    weights[: rows // 3] = 0  # base rows
    pads = [index % 5 for index in range(rows)]
    if step:
        return step.run(step_of(ids, pads, weights, cache)).logits[:, 0].clone()
    left = torch.tensor(pads, device=DEVICE)[:, None]
    mask = (torch.arange(length + 1, device=DEVICE) >= left).long()
    with torch.inference_mode(), engine.blend.using(weights):
        output = model(
            input_ids=ids[:, None].to(DEVICE),
            attention_mask=mask,
            position_ids=length - left,
            use_cache=True,
            **{cache_argument(model): cache},
        )
    return output.logits[:, -1]


@torch.inference_mode()
def random_cache(model: Any, rows: int, length: int, seed: int = 0) -> RowCache:
    """Return a cache of random keys and values, the same for the same seed."""
    config, cache = model.config, RowCache()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    draw = torch.Generator(model.device).manual_seed(seed)
    for layer in cache.rows(config.num_hidden_layers):
        size = (rows, config.num_key_value_heads, length, head)
        keys = torch.randn(size, generator=draw, device=model.device, dtype=model.dtype)
        layer.update(keys, keys.roll(1, -1))
        del keys
    return cache


def relative(some: torch.Tensor, other: torch.Tensor) -> float:
    """Return ||some - other|| / ||other||."""
    some, other = some.double(), other.double()
    return float((some - other).norm() / other.norm())


LAWS: dict[str, Callable[[], str]] = {
    "kernels agree with forward": kernels_agree,
    **{
        f"graph = forward, {name}, {len(targets)} layers": same_as_forward(shape, targets)
        for name, shape in VARIANTS.items()
        for targets in (KINDS if shape is SMALL else KINDS[1:])
    },
    "other combines are left to forward": other_combines,
    "adapters come and go": adapters_come_and_go,
    "weights and buffers change without a capture": weights_without_capture,
    "a batch is its singles": batch_is_singles,
}
