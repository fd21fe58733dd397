"""Log-likelihoods of given completions, in one forward pass with weights (B, T, N)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

from treadle.common.errors import OptionError, collect, first_of, problem_list
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.chat import ChatText, TokenPrompt, pieces_of, prompt_cursor, read_prompt
from treadle.engine.runners.rope import LengthRope
from treadle.engine.sequence import OutputOptions, SequenceError, TokenSequence
from treadle.engine.tokenization import Prompt, check_known, completion_ids
from treadle.routing.centroids import Floats
from treadle.routing.schedule import decisions_from
from treadle.routing.states import uses_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from treadle.engine.batch import Batch
    from treadle.lora.blend import Blend
    from treadle.routing.router import Router

CPU_BATCH_ROWS, GPU_BATCH_ROWS = 8, 32
"""Rows of one forward pass, on a CPU and on a GPU."""
STEP_ROWS = 32
"""Rows that are scored together step by step."""
TOKEN_WEIGHT_AXES = 3
"""Axes of weights that differ by token."""
MAX_LISTED_ROWS = 10
"""Rows that a message names at most."""


class Scorer(Protocol):
    """An engine, as far as scores need it."""

    @property
    def model(self) -> "PreTrainedModel":
        """The base model."""
        ...

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The base model's."""
        ...

    @property
    def blend(self) -> "Blend":
        """The adapters attached to the model."""
        ...

    @property
    def router(self) -> "Router":
        """Weighs the adapters."""
        ...

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows."""
        ...

    @property
    def context(self) -> int | None:
        """The most tokens of a text; None = the model does not say."""
        ...

    def new_batch(self, end_ids: frozenset[int] | None = None) -> "Batch":
        """Return an empty batch whose rows end at `end_ids`."""
        ...


Pair = tuple[list[int], list[int]]
"""Ids of a prompt and of the completion after it."""
Chats = Sequence[ChatText | None]
"""The text of each prompt that is a chat; None for others."""
Reader = Callable[[torch.Tensor, Sequence[int]], Floats]
"""Takes logits (T, V) and the tokens (T) that follow, and returns (T, ...)."""


def score(engine: Scorer, prompts: Sequence[Prompt], completions: Sequence[str], params: RoutingParams) -> list[Floats]:
    """Return the log-probabilities (nats) of each completion's tokens, one array a row; see `Engine.score`."""
    if len(prompts) != len(completions):
        raise OptionError(f"{len(prompts)} prompts but {len(completions)} completions.")
    read = [read_prompt(engine.tokenizer, prompt) for prompt in prompts]
    pairs = [
        (list(prompt.ids), completion_ids(engine.tokenizer, completion))
        for prompt, completion in zip(read, completions, strict=True)
    ]
    if empty := [index for index, (_, answer) in enumerate(pairs) if not answer]:
        raise OptionError(f"completions without a token: {', '.join(map(str, empty))}.")
    return score_ids(engine, pairs, params, [prompt.chat for prompt in read])


@torch.inference_mode()
def score_ids(engine: Scorer, pairs: Sequence[Pair], params: RoutingParams, chats: Chats | None = None) -> list[Floats]:
    """Return the log-probabilities (nats) of the second ids of each pair after the first, one array a pair.

    `chats` are what the prompts say, one a pair, None where a prompt is no chat.
    """
    chats = chats or [None] * len(pairs)
    check_context(engine, pairs)
    if uses_states(engine.router.states, params):
        return _checked([each[:, 0] for each in _score_by_steps(engine, pairs, params, chats)])
    by_length = sorted(range(len(pairs)), key=lambda index: (sum(map(len, pairs[index])), pairs[index]))
    results: dict[int, Floats] = {}
    size = CPU_BATCH_ROWS if engine.model.device.type == "cpu" else GPU_BATCH_ROWS
    for start in range(0, len(pairs), size):
        chosen = by_length[start : start + size]
        some, own = [pairs[index] for index in chosen], [chats[index] for index in chosen]
        results |= zip(chosen, _score(engine, some, params, own, _chosen), strict=True)
    return _checked([results[index] for index in range(len(pairs))])


