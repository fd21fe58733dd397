"""Decides the weights of rows: which rows are due, and what their text or the model's states say."""

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from treadle.engine.sequence import NOT_ROUTED, SequenceError, TokenSequence
from treadle.routing.centroids import Floats
from treadle.routing.embedder import Embedder
from treadle.routing.router import Comparison
from treadle.routing.schedule import Seen, Views
from treadle.routing.states import is_far

Found = TypeVar("Found")


@dataclass(frozen=True)
class Ahead:
    """The embedded parts of late decisions, and those that are a row's."""

    parts: "Future[Floats]"
    own: slice
    embedder: Embedder
    views: Views

    def get(self) -> Seen:
        """Return the row's own decision, when it is there."""
        try:
            return _seen(self.parts.result()[self.own], self.views)
        except Exception:  # other rows' texts may be to blame
            return _seen(self.embedder.finish(list(self.views.parts)), self.views)


RowViews = list[tuple[TokenSequence, Views]]
"""The views of each row's text, before they are embedded."""
SeenRows = list[tuple[TokenSequence, Seen]]
"""The embedded decision of each row: one row of views, (1, K, D)."""


def update_weights(rows: Sequence[TokenSequence]) -> tuple[list[TokenSequence], dict[TokenSequence, SequenceError]]:
    """Give new weights to the rows that are due; return these, and the errors of those that cannot be weighed.

    Each embedder is called once for all its rows, and rows with the same router and options are weighed together. What
    takes effect late is embedded by a thread of its own, while the model runs.
    """
    due = _Due()
    lost: dict[TokenSequence, SequenceError] = {}
    for row in rows:
        try:
            due.take(row)
        except Exception as error:  # whatever an embedder or a tokenizer raises: it must cost no other row
            lost[row] = SequenceError.of(NOT_ROUTED, error)
    for pairs in _grouped(due.late, lambda row: id(row.router.embedder)):
        _embed_beside(pairs)
    for pairs in _grouped(due.texts, lambda row: id(row.router.embedder)):
        due.seen += _together(pairs, _embed, lost)
    weighed: SeenRows = []
    for group in _grouped(due.seen, lambda row: (id(row.router), row.routing)):
        weighed += _together(group, _weigh, lost)
    for group in _grouped(due.states, lambda row: (id(row.router), row.routing)):
        weighed += _together(group, _weigh_states, lost)
    return [*due.fixed, *(row for row, _ in weighed)], lost


@dataclass
class _Due:
    """Rows whose weights change now, by what decides them.

    Attributes:
        fixed: have their weights already.
        texts: have a text to be embedded.
        late: have a text whose decision takes effect later.
        seen: have an embedded text.
        states: have the base model's states.
    """

    fixed: list[TokenSequence] = field(default_factory=list[TokenSequence])
    texts: RowViews = field(default_factory=list[tuple[TokenSequence, Views]])
    late: RowViews = field(default_factory=list[tuple[TokenSequence, Views]])
    seen: SeenRows = field(default_factory=list[tuple[TokenSequence, Seen]])
    states: SeenRows = field(default_factory=list[tuple[TokenSequence, Seen]])

    def take(self, row: TokenSequence) -> None:
        """Take a row, if its weights change."""
        if row.is_decided_by_states:
            self.states += [(row, row.state_views())] if row.is_due_by_states() else []
            return
        views = row.newest_views()
        if views is None:
            return
        if row.routing.rule == "fixed":
            row.weights = row.router.fixed_weights(row.routing)
            self.fixed.append(row)
        elif row.is_late:
            self.seen += [(row, row.ahead.get())] if row.ahead else []
            self.late.append((row, views))
        else:
            self.texts.append((row, views))


def _grouped(
    pairs: list[tuple[TokenSequence, Found]], key: Callable[[TokenSequence], Hashable]
) -> list[list[tuple[TokenSequence, Found]]]:
    """Return pairs in groups whose rows have the same key."""
    groups: dict[Hashable, list[tuple[TokenSequence, Found]]] = {}
    for pair in pairs:
        groups.setdefault(key(pair[0]), []).append(pair)
    return list(groups.values())


