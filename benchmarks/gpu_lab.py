"""Makes what benchmarks/gpu.py measures: random models of known shapes, random adapters, a router of random words.

Nothing is fetched. Weights are drawn where they stay, on the device.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model2vec import StaticModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from treadle.engine.engine import Engine
from treadle.engine.kv_cache import RowCache
from treadle.engine.runners.cuda.step import GraphStep
from treadle.engine.runners.passes import PassInput
from treadle.engine.runners.runner import Runner
from treadle.experiments.pools import random_adapters, random_router
from treadle.routing.embedder import StaticEmbedder

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reference_kernels import PlainKernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
LLAMA_3_8B = LLAMA_2_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
SMALL = LLAMA_2_7B | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
SHAPES = {"Llama-2-7B": LLAMA_2_7B, "Llama-3-8B": LLAMA_3_8B, "small": SMALL}
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = {"r 64, q v": (64, ("q_proj", "v_proj")), "r 16, all linear": (16, ALL_LINEAR)}
"""Rank and targets of the four adapters."""
NUM_ADAPTERS = 4
DIM = 64
"""Dimensions of the router's embeddings."""


def build_model(shape: dict[str, Any], device: str) -> Any:
    """Return a model with random weights, in bfloat16 on a GPU; biases and norms are random too."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    options = {key: value for key, value in shape.items() if key != "model_type"}
    config = AutoConfig.for_model(shape["model_type"], **options, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.normal_(float("norm" in name), 0.1)
        else:
            parameter.normal_(0, 0.6 * config.hidden_size**-0.5)
    return model


def word_core(size: int, end: str = "") -> Tokenizer:
    """Return the core of a tokenizer whose token i is the word `wi`, with `end` behind it."""
    return Tokenizer(models.WordLevel({f"w{index}{end}": index for index in range(size)}, unk_token=f"w0{end}"))


def build_engine(model: Any, rank: int, targets: Sequence[str]) -> Engine:
    """Return an engine of random adapters, whose weights change with every token."""
    size = model.config.vocab_size
    vectors = np.random.default_rng(0).standard_normal((size, DIM), np.float32)
    words = word_core(size)
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    embedder = StaticEmbedder(StaticModel(vectors, words))
    adapters = random_adapters(model, "base", NUM_ADAPTERS, rank=rank, targets=targets)
    router = random_router([adapter.name for adapter in adapters], embedder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_core(size, " "), clean_up_tokenization_spaces=False)
    is_gpu = model.device.type == "cuda"
    engine = Engine(model, tokenizer, adapters, router, is_fast=is_gpu)
    if not is_gpu:  # only to see that the script runs
        engine.blend.always_active_rows = sys.maxsize  # as on a GPU: the step reads the factors of all adapters
        engine.blend.take(engine.blend.plan(engine.blend.adapters))
        step = GraphStep(model, engine.blend, PlainKernels(), capture=lambda run: run)
        engine.runner = Runner(model, engine.blend, [step])
    return engine


def draw_weights(rows: int, seed: int) -> np.ndarray:
    """Return weights (B, N) whose rows sum to 1."""
    weights = np.random.default_rng(seed).random((rows, NUM_ADAPTERS), np.float32) + 0.05
    return weights / weights.sum(1, keepdims=True)


def draw_prompts(engine: Engine, batch: int, length: int) -> list[list[int]]:
    """Return ids (batch, length)."""
    return np.random.default_rng(0).integers(0, engine.model.config.vocab_size, (batch, length)).tolist()


@torch.inference_mode()
def random_cache(model: Any, rows: int, length: int) -> RowCache:
    """Return a cache of random keys and values, the same every time."""
    config, cache = model.config, RowCache()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    draw = torch.Generator(model.device).manual_seed(0)
    for layer in cache.rows(config.num_hidden_layers):
        size = (rows, config.num_key_value_heads, length, head)
        keys = torch.randn(size, generator=draw, device=model.device, dtype=model.dtype)
        layer.update(keys, keys.roll(1, -1))
        del keys
    return cache


def step_of(ids: Tensor, pads: Sequence[int], weights: np.ndarray | None, cache: RowCache) -> PassInput:
    """Return one token of each row, ids (B,), behind a cache, under weights (B, N)."""
    rows = len(ids)
    lengths = [cache.length + 1 - pad for pad in pads]
    per_token = None if weights is None else weights[:, None]
    return PassInput(ids[:, None], pads, per_token, ["sum"] * rows, cache, [[]] * rows, lengths)
