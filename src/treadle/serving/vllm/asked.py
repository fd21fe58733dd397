"""What requests ask for, read in the API server's process: before anything reaches the engine."""

from collections.abc import Mapping
from typing import Any

from treadle.serving.vllm.mixture import AUTO, Mixture, open_bundle
from treadle.serving.vllm.params import PluginParams


class Asked:
    """Checks the options of requests against the adapters that the server has."""

    def __init__(self, params: PluginParams, base: str, mixture: Mixture) -> None:
        self.params = params
        self.base = base
        self._mixture = mixture
        self.left: frozenset[str] = frozenset()  # adapters that were there: their names mean nothing else now

    @property
    def mixture(self) -> Mixture:
        """The adapters as they are now."""
        return self._mixture

    @mixture.setter
    def mixture(self, mixture: Mixture) -> None:
        self.left = (self.left | {*self._mixture.names}) - {*mixture.names}
        self._mixture = mixture

    @classmethod
    def of(cls, processor: Any) -> "Asked | None":
        """Return that of one of vLLM's input processors, made when it is; None = there is no bundle."""
        if not hasattr(processor, "treadle"):
            from treadle.serving.vllm.hooks import blending, params_of

            params = params_of(processor.vllm_config)
            blending += [params.bundle] if params else []
            processor.treadle = None if params is None else cls.open(params)
        return processor.treadle

    @classmethod
    def open(cls, params: PluginParams) -> "Asked":
        """Read the bundle."""
        bundle, mixture = open_bundle(params)
        return cls(params, bundle.base_model, mixture)

    def choice(self, given: Any, named: str | None) -> Any:
        """Return what the engine shall read: a request's own options, else the model's name where it says something.

        Raises:
            OptionError: they cannot be read, or these adapters do not allow them; lists every problem. Also where the
                model's name is that of an adapter that has left: a routed answer is not what was asked for.
        """
        if given is None and (named in self.mixture.choices() or named in self.left):
            given = named
        self.mixture.read_request(given)
        return dict(given) if isinstance(given, Mapping) else AUTO if given is None else given
