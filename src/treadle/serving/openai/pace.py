"""Decides how much of the waiting prompts is read between two steps, so that running streams do not stall."""

CHUNK_STEPS = 2.0
"""A chunk of a prompt may take as long as this many steps while sequences run."""
BURST_FACTOR = 8
"""Prompts that are read together may take this many times as long, and more where more wait than run."""
GROUP_CHUNKS = 2
"""Prompts that are read together may have the tokens of this many chunks."""
MIN_CHUNK_TOKENS = 16
"""The fewest tokens of a chunk, whatever they cost. Shorter passes do not tell what a token costs."""
SMOOTHING_WEIGHT = 0.3
"""Weight of the newest measurement in a running mean."""


class Pace:
    """Measures steps and chunks, and sizes the next chunk.

    Attributes:
        step_seconds: running mean of the steps.
        token_seconds: running mean of a token of a prompt that is read; 0 = not measured yet.
    """

    def __init__(self, prompt_chunk: int, step_seconds: float = 0.0, token_seconds: float = 0.0) -> None:
        """Allow chunks of at most `prompt_chunk` tokens."""
        self._prompt_chunk = prompt_chunk
        self.step_seconds = step_seconds
        self.token_seconds = token_seconds

    def observe_step(self, seconds: float) -> None:
        """Count one step of the running sequences."""
        self.step_seconds = smoothed(self.step_seconds, seconds)

    def observe_chunk(self, num_tokens: int, seconds: float, *, num_running: int) -> None:
        """Count a chunk of prompts that has been read."""
        if num_tokens >= MIN_CHUNK_TOKENS and (num_running or not self.token_seconds):
            self.token_seconds = smoothed(self.token_seconds, seconds / num_tokens)

    def chunk_tokens(self, *, num_running: int, num_waiting: int = 1) -> int:
        """Return how many tokens of prompts may be read before the next step.

        Several short prompts that wait are read together: the running sequences wait once, and the others start at
        once. If they were read by twos and threes, all of them would wait for the steps between.
        """
        is_group = num_waiting > 1
        most = self._prompt_chunk * (GROUP_CHUNKS if is_group else 1)
        if not num_running:
            return most
        if not self.token_seconds:
            return min(self._prompt_chunk, MIN_CHUNK_TOKENS)
        burst = BURST_FACTOR * max(1.0, num_waiting / num_running) if is_group else 1.0
        tokens = int(CHUNK_STEPS * burst * self.step_seconds / self.token_seconds)
        return min(most, max(MIN_CHUNK_TOKENS, tokens))


def smoothed(mean: float, value: float) -> float:
    """Return a running mean with one more value; a mean of 0 has no value yet."""
    return value if not mean else (1 - SMOOTHING_WEIGHT) * mean + SMOOTHING_WEIGHT * value
