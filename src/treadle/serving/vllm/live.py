"""The mixture of a running engine: weights for its requests, and adapters that come and go between steps."""

from collections.abc import Mapping, Sequence
from typing import Any

from treadle.common.errors import AdapterError, TreadleError
from treadle.serving.vllm.joining import read_newcomer, with_adapter, without_adapter
from treadle.serving.vllm.mixture import Mixture, open_bundle
from treadle.serving.vllm.params import CONTENTS, KEY, PluginParams
from treadle.serving.vllm.request_weights import RequestWeights
from treadle.serving.vllm.schedule import Plan, Schedule
from treadle.serving.vllm.tokens import tokenizer_of


class Core:
    """What the scheduler's process knows: the mixture as it is now, and the weights of every request."""

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

    def open_request(self, request: Any) -> None:
        """Give a request its weights and decide those of its prompt, unless it has them."""
        if hasattr(request, KEY):
            return
        extra = (request.sampling_params.extra_args or {}) if request.sampling_params else {}
        weights = self.schedule.open(extra.get(KEY), request.num_prompt_tokens, extra.get(CONTENTS))
        request.treadle = Hashed(self.schedule, weights)
        self.schedule.decide([(weights, request.all_token_ids, request.num_prompt_tokens)])

    def plan(self, scheduled: Mapping[str, int], requests: Mapping[str, Any]) -> Plan:
        """Return the gates of the tokens that have just been scheduled: request id -> how many."""
        entries = [(name, requests[name], count) for name, count in scheduled.items()]
        return self.schedule.plan(
            [
                (
                    name,
                    each.treadle.weights,
                    each.all_token_ids,
                    each.num_computed_tokens - count,
                    each.num_computed_tokens,
                )
                for name, each, count in entries
            ]
        )  # vLLM has counted these tokens as computed already

    def slots_in_use(self, requests: Mapping[str, Any]) -> set[int]:
        """Return the slots of the mixture and of those that requests began with."""
        used = set(self.mixture.slots)
        return used.union(*(each.treadle.weights.mixture.slots for each in requests.values() if hasattr(each, KEY)))


class Hashed:
    """A request's weights, as the hashes of its blocks need it."""

    def __init__(self, schedule: Schedule, weights: RequestWeights) -> None:
        self._schedule = schedule
        self.weights = weights

    def block_key(self, token_ids: Sequence[int], start: int, end: int) -> bytes | None:
        """Return what the hash of the block of positions `start` to `end` must contain besides its tokens."""
        self._schedule.decide([(self.weights, token_ids, end)])
        return self.weights.key(start, end)


# Functions of vLLM's EngineCore (`self`), which its clients call by name; they run between two steps


def treadle_adapters(self: Any) -> dict[str, Any]:
    """Return the adapters, their slots and what the router has decided."""
    core: Core = self.scheduler.treadle
    mixture = core.mixture
    return {
        "adapters": dict(zip(mixture.names, mixture.slots, strict=True)),
        "slots": mixture.num_slots,
        "fingerprint": mixture.fingerprint,
        "decisions": core.schedule.counts.decisions,
        "route_seconds": core.schedule.counts.seconds,
    }


def treadle_figures(self: Any) -> dict[str, Any]:
    """Return what one engine has decided and generated, for `treadle.serving.vllm.figures`."""
    counts = self.scheduler.treadle.schedule.counts
    return {
        "decisions": counts.decisions,
        "seconds": counts.seconds,
        "tokens": counts.tokens,
        "base_tokens": counts.base_tokens,
        "weights": dict(counts.weights),
    }


def treadle_check_adapter(self: Any, name: str, path: str, samples: Sequence[str] | None = None) -> dict[str, Any]:
    """Return {} if an adapter can join, else {"error": message}; nothing changes."""
    try:
        _changed(self, name, path, samples)
        _put(self, None, name, path)
    except TreadleError as error:
        return {"error": str(error)}
    return {}


def treadle_add_adapter(self: Any, name: str, path: str, samples: Sequence[str] | None = None) -> dict[str, Any]:
    """Read an adapter and let it take part in the requests that begin from now on; on an error nothing changes.

    Returns:
        `treadle_adapters`, or {"error": message}: of an exception vLLM's client would only have the text.
    """
    try:
        slot, changed = _changed(self, name, path, samples)
        _put(self, slot, name, path)
    except TreadleError as error:
        return {"error": str(error)}
    self.scheduler.treadle.schedule.mixture = changed
    return treadle_adapters(self)


def treadle_remove_adapter(self: Any, name: str) -> dict[str, Any]:
    """Take an adapter out of the requests that begin from now on; those that run finish with it."""
    core: Core = self.scheduler.treadle
    try:
        core.schedule.mixture = without_adapter(core.mixture, name)
    except TreadleError as error:
        return {"error": str(error)}
    return treadle_adapters(self)


FUNCTIONS = (
    treadle_check_adapter,
    treadle_add_adapter,
    treadle_remove_adapter,
    treadle_adapters,
    treadle_figures,
)
"""What the core gets, by name."""


def _changed(core: Any, name: str, path: str, samples: Sequence[str] | None) -> tuple[int, Mixture]:
    """Return a free slot, and the mixture with an adapter in it."""
    own: Core = core.scheduler.treadle
    if not own.params.is_hot:
        raise AdapterError("the adapters are fixed: start the server with max_adapters to leave room for more.")
    newcomer = read_newcomer(own.mixture, own.params, own.base, name, path, samples)
    free = sorted(set(range(own.mixture.num_slots)) - own.slots_in_use(core.scheduler.requests))
    if not free:
        raise AdapterError(f"all {own.mixture.num_slots} slots are taken, or used by requests that run still.")
    return free[0], with_adapter(own.mixture, newcomer, free[0])


def _put(core: Any, slot: int | None, name: str, path: str) -> None:
    """Call `put_adapter` in every worker; raise an AdapterError with what the first says is wrong."""
    problems = [each for each in core.collective_rpc(put_adapter, args=(slot, name, path)) if each]
    if problems:
        raise AdapterError(problems[0])


# Of vLLM's workers


def put_adapter(worker: Any, slot: int | None, name: str, path: str) -> str | None:
    """Copy an adapter's factors into a slot of a worker's model; return what is wrong instead of raising.

    Without a slot nothing is copied: it is only looked whether the adapter fits.
    """
    from treadle.lora.adapter import read_adapter

    stacks = worker.model_runner.get_model().treadle
    try:
        adapter = read_adapter(path, name)
        stacks.check_room(adapter)
    except TreadleError as error:
        return str(error)
    if slot is not None:
        stacks.put(slot, adapter)
    return None
