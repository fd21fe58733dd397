"""Turns a body into work for the engine, or lists every reason why it cannot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from treadle.common.errors import OptionError, TreadleError
from treadle.common.params import SamplingParams
from treadle.engine.chat import TokenPrompt, read_prompt
from treadle.engine.engine import Engine
from treadle.engine.sequence import OutputOptions
from treadle.engine.tokenization import chat_text, check_known, stop_ids
from treadle.serving.openai.bodies import ChatBody, CompletionBody, GenerationBody, Message, with_limits
from treadle.serving.openai.failures import Problem, Problems, refusal
from treadle.serving.openai.jobs import Work
from treadle.serving.openai.keys import Caller
from treadle.serving.openai.params import ServeParams
from treadle.serving.openai.queues import Check
from treadle.serving.openai.targets import Targets
from treadle.serving.openai.tokens import MinTokenCount

MAX_TOKEN_CHARACTERS = 128
"""A text with more characters than this for each allowed token is refused before it is tokenised."""
DEFAULT_COMPLETION_TOKENS = 16
"""Default of /v1/completions, as in OpenAI's API."""


@dataclass(frozen=True)
class ParsedRequest:
    """A validated request to generate.

    Attributes:
        model: the name that the request gave.
        work: the job for the scheduler: n sequences of the first prompt, then n of the second, and so on.
        is_chat: whether the answer is that of a chat.
        n: choices a prompt.
        likeliest: how many likeliest tokens come with each; None = no log-probabilities at all.
        width: entries of the answer for each token: itself, its likeliest ones, its weights and what made them.
        num_values: the log-probabilities and weights of the answer at most.
        echo: the text of each prompt, where it comes before its answer; else empty.
        is_silent: whether no token is wanted, only the prompt's own.
        is_streamed: whether the answer is streamed.
        has_usage: whether a stream ends with the numbers of tokens.
        has_trace: whether each choice carries its weights and what they were made from.
    """

    model: str
    work: Work
    is_chat: bool
    n: int
    likeliest: int | None
    width: int
    num_values: int
    echo: tuple[str, ...]
    is_silent: bool
    is_streamed: bool
    has_usage: bool
    has_trace: bool


