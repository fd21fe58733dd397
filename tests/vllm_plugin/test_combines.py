"""Combines that vLLM refuses, and adapters that come and go in a running engine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import treadle
from treadle.bundle.bundle import read_bundle, save_bundle
from treadle.common.errors import TreadleError
from treadle.common.params import RoutingParams
from treadle.serving.vllm.hooks import reader_of

from conftest import SAMPLES, save_adapter
from vllm_plugin.engines import ALL, BASE, PROMPTS, agree, reference, serving, small_llama


def test_a_bundle_that_combines_otherwise_is_refused_at_the_start(small: Path, tmp_path: Path) -> None:
    bundle = read_bundle(small)
    router = replace(bundle.router, params=replace(bundle.router.params, combine="linear"))
    equal = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    folders = {
        name: save_adapter(tmp_path / name, small_llama(), seed, **equal)
        for seed, name in enumerate(bundle.router.names, 1)
    }
    linear = save_bundle(tmp_path / "linear", base=bundle.base_model, adapters=folders, router=router)
    with pytest.raises(TreadleError, match=r"combine 'linear'.*use sum, or the embedded engine"):
        with serving(linear, small.parent / BASE):
            pass


@pytest.fixture(scope="module")
def newcomer(small: Path) -> Path:
    """An adapter that the bundle does not have."""
    return save_adapter(small.parent / "late", small_llama(), 9, r=5, lora_alpha=5, target_modules=ALL)


def test_adapters_come_and_go(small: Path, newcomer: Path) -> None:
    core: Any
    texts = ["sum planet loop", "planet loop sum"]
    prompts = PROMPTS[3:]
    engine = treadle.load(small, device="cpu", dtype="float32")
    before = reference(engine, prompts)
    engine.add_adapter("late", newcomer, texts)
    joined, alone = reference(engine, prompts), reference(engine, prompts, RoutingParams.one("late"))
    engine.remove_adapter("code")
    left = reference(engine, prompts)
    assert len({str(each) for each in (before, joined, alone, left)}) == 4

    with serving(small, treadle={"max_adapters": 4, "max_rank": 8}) as served:
        core = served.core
        assert served.llm.llm_engine.input_processor.treadle.mixture.names  # read before the first request
        assert agree(served.run(prompts), before) == []
        answer = core.treadle_add_adapter("late", str(newcomer), texts)
        assert answer["adapters"] == {"math": 0, "science": 1, "code": 2, "late": 3}
        # the server's own process learns of it from the endpoint; here, as that does
        reader_of(served.llm.llm_engine.input_processor).mixture = core.scheduler.treadle.mixture
        assert agree(served.run(prompts), joined) == []  # with a warm cache of the set before
        assert agree(served.run(prompts, "late"), alone) == []
        assert "slots are taken" in core.treadle_add_adapter("later", str(newcomer), texts)["error"]
        assert "exists already" in core.treadle_add_adapter("late", str(newcomer), texts)["error"]
        core.treadle_remove_adapter("code")
        assert agree(served.run(prompts), left) == []
        assert "unknown adapter" in core.treadle_remove_adapter("code")["error"]
        again = core.treadle_add_adapter("again", str(newcomer), texts)
        assert again["adapters"]["again"] == 2


def test_without_room_no_adapter_joins(small: Path, newcomer: Path) -> None:
    wide = save_adapter(small.parent / "wide", small_llama(), 9, r=9, target_modules=["q_proj"])
    with serving(small, treadle={"max_adapters": 4, "max_rank": 8}) as served:
        assert "max_rank is 8" in served.core.treadle_add_adapter("wide", str(wide), SAMPLES["math"])["error"]
        assert "not a PEFT folder" in served.core.treadle_add_adapter("gone", "/nowhere", SAMPLES["math"])["error"]
        assert served.core.treadle_adapters()["adapters"] == {"math": 0, "science": 1, "code": 2}
    with serving(small) as served:
        assert "are fixed" in served.core.treadle_add_adapter("late", str(newcomer), SAMPLES["math"])["error"]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_half_precision_follows_the_engine(small: Path, eager: bool) -> None:
    """In bfloat16 tokens may tie differently; the first token's log-probabilities stay close."""
    from vllm import SamplingParams

    engine = treadle.load(small, device="cpu", dtype="float32")
    ids = engine.tokenizer(PROMPTS[4]).input_ids
    with serving(small, dtype="bfloat16", enforce_eager=eager) as served:
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=1, extra_args={"treadle": "science"})
        (output,) = served.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    with torch.inference_mode(), engine.blend.using(engine.router.fixed_weights(RoutingParams.one("science"))):
        wanted = engine.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    token = output.outputs[0].token_ids[0]
    assert output.outputs[0].logprobs[0][token].logprob == pytest.approx(float(wanted[token]), abs=0.1)


def test_the_bundle_must_be_of_this_base(small: Path, tmp_path: Path) -> None:
    from treadle.common.errors import OptionError

    other = tmp_path / "another-model"
    other.symlink_to(small.parent / BASE)
    with pytest.raises(OptionError, match="the bundle's base is"), serving(small, other):
        pass
