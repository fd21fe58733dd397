"""The options of evaluation, speed measurements and training: frozen, checked once, the same for flags and files.

Pure Python, so that `treadle --help` need not wait for numpy or torch.
"""

from dataclasses import dataclass

from treadle.common.options import check_fields, explained, option, problem_of, raise_problems


@explained
@dataclass(frozen=True)
class EvalParams:
    """Options of an evaluation: which rows, and how."""

    limit: int = option(300, "examples per task, chosen by the seed", at_least=1)
    seed: int = option(0, "seed of the examples, shots, streams and bootstrap samples", at_least=0)
    shots: int = option(0, "solved examples of the same task before each prompt", at_least=0)
    chat: bool = option(False, "ask each prompt as a user's message, by the base's chat template")
    generate: bool = option(True, "generate texts and judge them; otherwise only likelihoods are measured")
    max_tokens: int | None = option(None, "tokens to generate at most; none = the task's own number", at_least=1)

    def __post_init__(self) -> None:
        """Check every field; one message lists all problems."""
        raise_problems("evaluation options:", check_fields(self))


@explained
@dataclass(frozen=True)
class BenchParams:
    """How long and with what `treadle bench` measures."""

    batch: tuple[int, ...] = option((1, 8), "rows of a batch", at_least=1)
    prompt: int = option(32, "tokens of each prompt", at_least=1)
    tokens: int = option(128, "tokens to generate per row", at_least=8)
    rounds: int = option(5, "measurements of each call, in turn with the other calls", at_least=1)
    long_prompt: int = option(512, "prefill: tokens of a prompt", at_least=1)

    def __post_init__(self) -> None:
        """Check every field; one message lists all problems."""
        problems = check_fields(self)
        if self.batch == ():
            problems.append(problem_of("batch", self.batch, "one number of rows or more"))
        raise_problems("bench options:", problems)
        object.__setattr__(self, "batch", tuple(dict.fromkeys(self.batch)))


@explained
@dataclass(frozen=True)
class TrainParams:
    """How one adapter is trained; the defaults are the recipe of the demo."""

    rank: int = option(16, "rank of each pair of factors", at_least=1)
    alpha: int = option(32, "the update is scaled by alpha / rank", at_least=1)
    targets: tuple[str, ...] = option(("q_proj", "v_proj"), "modules that get factors")
    learning_rate: float = option(1e-3, "learning rate of the first step; it falls to 0 linearly", above=0)
    steps: int = option(120, "optimiser steps", at_least=1)
    batch_size: int = option(8, "sequences a step", at_least=1)
    max_tokens: int = option(384, "tokens of a sequence; longer ones are left out, and counted", at_least=1)
    dropout: float = option(0.0, "share of an adapter's inputs that a step leaves out", at_least=0, below=1)
    join: float = option(0.25, "share of the sequences that join two or three examples", at_least=0, at_most=1)
    packing: bool = option(False, "put several sequences into one of max_tokens; none of them sees another")
    dtype: str = option("bfloat16", "dtype of the base model; the adapter itself trains in float32")
    seed: int = option(0, "seed of the order, the joining and the first factors", at_least=0, at_most=2**32 - 1)

    def __post_init__(self) -> None:
        """Check every field; a target may name several modules, separated by commas."""
        problems = check_fields(self)
        if "targets" not in {problem.options[0] for problem in problems}:
            names = tuple(name for each in self.targets for name in each.split(",") if name)
            object.__setattr__(self, "targets", names)
            if not names:
                problems.append(problem_of("targets", self.targets, "the name of one module or more"))
        raise_problems("training options:", problems)

    @classmethod
    def paper(cls) -> "TrainParams":
        """Return the paper's recipe: rank 64, alpha 16, dropout 0.1 on q and v, no joined sequences."""
        return cls(rank=64, alpha=16, dropout=0.1, learning_rate=2e-4, join=0.0)
