"""One row of text that someone else generates: what has been read so far, and what weights it asks for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from treadle.centroids import Floats
from treadle.params import RoutingParams
from treadle.routing import Router, RunningText, decision_length
from treadle.text import Detokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RunningRow:
    """The text of one row as far as the model has read it; decides when the engine's rows (`treadle.rows`) do."""

    def __init__(self, router: Router, params: RoutingParams, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.prompt_tokens = 0
        self.weights: Floats = router.fixed_weights(params)  # (N,) of the newest token; zeros where none are fixed
        self.is_real: list[bool] = []  # of each column of the cache: a token, or padding
        self._source = router, params, tokenizer
        self._params = params
        self._text = Detokenizer(tokenizer)
        self._running = RunningText(router, params)
        self._ids: list[int] = []
        self._pieces: list[str] = []

    def due(self, start: int) -> tuple[list[int], list[tuple[int, tuple[Any, ...]]]]:
        """Return what decides the weights of the tokens from `start` on.

        Returns:
            (T,) decision lengths, one a token, and (length, snapshot) of those that the embedder has yet to finish.
        """
        positions = range(start, len(self._ids))
        lengths = [decision_length(position, self.prompt_tokens, self._params) for position in positions]
        snapshots: list[tuple[int, tuple[Any, ...]]] = []
        for length in sorted(set(lengths)) if self._params.rule != "fixed" else ():
            views = self._running.decide(self._pieces, length, self.prompt_tokens)
            if views is not None:
                snapshots.append((length, views))
        return lengths, snapshots

    def read(self, ids: Sequence[int], is_real: Sequence[bool]) -> int:
        """Append the columns of one pass, padding included; return how many tokens there were before."""
        start = len(self._ids)
        self._ids += [token_id for token_id, real in zip(ids, is_real, strict=True) if real]
        self._pieces += [self._text.push(token_id) for token_id in self._ids[start:]]
        self.is_real += is_real
        return start

    def copy(self, columns: int) -> "RunningRow":
        """Return another row with the first `columns` columns of this one."""
        row = RunningRow(*self._source)
        row.is_real = self.is_real[:columns]
        row._ids = self._ids[: sum(row.is_real)]
        row._pieces = [row._text.push(token_id) for token_id in row._ids]
        row.prompt_tokens = min(self.prompt_tokens, len(row._ids))
        row.weights = self.weights
        return row
