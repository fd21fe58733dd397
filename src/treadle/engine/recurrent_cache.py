"""The cache of models with recurrent layers: linear attention, Mamba and short convolutions, beside keys and values.

A recurrent state is of a whole text: no token can be taken out of it. So a pass that fails cannot be undone, and a
text that shares a beginning with another is read again.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from treadle.engine.kv_cache import BufferLimits, RowCache, RowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import LinearAttentionLayer
else:
    try:
        from transformers.cache_utils import LinearAttentionLayer
    except ImportError:  # such releases have no layer of states
        LinearAttentionLayer = DynamicLayer


class RecurrentLayer(LinearAttentionLayer):
    """The recurrent states of one layer, each (B, ...), of which there may be several."""

    def change(self, change: Callable[[Tensor, int], Tensor]) -> None:
        """Replace each state by what `change` makes of it and its number among all states of the layer."""
        kinds = (self.conv_states, self.recurrent_states)
        places = [(kept, key) for kept in kinds for key in kept]
        for number, (kept, key) in enumerate(places):
            if (state := kept[key]) is not None:
                kept[key] = change(state, number)

    @property
    def states(self) -> list[Tensor | None]:
        """All states, by their number; None = no pass has written it."""
        return [*self.conv_states.values(), *self.recurrent_states.values()]


class HybridLayer(RecurrentLayer, RowLayer):  # pyright: ignore[reportIncompatibleMethodOverride] - as transformers' own
    """Keys, values and recurrent states of one layer."""

    def __init__(self, limits: BufferLimits, number_of_states: int) -> None:
        RowLayer.__init__(self, limits)
        RecurrentLayer.__init__(self, number_of_states)


class RecurrentCache(RowCache):
    """The cache of a model with recurrent layers. States cannot follow `cut` and `part`."""

    def __init__(self, model: "PreTrainedModel") -> None:
        """Start empty, with the layers that the model needs."""
        super().__init__()
        self.layer_class_to_replicate = None
        self.layers = [self._new(each) for each in _layers(model)]
        self._columns = 0

    def _new(self, like: Any) -> Any:
        """Return our layer of the same kind as one of transformers'; one that keeps nothing as it is."""
        if not isinstance(like, DynamicLayer | LinearAttentionLayer):
            return like
        if not isinstance(like, LinearAttentionLayer):
            return RowLayer(self._limits)
        has_keys = hasattr(like, "update")
        return HybridLayer(self._limits, like.number_of_states) if has_keys else RecurrentLayer(like.number_of_states)

    @property
    def length(self) -> int:
        """L, the tokens of the longest row."""
        return self._columns

    @property
    def has_keys(self) -> bool:
        """Whether a layer keeps keys and values."""
        return any(isinstance(layer, RowLayer) for layer in self.layers)

    @property
    def state_bytes(self) -> int:
        """Bytes of all recurrent states."""
        return sum(state.nbytes for layer in self._recurrent for state in layer.states if state is not None)

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers and states, including free room."""
        return super().num_bytes + self.state_bytes

    @property
    def _recurrent(self) -> list[RecurrentLayer]:
        return [layer for layer in self.layers if isinstance(layer, RecurrentLayer)]

    def begin_pass(self, num_columns: int) -> None:
        """Prepare for a pass that appends so many columns."""
        self._columns += num_columns

    def merge(self, other: RowCache) -> None:
        """Append the rows of another cache; the shorter one is padded on the left."""
        assert isinstance(other, RecurrentCache)
        super().merge(other)
        for mine, theirs in zip(self._recurrent, other._recurrent, strict=True):
            beside = theirs.states
            mine.change(lambda state, number, beside=beside: torch.cat([state, cast(Tensor, beside[number])]))
        self._columns = max(self._columns, other.length)

    def keep(self, rows: list[int], drop: int) -> None:
        """Keep the rows at these places, in this order, without the first `drop` columns; see `RowLayer.keep`."""
        super().keep(rows, drop)
        for layer in self._recurrent:
            layer.change(lambda state, _: state[rows])
        self._columns -= drop


def is_recurrent(model: "PreTrainedModel") -> bool:
    """Return whether layers of a model keep a state that each pass replaces."""
    return any(isinstance(each, LinearAttentionLayer) and hasattr(each, "conv_states") for each in _layers(model))


def states_of(cache: RowCache) -> list[Tensor]:
    """Return all recurrent states of a cache, layer by layer."""
    layers = [layer for layer in cache.layers if isinstance(layer, RecurrentLayer)]
    return [state for layer in layers for state in layer.states if state is not None]


def new_cache(model: "PreTrainedModel", layer_type: type[RowLayer] = RowLayer) -> RowCache:
    """Return an empty cache for a model."""
    return RecurrentCache(model) if is_recurrent(model) else RowCache(layer_type)


def _layers(model: "PreTrainedModel") -> list[Any]:
    """Return the layers of transformers' own cache for a model."""
    return DynamicCache(config=model.config.get_text_config(decoder=True)).layers