@dataclass(frozen=True)
class RequestReader:
    """Reads bodies for one server, by what its engine can do and its params allow."""

    engine: Engine
    targets: Targets
    params: ServeParams

    @cached_property
    def _fewest_tokens(self) -> MinTokenCount:
        return MinTokenCount(self.engine.tokenizer)

    def read(self, body: GenerationBody, problems: Problems, caller: Caller, check: Check) -> ParsedRequest:
        """Return the parsed request, or raise a Failure that lists all its problems, `problems` included."""
        problems = list(problems)
        target = self.targets.read(body.model, body.treadle, problems, caller)
        prompts: list[Any] = body.prompt if isinstance(body, CompletionBody) else [cast(ChatBody, body).messages]
        likeliest = _likeliest(body)
        _check_pairs(body, problems)
        n = body.n or 1
        sampling = self._sampling(body, problems, len(prompts) * n)
        read = self._read_prompts(prompts, problems, check)
        is_echo = isinstance(body, CompletionBody) and bool(body.echo)
        if target.routing.past == "recompute" and target.routing.every is not None:
            self._check_recompute(read, sampling, problems)
        num_adapters = len(self.engine.adapter_names if target.adapters is None else target.adapters)
        width = 1 + (likeliest or 0) + 3 * num_adapters * target.has_trace
        wide = {"logprobs": likeliest is not None, "treadle": target.has_trace}
        num_tokens = n * self._num_tokens(read, sampling[0].max_tokens, is_echo)
        self._check_values(wide, num_tokens, width, problems)
        if problems:
            raise refusal(problems)
        report = OutputOptions(likeliest or 0, is_echo and likeliest is not None, target.has_trace)
        echo = tuple(self._text(prompt) for prompt in prompts) if is_echo else ()
        each = [prompt for prompt in read for _ in range(n)]
        return ParsedRequest(
            model=body.model,
            work=Work(each, sampling, target.routing, report, target.adapters, caller.id),
            is_chat=isinstance(body, ChatBody),
            n=n,
            likeliest=likeliest,
            width=width,
            num_values=num_tokens * width if any(wide.values()) else 0,
            echo=echo,
            is_silent=body.max_tokens == 0,
            is_streamed=bool(body.stream),
            has_usage=bool(body.stream_options and body.stream_options.include_usage),
            has_trace=target.has_trace,
        )

    def _sampling(self, body: GenerationBody, problems: Problems, count: int) -> list[SamplingParams]:
        """Return the sampling of each sequence; with a seed, each has its own repeatable random stream."""
        temperature = 1.0 if body.temperature is None else body.temperature
        top_p = 1.0 if body.top_p is None else body.top_p
        most, stop = self._most_tokens(body, problems), tuple(body.stop or ())
        one = SamplingParams(
            temperature, top_p, max(0, body.top_k or 0), most, stop, stop_token_ids=tuple(body.stop_token_ids or ())
        )
        try:
            stop_ids(self.engine.tokenizer, one)
        except OptionError as error:
            problems += [Problem(each.text.partition(":")[0], each.text) for each in error.problems]
        seeds = [None if body.seed is None else (body.seed + index) % 2**63 for index in range(count)]
        return [replace(one, seed=seed) for seed in seeds]

    def _most_tokens(self, body: GenerationBody, problems: Problems) -> int:
        """Return how many tokens a choice may have; at least 1, even if the request only scores a prompt."""
        limit = self.params.max_tokens
        given = {"max_tokens": body.max_tokens}
        if isinstance(body, ChatBody):
            given["max_completion_tokens"] = body.max_completion_tokens
        wanted = {field: value for field, value in given.items() if value is not None}
        if len(set(wanted.values())) > 1:
            both = ", ".join(f"{field}: got {value}" for field, value in wanted.items())
            problems.append(Problem("max_tokens", f"{both}; allowed: one of them"))
        if isinstance(body, CompletionBody) and body.max_tokens == 0 and not body.echo:
            problems.append(Problem.of("max_tokens", 0, self._allowed(body, "max_tokens")))
        default = limit if isinstance(body, ChatBody) else min(limit, DEFAULT_COMPLETION_TOKENS)
        return max(1, min(wanted.values()) if wanted else default)

    def _allowed(self, body: GenerationBody, field: str) -> str:
        return with_limits(type(body).model_fields[field].description or "", self.params)

    def _read_prompts(self, prompts: Sequence[Any], problems: Problems, check: Check) -> list[TokenPrompt]:
        """Return the tokens of the prompts that are not too long; add the others to the problems."""
        context = self.engine.context
        room = context and context - 1  # for one token of the answer
        most = min((limit for limit in (self.params.max_prompt_tokens, room) if limit), default=None)
        allowed = f"at most {most} tokens"
        if most == room:  # some clients look for these words
            allowed += f" (this model's maximum context length is {context} tokens)"
        vocabulary = min(len(self.engine.tokenizer), self.engine.vocabulary)
        found: list[TokenPrompt] = []
        for index, prompt in enumerate(prompts):
            check()
            field = "messages" if isinstance(prompt, list) and not isinstance(prompt[0], int) else "prompt"
            place = f"prompt[{index}]" if len(prompts) > 1 else field
            letters = _num_letters(prompt)
            if most is not None and letters > most * MAX_TOKEN_CHARACTERS:  # to tokenise it would take long
                problems.append(_too_long(field, f"{place}: got {letters} characters; allowed: {allowed}"))
                continue
            try:
                fewest = self._fewest(prompt, most)
                if most is not None and fewest > most:
                    problems.append(_too_long(field, f"{place}: got at least {fewest} tokens; allowed: {allowed}"))
                    continue
                read = self._read_prompt(prompt)
                check_known(self.engine.tokenizer, read.ids, vocabulary)
            except TreadleError as error:
                problems.append(Problem(field, f"{place}: {error}"))
                continue
            ids = read.ids
            if most is not None and len(ids) > most:
                problems.append(_too_long(field, f"{place}: got {len(ids)} tokens; allowed: {allowed}"))
            else:
                found.append(read)
        return found

    def _fewest(self, prompt: Any, most: int | None) -> int:
        """Return a lower bound of a prompt's tokens; 0 if it costs as much as to tokenise the prompt."""
        if most is None:
            return 0
        if isinstance(prompt, str):
            return self._fewest_tokens(prompt)
        if isinstance(prompt[0], int):
            return 0
        messages = cast(list[Message], prompt)
        if sum(self._fewest_tokens(message.content) for message in messages) <= most:
            return 0
        # a template may leave parts of messages out
        return self._fewest_tokens(chat_text(self.engine.tokenizer, [message.model_dump() for message in messages]))

    def _read_prompt(self, prompt: Any) -> TokenPrompt:
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            return TokenPrompt(prompt)
        if isinstance(prompt, list):
            has_developers = "developer" in str(self.engine.tokenizer.chat_template)
            turns = [message.turn(has_developers=has_developers) for message in prompt]
            return read_prompt(self.engine.tokenizer, turns)
        return read_prompt(self.engine.tokenizer, prompt)

    def _text(self, prompt: Any) -> str:
        return str(self.engine.tokenizer.decode(prompt)) if isinstance(prompt, list) else prompt

    def _num_tokens(self, prompts: Sequence[TokenPrompt], most: int, has_prompts: bool) -> int:
        """Return how many tokens one answer to each prompt may have, including the prompts if it `has_prompts`."""
        context = self.engine.context
        lengths = [len(each.ids) for each in prompts]
        answers = [most if context is None else min(most, context - length) for length in lengths]
        return sum(answers) + (sum(lengths) if has_prompts else 0)

    def _check_values(self, wanted: Mapping[str, bool], num_tokens: int, width: int, problems: Problems) -> None:
        """Add the problem of an answer with too many values; all are in memory until the answer has been sent.

        Args:
            wanted: which fields of the request ask for values.
            num_tokens: tokens of all choices, with the prompts where they are echoed.
            width: values of each token.
            problems: what is wrong with the request.
        """
        fields = [field for field, is_given in wanted.items() if is_given]
        limit = self.params.max_values
        if fields and num_tokens * width > limit:
            given = f"{num_tokens} tokens of all choices with {width} values each"
            allowed = f"at most {limit} values (--max-values): fewer choices, tokens or values of each"
            problems.append(Problem(fields[0], f"{' and '.join(fields)}: got {given}; allowed: {allowed}"))

    def _check_recompute(
        self, prompts: Sequence[TokenPrompt], sampling: Sequence[SamplingParams], problems: Problems
    ) -> None:
        limit = self.params.max_recompute_tokens
        longest = max((len(each.ids) for each in prompts), default=0) + sampling[0].max_tokens
        if longest > limit:
            given = f"treadle.past: got 'recompute', to read {longest} tokens of prompt and answer again and again"
            problems.append(Problem("treadle", f"{given}; allowed: at most {limit} tokens, or 'keep'"))


