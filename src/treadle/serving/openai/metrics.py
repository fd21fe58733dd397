"""The server's metrics for Prometheus. Labels are bounded: routes, outcomes and loaded adapters."""

import time
from collections.abc import Sequence
from functools import partial

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from treadle.engine.sequence import TokenSequence

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
SEQUENCE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Holds one registry per server; the engine's thread and the event loop write to it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter("treadle_requests", "requests, by route and HTTP status", ["route", "outcome"])
        self.request_seconds = histogram(
            "treadle_request_seconds", "seconds from the request to its last byte", ["route"], buckets=LATENCY_BUCKETS
        )
        self.running = gauge("treadle_sequences_running", "sequences that are being generated")
        self.waiting = gauge("treadle_sequences_waiting", "sequences that wait in the queue")
        self.batch = histogram("treadle_batch_sequences", "sequences in one step", buckets=SEQUENCE_BUCKETS)
        self.step = histogram("treadle_step_seconds", "seconds of one step of all batches", buckets=LATENCY_BUCKETS)
        self.first_token = histogram(
            "treadle_time_to_first_token_seconds",
            "seconds from the request to its first token",
            buckets=LATENCY_BUCKETS,
        )
        self.token = histogram(
            "treadle_time_per_token_seconds", "seconds between two tokens of a sequence", buckets=LATENCY_BUCKETS
        )
        self.prompt_tokens = counter("treadle_prompt_tokens", "tokens of prompts that have been read")
        self.reused_tokens = counter(
            "treadle_prompt_tokens_reused", "tokens of prompts that the prefix cache already held"
        )
        self.tokens = counter("treadle_generated_tokens", "generated tokens of finished sequences")
        self.weight = counter(
            "treadle_adapter_weight", "sum of the adapter's weights over generated tokens", ["adapter"]
        )
        self.base_tokens = counter("treadle_base_tokens", "generated tokens to which no adapter contributed")
        self.router = counter("treadle_router_seconds", "seconds spent on computing weights")
        self.prefixes = gauge("treadle_prefix_cache_bytes", "bytes of keys and values that are kept for later prompts")
        self.kv_bytes = gauge("treadle_kv_bytes", "bytes of keys and values of running sequences")
        self.kv_limit = gauge(
            "treadle_kv_limit_bytes", "most bytes that the keys and values of running sequences may take"
        )
        self.loaded = gauge("treadle_adapter_loaded", "1 for each loaded adapter", ["adapter"])
        self._adapters: set[str] = set()

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def set_adapters(self, names: Sequence[str]) -> None:
        """Keep one series for each loaded adapter, and drop the series of removed adapters."""
        for name in self._adapters - set(names):
            self.weight.remove(name)
            self.loaded.remove(name)
        for name in names:
            self.weight.labels(name)
            self.loaded.labels(name).set(1)
        self._adapters = set(names)

    def observe_step(self, seconds: float, num_rows: int) -> None:
        """Count one step of the running sequences."""
        self.step.observe(seconds)
        self.batch.observe(num_rows)

    def set_load(self, running: int, waiting: int, prefix_bytes: int) -> None:
        """Set how many sequences run and wait, and how many bytes the prefix cache has."""
        self.running.set(running)
        self.waiting.set(waiting)
        self.prefixes.set(prefix_bytes)

    def set_kv_memory(self, used: int, limit: int) -> None:
        """Set how many bytes the buffers of keys and values take, and may take at most."""
        self.kv_bytes.set(used)
        self.kv_limit.set(limit)

    def count_prompts(self, rows: Sequence[TokenSequence]) -> None:
        """Count prompts that have been read."""
        self.prompt_tokens.inc(sum(row.prompt_tokens for row in rows))
        self.reused_tokens.inc(sum(row.reused for row in rows))

    def count_row(self, row: TokenSequence) -> None:
        """Count a finished sequence: its tokens, and the weight of each adapter in them."""
        self.tokens.inc(len(row.events))
        self.base_tokens.inc(sum(not event.weights.any() for event in row.events))
        for name, weight in zip(row.router.names, np.sum([event.weights for event in row.events], axis=0), strict=True):
            if name in self._adapters:
                self.weight.labels(name).inc(float(weight))

    def count_request(self, route: str, outcome: str, started: float) -> None:
        """Count a request that has ended; `started` is in seconds of the performance counter."""
        self.requests.labels(route, outcome).inc()
        self.request_seconds.labels(route).observe(time.perf_counter() - started)
