"""Reads a model's hidden states at one or several layers, without the layers behind them."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from treadle.common.errors import ModelError
from treadle.engine.runners.blocks import blocks_of, outputs_of
from treadle.engine.state_texts import ReadText
from treadle.routing.centroids import Floats
from treadle.routing.states import STATE_SPANS, unit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PASS_TOKENS = 4096
"""Tokens of one pass, padding included."""


class _Enough(Exception):
    """Ends a pass whose later layers nobody needs."""


@torch.inference_mode()
def read_views(
    model: "PreTrainedModel", texts: Sequence[ReadText], layers: Sequence[int], spans: Sequence[int] = STATE_SPANS
) -> Floats:
    """Return the views (places, layers, K, H) of the states at all places of texts, under the weights in force."""
    made: dict[int, list[Floats]] = {}
    for chosen in _in_passes(texts, PASS_TOKENS):
        length = max(len(texts[index].ids) for index in chosen)
        rows = [texts[index].ids for index in chosen]
        ids = torch.tensor([[*row, *([0] * (length - len(row)))] for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=model.device)
        states = read_states(model, layers, input_ids=ids, attention_mask=mask)
        for index, own in zip(chosen, states, strict=True):
            made[index] = [_views_at(own, place.count, spans) for place in texts[index].places]
    return np.stack([view for index in range(len(texts)) for view in made[index]])


def _in_passes(texts: Sequence[ReadText], num_tokens: int) -> Iterator[list[int]]:
    """Yield the texts of each pass, by index, the longest first: so many that they have at most `num_tokens` padded."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index].ids))
    while order:
        longest = len(texts[order[-1]].ids)
        yield [order.pop() for _ in range(min(len(order), max(1, num_tokens // longest)))]


def _views_at(states: Tensor, count: int, spans: Sequence[int]) -> Floats:
    """Return the views (layers, K, H) of the first `count` tokens of a text from its states (layers, T, H)."""
    first = 1 if count > 1 else 0
    means = [states[:, max(first, count - span) : count].double().mean(1) for span in spans]
    return unit(torch.stack(means, 1).cpu().numpy())


def read_states(model: "PreTrainedModel", layers: Sequence[int], **inputs: Tensor | None) -> Tensor:
    """Return the states (B, layers, T, H) of the decoder's `inputs`, among them `input_ids` (B, T); no cache is used.

    Raises:
        ModelError: the model's layers are not where states can be taken from them.
    """
    blocks = blocks_of(model)
    if blocks is None:
        raise ModelError(f"{type(model).__name__}: its layers are not where states can be taken from them.")
    with outputs_of(blocks, layers) as found:
        enough = blocks[max(layers) - 1].register_forward_hook(_stop)  # behind the hook that collects
        try:
            with suppress(_Enough):
                model.get_decoder()(**inputs, use_cache=False)
        finally:
            enough.remove()
    return torch.stack([found[layer].float() for layer in layers], 1)


def _stop(*_: Any) -> None:
    raise _Enough
