"""Models with recurrent layers: states join and leave with their rows, and texts are those of transformers itself.

`benchmarks/architectures.py` holds the same laws on every architecture that transformers can build.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.engine.kv_cache import CacheSizes
from treadle.engine.prefix_cache import PrefixCache
from treadle.engine.scoring import score_ids
from treadle.engine.sequence import SequenceError
from treadle.lora.adapter import read_adapter
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.fitting import fit
from treadle.serving.openai.kv_memory import KvMemory

from conftest import SAMPLES, TINY, byte_tokenizer, save_adapter

STATES_FIRST = {"layer_types": ["linear_attention", "full_attention"]}
GATED = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "use_mamba_kernels": False}
HEADS = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}


@dataclass(frozen=True)
class Kind:
    """An architecture, the fields of its configuration, and linear layers of it that adapters change."""

    name: str
    fields: dict[str, Any]
    targets: tuple[str, ...]

    def build(self) -> PreTrainedModel:
        known = vars(getattr(transformers, f"{self.name}Config")())
        fields = {key: value for key, value in TINY.items() if key in known} | self.fields
        config = getattr(transformers, f"{self.name}Config")(**fields)
        torch.manual_seed(0)
        model = getattr(transformers, f"{self.name.removesuffix('Text')}ForCausalLM")(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 0.5)
        model.tie_weights()
        return model.eval()


KINDS = {
    "convolutions": Kind("Lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}, ("in_proj", "q_proj")),
    "gated DeltaNet": Kind("Qwen3_5Text", STATES_FIRST | GATED, ("in_proj_qkv", "in_proj_z", "out_proj", "q_proj")),
    "Mamba and attention": Kind("Jamba", MAMBA | JAMBA, ("in_proj", "x_proj", "v_proj")),
    "both in one layer": Kind("FalconH1", HEADS, ("in_proj", "v_proj")),
    "Mamba alone": Kind("Mamba", {"state_size": 8}, ("in_proj", "x_proj")),
}
PROMPTS = [[5, 17, 40], [9, 9, 120, 33, 8, 1, 77, 200, 61, 99, 3, 250, 64, 7], [*range(40, 60)]]
GREEDY = SamplingParams(max_tokens=10)
ROUTINGS = [
    RoutingParams.one("math"),
    RoutingParams(every=1, temperature=5.0),
    RoutingParams(every=2, past="recompute"),
]
POISON = 256
"""A token whose embedding is not a number."""


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    if not hasattr(transformers, f"{request.param.name}Config"):
        pytest.skip("this release of transformers does not have it")
    return request.param


@pytest.fixture(scope="module")
def folders(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("recurrent")
    return {
        name: save_adapter(where / name, kind.build(), seed, target_modules=list(kind.targets))
        for seed, name in enumerate(SAMPLES)
    }


@pytest.fixture(scope="module")
def engine(kind: Kind, folders: dict[str, Path], embedder: StaticEmbedder) -> Engine:
    adapters = [read_adapter(folder, name) for name, folder in folders.items()]
    return Engine(kind.build(), byte_tokenizer(), adapters, fit(SAMPLES, embedder))


@pytest.mark.parametrize("prompt", PROMPTS, ids=map(len, PROMPTS))
def test_a_one_hot_text_is_that_of_transformers_with_the_adapter_in_peft(
    kind: Kind, engine: Engine, folders: dict[str, Path], prompt: list[int]
) -> None:
    (own,) = engine.generate_ids([prompt], sampling=GREEDY, routing=RoutingParams.one("math"))
    peft = PeftModel.from_pretrained(kind.build(), folders["math"], adapter_name="math").eval()
    done: Any = peft.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=10, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    tokens = done.sequences[0, len(prompt) :].tolist()
    assert list(own.token_ids) == tokens
    logprobs = torch.cat(done.logits).log_softmax(-1)[range(len(tokens)), tokens]
    np.testing.assert_allclose(own.logprobs, logprobs, atol=1e-4)


@pytest.mark.parametrize("routing", ROUTINGS, ids=["one", "every token", "recompute"])
def test_rows_of_a_batch_are_what_they_are_alone(engine: Engine, routing: RoutingParams) -> None:
    together = engine.generate_ids(PROMPTS, sampling=GREEDY, routing=routing)
    for prompt, each in zip(PROMPTS, together, strict=True):
        (alone,) = engine.generate_ids([prompt], sampling=GREEDY, routing=routing)
        assert each.token_ids == alone.token_ids
        np.testing.assert_allclose(each.logprobs, alone.logprobs, atol=1e-4)
        np.testing.assert_allclose(each.weights, alone.weights, atol=1e-5)
        (scored,) = score_ids(engine, [(prompt, list(alone.token_ids))], routing)
        np.testing.assert_allclose(scored, alone.logprobs, atol=1e-4)


def texts(engine: Engine, prompts: Sequence[Sequence[int]], routing: RoutingParams, columns: int) -> list[list[int]]:
    """Let rows join one another while the earlier ones run; the first is shortest, and leaves first."""
    batch = engine.new_batch(prefixes=PrefixCache(1 << 20))
    rows = engine.new_rows(prompts, sampling=GREEDY, routing=routing)
    for row in rows:
        reading = batch.begin([row])
        while not reading.is_finished:
            batch.read(reading, columns)
        batch.step()
    while batch.rows:
        batch.step()
    return [[event.token_id for event in row.events] for row in rows]


@pytest.mark.parametrize("routing", ROUTINGS, ids=["one", "every token", "recompute"])
def test_rows_that_join_and_leave_and_are_read_in_chunks_are_what_they_are_at_once(
    engine: Engine, routing: RoutingParams
) -> None:
    prompts = [*PROMPTS, PROMPTS[1][:6], PROMPTS[2]]  # the last begins like one before
    alone = [list(engine.generate_ids([each], sampling=GREEDY, routing=routing)[0].token_ids) for each in prompts]
    assert texts(engine, prompts, routing, 3) == alone
    assert texts(engine, prompts, routing, 64) == alone


def test_a_row_that_spoils_its_states_ends_and_the_others_go_on(engine: Engine) -> None:
    expected = [list(engine.generate_ids([each], sampling=GREEDY)[0].token_ids) for each in PROMPTS]

    def spoil(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return output.masked_fill((args[0] == POISON)[..., None], torch.nan)

    batch, rows = engine.new_batch(), engine.new_rows([*PROMPTS, [8, 4], [*range(70, 99)]], sampling=GREEDY)
    batch.join(rows)
    for row in rows[3:]:
        row.ids[-1] = POISON  # it is read next
    hook = engine.model.get_input_embeddings().register_forward_hook(spoil)
    try:
        while batch.rows:
            batch.step()
    finally:
        hook.remove()
    assert all(isinstance(row.failure, SequenceError) for row in rows[3:])
    assert [[event.token_id for event in row.events] for row in rows[:3]] == expected


def test_a_pass_that_fails_costs_no_row(engine: Engine) -> None:
    expected = [list(engine.generate_ids([each], sampling=GREEDY)[0].token_ids) for each in PROMPTS]
    batch, rows = engine.new_batch(), engine.new_rows(PROMPTS, sampling=GREEDY)
    batch.join(rows)
    last = engine.model.get_output_embeddings()
    failures: list[int] = []

    def fail_once(*_: Any) -> None:
        if not failures:
            failures.append(1)
            raise MemoryError("there is no room")

    batch.step()
    hook = last.register_forward_pre_hook(fail_once)  # all states have been replaced by then
    try:
        batch.step()
    finally:
        hook.remove()
    while batch.rows:
        batch.step()
    assert failures
    assert [[event.token_id for event in row.events] for row in rows] == expected


def test_states_count_as_memory_of_a_row_whatever_its_length(engine: Engine) -> None:
    sizes: CacheSizes = engine.new_batch().measure()
    batch = engine.new_batch()
    batch.join(engine.new_rows(PROMPTS, sampling=GREEDY))
    states = [each for layer in batch.cache.layers for each in getattr(layer, "states", []) if each is not None]
    assert sizes.state_bytes * len(PROMPTS) == sum(each.nbytes for each in states) == batch.cache.state_bytes > 0
    memory = KvMemory(engine, 1, 0)
    assert memory.has_room([batch], batch, engine.new_rows([PROMPTS[0]]))
    row_bytes = 10 * sizes.token_bytes + sizes.state_bytes
    many = engine.new_rows([PROMPTS[0]] * ((1 << 20) // row_bytes + 1), sampling=SamplingParams(max_tokens=7))
    assert not memory.has_room([batch], batch, many)
