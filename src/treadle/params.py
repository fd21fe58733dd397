"""The options of routing, sampling, evaluation and training: frozen, checked once, the same for flags and files.

Pure Python, so that `treadle --help` need not wait for numpy or torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, get_args

from treadle.errors import OptionError, OptionProblem, problem_list, unknown_name
from treadle.options import allowed_values, option

Score = Literal["cosine", "centred", "lda"]
Rule = Literal["boosted", "softmax", "top_k", "fixed"]
Combine = Literal["sum", "linear", "paper"]
COMBINES: tuple[Combine, ...] = get_args(Combine)

DEFAULT_TEMPERATURE: dict[Score, float] = {"lda": 1.6, "cosine": 0.05, "centred": 0.05}
"""Log-posteriors are overconfident, cosines lie close together: for `lda`, the least log-loss on held-out prompts."""

SMALLEST = 1e-6
"""Of a boost or temperature; below, scores divided by it overflow."""
FACTOR = f"a finite number of at least {SMALLEST}"
COUNT = "a whole number of at least 1"


@dataclass(frozen=True)
class RoutingParams:
    """How weights are made from the text, and when. The same fields are flags, request fields and result keys."""

    score: Score = option("lda", "text against centroids: cosine (the paper), centred, or lda")
    rule: Rule = option("softmax", "scores to weights: boosted (the paper), softmax, top_k or fixed")
    boost: float = option(4.0, "boosted: factor on the largest cosine", FACTOR)
    temperature: float | None = option(
        None, "softmax, top_k: divides the scores; none = 1.6 for lda, 0.05 for cosines", f"{FACTOR}, or none"
    )
    top_k: int = option(2, "top_k: how many adapters keep a weight", COUNT)
    fixed: Mapping[str, float] | None = option(
        None, "fixed: name=weight pairs; adapters not named get 0", 'an object like {"math": 0.7}, or none'
    )
    unit_scale: bool = option(False, "divide by the largest weight: the nearest acts at its trained strength")
    floor: float | None = option(
        None, "adapters whose score is below get 0; where all are, the base answers", "a finite score, or none"
    )
    every: int | None = option(
        2, "re-weigh every so many generated tokens; none = once, from the prompt", f"{COUNT}, or none"
    )
    lag: int = option(0, "1 = weights come one decision late: a slow embedder then runs beside the model", "0 or 1")
    window: int | None = option(None, "the embedder sees the last so many tokens; none = all", f"{COUNT}, or none")
    recent: int | None = option(
        32,
        "running text: three quarters of the score are that of its last so many tokens; none = off",
        f"{COUNT}, or none",
    )
    change: float | None = option(
        4.0,
        "lda: a prompt whose domain changes counts from the last change on, where that explains it by so many nats "
        "better; none = all of it",
        f"{FACTOR}, or none",
    )
    prefill: Literal["prompt", "causal"] = option(
        "prompt", "prompt tokens: weights of the whole prompt, or of the text so far"
    )
    past: Literal["keep", "recompute"] = option("keep", "on new weights: keep cached keys and values, or read again")
    combine: Combine = option("sum", "sum (the true mixture), linear (PEFT >= 0.9) or paper (PEFT 0.4.0)")

    def __post_init__(self) -> None:
        """Check every field and the fields against each other; one message lists all problems."""
        if self.fixed is not None:
            object.__setattr__(self, "fixed", dict(self.fixed))
        if problems := [*self._choice_problems(), *self._number_problems(), *self._clashes()]:
            raise OptionError(problem_list("routing options:", [problem.text for problem in problems]), problems)

    def _choice_problems(self) -> list[OptionProblem]:
        choices = {"score": Score, "rule": Rule, "combine": Combine}
        allowed = {name: get_args(kind) for name, kind in choices.items()}
        allowed |= {"prefill": ("prompt", "causal"), "past": ("keep", "recompute")}
        return [
            OptionProblem((name,), unknown_name(name, str(getattr(self, name)), values))
            for name, values in allowed.items()
            if getattr(self, name) not in values
        ]

    def _number_problems(self) -> list[OptionProblem]:
        may_be_none = ("temperature", "every", "window", "recent", "change", "floor")
        given: dict[str, Any] = {
            name: value for name, value in vars(self).items() if value is not None or name not in may_be_none
        }
        wrong = [
            name
            for name in ("boost", "temperature", "change")
            if name in given and not (isinstance(given[name], int | float) and SMALLEST <= given[name] < float("inf"))
        ]
        wrong += [
            name
            for name in ("top_k", "every", "window", "recent")
            if name in given and not (isinstance(given[name], int) and given[name] >= 1)
        ]
        wrong += [name for name in ("lag",) if given[name] not in {0, 1}]
        wrong += [name for name in ("floor",) if name in given and not isfinite(given[name])]
        allowed = allowed_values(RoutingParams)
        texts = {name: f"{name} must be {allowed[name]}, not {given[name]!r}" for name in wrong}
        problems = [OptionProblem((name,), text, given[name], allowed[name]) for name, text in texts.items()]
        bad = {name: weight for name, weight in (self.fixed or {}).items() if not (isfinite(weight) and weight >= 0)}
        return problems + [
            OptionProblem(
                (f"fixed.{name}",),
                f"fixed weight of {name!r} must be finite and not negative",
                weight,
                "a finite number of at least 0",
            )
            for name, weight in bad.items()
        ]

    def _clashes(self) -> list[OptionProblem]:
        clashes: dict[tuple[str, ...], tuple[str, str]] = {}  # options -> text, what is allowed of the first
        if self.rule == "boosted" and self.score == "lda":
            text = "rule boosted multiplies a cosine; with score lda use rule softmax"
            clashes["rule", "score"] = text, "'softmax' or 'top_k' with score 'lda'; 'boosted' multiplies a cosine"
        text = "rule fixed and fixed weights go together: give both or neither"
        if self.rule == "fixed" and self.fixed is None:
            clashes["fixed", "rule"] = text, "an object like {\"math\": 0.7} with rule 'fixed'"
        if self.rule != "fixed" and self.fixed is not None:
            clashes["rule", "fixed"] = text, "'fixed', or leave it out"
        if self.prefill == "causal" and self.every is None:
            text = "prefill causal decides in blocks of `every` tokens; every none decides once, from the prompt"
            clashes["every", "prefill"] = text, f"{COUNT} with prefill 'causal', which decides in blocks of so many"
        if self.prefill == "causal" and self.lag:
            text = "prefill causal decides while it reads the prompt; weights that come late (lag) cannot"
            clashes["lag", "prefill"] = text, "0 with prefill 'causal'"
        if self.prefill == "causal" and self.past == "recompute":
            text = "past recompute reads the prompt again under later weights; it cannot be causal"
            clashes["past", "prefill"] = text, "'keep' with prefill 'causal'"
        return [
            OptionProblem(options, text, getattr(self, options[0]), allowed)
            for options, (text, allowed) in clashes.items()
        ]

    @classmethod
    def paper(cls) -> "RoutingParams":
        """Return what the paper's code computes; use a bundle whose embedder is the sentence embedder."""
        return cls(
            score="cosine",
            rule="boosted",
            boost=4.0,
            every=2,
            recent=None,
            change=None,
            past="recompute",
            combine="paper",
        )

    @classmethod
    def base(cls) -> "RoutingParams":
        """Return params under which no adapter acts."""
        return cls(rule="fixed", fixed={}, every=None)

    @classmethod
    def one(cls, name: str) -> "RoutingParams":
        """Return params under which one adapter acts alone, at the strength it was trained at."""
        return cls(rule="fixed", fixed={name: 1.0}, every=None)

    @classmethod
    def uniform(cls, names: Sequence[str]) -> "RoutingParams":
        """Return params under which every adapter of `names` has the same weight; the weights sum to 1."""
        return cls(rule="fixed", fixed={name: 1.0 / len(names) for name in names}, every=None)


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
        if self.temperature != 0 and not 1e-3 <= self.temperature < float("inf"):
            problems.append(f"temperature must be 0 (greedy) or finite and at least 0.001, not {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        if self.top_k < 0:
            problems.append(f"top_k must be at least 0, not {self.top_k!r}")
        if self.max_tokens < 1:
            problems.append(f"max_tokens must be at least 1, not {self.max_tokens!r}")
        if "" in self.stop:
            problems.append("a stop string is empty")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            problems.append(f"seed must be at least 0 and below 2**63, or none, not {self.seed!r}")
        if problems:
            raise OptionError(problem_list("sampling options:", problems))


@dataclass(frozen=True)
class EvalParams:
    """What is evaluated: which rows, and how."""

    limit: int = option(300, "examples a task, a seeded choice")
    seed: int = option(0, "of the choice of examples and shots, of streams and of bootstrap samples")
    shots: int = option(0, "solved examples of the same task before each prompt")
    generate: bool = option(True, "generate texts and judge them; without, only likelihoods are measured")
    max_tokens: int | None = option(None, "tokens to generate at most; none = the task's own number")

    def __post_init__(self) -> None:
        """Check every field; one message lists all problems."""
        least = {"limit": 1, "seed": 0, "shots": 0, "max_tokens": 1}
        given = {name: getattr(self, name) for name in least if getattr(self, name) is not None}
        problems = [
            f"{name} must be at least {least[name]}, not {value}"
            for name, value in given.items()
            if value < least[name]
        ]
        if problems:
            raise OptionError(problem_list("evaluation options:", problems))


@dataclass(frozen=True)
class BenchParams:
    """How long and with what `treadle bench` measures."""

    batch: tuple[int, ...] = option((1, 8), "rows of a batch")
    prompt: int = option(32, "tokens of each prompt")
    tokens: int = option(128, "tokens made a row")
    rounds: int = option(5, "times that each call is measured, in turn with the others")
    long_prompt: int = option(512, "prefill: tokens of a prompt")
    paper_text: int = option(256, "peers: tokens of the text that peers without a cache read for each token")
    sentence: str = option("sentence-transformers/all-MiniLM-L6-v2", "peers: embedder of the paper's loop")
    vllm: str = option(".venv-vllm/bin/python", "peers: Python of an environment that has vLLM")
    vllm_compile: bool = option(False, "peers: vLLM's compiled mode, which takes minutes to start")

    def __post_init__(self) -> None:
        """Check every field; one message lists all problems."""
        object.__setattr__(self, "batch", tuple(dict.fromkeys(self.batch)))
        least = {"prompt": 1, "tokens": 8, "rounds": 1, "long_prompt": 1, "paper_text": 1}
        problems = [
            f"{name} must be at least {number}, not {getattr(self, name)}"
            for name, number in least.items()
            if getattr(self, name) < number
        ]
        if not self.batch or min(self.batch) < 1:
            problems.append(f"batch names numbers of rows, each at least 1, not {list(self.batch)}")
        if problems:
            raise OptionError(problem_list("bench options:", problems))


@dataclass(frozen=True)
class TrainParams:
    """How one adapter is trained; the defaults are the recipe of the demo."""

    rank: int = option(16, "rank of each pair of factors")
    alpha: int = option(32, "the update is scaled by alpha / rank")
    targets: tuple[str, ...] = option(("q_proj", "v_proj"), "modules that get factors")
    learning_rate: float = option(1e-3, "of the first step; falls to 0 linearly")
    steps: int = option(120, "optimiser steps")
    batch_size: int = option(8, "sequences a step")
    max_tokens: int = option(384, "longer sequences are left out, and counted")
    dropout: float = option(0.0, "share of an adapter's inputs that a step leaves out")
    join: float = option(0.25, "share of the sequences that join two or three examples")
    packing: bool = option(False, "put several sequences into one of max_tokens; each still sees itself alone")
    dtype: str = option("bfloat16", "of the base model; the adapter itself trains in float32")
    seed: int = option(0, "of the order, the joining and the first factors")

    def __post_init__(self) -> None:
        """Check every field; a target may name several modules, separated by commas."""
        object.__setattr__(self, "targets", tuple(name for each in self.targets for name in each.split(",") if name))
        problems = [
            f"{name} must be positive, not {getattr(self, name)}"
            for name in ("rank", "alpha", "learning_rate", "steps", "batch_size", "max_tokens")
            if not 0 < getattr(self, name) < float("inf")
        ]
        if not 0 <= self.join <= 1:
            problems.append(f"join is a share from 0 to 1, not {self.join}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is a share from 0 to below 1, not {self.dropout}")
        if not self.targets:
            problems.append("targets names no module")
        if not 0 <= self.seed < 2**32:
            problems.append(f"seed must be from 0 to {2**32 - 1}, not {self.seed}")
        if problems:
            raise OptionError(problem_list("training options:", problems))

    @classmethod
    def paper(cls) -> "TrainParams":
        """Return the paper's recipe: rank 64, alpha 16, dropout 0.1 on q and v, no joined sequences."""
        return cls(rank=64, alpha=16, dropout=0.1, learning_rate=2e-4, join=0.0)