def _too_long(field: str, message: str) -> Problem:
    """Return the problem of a prompt with too many tokens, with OpenAI's error code."""
    return Problem(field, message, code="context_length_exceeded")


def _num_letters(prompt: Any) -> int:
    """Return the characters of a text or of messages; 0 for token ids."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(each.content) for each in prompt if isinstance(each, Message))


def _likeliest(body: GenerationBody) -> int | None:
    """Return how many likeliest tokens come with each token; None = no log-probabilities."""
    if isinstance(body, CompletionBody):
        return body.logprobs
    assert isinstance(body, ChatBody)
    return (body.top_logprobs or 0) if body.logprobs else None


def _check_pairs(body: GenerationBody, problems: Problems) -> None:
    """Add the problems of fields that depend on each other."""
    n = body.n or 1
    if isinstance(body, CompletionBody) and body.best_of not in (None, n):
        problems.append(Problem.of("best_of", body.best_of, f"the same as n ({n})"))
    if isinstance(body, ChatBody) and body.top_logprobs and not body.logprobs:
        problems.append(Problem.of("top_logprobs", body.top_logprobs, 'only with "logprobs": true'))
    if isinstance(body, ChatBody):
        for tools, choice in (("tools", "tool_choice"), ("functions", "function_call")):
            if (given := getattr(body, tools)) and getattr(body, choice) != "none":
                allowed = f'only [] or null, or any with "{choice}": "none": it is not supported'
                problems.append(Problem.of(tools, given, allowed))
    if body.stream_options is not None and not body.stream:
        given = body.stream_options.model_dump(exclude_unset=True)
        problems.append(Problem.of("stream_options", given, 'only with "stream": true'))
