"""Compares a small engine of the installed vLLM with the plain formula: `treadle doctor --vllm`."""

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import run
from typing import Any

from treadle.common.errors import ModelError, TreadleError

TOLERANCE_NATS = 1e-3
"""The largest difference between vLLM's log-probabilities and the formula's."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WEIGHTS = {"one": 0.7, "two": 1.2}
IDS = list(range(40, 72))


@dataclass(frozen=True)
class VllmReport:
    """The result of an examination of the installed vLLM; it is healthy if `problems` is empty.

    Attributes:
        version: the version of vLLM.
        known: version -> what has been run on it.
        problems: hook points that have moved, or how far the self-test is off.
        difference: the largest difference in nats from the formula; None = not run.
        change: how far, in nats, the adapters move the same log-probabilities.
    """

    version: str
    known: Mapping[str, str]
    problems: tuple[str, ...]
    difference: float | None = None
    change: float | None = None


def examine_vllm() -> VllmReport:
    """Check the hook points, then run one forward and compare it with the formula.

    Raises:
        ModelError: vLLM is not installed.
    """
    try:
        from treadle.serving.vllm.support import VERSIONS, version_problems, vllm_version

        version = vllm_version()
    except ImportError as error:
        raise ModelError(f"vLLM is not installed ({error}): pip install 'treadle[vllm]', see docs/vllm.md") from error
    problems = version_problems()
    if problems:
        return VllmReport(version, VERSIONS, tuple(problems))
    found = _in_a_process_of_its_own()
    if "error" in found:
        return VllmReport(version, VERSIONS, (f"the self-test did not run: {found['error']}",))
    difference, change = float(found["difference"]), float(found["change"])
    if not difference < TOLERANCE_NATS < change:
        problems = [f"a forward is off by {difference:.3g} nats; the adapters change it by {change:.3g}"]
    return VllmReport(version, VERSIONS, tuple(problems), difference, change)


def _in_a_process_of_its_own() -> dict[str, Any]:
    """Run the comparison in a process that ends, because vLLM keeps what it starts."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    environment.pop("VLLM_PLUGINS", None)
    done = run(
        [sys.executable, "-W", "ignore", "-m", __name__], capture_output=True, text=True, env=environment, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(lines[-1])


def compare(folder: Path) -> dict[str, float]:
    """Return the largest difference (nats) between vLLM's log-probabilities and merged weights', and the change."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    bundle = _write(folder, model)
    before = _logprobs(model)
    _merge(model, folder)
    expected = _logprobs(model)
    options = {"treadle": {"bundle": str(bundle)}}
    llm = LLM(
        str(folder / "base"), dtype="float32", enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=32 << 20,
        additional_config=options, disable_log_stats=True,
    )  # fmt: skip
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, extra_args={"treadle": WEIGHTS})
    (output,) = llm.generate([{"prompt_token_ids": IDS}], params, use_tqdm=False)
    found = torch.tensor([each[token].logprob for each, token in zip(output.prompt_logprobs[1:], IDS[1:], strict=True)])
    return {"difference": float((found - expected).abs().max()), "change": float((before - expected).abs().max())}


def _write(folder: Path, model: Any) -> Path:
    """Write the model, two random adapters of unequal ranks, and a bundle of them."""
    import numpy as np
    import torch
    from model2vec import StaticModel
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from treadle.bundle.bundle import save_bundle
    from treadle.routing.embedder import StaticEmbedder
    from treadle.routing.fitting import fit

    model.save_pretrained(folder / "base")
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder / "base")
    layers = {name: each for name, each in model.named_modules() if name.rpartition(".")[2] in TARGETS}
    for rank, name in enumerate(WEIGHTS, 3):
        factors: dict[str, torch.Tensor] = {}
        for path, layer in layers.items():
            factors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, layer.in_features) * 0.1
            factors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(layer.out_features, rank) * 0.1
        (folder / name).mkdir()
        save_file(factors, folder / name / "adapter_model.safetensors")
        document = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(TARGETS),
                    "base_model_name_or_path": "base"}  # fmt: skip
        (folder / name / "adapter_config.json").write_text(json.dumps(document))
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    embedder = StaticEmbedder(StaticModel(np.eye(3, 4, dtype=np.float32), words))
    router = fit({name: [name, name] for name in WEIGHTS}, embedder)
    adapters = {name: folder / name for name in WEIGHTS}
    return save_bundle(folder / "bundle", base=str(folder / "base"), adapters=adapters, router=router)


def _merge(model: Any, folder: Path) -> None:
    """Add sum_i w_i s_i B_i A_i to the weights themselves: the plain formula, without any stack."""
    from treadle.lora.adapter import read_adapter

    for name, weight in WEIGHTS.items():
        for path, pair in read_adapter(folder / name).pairs.items():
            model.get_submodule(path).weight.data += weight * pair.scale * (pair.b @ pair.a)


def _logprobs(model: Any) -> Any:
    """Return the log-probability of each token of the text after the first, (T - 1,)."""
    import torch

    ids = torch.tensor([IDS])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)  # (T - 1, V)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0]


def main() -> None:
    """Print the comparison as one line of JSON."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            print(json.dumps(compare(Path(folder))), flush=True)
        except TreadleError as error:
            print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main()
