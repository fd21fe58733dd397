"""Makes what benchmarks/gpu.py measures: random models of known shapes, random adapters, a router of random words.

Nothing is fetched. Weights are drawn where they stay, on the device.
"""

import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from treadle.engine.engine import Engine
from treadle.engine.kv_cache import RowCache
from treadle.engine.runners.cuda.step import GraphStep
from treadle.engine.runners.passes import PassInput
from treadle.engine.runners.runner import Runner
from treadle.lora.adapter import Adapter, LoraPair
from treadle.lora.compatibility import linear_shapes
from treadle.routing.centroids import Centroids
from treadle.routing.router import Router

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
DIM = 256
"""Dimensions of the router's embeddings."""


def build_model(shape: dict[str, Any], device: str, dtype: torch.dtype | None = None) -> Any:
    """Return a model with random weights, in bfloat16 on a GPU; biases and norms are random too."""
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
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


def draw_adapters(model: Any, count: int, rank: int, targets: Sequence[str], *, seed: int = 0) -> list[Adapter]:
    """Return adapters a0, a1 ... in the dtype and on the device of the model."""
    draw = torch.Generator(model.device).manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=draw, device=model.device, dtype=torch.float32).mul_(0.02).to(model.dtype)

    shapes = {path: size for path, size in linear_shapes(model).items() if path.rpartition(".")[2] in targets}
    return [
        Adapter(
            f"a{index}",
            "base",
            {path: LoraPair(noise(rank, inner), noise(outer, rank), 2.0) for path, (inner, outer) in shapes.items()},
            Path(),
        )
        for index in range(count)
    ]


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token i is the word `wi`."""
    core = Tokenizer(models.WordLevel({f"w{index} ": index for index in range(size)}, unk_token="w0 "))
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


class WordEmbedder:
    """Random vectors of words; the newest weigh most, so that every token moves the weights."""

    id, dim = "words", DIM

    def __init__(self) -> None:
        self._table = np.random.default_rng(0).standard_normal((4096, DIM)).astype(np.float32)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors (B, D) of whole texts; each word weighs half of the next one."""
        summed = np.zeros((len(texts), DIM), np.float32)
        for index, text in enumerate(texts):
            for word in text.split()[-24:]:
                summed[index] = summed[index] * 0.5 + self._table[zlib.crc32(word.encode()) % len(self._table)]
        return summed / np.maximum(np.linalg.norm(summed, axis=1, keepdims=True), 1e-9)

    def follow(self, spans: object) -> None:
        """Keep no sum: each text is read anew."""

    def finish(self, views: Sequence[str]) -> np.ndarray:
        """Return the vectors (B, D) of texts."""
        return self.encode(views)

    def save(self, folder: Path) -> str:
        """Refuse."""
        raise NotImplementedError


def build_engine(model: Any, adapters: Sequence[Adapter], *, is_fast: bool = True) -> Engine:
    """Return an engine whose weights change with every token."""
    embedder = WordEmbedder()
    centroids = Centroids.empty(embedder.id, embedder.dim)
    draw = np.random.default_rng(1)
    for adapter in adapters:
        centroids = centroids.add(adapter.name, draw.standard_normal((4, DIM)).astype(np.float32))
    tokenizer = word_tokenizer(model.config.vocab_size)
    is_gpu = model.device.type == "cuda"
    engine = Engine(model, tokenizer, adapters, Router(centroids, embedder), is_fast=is_fast and is_gpu)
    if is_fast and not is_gpu:  # only to see that the scripts run
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


def cache_bytes(model: Any) -> int:
    """Return the bytes of one token's keys and values."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize


def step_of(ids: Tensor, pads: Sequence[int], weights: np.ndarray | None, cache: RowCache) -> PassInput:
    """Return one token of each row, ids (B,), behind a cache, under weights (B, N)."""
    rows = len(ids)
    lengths = [cache.length + 1 - pad for pad in pads]
    per_token = None if weights is None else weights[:, None]
    return PassInput(ids[:, None], pads, per_token, ["sum"] * rows, cache, [[]] * rows, lengths)
