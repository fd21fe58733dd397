"""Expressions of an adapter's config match as in PEFT, and cannot run forever."""

import subprocess
import threading
import time

import pytest
from peft.utils.other import get_pattern_key

from treadle.common.errors import AdapterError
from treadle.lora.patterns import match_ends

PATHS = [
    f"model.{tower}.layers.{layer}.{module}"
    for tower in ("language_model", "visual")
    for layer in (0, 1, 11)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj")
]
PUBLISHED = [
    r".*\.(q_proj|v_proj)",
    r"^(?!.*visual).*(?:q_proj|k_proj|v_proj|gate_proj)$",  # LLaMA-Factory: look-ahead
    r"^(model\.language_model(?=\.).*\.(q_proj|v_proj))$",  # ms-swift
    r"(?:.*?(?:visual|language).*?(?:self_attn|mlp).*?(?:q_proj|gate_proj).*?)",  # unsloth
    r"model\.language_model\.layers\.(?:[0-9]|1[01])\.mlp\.\w+",
    r".*(self)_attn.*(?<=q)_proj",
]
ENDLESS = [r"(.*)*!", r"(\w+\.?)+!", r"((((.?){99}){99}){99}){99}!"]


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_published_expressions_select_what_peft_selects(pattern: str) -> None:
    found = [index is not None for index in match_ends([pattern], PATHS)]
    assert found == [get_pattern_key([pattern], path) == pattern for path in PATHS]
    assert True in found
    assert False in found


@pytest.mark.parametrize("keys", [["v_proj", r"layers\.1\..*"], [r"layers.1\d?.self_attn.[qv]_proj", "q_proj"]])
def test_the_first_pattern_that_matches_an_end_is_pefts(keys: list[str]) -> None:
    found = [None if index is None else keys[index] for index in match_ends(keys, PATHS)]
    assert found == [key if (key := get_pattern_key(keys, path)) in keys else None for path in PATHS]
    assert set(found) == {*keys, None}


def test_names_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    assert match_ends(["q_proj", "layers.1.self_attn.v_proj"], PATHS[:5]) == [0, None, None, 0, 1]


@pytest.mark.parametrize("pattern", ["[", "*q", "(?P<x>a)(?P<x>b)", "(" * 3000 + ")" * 3000, "a{99999999999999}"])
def test_what_is_no_expression_is_refused_by_name(pattern: str) -> None:
    with pytest.raises(AdapterError, match="is no regular expression: "):
        match_ends([pattern], PATHS)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_an_expression_without_end_is_stopped_while_other_threads_run(pattern: str) -> None:
    stop, longest = threading.Event(), [0.0]

    def watch() -> None:
        while not stop.is_set():
            before = time.monotonic()
            time.sleep(0.005)
            longest[0] = max(longest[0], time.monotonic() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.monotonic()
    try:
        with pytest.raises(AdapterError, match=r"the regular expression .* takes more than"):
            match_ends([pattern], [path * 4 for path in PATHS], wall_seconds=0.5)
    finally:
        stop.set()
        thread.join()
    assert time.monotonic() - started < 5
    assert longest[0] < 0.4, "the interpreter was held"


def test_a_long_expression_is_refused_unread() -> None:
    with pytest.raises(AdapterError, match="an expression has 100001 characters; 100000 at most are read"):
        match_ends(["(" + "a" * 100_000], PATHS)
