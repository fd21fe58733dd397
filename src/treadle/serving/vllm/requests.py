"""Reads what requests ask for, in the API server's process, before anything reaches the engine. Imports no vLLM."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.engine.chat import contents_of
from treadle.serving.vllm.mixture import AUTO, Mixture, open_bundle
from treadle.serving.vllm.params import CONTENTS_KEY, PluginParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RenderedChats = tuple[Sequence[Sequence[Mapping[str, Any]]], Sequence[Any]]
"""Conversations, and the tokens of each as vLLM's engine takes them."""


class OptionReader:
    """Checks the options of requests against the adapters that the server has.

    Attributes:
        params: the plugin's options.
        base: the bundle's base model.
        removed: names of adapters that have left; they mean nothing else now.
    """

    def __init__(self, params: PluginParams, base: str, mixture: Mixture) -> None:
        self.params = params
        self.base = base
        self._mixture = mixture
        self.removed: frozenset[str] = frozenset()

    @property
    def mixture(self) -> Mixture:
        """The adapters as they are now."""
        return self._mixture

    @mixture.setter
    def mixture(self, mixture: Mixture) -> None:
        self.removed = (self.removed | {*self._mixture.names}) - {*mixture.names}
        self._mixture = mixture

    @classmethod
    def open(cls, params: PluginParams) -> "OptionReader":
        """Read the bundle."""
        bundle, mixture = open_bundle(params)
        return cls(params, bundle.base_model, mixture)

    def choice(self, given: Any, model: str | None) -> Any:
        """Choose what the engine reads: a request's own options, else the model's name where that is a choice.

        Raises:
            OptionError: the options cannot be read, or these adapters do not allow them; it lists every problem. Also
                where the model's name is that of an adapter that has left: a routed answer is not what was asked for.
        """
        if given is None and (model in self.mixture.choices() or model in self.removed):
            given = model
        self.mixture.read_request(given)
        return dict(given) if isinstance(given, Mapping) else AUTO if given is None else given


@dataclass(frozen=True)
class ServedEngine:
    """The parts of vLLM's client and configuration that the plugin's routes use.

    Attributes:
        reader: reads what requests ask for.
        tokenizer: vLLM's own.
        max_tokens: the most tokens of a text (`--max-model-len`).
        vocabulary: the number of token ids that the model knows.
        model_names: how this server calls its model.
        ask: calls a function of every engine's core, by name, and returns one answer an engine.
    """

    reader: OptionReader
    tokenizer: "PreTrainedTokenizerBase"
    max_tokens: int
    vocabulary: int
    model_names: tuple[str, ...]
    ask: Callable[..., Awaitable[list[dict[str, Any]]]]


def with_contents(conversations: Sequence[Sequence[Mapping[str, Any]]], prompts: Sequence[Any]) -> RenderedChats:
    """Put the contents of rendered chats' messages beside their tokens, which no longer tell them apart."""
    for messages, prompt in zip(conversations, prompts, strict=True):
        if isinstance(prompt, dict):
            prompt[CONTENTS_KEY] = contents_of(messages)
    return conversations, prompts
