"""Chooses the next token from logits. Each row has its own options and its own random stream."""

from collections.abc import Sequence

import torch
from torch import Tensor

from treadle.common.params import SamplingParams


def new_generator(params: SamplingParams, device: torch.device) -> torch.Generator | None:
    """Return the random stream of a new row; None if it is greedy."""
    if params.temperature == 0:
        return None
    generator = torch.Generator(device)
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def sample(
    logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator | None]
) -> tuple[list[int], list[float]]:
    """Choose one token a row.

    Args:
        logits: (B, V).
        params: of each row.
        generators: of each row; None where it is greedy.

    Returns:
        token ids (B) and their log-probabilities (B) in nats, under the model's own distribution at temperature 1.
        A row whose logits overflow has a log-probability that is not finite, and a meaningless token; others do not
        change.
    """
    logits = logits.float()
    tokens = logits.argmax(-1)  # (B,)
    totals = logits.logsumexp(-1)  # (B,)
    is_drawn = totals.isfinite().tolist() if any(generators) else []  # once for all rows: on a GPU this synchronises
    for row, (options, generator) in enumerate(zip(params, generators, strict=True)):
        if generator is not None and is_drawn[row]:
            weights = torch.softmax(truncate(_tempered(logits[row], options.temperature), options), -1)
            tokens[row] = torch.multinomial(weights, 1, generator=generator)[0]
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - totals  # (B,)
    ids, values = torch.stack([tokens.double(), logprobs.double()]).tolist()  # to the host in one copy; both are exact
    return [int(token) for token in ids], values


def likeliest(logits: Tensor, counts: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """Return the `counts` (B) most probable tokens of each row of logits (B, V), with log-probabilities in nats."""
    if not max(counts, default=0):
        return [()] * len(counts)
    logits = logits.float()
    values, tokens = logits.topk(min(max(counts), logits.shape[-1]))  # (B, largest count)
    logprobs = values - logits.logsumexp(-1, keepdim=True)
    pairs = zip(tokens.tolist(), logprobs.tolist(), counts, strict=True)
    return [tuple(zip(ids[:count], each[:count], strict=True)) for ids, each, count in pairs]


def score_tokens(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """Return the log-probabilities (T) in nats of tokens (T) under logits (T, V)."""
    logits = logits.float()
    index = torch.tensor(tokens, dtype=torch.long, device=logits.device)[:, None]  # (T, 1)
    # bit for bit as in `likeliest`: callers that ask for both compare them
    return (logits.gather(-1, index)[:, 0] - logits.logsumexp(-1)).tolist()


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """Return (logits - maximum) / temperature (V,), so that no float32 of either overflows to NaN."""
    return (logits - logits.max()) / min(temperature, torch.finfo(torch.float32).max)


def truncate(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return logits (V,) with -inf for tokens that `top_k` or `top_p` excludes; the most probable token stays."""
    if 0 < params.top_k < logits.shape[-1]:
        smallest = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        probabilities = torch.softmax(ordered, -1)
        before = probabilities.cumsum(-1) - probabilities  # probability mass of the tokens before
        is_out = before >= params.top_p
        is_out[0] = False  # a tiny `top_p` is 0 in float32
        logits = logits.masked_fill(torch.empty_like(is_out).scatter_(-1, order, is_out), -torch.inf)
    return logits
