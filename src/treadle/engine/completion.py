"""The result of generation for one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treadle.common.errors import TreadleError, problem_list
from treadle.engine.sequence import FinishReason, SequenceError, TokenSequence
from treadle.routing.centroids import Floats


@dataclass(frozen=True)
class Completion:
    """A finished row.

    Attributes:
        text: what was generated, without the end-of-text token and without the stop string.
        token_ids: (T) all generated tokens, the one that ended the text included.
        logprobs: (T,) in nats.
        weights: (T, N) under which the forward pass ran that gave each token.
        adapter_names: (N) of the columns of `weights`.
        finish_reason: "stop" or "length".
        prompt_tokens: how many tokens the prompt has.
        seconds: from the start of the call until the row's last token.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: Floats
    weights: Floats
    adapter_names: tuple[str, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    seconds: float

    @classmethod
    def of(cls, row: TokenSequence, reason: FinishReason, seconds: float) -> "Completion":
        """Return the completion of a finished row."""
        return cls(
            text="".join(event.text for event in row.events),
            token_ids=tuple(event.token_id for event in row.events),
            logprobs=np.array([event.logprob for event in row.events], np.float32),
            weights=np.stack([event.weights for event in row.events]),
            adapter_names=row.router.names,
            finish_reason=reason,
            prompt_tokens=row.prompt_tokens,
            seconds=seconds,
        )


class GenerationError(TreadleError):
    """Some prompts of a call cannot be continued; the others have been, to their end.

    Attributes:
        completions: one a prompt, in their order; None where there is none.
        failures: the error of each prompt that has no completion, by its place.
    """

    def __init__(self, completions: Sequence[Completion | None], failures: dict[int, SequenceError]) -> None:
        super().__init__(problem_list("generation:", [f"prompt {place}: {why}" for place, why in failures.items()]))
        self.completions = tuple(completions)
        self.failures = failures
