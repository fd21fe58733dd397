"""Finds the messages of a chat in its tokens, where nothing but tokens is known: inside transformers, inside lm-eval.

What a template puts around contents is learned from three chats of marked words. What is found is rendered again and
must give the same text; tokens that do not, such as a chat that was cut at its beginning, are an ordinary text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.common.errors import ModelError, OptionError
from treadle.engine.chat import ChatText
from treadle.engine.tokenization import chat_text, completion_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
SYSTEM, FIRST, ANSWER, LAST = "treadlesystem", "treadlefirst", "treadleanswer", "treadlelast"
"""Words that no template alters."""


@dataclass(frozen=True)
class Template:
    """The text that a chat template puts around the contents of messages.

    Attributes:
        user: before the first message of a user; a default system text is in it.
        to_answer: between a user's message and the answer after it.
        to_user: between an answer and the next message.
        opening: behind the last message, where the answer is to begin.
        system: before a system message, and between it and the user's; None = the template takes none.
    """

    user: str
    to_answer: str
    to_user: str
    opening: str
    system: tuple[str, str] | None

    def messages(self, text: str) -> Messages:
        """Return the messages of a rendered chat, user and assistant in turns; none if it is no chat."""
        starts = [self.user, *(self.system[:1] if self.system else ())]
        begins = max((start for start in starts if text.startswith(start)), key=len, default=None)
        if begins is None:
            return []
        rest, found = text[len(begins) :], Messages()
        if self.system and begins != self.user:
            content, _, rest = rest.partition(self.system[1])
            found.append({"role": "system", "content": content})
        role, gap = "user", self.to_answer
        while gap in rest:
            content, _, rest = rest.partition(gap)
            found.append({"role": role, "content": content})
            role, gap = ("assistant", self.to_user) if role == "user" else ("user", self.to_answer)
        if role == "user" and self.opening in rest:
            content, _, rest = rest.rpartition(self.opening)
            found.append({"role": role, "content": content})
            role, gap = "assistant", self.to_user
        last = {"role": role, "content": _without_beginning(rest, gap)}
        return [*found, last] if last["content"] or role == "user" else found  # else an answer that has yet to begin


class RenderedChats:
    """Tells what the tokens of a chat say, by the tokenizer's own chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer: Any = tokenizer
        self._template = self._learn()

    def read(self, ids: Sequence[int]) -> ChatText | None:
        """Return the contents in tokens (T,) of a rendered chat, with or without the start of its answer."""
        contents = self.contents(ids)
        return None if contents is None else ChatText.of(self._tokenizer, contents)

    def contents(self, ids: Sequence[int]) -> list[str] | None:
        """Return the contents of the messages that tokens (T,) are made of; None = they are no chat."""
        if self._template is None:
            return None
        text = self._decode(ids)
        messages = self._template.messages(text)
        asked = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
        again = self._render(asked) if asked else None
        if again is None or not (text.startswith(again) or again.startswith(text)):
            return None
        return [message["content"] for message in messages]

    def _learn(self) -> Template | None:
        """Return the template's text around contents; None = there is none, or it repeats or alters them."""
        asked = [{"role": "user", "content": FIRST}]
        one = self._around(asked)
        told = self._around([{"role": "system", "content": SYSTEM}, *asked])
        answer, last = {"role": "assistant", "content": ANSWER}, {"role": "user", "content": LAST}
        turns = self._around([*asked, answer, last])
        if one is None or turns is None:
            return None
        return Template(one[0], turns[1], turns[2], one[1], None if told is None else (told[0], told[1]))

    def _around(self, messages: Messages) -> list[str] | None:
        """Return the text rendered around contents; None = the template refuses or changes them."""
        rest, around = self._render(messages), list[str]()
        for message in messages:
            if rest is None or rest.count(message["content"]) != 1:
                return None
            before, _, rest = rest.partition(message["content"])
            around.append(before)
        return None if rest is None else [*around, rest]

    def _render(self, messages: Messages) -> str | None:
        """Return messages as their tokens read; None = the template refuses them."""
        try:
            text = chat_text(self._tokenizer, messages)
        except (ModelError, OptionError):  # no template, or roles that it does not take
            return None
        return self._decode(completion_ids(self._tokenizer, text))

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False))


def _without_beginning(text: str, gap: str) -> str:
    """Return a text without what, at its end, begins a gap: the end of a message behind which nothing follows."""
    longest = next((size for size in range(min(len(gap), len(text)), 0, -1) if text.endswith(gap[:size])), 0)
    return text[: len(text) - longest]
