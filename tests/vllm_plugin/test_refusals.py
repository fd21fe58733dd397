"""The start refuses by name what cannot be done; a wrong request is an error of that request."""

from pathlib import Path
from typing import Any

import pytest

from treadle.common.errors import TreadleError
from treadle.serving.vllm.hooks import ServerProcess, checked_start
from treadle.serving.vllm.support import HookPoint, version_problems, vllm_version

from vllm_plugin.engines import PROMPTS, serving

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "lora": ({"enable_lora": True}, "--enable-lora"),
    "speculative": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "speculative decoding",
    ),
    "no bundle": ({"treadle": {"bundle": "/nowhere"}}, "is not a bundle"),
    "unknown option": ({"treadle": {"max_adaptors": 4}}, "Did you mean 'max_adapters'"),
    "too few slots": ({"treadle": {"max_adapters": 2}}, "has 3 adapters; max_adapters is 2"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_start_that_is_refused(small: Path, case: str) -> None:
    options, message = CASES[case]
    with pytest.raises(TreadleError, match=message), serving(small, **options):
        pass


def test_a_version_that_is_unknown_is_refused_by_name() -> None:
    (problem,) = version_problems(versions={"0.31": ""})
    assert problem.startswith(f"vLLM {vllm_version()} is unknown")


def test_a_hook_point_that_has_moved_is_refused_by_name() -> None:
    moved = {
        "gone": HookPoint("vllm.v1.core.sched.scheduler:Scheduler.schedul", ("self",)),
        "changed": HookPoint("vllm.v1.core.sched.scheduler:Scheduler.schedule", ("self", "budget")),
        "lost": HookPoint("vllm.v2.core:Scheduler", ()),
    }
    problems = version_problems(points=moved)
    assert len(problems) == 3
    assert "expected self, budget" in problems[1]
    start = checked_start(lambda *_: None, problems, ServerProcess())
    with pytest.raises(TreadleError, match=r"Scheduler\.schedul: "):
        start(type("Args", (), {"additional_config": {"treadle": "anything"}})())
    assert start(type("Args", (), {"additional_config": {}})()) is None


BAD: list[tuple[Any, str]] = [
    ("mathh", "Did you mean 'math'"),
    ({"evry": 2}, "Did you mean 'every'"),
    ('{"evry', "is not JSON"),
    ({"math": -1}, "fixed.math must be a finite number of at least 0"),
    ({"math": 1e9}, "at most 100"),
    ({"past": "recompute"}, "past='recompute'"),
    ({"combine": "paper"}, "use sum, or the embedded engine"),
    ({"rule": "boosted", "score": "lda"}, "rule boosted multiplies a cosine"),
    ({"math": 0.5, "every": 2}, "unknown option 'math'"),
    ({"fixed": {"maths": 1}}, "unknown adapter 'maths'"),
    (3, "allowed: auto, base, math"),
    (["math"], "allowed: auto, base, math"),
]


def test_a_bad_request_is_an_error_of_that_request(small: Path) -> None:
    from vllm.exceptions import VLLMValidationError

    with serving(small) as served:
        good = served.ids(PROMPTS[:1], max_tokens=4)
        for given, message in BAD:
            with pytest.raises(VLLMValidationError, match=message):
                served.run(PROMPTS[:1], [given])
        assert served.ids(PROMPTS[:1], max_tokens=4) == good
