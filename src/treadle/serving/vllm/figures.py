"""The figures of the blending in vLLM's /metrics, under the names of `treadle serve`.

The figures are the schedulers', in processes of their own, so they are asked for when Prometheus reads them, through
the call that vLLM's clients have for functions of its core. Labels are the adapters that are there.
"""

import asyncio
import importlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry
from starlette.responses import Response

Answers = Sequence[Mapping[str, Any]]
"""The answers of `treadle.serving.vllm.live.Core.figures`, one an engine."""

ANSWER_SECONDS = 5.0
"""The time that the engines have to answer, which they do between two steps; Prometheus itself waits for 10."""


class Figures(Collector):
    """The figures of all engines of a server, added up."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers  # empty: the engines did not answer

    def collect(self) -> Iterator[Metric]:
        """Yield one family after the other."""
        yield GaugeMetricFamily(
            "treadle_engines_answered", "engines that gave these figures; 0 = they are missing", len(self._answers)
        )
        if not self._answers:
            return
        counters = {
            "treadle_generated_tokens": ("tokens", "generated tokens"),
            "treadle_base_tokens": ("base_tokens", "generated tokens under which no adapter acted"),
            "treadle_router_decisions": ("decisions", "times that weights were made from a text"),
            "treadle_router_seconds": ("seconds", "time spent on weights"),
        }
        for name, (key, text) in counters.items():
            yield CounterMetricFamily(name, text, sum(answer[key] for answer in self._answers))
        weight = CounterMetricFamily(
            "treadle_adapter_weight", "sum of weights over generated tokens", labels=["adapter"]
        )
        loaded = GaugeMetricFamily("treadle_adapter_loaded", "1 for each loaded adapter", labels=["adapter"])
        for adapter in self._answers[0]["weights"]:
            weight.add_metric([adapter], sum(answer["weights"].get(adapter, 0.0) for answer in self._answers))
            loaded.add_metric([adapter], 1)
        yield weight
        yield loaded


async def response(ask: Callable[[str], Awaitable[Answers]] | None, timeout: float = ANSWER_SECONDS) -> Response:
    """Return vLLM's own figures, followed by these; vLLM's alone where there is no bundle.

    Args:
        ask: calls a function of every engine's core; None = there is no bundle.
        timeout: the seconds that the engines have to answer.
    """
    own = importlib.import_module("vllm.v1.metrics.prometheus").get_prometheus_registry()
    text = await asyncio.to_thread(generate_latest, own)
    if ask is not None:
        registry = CollectorRegistry()
        registry.register(Figures(await _answers(ask, timeout)))
        text += generate_latest(registry)
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _answers(ask: Callable[[str], Awaitable[Answers]], timeout: float) -> Answers:
    """Return the engines' answers; none where engines are dead or too slow: vLLM's own figures come then too."""
    dead = importlib.import_module("vllm.v1.engine.exceptions").EngineDeadError
    try:
        return await asyncio.wait_for(ask("treadle_figures"), timeout)
    except (TimeoutError, dead):
        return ()
