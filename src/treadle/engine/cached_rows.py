"""The rows of a transformers cache: the columns, tokens and weights of each, and which is which after they moved."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from treadle.common.errors import OptionError
from treadle.common.params import RoutingParams
from treadle.engine.chat import only, prompt_cursor
from treadle.engine.rendered_chats import RenderedChats
from treadle.engine.tokenization import Detokenizer
from treadle.routing.centroids import Floats
from treadle.routing.router import Router
from treadle.routing.schedule import Decision, DecisionCursor, Seen, is_due_by_states
from treadle.routing.states import new_trail

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOST_ROWS = (
    "the rows of this cache are not those of its last pass, so treadle cannot tell which text each row continues. "
    "Beam search and other code that moves, repeats or drops whole rows of one cache between passes is followed; "
    "a copied cache, one filled outside routed(), and a cropped or quantized one of several rows are not."
)

Source = tuple[Router, RoutingParams, "PreTrainedTokenizerBase", RenderedChats]
"""A router, its params, the model's tokenizer, and the reader of rendered chats."""


class CachedRow:
    """One row of a cache: its columns, its tokens, and the cursor over its text.

    Attributes:
        weights: (N,) of the newest token.
        is_real: of each column, whether it is a token, and not padding.
        ids: of the tokens.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._router, self._params, tokenizer, self._chats = source
        self.weights: Floats = self._router.fixed_weights(self._params)
        self.is_real: list[bool] = []
        self.ids: list[int] = []
        self.cursor: DecisionCursor | None = None  # from the first pass on
        self.trail = new_trail(self._router.states, self._params)  # the base model's states, if these decide
        self._text = Detokenizer(tokenizer)
        self._own: list[str] = []  # the text that each token adds

    def read(self, ids: Sequence[int], is_real: Sequence[bool], prompt_tokens: int) -> int:
        """Append the columns of one pass, padding included; return how many tokens there were before.

        Args:
            ids: (T,) of the pass.
            is_real: (T,) which of them are tokens.
            prompt_tokens: of the first pass, how many of the tokens are the prompt.
        """
        start = len(self.ids)
        self.is_real += is_real
        new = [token_id for token_id, real in zip(ids, is_real, strict=True) if real]
        self.ids += new
        self._own += [self._text.push(token_id) for token_id in new]
        pieces = self._own[start:]
        if self.cursor is None:
            chat = self._chats.read(self.ids[:prompt_tokens])
            self.cursor = prompt_cursor(self._router, self._params, pieces[:prompt_tokens], chat)
            pieces = pieces[prompt_tokens:]
        elif len(new) > 1 and self.cursor.ends is not None:  # a chat that goes on in its cache
            pieces = only(self._own, self._chats.contents(self.ids) or [])[start:]
        self.cursor.add(pieces)
        return start

    def decide(self) -> list[Decision]:
        """Return the decisions that the text of the newest tokens makes; none where the weights are fixed."""
        if self.cursor is None or self._params.rule == "fixed" or self.has_states:
            return []
        return self.cursor.decide(len(self.ids))

    @property
    def has_states(self) -> bool:
        """Whether states decide, and a pass has read some."""
        return self.trail is not None and not self.trail.is_empty

    def is_due_by_states(self) -> bool:
        """Return whether its states decide anew before its newest token is read."""
        if self.cursor is None or not self.has_states:
            return False
        return is_due_by_states(len(self.ids), self.cursor.prompt_tokens, self._params)

    def state_views(self) -> Seen:
        """Return the views (1, K, H) of its states, which it has."""
        assert self.trail is not None
        assert self.cursor is not None
        return Seen(self.trail.views()[None], np.array([self.trail.end > self.cursor.prompt_tokens]))

    def put_states(self, is_real: Sequence[bool], states: Tensor) -> None:
        """Take the states (T, H) of the columns of the newest pass, of which some are tokens."""
        assert self.trail is not None
        newest = [column for column, real in enumerate(is_real) if real][-self.trail.room :]
        self.trail.put(len(self.ids) - len(newest), states[newest].detach().float().cpu().numpy())

    def copy(self, columns: int) -> "CachedRow":
        """Return another row with the first `columns` columns of this one."""
        row = CachedRow(self._source)
        row.is_real = self.is_real[:columns]
        row.ids = self.ids[: sum(row.is_real)]
        row._own = [row._text.push(token_id) for token_id in row.ids]
        row.cursor = self.cursor and self.cursor.first(len(row.ids))
        row.weights = self.weights
        row.trail = self.trail and self.trail.copy()
        return row


def marks(cache: Cache) -> Tensor | None:
    """Return the last layer's states of the newest column, (B, F); rows are equal if their texts are."""
    for layer in reversed(cache.layers):
        states = getattr(layer, "keys", None), getattr(layer, "values", None)
        if all(torch.is_tensor(each) and each.dim() == 4 and each.shape[2] for each in states):
            return torch.cat([each[:, :, -1].detach().flatten(1) for each in states if each is not None], 1)
    return None


def places_of(old: Tensor, new: Tensor) -> list[int]:
    """Return the row of `old` (B, F) that each row of `new` (C, F) equals, its own place first."""
    equal = (new[:, None] == old).all(-1).tolist()  # (C, B)
    if not all(any(row) for row in equal):
        raise OptionError(LOST_ROWS)
    return [index if index < len(row) and row[index] else row.index(True) for index, row in enumerate(equal)]
