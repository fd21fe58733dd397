"""Chooses the next token from logits; each row by its own options and its own random stream."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treadle.errors import OptionError, problem_list
from treadle.options import option


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a row ends."""

    temperature: float = option(0.0, "0 = greedy; else logits are divided by it")
    top_p: float = option(1.0, "sample from the smallest set of tokens with this probability mass")
    top_k: int = option(0, "sample from so many most probable tokens; 0 = all")
    max_tokens: int = option(128, "tokens to generate at most")
    stop: tuple[str, ...] = option((), "strings that end the text; they are not part of it")
    seed: int | None = option(None, "of this row's random stream; none = a fresh one each time")

    def __post_init__(self) -> None:
        """Check every field; one message lists all problems."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        problems: list[str] = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature must be a finite number of at least 0, not {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        if self.top_k < 0:
            problems.append(f"top_k must be at least 0, not {self.top_k!r}")
        if self.max_tokens < 1:
            problems.append(f"max_tokens must be at least 1, not {self.max_tokens!r}")
        if "" in self.stop:
            problems.append("a stop string is empty")
        if problems:
            raise OptionError(problem_list("sampling options:", problems))

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Return the random stream of a new row, None for a greedy one."""
        if self.temperature == 0:
            return None
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
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
    """
    logits = logits.float()
    tokens = logits.argmax(-1)  # (B,)
    for row, (options, generator) in enumerate(zip(params, generators, strict=True)):
        if generator is not None:
            weights = torch.softmax(truncate(logits[row] / options.temperature, options), -1)
            tokens[row] = torch.multinomial(weights, 1, generator=generator)[0]
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)  # (B,)
    return tokens.tolist(), logprobs.tolist()


def truncate(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return logits (V,) with -inf where `top_k` and `top_p` leave a token out; the most probable always stays."""
    if 0 < params.top_k < logits.shape[-1]:
        smallest = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        probabilities = torch.softmax(ordered, -1)
        before = probabilities.cumsum(-1) - probabilities  # mass of the tokens that come first
        logits = logits.masked_fill((before >= params.top_p).scatter(-1, order, before >= params.top_p), -torch.inf)
    return logits
