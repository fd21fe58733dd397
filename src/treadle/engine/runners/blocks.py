"""The layers of a decoder, and their outputs while a context lasts."""

from collections.abc import Collection, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def blocks_of(model: "PreTrainedModel") -> nn.ModuleList | None:
    """Return the decoder's layers; None where they are not `layers` of its decoder."""
    blocks = getattr(model.get_decoder(), "layers", None)
    count = int(model.config.get_text_config().num_hidden_layers)
    return blocks if isinstance(blocks, nn.ModuleList) and len(blocks) == count else None


@contextmanager
def outputs_of(blocks: nn.ModuleList, layers: Collection[int]) -> Generator[dict[int, Tensor]]:
    """Collect the outputs (B, T, H) of some layers, counted from 1, of the passes inside.

    transformers' own `output_hidden_states` leaves hooks behind, and hooks keep our own passes from running.
    """
    found: dict[int, Tensor] = {}

    def keep(layer: int, output: Any) -> None:
        found[layer] = output[0] if isinstance(output, tuple) else output

    hooks = [
        blocks[layer - 1].register_forward_hook(lambda _, __, output, layer=layer: keep(layer, output))
        for layer in layers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
