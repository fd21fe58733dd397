"""The next tokens of rows that share a pass: what it draws for each, or why a row gets none."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import NamedTuple

from torch import Tensor

from treadle.engine.sampling import likeliest, sample, score_tokens
from treadle.engine.sequence import Likeliest, SequenceError, TokenSequence

OVERFLOW = "the model overflows under these weights: there is no next token."


class Draw(NamedTuple):
    """The next token of a row, its log-probability in nats, and the likeliest ones in its place."""

    token_id: int
    logprob: float
    likeliest: Likeliest


Draws = dict[TokenSequence, Draw | SequenceError]


def drawn(
    rows: Sequence[TokenSequence],
    run: Callable[[], Tensor],
    found: Mapping[TokenSequence, Draw | SequenceError] | None = None,
) -> Draws:
    """Run a pass and draw each row's next token from its logits (B, V), or give the row an error.

    Rows whose token was `found` already keep it: to draw again would move their random stream on.
    """
    wanted = [index for index, row in enumerate(rows) if not isinstance((found or {}).get(row), Draw)]
    draws: list[Draw] = []

    def draw() -> None:
        logits = run()
        chosen = logits if len(wanted) == len(rows) else logits[wanted]
        draws.extend(_draw([rows[index] for index in wanted], chosen))

    if failure := failure_of(draw):
        return {rows[index]: failure for index in wanted}
    each = zip(wanted, draws, strict=True)
    return {rows[index]: made if isfinite(made.logprob) else SequenceError(OVERFLOW) for index, made in each}


def failure_of(run: Callable[[], object], what: str = "the forward pass failed") -> SequenceError | None:
    """Run a part of what rows need; return their error where it fails, whatever it raises."""
    try:
        run()
    except SequenceError as failure:  # it says itself what is wrong
        return failure.with_traceback(None)  # whose frames hold the logits
    except Exception as error:  # such as for want of memory: it must cost no row that is not to blame
        return SequenceError.of(what, error)
    return None


def are_whole(draws: Draws) -> bool:
    """Return whether every row has a token."""
    return not any(isinstance(draw, SequenceError) for draw in draws.values())


def _draw(rows: Sequence[TokenSequence], logits: Tensor) -> list[Draw]:
    """Draw the next token of each row from logits (B, V)."""
    tokens, logprobs = sample(logits, [row.sampling for row in rows], [row.generator for row in rows])
    for index, row in enumerate(rows):
        if (token_id := row.forced_next) is not None:
            tokens[index], (logprobs[index],) = token_id, score_tokens(logits[index : index + 1], [token_id])
    counts = [row.report.likeliest for row in rows]
    tops = likeliest(logits, counts) if any(counts) else [()] * len(rows)
    return list(map(Draw, tokens, logprobs, tops))