def check_context(engine: Scorer, pairs: Sequence[Pair]) -> None:
    """Refuse texts that are longer than the model reads, though it would give numbers, and tokens unknown to it."""
    lengths = [len(prompt) + len(answer) - 1 for prompt, answer in pairs]  # nothing is read after the last token
    unknown: list[str] = []
    known = partial(check_known, engine.tokenizer, vocabulary=engine.vocabulary)
    collect(unknown, [partial(known, prompt + answer) for prompt, answer in pairs])
    if unknown:
        raise OptionError(problem_list("tokens:", first_of(unknown, MAX_LISTED_ROWS)))
    context = engine.context or max(lengths, default=0)
    problems = [f"row {index} has {length + 1} tokens" for index, length in enumerate(lengths) if length > context]
    if problems:
        title = f"the model reads at most {context} tokens of prompt and completion, the last token not counted:"
        raise OptionError(problem_list(title, first_of(problems, MAX_LISTED_ROWS)))


@torch.inference_mode()
def score_greedy(
    engine: Scorer, pairs: Sequence[Pair], params: RoutingParams, chats: Chats | None = None
) -> list[tuple[Floats, npt.NDArray[np.bool_]]]:
    """Return the log-probabilities (T,) of `score_ids`, and for each token (T,) whether greedy decoding takes it.

    The pairs are one batch, however many they are; pairs that differ in their last token only share a row of it.
    """
    chats = chats or [None] * len(pairs)
    if uses_states(engine.router.states, params):
        scored = _checked(_score_by_steps(engine, pairs, params, chats))
    else:
        scored = _checked(_score(engine, pairs, params, chats, _chosen_and_greedy))
    return [(both[:, 0], both[:, 1] == 1) for both in scored]


def trace_weights(
    engine: Scorer, ids: Sequence[int], prompt_tokens: int, params: RoutingParams, chat: ChatText | None = None
) -> Floats:
    """Return the weights (T, N) under which generation reads each of the tokens `ids`.

    `chat` is what the prompt says where it is a chat.
    """
    own = pieces_of(engine.tokenizer, ids)
    text = prompt_cursor(engine.router, params, own[:prompt_tokens], chat)
    text.add(own[prompt_tokens:])
    return engine.router.trace(text.pieces, prompt_tokens, params, ends=text.ends)


def _score(engine: Scorer, pairs: Sequence[Pair], params: RoutingParams, chats: Chats, read: Reader) -> list[Floats]:
    traces = [
        trace_weights(engine, prompt + answer[:-1], len(prompt), params, chat)
        for (prompt, answer), chat in zip(pairs, chats, strict=True)
    ]
    # past="keep" is one pass over all rows, which is what cached decoding computes
    run = _score_again if params.past == "recompute" and params.every is not None else _score_under
    return run(engine, pairs, traces, params, read)


@torch.inference_mode()
def score_under(engine: Scorer, pairs: Sequence[Pair], traces: Sequence[Floats], params: RoutingParams) -> list[Floats]:
    """Return the log-probabilities of `score_ids` under given weights, in one forward pass padded on the right.

    Args:
        engine: the model and its adapters.
        pairs: ids of prompts and completions.
        traces: (T, N) for each pair, T = its tokens but the last, which nothing follows.
        params: only the combine is read.
    """
    return _checked(_score_under(engine, pairs, traces, params, _chosen))


def _checked(scores: list[Floats]) -> list[Floats]:
    """Return the scores (T, ...) of rows; a SequenceError names those where the model overflows."""
    if bad := [str(index) for index, each in enumerate(scores) if np.isnan(each).any()]:
        named = ", ".join(first_of(bad, MAX_LISTED_ROWS))
        raise SequenceError(f"the model overflows under these weights: no log-probabilities of row {named}.")
    return scores


def _score_under(
    engine: Scorer, pairs: Sequence[Pair], traces: Sequence[Floats], params: RoutingParams, read: Reader
) -> list[Floats]:
    # the one-token options of a choice differ in what nobody reads: their rows are one row
    keys = [((*prompt, *answer[:-1]), trace.tobytes()) for (prompt, answer), trace in zip(pairs, traces, strict=True)]
    rows = {key: (list(key[0]), trace) for key, trace in zip(keys, traces, strict=True)}
    length, names = max(len(row) for row, _ in rows.values()), engine.blend.names
    ids = torch.tensor([row + [0] * (length - len(row)) for row, _ in rows.values()])  # (rows, length)
    weights = np.zeros((len(rows), length, len(names)), np.float32)
    columns = [names.index(name) for name in engine.router.names]
    for index, (row, trace) in enumerate(rows.values()):
        weights[index, : len(row), columns] = trace.T
    first = min(len(prompt) for prompt, _ in pairs) - 1  # the earliest position whose logits matter
    logits = dict(zip(rows, _logits(engine, ids, weights, params, first), strict=True))
    return [
        read(logits[key][len(prompt) - 1 - first : len(prompt) - 1 - first + len(answer)], answer)
        for key, (prompt, answer) in zip(keys, pairs, strict=True)
    ]


