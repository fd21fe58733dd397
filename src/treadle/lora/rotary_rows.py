"""Two orders of the rows of queries and keys: transformers keeps rotary halves together, others keep pairs.

llama.cpp (its LLAMA architecture) and torchtune turn neighbouring rows of a head together; in transformers the first
half of a head's rows turns with the second half.
"""

from typing import Any

from torch import Tensor


def num_heads(module: str, config: Any) -> int | None:
    """Return the heads of a module whose rows have an order: queries' or keys'; None for others."""
    field = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(module.rpartition(".")[2])
    return None if field is None else int(getattr(config, field))


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """Return rows (out, ...) in the order of pairs, given in that of halves."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """Return rows (out, ...) in the order of halves, given in that of pairs."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)
