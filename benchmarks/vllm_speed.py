"""Prints decoding in vLLM, blended against its base and against its own LoRA serving of one adapter.

    python benchmarks/vllm_speed.py [--batch 1 8 32] [--steps 40] [--dtype bfloat16] [--arms base qv ...]

All arms are engines in one process; a step of each is timed in turn (A B C A B C ...). In each round the first arm's
time is divided by this arm's, because a slow round slows both alike. The median over rounds, with quartiles, is the
share of the base's tokens a second. A row is marked if the first arm's quartiles lie more than a fifth of its median
apart.

`qv` is the demo's bundle (four adapters of rank 16 on q and v); `all` has four random adapters of rank 8 on all seven
linear layers; `lora-...` is vLLM's own serving of one of these adapters. Run in the environment of `make test-vllm`;
steps are eager unless --compile is given.
"""

import argparse
import os
import tempfile
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from treadle.bundle.base_model import quiet_libraries
from treadle.bundle.bundle import read_bundle, save_bundle
from treadle.common.files import locate
from treadle.experiments.timing import interleave

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO = Path(__file__).parents[1] / "demo" / "bundle"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = ["Question: A farmer has 3 fields. How many", "def largest(numbers):", "Which of these makes plants green?",
           "Context: The University of Padua was founded in 1222."]  # fmt: skip
ARMS = ("base", "qv", "all", "lora-qv", "lora-all")
RANKS = {"lora-qv": 16, "lora-all": 8}
"""The rank of the adapter that vLLM serves itself, and of its room for it."""
MAX_SPREAD = 0.2
"""The distance of the base's quartiles, as a share of its median, beyond which a row says little."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--compile", action="store_true", help="vLLM's compiled mode (minutes to start)")
    options = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        bundles = {"qv": DEMO, "all": random_bundle(Path(folder))}
        engines = {name: start(name, bundles, options) for name in options.arms}
        print(f"vLLM {__import__('vllm').__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
              f"{options.dtype}, {'compiled' if options.compile else 'eager'}")  # fmt: skip
        print(f"\n| batch | arm | ms a step (quartiles) | tokens/s | of {options.arms[0]}'s (quartiles) |")
        print("|---|---|---|---|---|")
        for batch in options.batch:
            for line in rows(measure(engines, batch, options.steps, folder), batch):
                print(line, flush=True)


def random_bundle(folder: Path) -> Path:
    """Write the demo's bundle with four random adapters of rank 8 on all linear layers in the place of its own."""
    demo = read_bundle(DEMO)
    for seed, adapter in enumerate(demo.adapters):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(locate(BASE), dtype=torch.float32)
        wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=ALL, task_type="CAUSAL_LM"))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.01)
        wrapped.peft_config["default"].base_model_name_or_path = demo.base_model
        wrapped.save_pretrained(folder / adapter.name, save_embedding_layers=False)
    adapters = {adapter.name: folder / adapter.name for adapter in demo.adapters}
    return save_bundle(folder / "bundle", base=demo.base_model, adapters=adapters, router=demo.router)


def start(arm: str, bundles: dict[str, Path], options: argparse.Namespace) -> LLM:
    """Start the engine of an arm."""
    given: dict[str, Any] = {}
    if arm in bundles:
        given["additional_config"] = {"treadle": {"bundle": str(bundles[arm])}}
    elif arm.startswith("lora"):
        given.update(enable_lora=True, max_lora_rank=RANKS[arm], max_loras=1)
    return LLM(
        locate(BASE), dtype=options.dtype, enforce_eager=not options.compile, max_model_len=512, disable_log_stats=True,
        kv_cache_memory_bytes=400 << 20, max_num_seqs=64, max_num_batched_tokens=512, enable_prefix_caching=False,
        **given,
    )  # fmt: skip


def rows(seconds: dict[str, list[float]], batch: int) -> list[str]:
    """Return the lines of the table for one batch."""
    first = next(iter(seconds.values()))
    low, _, high = quantiles(first, n=4)
    mark = " **unsteady**" if high - low > MAX_SPREAD * median(first) else ""
    made: list[str] = []
    for arm, each in seconds.items():
        shares = [base / own for base, own in zip(first, each, strict=True)]
        share = "1" if each is first else f"{spread(shares, 3)}{mark}"
        taken = spread([1000 * second for second in each], 1)
        made.append(f"| {batch} | {arm} | {taken} | {batch / median(each):.1f} | {share} |")
    return made


def spread(values: list[float], digits: int) -> str:
    """Return the median and the quartiles."""
    low, _, high = quantiles(values, n=4)
    return f"{median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def measure(engines: dict[str, LLM], batch: int, steps: int, folder: str) -> dict[str, list[float]]:
    """Return the seconds of each step of all engines, each with `batch` requests that decode."""
    sources = {"lora-qv": DEMO / "adapters" / "math", "lora-all": Path(folder) / "math"}
    for name, llm in engines.items():
        lora = LoRARequest("math", 1, str(sources[name])) if name in sources else None
        fill(llm, batch, steps + 10, lora)
    seconds = interleave({name: llm.llm_engine.step for name, llm in engines.items()}, steps, warm_up=4)
    for llm in engines.values():
        finish(llm)
    return seconds


def fill(llm: LLM, batch: int, tokens: int, lora: LoRARequest | None = None) -> None:
    """Add requests and read their prompts, so that the next steps decode all of them."""
    for index in range(batch):
        text = PROMPTS[index % len(PROMPTS)] + " " * (index // 4)
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        llm.llm_engine.add_request(f"{index}", text, params, lora_request=lora)
    core = llm.llm_engine.engine_core.engine_core
    while sum(each.num_output_tokens > 0 for each in core.scheduler.requests.values()) < batch:
        llm.llm_engine.step()


def finish(llm: LLM) -> None:
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


if __name__ == "__main__":
    main()
