"""Rows of a cache that join and leave, against a list of each row's own keys and values."""

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treadle.engine.kv_cache import RowCache, RowLayer

HEADS, HEAD = 2, 3


class Unfilled(RowLayer):
    """Memory that nobody has written to is not a number."""

    def new_buffer(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return like.new_full(tuple(shape), torch.nan)


def states(rows: int, tokens: int, seed: int) -> Tensor:
    return torch.randn(rows, HEADS, tokens, HEAD, generator=torch.Generator().manual_seed(seed))


class Model:
    """A cache of one layer, and the contents that each row must have."""

    def __init__(self, layer_type: type[RowLayer] = Unfilled) -> None:
        self.layer_type = layer_type
        self.cache = RowCache(layer_type)
        self.rows: list[Tensor] = []  # each (H, T, head)
        self.seed = 0

    def join(self, lengths: list[int]) -> None:
        other = RowCache(self.layer_type)
        longest = max(lengths)
        self.seed += 1
        new = states(len(lengths), longest, self.seed)
        other.update(new, new + 1, 0)
        if self.rows:
            self.cache.merge(other)
        else:
            self.cache = other
        self.rows += [row[:, longest - length :] for row, length in zip(new, lengths, strict=True)]

    def step(self, tokens: int) -> None:
        self.seed += 1
        new = states(len(self.rows), tokens, self.seed)
        self.cache.update(new, new + 1, 0)
        self.rows = [torch.cat([row, more], 1) for row, more in zip(self.rows, new, strict=True)]

    def leave(self, place: int) -> None:
        last = self.rows.pop()
        order = list(range(len(self.rows)))
        if place < len(self.rows):
            self.rows[place] = last
            order[place] = len(self.rows)
        if not self.rows:
            self.cache = RowCache(self.layer_type)
            return
        self.cache.keep(order, self.cache.length - max(row.shape[1] for row in self.rows))
        layer = self.cache.rows(1)[0]
        for buffer in layer.buffers:  # nothing may read again what is left behind
            buffer[len(self.rows) :] = torch.nan
            buffer[:, :, : layer.window[0]] = torch.nan

    def check(self) -> None:
        if not self.rows:
            return
        layer = self.cache.rows(1)[0]
        assert self.cache.length == max(row.shape[1] for row in self.rows) == layer.keys.shape[-2]
        assert len(layer.keys) == len(self.rows)
        assert torch.isfinite(layer.keys).all()
        assert torch.isfinite(layer.values).all()
        for place, row in enumerate(self.rows):
            np.testing.assert_array_equal(layer.keys[place, :, -row.shape[1] :], row)
            np.testing.assert_array_equal(layer.values[place, :, -row.shape[1] :], row + 1)


ACTIONS = st.one_of(
    st.tuples(st.just("join"), st.lists(st.integers(1, 40), min_size=1, max_size=4)),
    st.tuples(st.just("step"), st.integers(1, 9)),
    st.tuples(st.just("leave"), st.integers(0, 99)),
)


@settings(max_examples=60, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=30), growth=st.integers(1, 16), row_growth=st.integers(0, 3))
def test_rows_that_join_and_leave_keep_what_is_theirs(
    actions: list[tuple[str, object]], growth: int, row_growth: int
) -> None:
    class Layer(Unfilled):
        growth_tokens, growth_rows = growth, row_growth

    model = Model(Layer)
    for name, argument in actions:
        if name == "join":
            model.join(argument)
        elif model.rows:
            model.step(argument) if name == "step" else model.leave(argument % len(model.rows))
        model.check()


def test_rows_that_stay_are_not_moved() -> None:
    model = Model()
    model.join([20, 20, 20])
    model.join([5])
    before = model.cache.rows(1)[0].keys.data_ptr()
    for _ in range(4):
        model.join([10])
        model.step(1)
        model.leave(0)
        model.check()
        assert model.cache.rows(1)[0].keys.data_ptr() >= before
    storage = model.cache.rows(1)[0].keys.untyped_storage().data_ptr()
    model.join([15])
    assert model.cache.rows(1)[0].keys.untyped_storage().data_ptr() == storage
