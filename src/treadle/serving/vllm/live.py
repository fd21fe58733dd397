"""The mixture of a running engine, in the scheduler's process; adapters come and go between two steps.

Nothing here imports vLLM: `treadle.serving.vllm.engine_hooks` calls it with what it takes from vLLM's objects.
"""

from collections.abc import Callable, Sequence
from typing import Any

from treadle.common.errors import AdapterError, TreadleError
from treadle.serving.vllm.mixture import Mixture, open_bundle, read_newcomer, with_adapter, without_adapter
from treadle.serving.vllm.params import PluginParams
from treadle.serving.vllm.request_weights import RequestWeights
from treadle.serving.vllm.schedule import Schedule
from treadle.serving.vllm.support import tokenizer_of

PutAdapter = Callable[[int | None, str, str], None]
"""(slot, name, path) -> every worker copies an adapter into a slot, or only checks that it fits (slot None).

It raises an AdapterError with what is wrong.
"""


class HashedWeights:
    """A request's weights, as the hashes of its blocks need them."""

    def __init__(self, schedule: Schedule, weights: RequestWeights) -> None:
        self._schedule = schedule
        self.weights = weights

    def block_key(self, token_ids: Sequence[int], start: int, end: int) -> bytes | None:
        """Return the key that the hash of the block `start` to `end` must contain besides its tokens."""
        self._schedule.decide([(self.weights, token_ids, end)])
        return self.weights.key(start, end)


class Core:
    """Holds the mixture as it is now, and the weights of every request, in the scheduler's process.

    Methods that return a dict answer the routes. They return {"error": message} and raise nothing, because vLLM's
    client would get only the text of an exception.
    """

    def __init__(self, params: PluginParams, base: str, schedule: Schedule) -> None:
        self.params = params
        self.base = base
        self.schedule = schedule

    @classmethod
    def open(cls, params: PluginParams, model_config: Any) -> "Core":
        """Read the bundle, and the tokenizer that vLLM was given."""
        bundle, mixture = open_bundle(params)
        return cls(params, bundle.base_model, Schedule(mixture, tokenizer_of(model_config)))

    @property
    def mixture(self) -> Mixture:
        """The adapters as they are now; requests that began before keep theirs."""
        return self.schedule.mixture

    def adapters(self) -> dict[str, Any]:
        """Return the adapters, their slots and what the router has decided."""
        return {
            "adapters": dict(zip(self.mixture.names, self.mixture.slots, strict=True)),
            "slots": self.mixture.num_slots,
            "fingerprint": self.mixture.fingerprint,
            "decisions": self.schedule.counts.decisions,
            "route_seconds": self.schedule.counts.seconds,
        }

    def figures(self) -> dict[str, Any]:
        """Return the numbers of decisions and generated tokens, for `treadle.serving.vllm.figures`."""
        counts = self.schedule.counts
        return {
            "decisions": counts.decisions,
            "seconds": counts.seconds,
            "tokens": counts.tokens,
            "base_tokens": counts.base_tokens,
            "weights": dict(counts.weights),
        }

    def check_adapter(
        self, name: str, path: str, samples: Sequence[str] | None, busy_slots: set[int], put: PutAdapter
    ) -> dict[str, Any]:
        """Return {} if an adapter can join, else the error; change nothing.

        Args:
            name: the adapter's name.
            path: its folder.
            samples: texts of its domain; None = its folder has a centroid.
            busy_slots: slots that running requests began with.
            put: asks the workers.
        """
        try:
            self._joined(name, path, samples, busy_slots)
            put(None, name, path)
        except TreadleError as error:
            return {"error": str(error)}
        return {}

    def add_adapter(
        self, name: str, path: str, samples: Sequence[str] | None, busy_slots: set[int], put: PutAdapter
    ) -> dict[str, Any]:
        """Let an adapter take part in the requests that begin from now on; on an error nothing changes.

        Arguments as in `check_adapter`. Returns `adapters`, or the error.
        """
        try:
            slot, joined = self._joined(name, path, samples, busy_slots)
            put(slot, name, path)
        except TreadleError as error:
            return {"error": str(error)}
        self.schedule.mixture = joined
        return self.adapters()

    def remove_adapter(self, name: str) -> dict[str, Any]:
        """Take an adapter out of the requests that begin from now on; those that run finish with it."""
        try:
            self.schedule.mixture = without_adapter(self.mixture, name)
        except TreadleError as error:
            return {"error": str(error)}
        return self.adapters()

    def _joined(self, name: str, path: str, samples: Sequence[str] | None, busy_slots: set[int]) -> tuple[int, Mixture]:
        """Return a free slot, and the mixture with the adapter in it."""
        if not self.params.is_hot:
            raise AdapterError("the adapters are fixed: start the server with max_adapters to leave room for more.")
        newcomer = read_newcomer(self.mixture, self.params, self.base, name, path, samples)
        num_slots = self.mixture.num_slots
        free = sorted(set(range(num_slots)) - {*self.mixture.slots, *busy_slots})
        if not free:
            raise AdapterError(f"all {num_slots} slots are taken, or used by requests that run still.")
        return free[0], with_adapter(self.mixture, newcomer, free[0])
