"""Some options of vLLM are refused at the start, and so is a step without weights. Needs no vLLM."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from treadle.common.errors import ModelError
from treadle.serving.vllm.engine_hooks import fill_gates
from treadle.serving.vllm.hooks import checked_params
from treadle.serving.vllm.params import CONTENTS_KEY, PluginParams
from treadle.serving.vllm.requests import OptionReader, with_contents
from treadle.serving.vllm.support import option_problems, tokenizer_problems

from conftest import BASE


def config(**changes: Any) -> SimpleNamespace:
    """vLLM's configuration, with nothing on that is refused; a change names its part, as in `model.is_diffusion`."""
    parts: dict[str, dict[str, Any]] = {
        "scheduler": {"async_scheduling": False, "scheduler_cls": None},
        "parallel": {"enable_dbo": False, "ubatch_size": 0, "prefill_context_parallel_size": 1,
                     "decode_context_parallel_size": 1, "enable_hc_sp": False, "use_sequence_parallel_moe": False},
        "cache": {"kv_sharing_fast_prefill": False},
        "model": {"runner_type": "generate", "is_encoder_decoder": False, "is_multimodal_model": False,
                  "is_diffusion": False, "skip_tokenizer_init": False, "tokenizer_mode": "auto"},
    }  # fmt: skip
    whole: dict[str, Any] = {"speculative_config": None, "lora_config": None, "kv_transfer_config": None}
    for name, value in changes.items():
        part, _, field = name.partition(".")
        if field:
            assert field in parts[part], name
            parts[part][field] = value
        else:
            assert name in whole, name
            whole[name] = value
    return SimpleNamespace(**{f"{part}_config": SimpleNamespace(**each) for part, each in parts.items()}, **whole)


ON: dict[str, tuple[Any, str]] = {
    "scheduler.async_scheduling": (True, "--no-async-scheduling"),
    "scheduler.scheduler_cls": ("mine.Scheduler", "--scheduler-cls"),
    "speculative_config": (object(), "--speculative-config"),
    "lora_config": (object(), "--enable-lora"),
    "kv_transfer_config": (object(), "--kv-transfer-config"),
    "parallel.enable_dbo": (True, "--enable-dbo"),
    "parallel.ubatch_size": (2, "--enable-dbo"),
    "parallel.prefill_context_parallel_size": (2, "--prefill-context-parallel-size"),
    "parallel.decode_context_parallel_size": (2, "--decode-context-parallel-size"),
    "parallel.enable_hc_sp": (True, "--enable-hc-sp"),
    "parallel.use_sequence_parallel_moe": (True, "--enable-hc-sp"),
    "cache.kv_sharing_fast_prefill": (True, "--kv-sharing-fast-prefill"),
    "model.runner_type": ("pooling", "--runner pooling"),
    "model.is_encoder_decoder": (True, "encoder-decoder"),
    "model.is_multimodal_model": (True, "multimodal"),
    "model.is_diffusion": (True, "diffusion"),
    "model.skip_tokenizer_init": (True, "--skip-tokenizer-init"),
    "model.tokenizer_mode": ("mistral", "--tokenizer-mode mistral"),
}


def test_what_is_off_is_not_refused() -> None:
    assert option_problems(config()) == []
    assert option_problems(config(**{"model.tokenizer_mode": "hf"})) == []


@pytest.mark.parametrize("name", ON)
def test_each_is_refused_by_its_name_alone(name: str) -> None:
    value, words = ON[name]
    (message,) = option_problems(config(**{name: value}))
    assert words in message


def test_all_are_refused_at_once() -> None:
    assert (
        len(option_problems(config(**{name: value for name, (value, _) in ON.items()}))) == len(ON) - 2
    )  # two flags share


def test_a_tokenizer_that_requests_would_fail_with_is_refused(bundle_folder: Path) -> None:
    asked: list[dict[str, Any]] = []
    model = SimpleNamespace(
        tokenizer=str(bundle_folder.parent / BASE), tokenizer_revision=None, trust_remote_code=False,
        skip_tokenizer_init=False,
    )  # fmt: skip
    given = SimpleNamespace(model_config=model)
    assert tokenizer_problems(given) == []
    model.tokenizer = "/nowhere"
    (message,) = tokenizer_problems(given)
    assert "'/nowhere' cannot be loaded" in message

    def slow(name: str, **options: Any) -> Any:
        asked.append({"name": name, **options})
        return SimpleNamespace()

    model.tokenizer, model.tokenizer_revision, model.trust_remote_code = "other/name", "v2", True
    (message,) = tokenizer_problems(given, slow)
    assert "is not a fast tokenizer" in message
    assert asked == [{"name": "other/name", "revision": "v2", "trust_remote_code": True}]


class Board:
    def __init__(self) -> None:
        self.filled: list[Any] = []

    def fill(self, *given: Any) -> None:
        self.filled.append(given)


def test_a_step_without_weights_is_never_computed() -> None:
    board = Board()
    blended = SimpleNamespace(get_model=lambda: SimpleNamespace(treadle=SimpleNamespace(board=board)))
    plain = SimpleNamespace(get_model=SimpleNamespace, load_config=SimpleNamespace(load_format="mine"))
    planned = SimpleNamespace(treadle=SimpleNamespace(in_order=lambda ids: (ids, [1])))
    unplanned = SimpleNamespace()
    fill_gates(blended, planned, ["a"])
    assert board.filled == [(["a"], [1])]
    fill_gates(plain, unplanned, ["a"])  # a server without a bundle
    # what vLLM's worker makes up before it serves has no weights, and needs none
    fill_gates(blended, unplanned, ["_warmup_0_", "_warmup_1_"])
    fill_gates(blended, unplanned, ["_v2_mixed_warmup_decode_", "_sparse_mla_v2_warmup_prefill_"])
    for ids in (["a"], ["_warmup_0_", "a"], ["cmpl-_warmup_0_"]):
        with pytest.raises(ModelError, match="came without its weights"):
            fill_gates(blended, unplanned, ids)
    with pytest.raises(ModelError, match="'mine' did not lay the adapters"):
        fill_gates(plain, planned, ["a"])
    assert len(board.filled) == 1


def test_what_a_chat_says_goes_from_the_renderer_to_the_engine(bundle_folder: Path) -> None:
    prompts = [{"prompt_token_ids": [1]}, {"prompt_token_ids": [2]}]
    with_contents([[{"role": "user", "content": "add"}], [{"role": "user", "content": None}]], prompts)
    assert [prompt[CONTENTS_KEY] for prompt in prompts] == [["add"], [""]]
    reader = OptionReader.open(PluginParams(bundle=str(bundle_folder)))

    class Params(SimpleNamespace):
        def clone(self) -> "Params":
            return Params(**vars(self))

    given = Params(extra_args={CONTENTS_KEY: ["not the client's to say"], "mine": 1})
    assert checked_params(reader, given, None).extra_args == {"mine": 1, "treadle": "auto"}
    said = checked_params(reader, given, prompts[0][CONTENTS_KEY]).extra_args
    assert said == {"mine": 1, "treadle": "auto", CONTENTS_KEY: ["add"]}
    assert given.extra_args == {CONTENTS_KEY: ["not the client's to say"], "mine": 1}
