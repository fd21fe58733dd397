"""What is no text is refused in our own words: in Python, on the command line and from standard input."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from treadle.common.errors import OptionError
from treadle.engine.engine import Engine

from conftest import Run

HALF = "a\ud800b"


@pytest.mark.parametrize("given", [HALF, [{"role": "user", "content": HALF}], ["add", None], ["add", 7], [HALF, "add"]])
def test_a_prompt_that_is_no_text_is_refused(engine: Engine, given: Any) -> None:
    with pytest.raises(OptionError, match=r"half of a surrogate pair|allowed: a text"):
        engine.generate(given)


@pytest.mark.parametrize("given", [HALF, None, 7])
def test_a_text_to_route_or_score_that_is_none_is_refused(engine: Engine, given: Any) -> None:
    with pytest.raises(OptionError, match=r"half of a surrogate pair|allowed: a text"):
        engine.router.scores([given])
    with pytest.raises(OptionError, match=r"half of a surrogate pair|allowed: a text"):
        engine.score(["add"], [given])


def test_bytes_that_are_no_text_are_refused_on_the_command_line(
    bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, said = run("route", bundle, "--text", b"add \xff".decode("utf-8", "surrogateescape"))
    assert (code, said) == (1, "treadle: character 4 of the text is half of a surrogate pair; give UTF-8.\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"add \xff"), "utf-8"))
    code, _, said = run("generate", bundle, "--prompt", "-")
    assert code == 1
    assert "half of a surrogate pair; give UTF-8." in said