def _score_by_steps(engine: Scorer, pairs: Sequence[Pair], params: RoutingParams, chats: Chats) -> list[Floats]:
    """Generate the given tokens step by step: (T, 2) of each pair, as `_chosen_and_greedy` returns.

    Each step's states decide the weights of the next, so that no single pass can compute them all.
    """
    rows: list[TokenSequence] = []
    for (prompt, answer), chat in zip(pairs, chats, strict=True):
        asked, sampling = TokenPrompt(prompt, chat), SamplingParams(max_tokens=len(answer))
        row = TokenSequence(asked, engine.router, params, sampling, engine.tokenizer, OutputOptions(likeliest=1))
        row.forced = answer
        rows.append(row)
    by_length = sorted(rows, key=lambda row: (len(row.forced), row.prompt_tokens))
    for start in range(0, len(rows), STEP_ROWS):
        batch = engine.new_batch(frozenset())
        batch.join(by_length[start : start + STEP_ROWS])
        while batch.rows:
            batch.step()
    if failure := next((row.failure for row in rows if row.failure), None):
        raise failure
    return [
        np.array([(event.logprob, event.likeliest[0][0] == event.token_id) for event in row.events], np.float32)
        for row in rows
    ]


def _score_again(
    engine: Scorer, pairs: Sequence[Pair], traces: Sequence[Floats], params: RoutingParams, read: Reader
) -> list[Floats]:
    """Run a pass for each decision, over all the text so far under the newest weights: past="recompute"."""
    results: list[Floats] = []
    columns = [engine.blend.names.index(name) for name in engine.router.names]
    for (prompt, answer), trace in zip(pairs, traces, strict=True):
        ids = prompt + answer[:-1]
        scores: list[Floats] = []
        before = len(prompt) - 1  # positions that no token of the answer is read from
        for start, _, after in decisions_from(before, len(prompt), params):
            if start >= len(ids):
                break
            end = min(after, len(ids))
            weights = np.zeros(len(engine.blend.names), np.float32)
            weights[columns] = trace[start]
            logits = _logits(engine, torch.tensor([ids[:end]]), weights, params, start)
            scores.append(read(logits[0], answer[start - before : end - before]))
        results.append(np.concatenate(scores))
    return results


def _logits(
    engine: Scorer, ids: torch.Tensor, weights: Floats, params: RoutingParams, first: int
) -> torch.Tensor:  # (B, T) -> (B, T - first, V)
    rope, length = LengthRope.of(engine.model), ids.shape[1]
    if rope and first < rope.limit < length:  # the text grew in between, and was read again with other factors
        short = weights[:, : rope.limit] if weights.ndim == TOKEN_WEIGHT_AXES else weights
        before = _logits(engine, ids[:, : rope.limit], short, params, first)
        return torch.cat([before, _logits(engine, ids, weights, params, rope.limit)], 1)
    device = engine.model.device
    positions = torch.arange(length, device=device)[None]  # as generation gives them: some models count otherwise
    with engine.blend.using(weights if weights.any() else None, params.combine, [engine.router.names]):
        output = engine.model(
            input_ids=ids.to(device), position_ids=positions, use_cache=False, logits_to_keep=length - first
        )
    return output.logits


def _chosen(logits: torch.Tensor, tokens: Sequence[int]) -> Floats:
    """Return the log-probabilities (T,) of tokens under logits (T, V)."""
    logprobs = torch.log_softmax(logits.float(), -1)
    return logprobs[torch.arange(len(tokens)), torch.tensor(tokens)].cpu().numpy()


def _chosen_and_greedy(logits: torch.Tensor, tokens: Sequence[int]) -> Floats:
    """Return (T, 2): the log-probabilities of tokens under logits (T, V), and 1 where the token is the likeliest."""
    greedy = logits.float().argmax(-1).cpu().numpy() == np.array(tokens)
    return np.stack([_chosen(logits, tokens), greedy.astype(np.float32)], -1)
