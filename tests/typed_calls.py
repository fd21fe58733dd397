"""What an editor must know of public calls: pyright reads this file, nothing runs it."""

from typing import assert_type

import torch

import treadle


def calls(engine: treadle.Engine) -> None:
    """A text or a chat gives one completion, a list of them a list."""
    messages = [{"role": "user", "content": "add"}]
    assert_type(engine.generate("add"), treadle.Completion)
    assert_type(engine.generate(messages), treadle.Completion)
    assert_type(engine.generate(["add", "sum"]), list[treadle.Completion])
    assert_type(engine.generate([messages, messages]), list[treadle.Completion])
    assert_type(engine.generate("add").text, str)
    for event in engine.stream("add"):
        assert_type(event, treadle.TokenEvent)
    assert_type(treadle.load("bundle", dtype=torch.bfloat16, device=torch.device("cpu")), treadle.Engine)
    assert_type(treadle.load("bundle", dtype="bfloat16", device="cpu"), treadle.Engine)
