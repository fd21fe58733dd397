"""Writes tokens as documents of OpenAI's API: whole answers, and the chunks of a stream."""

import time
import uuid
from codecs import getincrementaldecoder
from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any, cast

from pydantic_core import to_json

from treadle.engine.sequence import Likeliest, TokenEvent, TokenSequence
from treadle.routing.centroids import Floats
from treadle.serving.openai.bodies import Json
from treadle.serving.openai.requests import ParsedRequest
from treadle.serving.openai.tokens import TokenTexts

DONE = b"data: [DONE]\n\n"
"""The event that ends a stream."""
LIST_DEPTH, PIECE_ENTRIES = 4, 256
"""The depth of an answer's long lists, and the entries of each piece in which they are written."""


class Answer:
    """Writes the answer to one request: its id, choices and usage."""

    def __init__(self, parsed: ParsedRequest, tokens: TokenTexts) -> None:
        self.parsed = parsed
        self.id = ("chatcmpl-" if parsed.is_chat else "cmpl-") + uuid.uuid4().hex
        self._tokens = tokens
        self._created = int(time.time())  # seconds since 1970
        kind = "chat.completion" if parsed.is_chat else "text_completion"
        self._kinds = kind, kind + ".chunk" * parsed.is_chat  # of a whole answer, and of a chunk
        self._offsets = [len(self._echo(index)) for index in range(len(parsed.work.prompts))]  # characters so far

    def whole(self, rows: Sequence[TokenSequence]) -> Json:
        """Return the answer of finished rows."""
        choices = [self._choice(index, row) for index, row in enumerate(rows)]
        return {**self._head(self._kinds[0]), "choices": choices, "usage": self.usage(rows)}

    def opening(self) -> list[Json]:
        """Return the chunks before the first token: the role of each choice of a chat."""
        if not self.parsed.is_chat:
            return []
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(index, delta, None) for index in range(len(self.parsed.work.prompts))]

    def chunk(self, index: int, row: TokenSequence, event: TokenEvent) -> Json | None:
        """Return the chunk of one token, None if there is nothing to show; the first one has the echoed prompt."""
        parsed = self.parsed
        echo = self._echo(index) if event.index == 0 else ""
        has_more = parsed.likeliest is not None or parsed.has_trace
        if not echo and not event.text and not event.finish_reason and not has_more:
            return None
        text = echo + ("" if parsed.is_silent else event.text)
        if parsed.is_chat:
            delta: Json = {"delta": {"content": text}, "logprobs": self._chat_logprobs([event])}
        else:
            delta = {"text": text, "logprobs": self._text_logprobs(index, row, [event], has_prompt=bool(echo))}
        if parsed.has_trace:
            delta["treadle"] = self._trace(row, [event], has_prompt=bool(echo))
        return self._chunk(index, delta, event.finish_reason)

    def usage(self, rows: Sequence[TokenSequence]) -> Json:
        """Return how many tokens were read and generated; a prompt counts once for all its choices."""
        prompts = rows[:: self.parsed.n]
        read = sum(row.prompt_tokens for row in prompts)
        generated = 0 if self.parsed.is_silent else sum(len(row.events) for row in rows)
        cached = {"cached_tokens": sum(row.reused for row in prompts)}
        return {
            "prompt_tokens": read,
            "completion_tokens": generated,
            "total_tokens": read + generated,
            "prompt_tokens_details": cached,
        }

    def closing(self, rows: Sequence[TokenSequence]) -> Json:
        """Return the last chunk of a stream, which has no choices."""
        return {**self._head(self._kinds[1]), "choices": [], "usage": self.usage(rows)}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self._created, "model": self.parsed.model}

    def _chunk(self, index: int, delta: Json, reason: str | None) -> Json:
        choice = {"index": index, "logprobs": None, **delta, "finish_reason": reason}
        document = {**self._head(self._kinds[1]), "choices": [choice]}
        return {**document, "usage": None} if self.parsed.has_usage else document

    def _choice(self, index: int, row: TokenSequence) -> Json:
        parsed = self.parsed
        text = "" if parsed.is_silent else "".join(event.text for event in row.events)
        choice: Json = {"index": index, "finish_reason": row.events[-1].finish_reason}
        if parsed.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            choice["logprobs"] = self._chat_logprobs(row.events)
        else:
            choice["text"] = self._echo(index) + text
            choice["logprobs"] = self._text_logprobs(index, row, row.events, has_prompt=bool(parsed.echo))
        if parsed.has_trace:
            choice["treadle"] = self._trace(row, row.events, has_prompt=bool(parsed.echo))
        return choice

    def _echo(self, index: int) -> str:
        return self.parsed.echo[index // self.parsed.n] if self.parsed.echo else ""

    def _trace(self, row: TokenSequence, events: Sequence[TokenEvent], *, has_prompt: bool) -> Json:
        """Return the text of each token, the weights (T, N) of its pass, and the cosines and scores behind them.

        The prompt's tokens come first where it is echoed, each with the weights of the pass that read it.
        """
        events = [] if self.parsed.is_silent else events
        prompt = row.prompt_pieces if has_prompt else []
        read_under = row.read_under if len(row.read_under) > 1 else row.events[0].weights[None]  # (T or 1, N)
        after = row.read_after
        made_from = [event.comparison for event in events]
        return {
            "adapters": list(row.router.names),
            "prompt_tokens": len(prompt),
            "tokens": [*prompt, *(event.text for event in events)],
            "weights": [*_repeated(read_under, len(prompt)), *(_rounded(event.weights) for event in events)],
            "cosines": [
                *_repeated(after and after.cosines, len(prompt)),
                *(each and _rounded(each.cosines) for each in made_from),
            ],
            "scores": [
                *_repeated(after and after.scores, len(prompt)),
                *(each and _rounded(each.scores) for each in made_from),
            ],
        }

    def _chat_logprobs(self, events: Sequence[TokenEvent]) -> Json | None:
        if self.parsed.likeliest is None:
            return None

        def entry(token_id: int, logprob: float) -> Json:
            raw = list(self._tokens.bytes_of(token_id))
            return {"token": self._tokens.text_of(token_id), "logprob": logprob, "bytes": raw}

        content: list[Json] = [
            {
                **entry(event.token_id, event.logprob),
                "top_logprobs": [entry(token_id, logprob) for token_id, logprob in event.likeliest],
            }
            for event in events
        ]
        return {"content": content, "refusal": None}

    def _text_logprobs(
        self, index: int, row: TokenSequence, events: Sequence[TokenEvent], *, has_prompt: bool
    ) -> Json | None:
        """Return four lists with one entry a token; the first token of a prompt has no log-probability."""
        if self.parsed.likeliest is None:
            return None
        events = [] if self.parsed.is_silent else events
        ids = [event.token_id for event in events]
        logprobs: list[float | None] = [event.logprob for event in events]
        tops: list[Likeliest | None] = [event.likeliest for event in events]
        offsets: list[int] = []
        for event in events:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(event.text)
        if has_prompt:
            prompt = row.ids[: row.prompt_tokens]
            ids = prompt + ids
            logprobs = [None, *(score.logprob for score in row.prompt_scores), *logprobs]
            tops = [None, *(score.likeliest for score in row.prompt_scores), *tops]
            offsets = self._places(prompt) + offsets
        return {
            "tokens": [self._tokens.text_of(token_id) for token_id in ids],
            "token_logprobs": logprobs,
            "top_logprobs": [self._top(top) for top in tops] if self.parsed.likeliest else None,
            "text_offset": offsets,
        }

    def _top(self, likeliest: Likeliest | None) -> dict[str, float] | None:
        return None if likeliest is None else {self._tokens.text_of(token_id): lp for token_id, lp in likeliest}

    def _places(self, ids: Sequence[int]) -> list[int]:
        """Return where each token begins in the text, in characters; later parts of a character begin after it."""
        places: list[int] = []
        text = getincrementaldecoder("utf-8")(errors="ignore")
        place = 0
        for token_id in ids:
            places.append(place)
            place += len(text.decode(self._tokens.bytes_of(token_id)))
        return places


def _rounded(values: Floats) -> list[float | None]:
    """Return numbers with six digits; NaN, of an adapter without samples, is None."""
    return [round(value, 6) if isfinite(value) else None for value in map(float, values)]


def _repeated(rows: Floats | None, length: int) -> list[list[float | None] | None]:
    """Return the rows of (length, N), or `length` times the row of (1, N); None gives `length` times None."""
    if rows is None or not length:
        return [None] * length
    return [_rounded(row) for row in rows] if len(rows) > 1 else [_rounded(rows[0])] * length


def json_pieces(value: Any, depth: int = 0) -> Iterator[bytes]:
    """Yield a document in pieces, so that other threads run while a long one is written."""
    if depth == LIST_DEPTH and isinstance(value, list):
        entries = cast(list[Any], value)
        for start in range(0, len(entries) or 1, PIECE_ENTRIES):
            yield (b"," if start else b"[") + to_json(entries[start : start + PIECE_ENTRIES])[1:-1]
        yield b"]"
    elif depth < LIST_DEPTH and isinstance(value, list):
        for index, each in enumerate(cast(list[Any], value)):
            yield b"," if index else b"["
            yield from json_pieces(each, depth + 1)
        yield b"]" if value else b"[]"
    elif depth < LIST_DEPTH and isinstance(value, dict):
        for index, (key, each) in enumerate(cast(Json, value).items()):
            yield (b"," if index else b"{") + to_json(key) + b":"
            yield from json_pieces(each, depth + 1)
        yield b"}" if value else b"{}"
    else:
        yield to_json(value)


def event_line(document: Json) -> bytes:
    """Return a server-sent event; pydantic's JSON takes a fifth of the standard library's time."""
    return b"data: " + to_json(document) + b"\n\n"
