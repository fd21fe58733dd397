"""Examines a bundle: loading, each adapter's effect, the router's centroids, and the cost of a step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from treadle.bundle.bundle import Bundle, read_bundle
from treadle.common.params import RoutingParams
from treadle.engine.engine import Engine
from treadle.engine.loading import load
from treadle.engine.tokenization import prompt_ids
from treadle.experiments.timing import interleave
from treadle.experiments.workbench import PROBE_TEXT, start_batch
from treadle.lora.adapter import Adapter

MIN_CHANGE_NATS = 1e-6
"""An adapter that moves no log-probability by more (in nats) does nothing."""
TIMED_STEPS = 12


@dataclass(frozen=True)
class AdapterReport:
    """Findings about one adapter.

    Attributes:
        name: of the adapter.
        ranks: all ranks of its factors, ascending.
        targets: the last names of the modules it targets, and "virtual tokens" if it puts some before texts.
        modules: how many modules that are.
        norm: Frobenius norm of the factors' whole update, scale included; vectors (DoRA, IA3, bias) are not in it.
        change: mean over its samples' tokens of the Kullback-Leibler divergence from base to adapter, in nats.
        samples: how many of its own texts were read; 0 = the probe text.
        cosines: of its centroid with those of all adapters that have samples; () = it has none.
    """

    name: str
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    modules: int
    norm: float
    change: float
    samples: int
    cosines: tuple[float, ...]


@dataclass(frozen=True)
class BundleReport:
    """Findings about a bundle; it is healthy if `problems` is empty."""

    base_model: str
    device: str
    dtype: str
    adapters: tuple[AdapterReport, ...]
    base_step: float  # seconds, median
    blended_step: float  # seconds, median
    problems: tuple[str, ...]
    state_layer: int | None = None  # of the base model, whose states decide; None = the bundle has no states
    state_spans: tuple[int, ...] = ()  # tokens of each view of states
    num_left_out: int = 0  # adapters that were not loaded


def examine(
    bundle: Bundle | str | Path,
    *,
    samples: Mapping[str, Sequence[str]] | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> BundleReport:
    """Load a bundle strictly and measure it.

    Args:
        bundle: its folder, or the bundle that was read from it.
        samples: adapter name -> texts to read instead of those that the bundle keeps.
        device: see `treadle.load`.
        dtype: see `treadle.load`.

    Raises:
        TreadleError: the bundle does not load.
    """
    bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    engine = load(bundle, device=device, dtype=dtype)
    texts = {**bundle.samples, **(samples or {})}
    centroids = engine.router.centroids
    cosines = dict(zip(centroids.names, centroids.cosines(centroids.means).tolist(), strict=True))
    reports = tuple(
        _examine_adapter(engine, adapter, texts.get(adapter.name, ()), tuple(cosines.get(adapter.name, ())))
        for adapter in engine.blend.adapters
    )
    misfits = [adapter.name for adapter in bundle.adapters if adapter.name not in engine.adapter_names]
    left_out = {**bundle.left_out, **dict.fromkeys(misfits, "it does not fit the loaded model; the log says why")}
    base_step, blended_step = _step_times(engine)
    states = bundle.router.states
    return BundleReport(
        base_model=bundle.base_model,
        device=str(engine.model.device),
        dtype=str(engine.model.dtype).removeprefix("torch."),
        adapters=reports,
        base_step=base_step,
        blended_step=blended_step,
        problems=(*_problems(reports, left_out),),
        state_layer=states and states.layer,
        state_spans=states.spans if states else (),
        num_left_out=len(left_out),
    )


def _problems(reports: Sequence[AdapterReport], left_out: Mapping[str, str]) -> Iterator[str]:
    """Yield why adapters are left out, and which change nothing."""
    for name, reason in left_out.items():
        yield f"adapter {name!r} is left out: {reason}"
    for report in reports:
        if not report.change > MIN_CHANGE_NATS:
            change = f"its largest divergence from the base is {report.change:.1e} nats"
            yield f"adapter {report.name!r} changes nothing: {change}"


def _examine_adapter(
    engine: Engine, adapter: Adapter, texts: Sequence[str], cosines: tuple[float, ...]
) -> AdapterReport:
    pairs, targets = adapter.pairs.values(), sorted({module.rpartition(".")[2] for module in adapter.modules})
    return AdapterReport(
        name=adapter.name,
        ranks=tuple(sorted({pair.rank // pair.num_experts for pair in pairs})),
        targets=(*targets, *(["virtual tokens"] if adapter.virtual else [])),
        modules=len(adapter.modules),
        norm=sum(pair.norm() ** 2 for pair in pairs) ** 0.5,
        change=sum(_divergence(engine, adapter.name, text) for text in texts or [PROBE_TEXT])
        / len(texts or [PROBE_TEXT]),
        samples=len(texts),
        cosines=cosines,
    )


@torch.inference_mode()
def _divergence(engine: Engine, name: str, text: str) -> float:
    """Return the mean over tokens of KL(base || adapter) in nats."""
    ids = torch.tensor([prompt_ids(engine.tokenizer, text)], device=engine.model.device)
    logprobs: list[torch.Tensor] = []
    for weights in (None, engine.router.fixed_weights(RoutingParams.one(name))):
        with engine.blend.using(weights):
            logprobs.append(engine.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1))  # (T, V)
    base, adapted = logprobs
    return float((base.exp() * (base - adapted)).sum(-1).mean())


def _step_times(engine: Engine) -> tuple[float, float]:
    """Return the median seconds of a decoding step of the base alone and of the blend, measured in turn."""
    blended = RoutingParams(every=1) if engine.router.params.rule == "fixed" else engine.router.params
    if engine.router.lacks_samples:
        blended = RoutingParams.uniform(engine.adapter_names)
    ids, warm_up = prompt_ids(engine.tokenizer, PROBE_TEXT), 2
    arms = {"base": RoutingParams.base(), "blended": blended}
    steps = {
        name: start_batch(engine, [ids], TIMED_STEPS + warm_up + 2, routing).step for name, routing in arms.items()
    }
    seconds = interleave(steps, TIMED_STEPS, warm_up)
    return median(seconds["base"]), median(seconds["blended"])
