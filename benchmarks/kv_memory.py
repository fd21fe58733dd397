"""Runs long requests under a budget of keys and values, and checks the answers and the process's memory.

`python benchmarks/kv_memory.py` prints a table: the budget, what the buffers took at most, how much the process grew.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import numpy as np
import torch
from model2vec import StaticModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
ROWS, PROMPT, TOKENS = 24, 600, 160
SIZES = {
    "vocab_size": 260,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
}


def peak() -> float:
    """Return the most MiB that the process has had."""
    return getrusage(RUSAGE_SELF).ru_maxrss / 1024


def measure(budget: int) -> None:
    """Run the requests under a budget in MiB; print what they took."""
    from treadle.common.params import RoutingParams, SamplingParams
    from treadle.engine.engine import Engine
    from treadle.routing.centroids import Centroids
    from treadle.routing.embedder import StaticEmbedder
    from treadle.routing.router import Router
    from treadle.serving.openai.jobs import Job, News, Work
    from treadle.serving.openai.loop import Loop
    from treadle.serving.openai.metrics import Metrics
    from treadle.serving.openai.params import ServeParams
    from treadle.serving.openai.targets import Routers

    from conftest import byte_tokenizer

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    core = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    embedder = StaticEmbedder(StaticModel(np.ones((1, 1), np.float32), core))
    router = Router(Centroids.empty(embedder.id, 1), embedder, RoutingParams.base())
    engine = Engine(model, byte_tokenizer(), [], router)
    prompts = [[(7 * row + step) % 256 for step in range(PROMPT - row)] for row in range(ROWS)]
    sampling, base = SamplingParams(max_tokens=TOKENS), RoutingParams.base()
    alone = [engine.generate_ids([each], sampling=sampling, routing=base)[0].token_ids for each in prompts]
    before, news, most = peak(), list[News](), 0.0
    loop = Loop(engine, Routers(engine).among, ServeParams(kv_memory=budget, prefix_cache=0), Metrics())
    jobs = [Job(Work([each], [sampling], base), news.append) for each in prompts]
    for job in jobs:
        loop.accept(job)
    while loop.is_busy:
        loop.advance()
        most = max(most, loop._memory.used(loop._batches, loop._reading) / 2**20)
    right = sum(tuple(e.token_id for e in job.rows[0].events) == a for job, a in zip(jobs, alone, strict=True))
    failed = sum(isinstance(each, Exception) for each in news)
    print(f"| {budget} | {most:.0f} | {peak() - before:.0f} | {right} of {ROWS} | {failed} |", flush=True)


def main() -> None:
    """Measure each budget in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=int, help="measure this budget here")
    one = parser.parse_args().one
    if one:
        return measure(one)
    print("| budget MiB | buffers MiB | process grew MiB | right answers | errors |\n|---|---|---|---|---|", flush=True)
    for budget in (40, 80, 4096):
        subprocess.run([sys.executable, __file__, "--one", str(budget)], check=True)
    return None


if __name__ == "__main__":
    main()