def _together(
    pairs: list[tuple[TokenSequence, Found]],
    run: Callable[[list[tuple[TokenSequence, Found]]], SeenRows],
    lost: dict[TokenSequence, SequenceError],
) -> SeenRows:
    """Run on rows together, and where that fails on each alone; rows that fail alone are `lost`."""
    try:
        return run(pairs)
    except Exception as error:  # as in `update_weights`
        if len(pairs) == 1:
            lost[pairs[0][0]] = SequenceError.of(NOT_ROUTED, error)
            return []
    return [made for pair in pairs for made in _together([pair], run, lost)]


def _embed(pairs: RowViews) -> SeenRows:
    """Return the embedded decisions of rows with the same embedder."""
    parts, places = _flat(pairs)
    finished = pairs[0][0].router.embedder.finish(parts)  # (sum of K, D)
    return [(row, _seen(finished[place], views)) for (row, views), place in zip(pairs, places, strict=True)]


def _seen(embeddings: Floats, views: Views) -> Seen:
    """Return one decision from the embeddings (K, D) of its views."""
    return Seen(embeddings[None], np.array([views.is_running]))


def _embed_beside(pairs: RowViews) -> None:
    """Let the thread beside the model embed the texts of rows with the same embedder."""
    parts, places = _flat(pairs)
    embedder = pairs[0][0].router.embedder
    embedded = _beside().submit(embedder.finish, parts)
    for (row, views), place in zip(pairs, places, strict=True):
        row.ahead = Ahead(embedded, place, embedder, views)


def _flat(pairs: RowViews) -> tuple[list[Any], list[slice]]:
    """Return the parts of all rows' views in one list, and where each row's are."""
    parts: list[Any] = []
    places: list[slice] = []
    for _, views in pairs:
        places.append(slice(len(parts), len(parts) + len(views.parts)))
        parts += views.parts
    return parts, places


@cache
def _beside() -> ThreadPoolExecutor:
    """Return the thread that embeds texts beside the model; the decisions of one row are made in their order."""
    return ThreadPoolExecutor(1, "treadle-embedder")


def is_to_reread(row: TokenSequence) -> bool:
    """Give a row whose prompt has been read the weights of its states, if these differ much; once.

    Returns:
        whether they do: the prompt is then read again.
    """
    if row.events or row.is_reread or not row.has_states:
        return False
    seen = row.state_views()
    weights = row.router.weigh_states(seen, row.routing)
    row.is_reread = is_far(weights[0], row.weights)
    if row.is_reread:
        _settle([(row, seen)], weights, row.router.compare_states)
    return row.is_reread


def put_states(rows: Sequence[TokenSequence], pads: Sequence[int], end: int, hidden: Tensor) -> None:
    """Give rows the states (B, T, H) of the columns before `end`, where all rows end; padding is left out."""
    room = max((row.trail.room for row in rows if row.trail), default=0)
    newest = hidden[:, -room:].float().cpu().numpy()  # once for all rows: on a GPU this synchronises
    for row, pad, states in zip(rows, pads, newest, strict=True):
        if row.trail is not None:
            start = max(end - pad - len(states), 0)  # in the row's text
            row.trail.put(start, states[len(states) - (end - pad - start) :])


def _weigh(rows: SeenRows) -> SeenRows:
    """Weigh rows with the same router and options together, by their text."""
    router, routing = rows[0][0].router, rows[0][0].routing
    return _settle(rows, router.weigh(_beside_each_other(rows), routing), lambda seen: router.compare(seen, routing))


def _weigh_states(rows: SeenRows) -> SeenRows:
    """Weigh rows with the same router and options together, by the base model's states."""
    router, routing = rows[0][0].router, rows[0][0].routing
    return _settle(rows, router.weigh_states(_beside_each_other(rows), routing), router.compare_states)


def _beside_each_other(rows: SeenRows) -> Seen:
    """Return the decisions of rows in one array."""
    return Seen(np.concatenate([seen.views for _, seen in rows]), np.concatenate([seen.is_running for _, seen in rows]))


def _settle(rows: SeenRows, weights: Floats, compare: Callable[[Seen], Comparison]) -> SeenRows:
    """Give rows their weights (B, N), and what these were made from if it is asked for."""
    for (row, seen), own in zip(rows, weights, strict=True):
        row.weights = own
        if row.report.comparison:
            compared = compare(seen)
            row.comparison = Comparison(compared.cosines[0], compared.scores[0])
    return rows
