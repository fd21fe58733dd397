"""Rotary positions whose factors depend on the length of the text (longrope), chosen for each row of a pass.

transformers chooses short or long factors once a pass, by its largest position. Chunks of a long prompt, and short rows
beside long ones, would then rotate differently than alone.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LONGROPE = "longrope"


class LengthRope:
    """The rotary modules of a model that have short and long factors."""

    def __init__(self, modules: Sequence[nn.Module], limit: int) -> None:
        """Take the modules; texts of more than `limit` tokens use the long factors, from their beginning."""
        self._modules = list(modules)
        self.limit = limit

    @classmethod
    def of(cls, model: nn.Module) -> "LengthRope | None":
        """Return those of a model; None if it does not use longrope."""
        found: list[Any] = [each for each in model.modules() if getattr(each, "rope_type", None) == LONGROPE]
        if not found:
            return None
        return cls(found, int(found[0].config.rope_parameters["original_max_position_embeddings"]))

    def is_long(self, num_tokens: int) -> bool:
        """Return whether a text of `num_tokens` tokens uses the long factors."""
        return num_tokens > self.limit

    @contextmanager
    def using(self, lengths: Sequence[int]) -> Generator[None]:
        """Run a pass in which each row belongs to a text of this many tokens, read or not yet."""
        hook = partial(self._rotate, [self.is_long(length) for length in lengths])
        handles = [module.register_forward_hook(hook, with_kwargs=True) for module in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _rotate(
        self, is_long: list[bool], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any
    ) -> tuple[Tensor, ...]:
        """Return the cosines and sines (B, T, head) of each row, as a forward hook."""
        rest = dict(kwargs)
        x, *behind = args
        positions: Tensor = behind.pop(0) if behind else rest.pop("position_ids")  # (B, T)
        made: dict[bool, tuple[Tensor, ...]] = {}
        for long in set(is_long):
            # an added position chooses the factors; other rows' positions must not
            given = positions if long else positions.clamp(max=self.limit - 1)
            last = positions.new_full((len(positions), 1), self.limit if long else 0)
            whole = module.forward(x, torch.cat([given, last], 1), *behind, **rest)
            made[long] = tuple(each[:, :-1] for each in whole)
        if len(made) == 1:
            return next(iter(made.values()))
        chosen = torch.tensor(is_long, device=positions.device)[:, None, None]
        return tuple(torch.where(chosen, long, short) for long, short in zip(made[True], made[False], strict=True))
