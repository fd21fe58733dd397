"""Adapters that come and go while requests run, and what is cached of those that were there before."""

from collections.abc import Generator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import treadle
from treadle.common.errors import TreadleError
from treadle.common.params import RoutingParams
from treadle.serving.vllm.hooks import reader_of
from treadle.serving.vllm.mixture import Mixture
from treadle.serving.vllm.requests import OptionReader

from conftest import save_adapter
from vllm_plugin.engines import ALL, PROMPTS, Served, agree, reference, serving, small_llama

TEXTS = ["sum planet loop", "planet loop sum"]
LONG = PROMPTS[4:]  # of several blocks


@pytest.fixture
def served(small: Path) -> Generator[Served]:
    with serving(small, treadle={"max_adapters": 4, "max_rank": 8}) as engine:
        yield engine


@pytest.fixture(scope="module")
def folders(small: Path) -> list[Path]:
    """Two adapters that the bundle does not have."""
    options = {"r": 5, "lora_alpha": 5, "target_modules": ALL}
    return [save_adapter(small.parent / f"late-{seed}", small_llama(), seed, **options) for seed in (9, 10)]


@pytest.fixture(scope="module")
def texts(small: Path, folders: list[Path]) -> list[list[list[int]]]:
    """The embedded engine's texts with each of them alone."""
    made: list[list[list[int]]] = []
    for folder in folders:
        engine = treadle.load(small, device="cpu", dtype="float32")
        engine.add_adapter("late", folder, TEXTS)
        made.append(reference(engine, LONG, RoutingParams.one("late")))
    assert made[0] != made[1]
    return made


def reader(served: Served) -> OptionReader:
    """The reader of the server's own process; its endpoints tell it of changes, here the test does."""
    found = reader_of(served.llm.llm_engine.input_processor)
    assert found is not None
    return found


def change(served: Served, function: str, *arguments: Any) -> dict[str, Any]:
    """Call a function of the core, and tell the server as its endpoints do."""
    answer = getattr(served.core, function)(*arguments)
    reader(served).mixture = served.core.scheduler.treadle.mixture
    return answer


def one_after_the_other(served: Served, folders: list[Path]) -> list[Any]:
    """Run each of two adapters alone, warm, both under one name in one slot; return the outputs of the second."""
    for index, folder in enumerate(folders):
        assert change(served, "treadle_add_adapter", "late", str(folder), TEXTS)["adapters"]["late"] == 3
        outputs = [served.run(LONG, "late") for _ in range(2)][index]
        change(served, "treadle_remove_adapter", "late")
    return outputs


class Unmarked(Mixture):
    """A mixture that looks the same whatever its adapters are."""

    fingerprint = "the same"  # type: ignore[assignment]


def test_an_adapter_that_takes_anothers_place_is_not_read_from_its_cache(
    served: Served, folders: list[Path], texts: list[list[list[int]]]
) -> None:
    (output,) = one_after_the_other(served, folders)
    assert agree([output], texts[1]) == []
    assert output.num_cached_tokens == 64  # its own
    # the control: adapters that are not told apart
    served.llm.reset_prefix_cache()
    core = served.core.scheduler.treadle
    core.schedule.mixture = Unmarked(**{each.name: getattr(core.mixture, each.name) for each in fields(core.mixture)})
    (output,) = one_after_the_other(served, folders)
    assert output.num_cached_tokens == 64
    assert agree([output], texts[1]) != []


def test_the_one_that_comes_back_is_not_taken_for_another(small: Path, served: Served) -> None:
    """Its slot is that of before, but it is the last of N: the same keys then stand for other adapters."""
    engine = treadle.load(small, device="cpu", dtype="float32")
    names = ("math", "science", "code")
    expected = {name: reference(engine, LONG, RoutingParams.one(name)) for name in names}
    for name in names:
        assert agree(served.run(LONG, name), expected[name]) == []
    change(served, "treadle_remove_adapter", "math")
    answer = change(served, "treadle_add_adapter", "math", str(small / "adapters" / "math"), TEXTS)
    assert answer["adapters"] == {"science": 1, "code": 2, "math": 0}
    for name in names:
        assert agree(served.run(LONG, name), expected[name]) == [], name


def begin(served: Served, prompts: list[str]) -> None:
    """Add requests that the bundle's routing answers."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, logprobs=3)
    for index, prompt in enumerate(prompts):
        served.llm.llm_engine.add_request(f"{index}", prompt, params)


def step(served: Served, number: int) -> dict[str, Any]:
    """Make some steps and return the outputs of the requests that end."""
    outputs = [each for _ in range(number) for each in served.llm.llm_engine.step()]
    return {each.request_id: each for each in outputs if each.finished}


def test_requests_that_run_keep_their_adapters(small: Path, served: Served, folders: list[Path]) -> None:
    expected = reference(treadle.load(small, device="cpu", dtype="float32"), PROMPTS)
    begin(served, PROMPTS)
    assert step(served, 8) == {}
    assert change(served, "treadle_add_adapter", "late", str(folders[0]), TEXTS)["adapters"]["late"] == 3
    assert step(served, 8) == {}
    change(served, "treadle_remove_adapter", "code")
    assert step(served, 8) == {}
    again = change(served, "treadle_add_adapter", "again", str(folders[1]), TEXTS)
    assert "used by requests that run still" in again["error"]
    outputs = step(served, 60)
    assert agree([outputs[f"{index}"] for index in range(len(PROMPTS))], expected) == []
    again = change(served, "treadle_add_adapter", "again", str(folders[1]), TEXTS)
    assert again["adapters"] == {"math": 0, "science": 1, "late": 3, "again": 2}


def test_a_request_that_comes_too_late_ends_alone(served: Served, folders: list[Path]) -> None:
    """It was checked before the adapter left and reaches the core after: vLLM ends it, and the others go on."""
    from vllm import SamplingParams

    change(served, "treadle_add_adapter", "late", str(folders[0]), TEXTS)
    good = served.ids(LONG, "math", max_tokens=4)
    served.core.treadle_remove_adapter("late")  # the server does not know yet
    engine = served.llm.llm_engine
    params = SamplingParams(max_tokens=4, extra_args={"treadle": "late"})
    request = engine.input_processor.process_inputs("0", {"prompt_token_ids": [3] * 40}, params, ("generate",))
    with pytest.raises(TreadleError, match="unknown choice 'late'"):
        served.core.preprocess_add_request(request)  # its caller in the input thread answers with an error
    assert served.ids(LONG, "math", max_tokens=4) == good
