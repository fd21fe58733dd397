"""The options of routing and sampling: frozen, checked once, the same for flags and files.

Pure Python, so that `treadle --help` need not wait for numpy or torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from treadle.common.errors import OptionProblem
from treadle.common.options import check_fields, explained, option, problem_of, raise_problems, read_options

Score = Literal["cosine", "centred", "lda"]
Rule = Literal["boosted", "softmax", "top_k", "fixed"]
Combine = Literal["sum", "linear", "paper"]
COMBINES: tuple[Combine, ...] = get_args(Combine)

COSINE_TEMPERATURE = 0.05
"""Divides cosines, which lie close together."""

SMALLEST, LARGEST = 1e-6, 1_000_000
"""Limits of numbers that scores are divided by; beyond them, float32 overflows."""
COLDEST = 1e-3
"""The lowest temperature above 0 of sampling; below, logits divided by it overflow."""


@explained
@dataclass(frozen=True)
class RoutingParams:
    """How weights are made from the text, and when. The same fields are flags, request fields and result keys."""

    score: Score = option("lda", "how a text is compared with centroids: cosine (the paper), centred or lda")
    rule: Rule = option("softmax", "how scores become weights: boosted (the paper), softmax, top_k or fixed")
    boost: float = option(4.0, "boosted: factor on the largest cosine", at_least=SMALLEST, at_most=1000)
    temperature: float | None = option(
        None,
        "softmax, top_k: divides the scores; none = the bundle's own for lda, 0.05 for cosines",
        at_least=SMALLEST,
        at_most=LARGEST,
    )
    top_k: int = option(2, "top_k: how many adapters keep a weight", at_least=1)
    fixed: Mapping[str, float] | None = option(None, "fixed: name=weight pairs; adapters not named get 0", at_least=0)
    every: int | None = option(
        2, "generated tokens between two decisions on the weights; none = decide once, from the prompt", at_least=1
    )
    lag: int = option(
        0,
        "1 = weights take effect one decision late, so that a slow embedder runs beside the model",
        at_least=0,
        at_most=1,
    )
    window: int | None = option(None, "tokens that the embedder sees, the last ones; none = all", at_least=1)
    fallback: bool = option(
        True, "lda: the base model answers texts of no adapter's kind; false = the adapters share all weight"
    )
    states: bool = option(
        True, "lda: decide from the base model's own states if the bundle has them; false = from the text alone"
    )
    prefill: Literal["prompt", "causal"] = option(
        "prompt", "prompt tokens: weights of the whole prompt, or of the text so far"
    )
    past: Literal["keep", "recompute"] = option(
        "keep", "when weights change: keep cached keys and values, or recompute them"
    )
    combine: Combine = option("sum", "sum (the true mixture), linear (PEFT >= 0.9) or paper (PEFT 0.4.0)")

    def __post_init__(self) -> None:
        """Check every field and the fields against each other; one message lists all problems."""
        raise_problems("routing options:", [*check_fields(self), *self._clashes()])

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
            clashes["every", "prefill"] = (
                text,
                "a whole number of at least 1 with prefill 'causal', which decides in blocks of this many tokens",
            )
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
        """Return the options of the paper's code; its bundle needs the sentence embedder."""
        return cls(
            score="cosine",
            rule="boosted",
            boost=4.0,
            every=2,
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


def read_routing(given: Mapping[str, Any], onto: RoutingParams) -> RoutingParams:
    """Read routing options over others: `fixed` implies its rule, and another rule drops the others' `fixed`.

    Raises:
        OptionError: an option does not exist, cannot be read, or does not fit the others.
    """
    implied: dict[str, Any] = {}
    if given.get("fixed") is not None:
        implied = {"rule": "fixed"}
    elif onto.fixed is not None and given.get("rule", "fixed") != "fixed":
        implied = {"fixed": None}
    return read_options(RoutingParams, {**implied, **given}, onto=onto)


@explained
@dataclass(frozen=True)
class SourceParams:
    """Where a base and its adapters are, instead of a bundle that was made before."""

    base: str | None = option(None, "folder or hub id of a base model; with it no bundle is needed")
    adapters: str | None = option(
        None,
        "with base: a folder; each sub-folder with an adapter is one, routed by samples.txt or samples.jsonl in it",
    )
    adapter: tuple[str, ...] = option((), "with base: name=PATH or name=HUB_ID of one more adapter")
    embedder: str | None = option(
        None,
        "with base: of the samples, as in treadle fit; none = tokens, the base's own token vectors",
    )

    def __post_init__(self) -> None:
        """Check every field; one message lists all problems."""
        raise_problems("options of the adapters:", self.source_problems())

    def source_problems(self) -> list[OptionProblem]:
        """Return the problems of all fields by themselves, and of these fields together."""
        problems = check_fields(self)
        if problems:
            return problems
        given = [name for name in ("adapters", "adapter", "embedder") if getattr(self, name)]
        if self.base is None and given:
            problems.append(OptionProblem(("base",), f"{', '.join(given)} need a base: name its folder or hub id"))
        if self.base is not None and not self.adapters and not self.adapter:
            problems.append(OptionProblem(("adapters",), "base needs adapters: a folder, or adapter name=PATH"))
        return problems


@explained
@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a row ends."""

    temperature: float = option(0.0, "0 = greedy; else logits are divided by it", at_least=0)
    top_p: float = option(1.0, "sample from the smallest set of tokens with this probability mass", above=0, at_most=1)
    top_k: int = option(0, "sample from this many most probable tokens; 0 = all", at_least=0)
    max_tokens: int = option(128, "tokens to generate at most", at_least=1)
    stop: tuple[str, ...] = option((), "strings that end the text; they are not part of it")
    seed: int | None = option(
        None, "seed of this row's random stream; none = a fresh one each time", at_least=0, at_most=2**63 - 1
    )
    stop_token_ids: tuple[int, ...] = option((), "token ids that end the text; they are not part of it", at_least=0)

    def __post_init__(self) -> None:
        """Check every field; one message lists all problems."""
        problems = check_fields(self)
        right = vars(self).keys() - {problem.options[0] for problem in problems}
        if "temperature" in right and 0 < self.temperature < COLDEST:
            allowed = f"0 (greedy) or at least {COLDEST}"
            problems.append(problem_of("temperature", self.temperature, allowed))
        if "stop" in right and "" in self.stop:
            problems.append(problem_of("stop", self.stop, "texts that are not empty"))
        raise_problems("sampling options:", problems)
