"""Reads chats by the contents of their messages. It is routed on these, and on no word of its chat template.

A template adds roles, special tokens, a default system text or a date, and may trim, repeat or drop contents. So the
text that is routed is made of the messages themselves: their contents, joined by blank lines, as samples of chats are.
Only `prefill="causal"` asks where in the prompt each content stands.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

from treadle.common.errors import OptionError, one_or_list
from treadle.common.params import RoutingParams
from treadle.engine.tokenization import Detokenizer, Prompt, prompt_ids, token_ids
from treadle.routing.router import Router
from treadle.routing.schedule import BLANK_LINE, DecisionCursor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def contents_of(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the text of each message; parts of type text are joined, a message without content says nothing."""
    problems: list[str] = []
    contents: list[str] = []
    for index, message in enumerate(messages):
        content = message.get("content")
        parts = cast(list[Any], content) if isinstance(content, list | tuple) else [content]
        texts = [_text_of(part) for part in parts]
        if any(text is None for text in texts):
            problems.append(f"message {index}: content is {content!r:.60}; allowed: a text, or a list of parts")
        contents.append("".join(filter(None, texts)))
    if problems:
        raise OptionError(one_or_list("messages:", problems))
    return contents


def _text_of(part: Any) -> str | None:
    """Return the text of a content's part, "" for an image's; None = it is no part."""
    if part is None or isinstance(part, str):
        return part or ""
    if not isinstance(part, Mapping):
        return None
    text = cast(Mapping[str, Any], part).get("text", "")
    return text if isinstance(text, str) else None


def joined(contents: Sequence[str]) -> str:
    """Join the contents of a chat that are not blank, with blank lines between."""
    return BLANK_LINE.join(content for content in contents if content.strip())


@dataclass(frozen=True)
class ChatText:
    """The text of a chat, as routing reads it.

    Attributes:
        contents: of the messages, in their order.
        pieces: (K,) `joined` contents as the tokenizer cuts such a prompt: what windows count.
    """

    contents: tuple[str, ...]
    pieces: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", contents: Sequence[str]) -> "ChatText":
        """Cut contents into pieces."""
        text = joined(contents)
        return cls(tuple(contents), tuple(pieces_of(tokenizer, prompt_ids(tokenizer, text))) if text else ())

    def ends(self, own: Sequence[str], params: RoutingParams) -> list[int]:
        """Return how many of the pieces have been read with each token of the prompt, (T,).

        A content that the template has altered so that it is not found counts with the next one, the last with the
        prompt's last token: text may count later than it is read, never earlier.

        Args:
            own: (T,) the text that each token of the prompt adds.
            params: where the prompt is decided as a whole, only its last token is ever asked for.
        """
        if params.prefill != "causal":
            return [len(self.pieces)] * len(own)
        read = list(accumulate(map(len, own)))  # (T,) characters
        places = self._places("".join(own))
        return [*(bisect_right(places, length) for length in read[:-1]), len(self.pieces)]

    def _places(self, prompt: str) -> list[int]:
        """Return how many characters of the prompt must have been read for each piece to count, (K,)."""
        last = len(prompt) + 1  # with the last token alone
        said = [content for content in self.contents if content.strip()]
        if "".join(self.pieces) != BLANK_LINE.join(said):  # a normalizer, or special tokens in a content
            return [last] * len(self.pieces)
        shifts: list[tuple[int, bool]] = []  # of each content, the last first: where it begins, and whether it is found
        limit = len(prompt)
        for content in reversed(said):  # from the end: never before its own place, should the template say it too
            bare = content.strip()
            at = prompt.rfind(bare, 0, limit)
            if at >= 0:
                limit = at
                shifts.append((at - content.index(bare), True))
            else:  # altered, or moved behind what follows it
                shifts.append((last if bare in prompt or not shifts else limit, False))
        places: list[int] = []
        end = 0  # of the piece, in the joined text
        starts = list(accumulate((len(content) + len(BLANK_LINE) for content in said), initial=0))
        for piece in self.pieces:
            end += len(piece)
            which = bisect_right(starts, max(end - 1, 0)) - 1
            shift, is_found = shifts[-1 - which]
            inside = min(end - starts[which], len(said[which].rstrip())) if is_found else 1
            places.append(max(shift + inside, places[-1] if places else 0))
        return places


def prompt_cursor(
    router: Router, params: RoutingParams, own: Sequence[str], chat: ChatText | None = None
) -> DecisionCursor:
    """Return the cursor of a prompt whose tokens add the texts `own` (T,); of a chat its contents count alone."""
    if chat is None:
        return DecisionCursor(router, params, own, len(own))
    return DecisionCursor(router, params, chat.pieces, len(own), chat.ends(own, params))


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt as the model reads it, and what it says where it is a chat.

    Attributes:
        ids: (T,) tokens.
        chat: what is routed on; None = the text of the tokens.
    """

    ids: Sequence[int]
    chat: ChatText | None = None


def read_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> TokenPrompt:
    """Return the tokens of a text or of chat messages, and of messages what they say."""
    if isinstance(prompt, str):
        return TokenPrompt(prompt_ids(tokenizer, prompt))
    ids = prompt_ids(tokenizer, prompt)  # first: it refuses what is no prompt at all
    return TokenPrompt(ids, ChatText.of(tokenizer, contents_of(prompt)))


def token_prompt(prompt: Sequence[int] | TokenPrompt) -> TokenPrompt:
    """Return a prompt of tokens that are known already; an OptionError where there are none."""
    return prompt if isinstance(prompt, TokenPrompt) else TokenPrompt(token_ids(prompt))


def pieces_of(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """Return the text that each of some tokens (T,) adds."""
    text = Detokenizer(tokenizer)
    return [text.push(token_id) for token_id in ids]


def only(own: Sequence[str], contents: Sequence[str]) -> list[str]:
    """Return the text that each token of a chat adds, (T,), without the template's words.

    Args:
        own: (T,) the text that each token adds.
        contents: of the chat's messages; where one is not found, those before it are not looked for.
    """
    text, spans = "".join(own), list[tuple[int, int]]()
    limit = len(text)
    for content in (content.strip() for content in reversed(contents)):
        limit = text.rfind(content, 0, limit) if content else limit
        if limit < 0:
            break
        spans.append((limit, limit + len(content)))
    said: list[str] = []
    end = 0
    for piece in own:
        start, end = end, end + len(piece)
        inside = next((span for span in spans if start < span[1] and span[0] < end), None)
        begins = inside is not None and start <= inside[0]
        said.append((BLANK_LINE if begins else "") + piece if inside else "")
    return said
