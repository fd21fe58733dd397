"""One row of text that someone else generates: what has been read so far, and what weights it asks for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from treadle.common.params import RoutingParams
from treadle.engine.chat import RoutedText, only
from treadle.engine.rendered_chats import RenderedChats
from treadle.engine.tokenization import Detokenizer
from treadle.routing.centroids import Floats
from treadle.routing.router import Router, RunningText, decision_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = tuple[Router, RoutingParams, "PreTrainedTokenizerBase", RenderedChats]
"""What a row is weighed by: a router, its params, the model's tokenizer, and what finds chats in its tokens."""


class RunningRow:
    """The text of one row as far as the model has read it; decides when the engine's rows (`sequence`) do."""

    def __init__(self, source: Source) -> None:
        router, self._params, tokenizer, self._chats = source
        self.weights: Floats = router.fixed_weights(self._params)  # (N,) of the newest token; zeros if none are fixed
        self.is_real: list[bool] = []  # of each column of the cache: a token, or padding
        self.prompt_tokens = 0
        self._source = source
        self._text = Detokenizer(tokenizer)
        self._running = RunningText(router, self._params)
        self.ids: list[int] = []  # of the tokens that have been read
        self._own: list[str] = []  # the text that each token adds
        self._routed = RoutedText(None, [], self._params)

    def due(self, start: int) -> tuple[list[int], list[tuple[int, tuple[Any, ...]]]]:
        """Return what decides the weights of the tokens from `start` on.

        Returns:
            (T,) how many pieces decide for each token, and (pieces, snapshot) of what the embedder has yet to finish.
        """
        routed, params = self._routed, self._params
        positions = range(start, len(self.ids))
        lengths = [routed.count(decision_length(position, self.prompt_tokens, params)) for position in positions]
        snapshots: list[tuple[int, tuple[Any, ...]]] = []
        for length in sorted(set(lengths)) if params.rule != "fixed" else ():
            views = self._running.decide(routed.pieces, length, routed.prompt_pieces)
            if views is not None:
                snapshots.append((length, views))
        return lengths, snapshots

    def read(self, ids: Sequence[int], is_real: Sequence[bool], prompt_tokens: int | None = None) -> int:
        """Append the columns of one pass, padding included; return how many tokens there were before.

        Args:
            ids: (T,) of the pass.
            is_real: (T,) which of them are tokens.
            prompt_tokens: with the first pass, how many of the tokens are the prompt.
        """
        start = len(self.ids)
        self.is_real += is_real
        new = [token_id for token_id, real in zip(ids, is_real, strict=True) if real]
        self.ids += new
        self._own += [self._text.push(token_id) for token_id in new]
        pieces = self._own[start:]
        if prompt_tokens is not None:
            self.prompt_tokens = prompt_tokens
            chat = self._chats.read(self.ids[:prompt_tokens])
            self._routed = RoutedText(chat, pieces[:prompt_tokens], self._params)
            pieces = pieces[prompt_tokens:]
        elif len(new) > 1 and self._routed.ends is not None:  # a chat that goes on in its cache
            pieces = only(self._own, self._chats.contents(self.ids) or [])[start:]
        for piece in pieces:
            self._routed.add(piece)
        return start

    def copy(self, columns: int) -> "RunningRow":
        """Return another row with the first `columns` columns of this one."""
        row = RunningRow(self._source)
        is_real = self.is_real[:columns]
        count = sum(is_real)
        row.is_real, row.ids = is_real, self.ids[:count]
        row.prompt_tokens = min(self.prompt_tokens, count)
        row._own = [row._text.push(token_id) for token_id in row.ids]
        row._routed = routed = self._routed.first(count)
        row.weights = self.weights
        if self._params.prefill == "prompt" and self._params.rule != "fixed":  # where its last domain begins
            row._running.decide(routed.pieces, routed.prompt_pieces, routed.prompt_pieces)
        return row
