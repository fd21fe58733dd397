"""Between text and token ids: one way to tokenise prompts, text that grows token by token, stop strings."""

from collections.abc import Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, cast

from tokenizers.decoders import DecodeStream

from treadle.common.documents import check_text
from treadle.common.errors import ModelError, OptionError, first_of, one_or_list, shown
from treadle.common.params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or chat messages {"role": ..., "content": a text or parts {"type": "text", "text": ...}}."""
MAX_LISTED_IDS = 5
"""Token ids that a message names at most."""


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt: a text as the tokenizer begins texts, messages by its chat template."""
    if isinstance(prompt, str):
        check_text(prompt)
        ids = tokenizer(prompt).input_ids
    elif not isinstance(prompt, Sequence) or not all(isinstance(each, Mapping) for each in prompt):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"got {shown(prompt)}; allowed: a text, or a list of chat messages.")
    else:
        ids = tokenizer(chat_text(tokenizer, prompt), add_special_tokens=False).input_ids
    return token_ids(ids)


def token_ids(prompt: Sequence[int]) -> list[int]:
    """Return the token ids of a prompt that are known already; an OptionError where there are none."""
    if isinstance(prompt, str) or not hasattr(prompt, "__len__"):
        raise OptionError(f"got {shown(prompt)}; allowed: a list of token ids.")
    if not len(prompt):
        raise OptionError("the prompt is empty: there is no token to continue from.")
    return [_whole_number(each) for each in prompt]


def _whole_number(value: Any) -> int:
    """Return a token id as Python's int; numbers of numpy and torch are taken too, but no truth values."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except TypeError as error:
        raise OptionError(f"got token id {shown(value)}; allowed: whole numbers.") from error


def check_known(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], vocabulary: int) -> None:
    """Raise an OptionError that lists the ids beyond the model's vocabulary, such as added tokens."""
    unknown = [each for each in dict.fromkeys(ids) if not 0 <= each < vocabulary]
    if unknown:
        named = first_of(unknown, MAX_LISTED_IDS, lambda each: f"{shown(each)}{_name(tokenizer, each)}")
        raise OptionError(f"got token id {', '.join(named)}; allowed: 0 to {vocabulary - 1}")


def _name(tokenizer: "PreTrainedTokenizerBase", token_id: int) -> str:
    """Return a token's own text in brackets, where the tokenizer knows the id though the model does not."""
    return f" ({tokenizer.convert_ids_to_tokens(token_id)!r})" if 0 <= token_id < len(tokenizer) else ""


def is_one_prompt(prompt: Any) -> bool:
    """Return whether this is one prompt, a text or chat messages, rather than a list of prompts."""
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, Sequence) or not prompt:
        raise OptionError("give a text, a list of texts, or chat messages; got " + repr(prompt)[:60])
    return isinstance(cast(Sequence[Any], prompt)[0], Mapping)


def chat_text(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, Any]]) -> str:
    """Return chat messages as the text after which the assistant's answer begins, by the model's chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError("the tokenizer has no chat template: give the prompt as one text.")
    from jinja2 import TemplateError

    # a template is a program that came with the model: what it does with these messages may fail like any program
    errors = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
    given = [dict(message) for message in messages]
    try:
        text = str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True))
    except errors as error:  # such as roles that do not alternate
        raise OptionError(f"the chat template refuses these messages: {error}") from error
    check_text(text)
    return text


def completion_ids(tokenizer: "PreTrainedTokenizerBase", completion: str) -> list[int]:
    """Return the token ids of a text that continues a prompt."""
    check_text(completion)
    return list(tokenizer(completion, add_special_tokens=False).input_ids)


class Detokenizer:
    """Turns ids into the text that each adds; characters that span tokens appear with the last of theirs."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise ModelError(f"{type(tokenizer).__name__} is not a fast tokenizer; treadle needs tokenizer.json.")
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []  # ids whose text has not appeared yet

    def push(self, token_id: int) -> str:
        """Return the text that this token adds; "" inside a character and for special tokens."""
        self._held.append(token_id)
        try:
            piece = self._stream.step(self._backend, token_id)
        except Exception as error:
            # Of tokenizers with byte fallback (Gemma, Mistral), an unfinished character changes how the bytes before it
            # decode; tokenizers raises a bare Exception then: https://github.com/vllm-project/vllm/issues/17448
            if "Invalid prefix" not in str(error):
                raise
            self._stream = DecodeStream(skip_special_tokens=True)
            piece = [self._stream.step(self._backend, held) for held in self._held][-1]
        if piece:
            self._held = []
        return piece or ""

    def flush(self) -> str:
        """Return the text of an unfinished character at the end."""
        text = self._backend.decode(self._held, skip_special_tokens=True) if self._held else ""
        self._held = []
        return text


def stop_ids(tokenizer: "PreTrainedTokenizerBase", sampling: SamplingParams) -> frozenset[int]:
    """Return the tokens that end a text by its sampling options: `stop_token_ids`, and special tokens in `stop`.

    A special token adds no text, so a stop string that names one is looked for among the tokens.

    Raises:
        OptionError: a token id that the tokenizer does not have, or a stop string that mixes special tokens with text.
    """
    problems = [
        f"stop_token_ids: got {token_id}; allowed: 0 to {len(tokenizer) - 1}"
        for token_id in sampling.stop_token_ids
        if token_id >= len(tokenizer)
    ]
    added = tokenizer.added_tokens_decoder.items() if sampling.stop else ()
    special = {token.content: token_id for token_id, token in added if token.special}
    mixed = [
        (stop, token) for stop in sampling.stop if stop not in special for token in special if token and token in stop
    ]
    problems += [
        f"stop: {stop!r} holds the special token {token!r}, which adds no text; give the token alone"
        for stop, token in mixed
    ]
    if problems:
        raise OptionError(one_or_list("sampling options:", problems))
    return frozenset(sampling.stop_token_ids) | {special[stop] for stop in sampling.stop if stop in special}


class StopStrings:
    """Passes text on until a stop string appears, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Return the text that is safe to show; the stop string and all after it never are."""
        if self.found:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.found, self._held = True, ""
            _, start = min(found)  # the first to end, however the text is cut into pieces
            return text[:start]
        keep = max(self._overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the text that was held back until the end."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Return the length of the longest end of `text` that begins `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
