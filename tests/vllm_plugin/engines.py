"""Engines of a stock vLLM with the plugin beside it, on a small random model and on the demo's bundle.

Run by `make test-vllm` in an environment of its own; the tests proper leave this folder out.
"""

import gc
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import treadle
from treadle.bundle.bundle import save_bundle
from treadle.common.params import RoutingParams
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.fitting import fit

from conftest import SAMPLES, byte_tokenizer, save_adapter

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, so that tests can look in
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

DEMO = Path(__file__).parents[2] / "demo" / "bundle"
BASE = "tiny-llama"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "math": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "science": {"r": 2, "lora_alpha": 3, "target_modules": ALL, "rank_pattern": {"down_proj": 5}},
    "code": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "gate_proj", "down_proj"],
             "use_rslora": True},
}  # fmt: skip
"""Adapters of unequal ranks, scales and target modules, fused layers and row-parallel ones among them."""
PROMPTS = [
    "add three plus four and the sum plus three",
    "the atom heat of a planet",
    "def loop return list return the list",
    "heat",
    "sum add three def list planet cell atom add sum four plus three heat the planet loop return",
]


def small_llama(kv_heads: int = 2) -> LlamaForCausalLM:
    """A random Llama whose heads are as large as vLLM's attention on CPUs wants them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=32, bos_token_id=None, eos_token_id=257, pad_token_id=258,
        max_position_embeddings=512, initializer_range=0.12, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write_bundle(root: Path, embedder: StaticEmbedder, adapters: dict[str, dict[str, Any]], kv_heads: int = 2) -> Path:
    """Write the small model and a bundle of random adapters for it; its weights change at every token."""
    small_llama(kv_heads).save_pretrained(root / BASE)
    byte_tokenizer().save_pretrained(root / BASE)
    folders = {
        name: save_adapter(root / name, small_llama(kv_heads), seed, **options)
        for seed, (name, options) in enumerate(adapters.items(), 1)
    }
    params = RoutingParams(score="centred", temperature=0.3, every=1)
    router = fit({name: SAMPLES[name] for name in adapters}, embedder, params)
    return save_bundle(root / "bundle", base=str(root / BASE), adapters=folders, router=router)


class Served:
    """One vLLM engine."""

    def __init__(self, bundle: Path | None, model: str, **options: Any) -> None:
        from vllm import LLM

        defaults = {
            "enforce_eager": True, "dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 64 << 20,
            "max_num_batched_tokens": 512, "max_num_seqs": 32, "block_size": 32, "disable_log_stats": True,
        }  # fmt: skip
        treadle_options = options.pop("treadle", {})
        config = {"treadle": {"bundle": str(bundle), **treadle_options}} if bundle else {}
        self.llm = LLM(model, additional_config=config, **{**defaults, **options})

    @property
    def core(self) -> Any:
        """vLLM's EngineCore."""
        return self.llm.llm_engine.engine_core.engine_core

    def run(self, prompts: Sequence[str | list[int]], given: Any = None, **sampling: Any) -> list[Any]:
        """Generate greedily and return vLLM's outputs; `given` is one treadle option for all, or a list, one each."""
        from vllm import SamplingParams

        each = given if isinstance(given, list) else [given] * len(prompts)
        options = {"temperature": 0, "max_tokens": 48, "ignore_eos": True, "logprobs": 3, **sampling}
        params = [SamplingParams(**options, extra_args=None if one is None else {"treadle": one}) for one in each]
        inputs = [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in prompts]
        return self.llm.generate(inputs, params, use_tqdm=False)

    def ids(self, prompts: Sequence[str | list[int]], given: Any = None, **sampling: Any) -> list[list[int]]:
        """Generate greedily and return the token ids."""
        return [list(each.outputs[0].token_ids) for each in self.run(prompts, given, **sampling)]


@contextmanager
def serving(bundle: Path | None, model: Path | str | None = None, **options: Any) -> Generator[Served]:
    """Start an engine in this process, and end it."""
    name = str(model or (bundle.parent / BASE if bundle else ""))
    served = Served(bundle, name, **options)
    try:
        yield served
    finally:
        served.llm.llm_engine.engine_core.shutdown()
        del served
        gc.collect()


def reference(
    engine: Any, prompts: Sequence[Any], routing: Any = None, tokens: int = 48, *, together: bool = False
) -> list[list[int]]:
    """Generate greedily with the embedded engine, past the end of text: each prompt alone, or all together."""
    ids = [engine.tokenizer(each).input_ids if isinstance(each, str) else each for each in prompts]
    each = routing if isinstance(routing, list) else [routing or engine.router.params] * len(ids)
    groups = [(ids, each)] if together else [([one], [params]) for one, params in zip(ids, each, strict=True)]
    made: list[list[int]] = []
    for group, params in groups:
        batch = engine.new_batch(end_ids=frozenset())
        sampling = treadle.SamplingParams(max_tokens=tokens)
        rows = engine.new_rows(group, sampling=sampling, routing=params)
        batch.join(rows)
        while batch.rows:
            batch.step()
        made += [list(row.ids[row.prompt_tokens :]) for row in rows]
    return made


def agree(outputs: Sequence[Any], expected: Sequence[Sequence[int]], tolerance: float = 1e-3) -> list[str]:
    """Return where vLLM's outputs differ from token ids by more than a tie: the first difference of each.

    A tie: both tokens are among vLLM's likeliest there, their log-probabilities within `tolerance` nats.
    """
    problems: list[str] = []
    for index, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        got = list(output.outputs[0].token_ids)
        place = next((at for at, (one, two) in enumerate(zip(got, wanted, strict=True)) if one != two), None)
        if place is None:
            continue
        tops = output.outputs[0].logprobs[place]
        gap = tops[got[place]].logprob - tops[wanted[place]].logprob if wanted[place] in tops else np.inf
        if gap > tolerance:
            problems.append(f"prompt {index} differs at token {place} by {gap:.3g} nats")
    return problems
