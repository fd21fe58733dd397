"""What the messages of a chat say, on its way from vLLM's renderer, the last that sees them, to the engine's core.

Nothing here imports vLLM.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from treadle.engine.chat import contents_of
from treadle.serving.vllm.params import CONTENTS

Rendered = tuple[Sequence[Sequence[Mapping[str, Any]]], Sequence[Any]]
"""Conversations, and the tokens of each as vLLM's engine takes them."""


def with_contents(conversations: Sequence[Sequence[Mapping[str, Any]]], prompts: Sequence[Any]) -> Rendered:
    """Put what the messages of rendered chats say beside their tokens, among which it cannot be told any more."""
    for messages, prompt in zip(conversations, prompts, strict=True):
        if isinstance(prompt, dict):
            prompt[CONTENTS] = contents_of(messages)
    return conversations, prompts
