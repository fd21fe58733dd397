"""Prints, for each causal architecture of transformers, whether treadle keeps its laws on it or refuses it by name.

    python benchmarks/architectures.py [--only llama phi3 ...] [--seconds 60] [--page docs/architectures.md]

Each model is random and tiny. Its adapters are made by PEFT on every linear layer that PEFT adapts. Laws: greedy text
and log-probabilities are those of transformers' own `generate` with the PEFT adapter active; rows of unequal length
share a pass; a prompt in chunks reads as a prompt at once; scores are those of generation. Each model runs in a
process of its own for at most --seconds. --page writes the verdicts, names grouped by verdict, as a page of the docs.
"""

import argparse
import copy
import logging
import multiprocessing
import re
import sys
import tempfile
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from treadle.common.errors import TreadleError
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.engine.prefix_cache import PrefixCache
from treadle.engine.scoring import score_ids
from treadle.lora.adapter import read_adapter
from treadle.lora.compatibility import linear_shapes
from treadle.routing.fitting import fit

import conftest

END, PAD = 257, 258
SIZES: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 96, "bos_token_id": 256, "eos_token_id": END,
    "pad_token_id": PAD, "sliding_window": 8, "attention_chunk_size": 8,
    # other names of the same
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "n_ctx": 96, "d_model": 32, "n_layers": 2,
    "n_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32, "rotary_dim": 4, "ffn_hidden_size": 48,
    "num_layers": 2, "n_inner": 48, "max_seq_len": 96, "decoder_layers": 2, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48, "embedding_size": 32, "is_decoder": True, "vocab_size_per_layer_input": 260,
    "hidden_size_per_layer_input": 8, "attention_types": [[["global", "local"], 1]], "window_size": 8,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "moe_topk": 2, "moe_num_experts": 4, "moe_k": 2,
    "shared_intermediate_size": 24, "expert_ffn_hidden_size": 16, "zero_expert_num": 1, "expert_interval": 1,
    # latent attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    "qk_head_dim": 16, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4,
    # states
    "state_size": 8, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_n_groups": 1, "mamba_dt_rank": 4, "conv_L_cache": 3, "time_step_rank": 4, "mamba_d_ssm": 64,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "attention_hidden_size": 32, "lru_width": 32, "attention_window_size": 8, "num_heads": 4,
    # factors that are made for other sizes
    "partial_rotary_factor": None, "rope_scaling": None,
}  # fmt: skip
"""Values of configuration fields that make a model tiny; a model takes those that its configuration knows."""
TOWERS = ("vision_config", "audio_config")
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
"""Parts of a model that read images and sound."""
DEFAULT_FIELDS = ("partial_rotary_factor", "rope_scaling", "num_heads")
"""Fields above that most models are better without; `MORE` says where they matter."""
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24, "factor": 4.0,
            "short_factor": [1.0] * 4, "long_factor": [4.0, 6.0, 8.0, 10.0]}  # fmt: skip
HYBRID = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16,
          "attention_hidden_size": 64}  # fmt: skip
STATES_FIRST = {"layer_types": ["linear_attention", "full_attention"]}
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen4_exp"), STATES_FIRST),
    "phi3-longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24},
    "phi3-long": {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 4},
                  "original_max_position_embeddings": 4},
    "llama-dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                      "max_position_embeddings": 48},
    "llama-yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                       "original_max_position_embeddings": 24}},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama-llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0,
                     "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": STATES_FIRST,
    "qwen3_next": STATES_FIRST,
    "qwen3_5_text": STATES_FIRST,
    "qwen3_5_moe_text": STATES_FIRST,
    "olmo_hybrid": STATES_FIRST,
    "kimi_linear": STATES_FIRST | {"mlp_layer_types": ["dense", "dense"], "num_key_value_heads": 4},
    "bailing_hybrid": STATES_FIRST | {"mlp_layer_types": ["dense", "dense"], "num_key_value_heads": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zamba": HYBRID,
    "zamba2": HYBRID | {"hybrid_layer_ids": [1, 3]},
    "nemotron_h": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "full_attention", "mlp"],
                   "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 2},
    "minimax": STATES_FIRST,
    # latent attention has no groups; PAD is no position
    **{kind: {"num_key_value_heads": 4} for kind in (
        "axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "sarvam_mla", "youtu")},
    **{kind: {"max_position_embeddings": 300} for kind in (
        "camembert", "data2vec-text", "prophetnet", "roberta", "roberta-prelayernorm", "xglm", "xlm-roberta",
        "xlm-roberta-xl", "xmod")},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "qwen4_exp_text": STATES_FIRST,
}  # fmt: skip
"""What some models need beyond `SIZES`; a name before a hyphen is an architecture, behind it one of its kinds."""
MODELS_WITHOUT_OUT_PROJ = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
"""PEFT adapts no out_proj of these."""
UNADAPTED = {"laguna": ("shared_experts.",)}
"""Layers whose factors PEFT writes and does not find again."""
SAMPLES = {"one": ["add three plus four", "the sum plus three"], "two": ["def loop return list", "return the list"]}
PROMPTS = [[5, 17, 40], [9, 9, 120, 33, 8, 1, 77, 200, 61, 99, 3, 250, 64, 7], [*range(40, 60)]]
"""Token ids of three rows; with what follows, the longest crosses every limit of length above."""
NUM_TOKENS = 12
OUTSIDE = {
    "not built": "not tried: the script's sizes make no tiny model of it",
    "not adapted by PEFT": "not tried: PEFT adapts none of its layers",
    "transformers itself fails": "not tried: transformers' own `generate` fails on it",
    "transformers itself differs": "not judged: transformers' own cache changes the text that `generate` gives",
    "its process died": "not tried: the script's sizes make no tiny model of it",
    "no verdict in time": "not tried: too slow for the script's time",
}
"""Verdicts that say nothing of treadle."""
INTRODUCTION = """# Which architectures run

Generated by `python benchmarks/architectures.py --page docs/architectures.md` with transformers {version}: all {count}
causal architectures that its auto-mapping knows, and some of their kinds (behind a hyphen). Each model is tiny and
random. Its two adapters are PEFT's, on every linear layer that PEFT adapts.

The laws: text and log-probabilities are those of transformers' own `generate` with the PEFT adapter active; rows of
unequal length share a pass; a prompt in chunks reads as a prompt at once; a kept prefix changes nothing; scores are
those of generation.

| verdict | count | architectures |
|---|---|---|"""


def configure(config_class: Any, more: dict[str, Any]) -> Any:
    """Make a tiny configuration; where the text model is a part, its towers are tiny, too."""
    known = config_class().to_dict()
    sizes = {key: value for key, value in SIZES.items() if key in known and key not in DEFAULT_FIELDS}
    parts = getattr(config_class, "sub_configs", {})
    if "text_config" in parts:
        sizes["text_config"] = configure(parts["text_config"], {}).to_dict()
        sizes |= {part: TOWER for part in parts if part in TOWERS}
    return config_class(**sizes | more)


def build(kind: str) -> Any:
    """Make the model, the same every time: random weights large enough to matter, biases that are not zero."""
    name = kind if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else kind.partition("-")[0]
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    torch.manual_seed(0)
    model = model_class(configure(model_class.config_class or transformers.CONFIG_MAPPING[name], MORE.get(kind, {})))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig(eos_token_id=END, pad_token_id=PAD)
    return model.eval()


def save_adapter(folder: Path, model: Any, seed: int, targets: list[str]) -> Path:
    """Let PEFT write a random adapter."""
    return conftest.save_adapter(folder, copy.deepcopy(model), seed, r=3 + seed, target_modules=targets, task_type=None)


def reference(model: Any, ids: list[int], *, use_cache: bool = True) -> tuple[list[int], torch.Tensor]:
    """Return what transformers' own `generate` gives, and the log-probabilities of its tokens."""
    done = model.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
        max_new_tokens=NUM_TOKENS, use_cache=use_cache, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    tokens = done.sequences[0, len(ids) :].tolist()
    logits = torch.cat(done.logits)
    return tokens, torch.log_softmax(logits, -1)[range(len(tokens)), tokens]


def chunked(
    engine: Engine, ids: list[int], sampling: SamplingParams, routing: RoutingParams, known: PrefixCache | None = None
) -> list[int]:
    """Return the tokens of a row whose prompt is read a few tokens at a time; with `known` after another like it."""
    batch = engine.new_batch(prefixes=known)
    beginnings = [ids[:17], ids] if known else [ids]
    for beginning in beginnings:
        (row,) = engine.new_rows([beginning], sampling=sampling, routing=routing)
        reading = batch.begin([row])
        while not reading.is_finished:
            batch.read(reading, 3)
        while not row.is_finished:
            batch.step()
    return [event.token_id for event in row.events]


def verdict(kind: str) -> str:
    """Try one architecture; return "right", or what is not."""
    try:
        model = build(kind)
    except Exception as error:  # whatever keeps transformers from making it is the verdict
        return f"not built: {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
    paths = {path for path in linear_shapes(model) if re.search(r"\.\d+\.", path)}
    names = sorted({".".join(path.split(".")[-2:]) for path in paths})  # PEFT maps bare names of experts
    if model.config.model_type in MODELS_WITHOUT_OUT_PROJ:
        names = [name for name in names if not name.endswith(".out_proj")]
    names = [name for name in names if not name.startswith(UNADAPTED.get(kind, ("\0",)))]
    where = Path(tempfile.mkdtemp())
    try:
        folders = [save_adapter(where / name, model, seed, names) for seed, name in enumerate(SAMPLES)]
    except Exception as error:
        return f"not adapted by PEFT: {str(error).splitlines()[0][:100]}"
    try:
        router = fit(SAMPLES, conftest.embedder_of(conftest.WORDS))
        adapters = [read_adapter(folder) for folder in folders]
        engine = Engine(copy.deepcopy(model), conftest.byte_tokenizer(), adapters, router)
    except TreadleError as error:
        return f"refused: {error}"
    peft = PeftModel.from_pretrained(copy.deepcopy(model), folders[0], adapter_name="one")
    peft.load_adapter(folders[1], adapter_name="two")
    peft.eval()
    try:
        expected = []
        for index, ids in enumerate(PROMPTS):
            peft.set_adapter(("one", "two")[index % 2])
            expected.append(reference(peft, ids))
            if expected[-1][0] != reference(peft, ids, use_cache=False)[0]:
                return "transformers itself differs: its cache changes the text"
    except Exception as error:
        return f"transformers itself fails: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return "; ".join(problems(engine, expected)) or "right"


def problems(engine: Engine, expected: list[tuple[list[int], torch.Tensor]]) -> list[str]:
    """Return the laws that do not hold."""
    sampling = SamplingParams(max_tokens=NUM_TOKENS)
    routings = [RoutingParams.one(("one", "two")[index % 2]) for index in range(len(PROMPTS))]
    together = engine.generate_ids(PROMPTS, sampling=sampling, routing=routings)
    found: list[str] = []
    for index, (ids, routing, (tokens, logprobs)) in enumerate(zip(PROMPTS, routings, expected, strict=True)):
        (one,) = engine.generate_ids([ids], sampling=sampling, routing=routing)
        text = list(one.token_ids)
        if text != tokens:
            found.append(f"row {index} is {text}, transformers' {tokens}")
        elif far(one.logprobs, logprobs.numpy()):
            found.append(f"row {index} has other log-probabilities than transformers'")
        if list(together[index].token_ids) != text or far(together[index].logprobs, one.logprobs):
            found.append(f"row {index} in a batch is another")
        if chunked(engine, ids, sampling, routing) != text:
            found.append(f"row {index} read in chunks is another text")
        if chunked(engine, ids, sampling, routing, PrefixCache(10**8)) != text:
            found.append(f"row {index} read from a prefix is another text")
        if far(score_ids(engine, [(ids, text)], routing)[0], one.logprobs):
            found.append(f"row {index} is scored otherwise")
    return found


def far(ours: Any, theirs: Any) -> bool:
    """Return whether log-probabilities (T) differ by more than rounding, in nats."""
    return len(ours) != len(theirs) or bool(abs(ours - theirs).max() > 2e-3)


def run_one(kind: str, said: Connection) -> None:
    """Send the verdict on one architecture; an unforeseen error is one."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        said.send(verdict(kind))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        line = (str(error).splitlines() or [""])[0][:140]
        said.send(f"ERROR {type(error).__name__}: {line} ({Path(place.filename).name}:{place.lineno})")


def page(verdicts: dict[str, str]) -> str:
    """Return a page of the documentation: a line for each verdict, with the architectures that have it."""
    groups: dict[str, list[str]] = {}
    for kind, found in verdicts.items():
        groups.setdefault(short(found), []).append(f"`{kind}`")
    lines = [
        f"| {told} | {len(kinds)} | {', '.join(kinds)} |"
        for told, kinds in sorted(groups.items(), key=lambda item: (rank(item[0]), -len(item[1])))
    ]
    return "\n".join([INTRODUCTION.format(version=transformers.__version__, count=len(verdicts)), *lines, ""])


def short(found: str) -> str:
    """Return a verdict without what differs from one architecture to the next."""
    if found == "right":
        return "all laws hold"
    if found.startswith("refused: the engine"):
        reasons = [
            re.sub(r"(engine's cache): .*", r"\1", line[4:]) for line in found.splitlines() if line.startswith("  - ")
        ]
        return f"`treadle.attach` blends its adapters, the engine refuses it: {'; '.join(reasons)}"
    if found.startswith("refused"):
        return f"refused: {found.removeprefix('refused: ').splitlines()[0].rstrip(':')}"
    for beginning, told in OUTSIDE.items():
        if found.startswith(beginning):
            return told
    return f"**a law fails**: {found.splitlines()[0]}"


def rank(told: str) -> int:
    """Return the place of a verdict on the page: what runs, what attaches, what is refused, the rest."""
    beginnings = ("all laws", "`treadle.attach`", "refused", "**")
    return next((place for place, each in enumerate(beginnings) if told.startswith(each)), len(beginnings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="architectures, by transformers' model types")
    parser.add_argument("--seconds", type=float, default=60, help="of one architecture")
    parser.add_argument("--page", type=Path, help="file that the verdicts are written to, grouped")
    options = parser.parse_args()
    verdicts: dict[str, str] = {}
    context = multiprocessing.get_context("fork")  # each starts with everything imported
    for kind in options.only or [
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *(kind for kind in MORE if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ]:
        hears, says = context.Pipe(duplex=False)
        process = context.Process(target=run_one, args=(kind, says))
        process.start()
        says.close()
        try:
            found = hears.recv() if hears.poll(options.seconds) else "no verdict in time"
        except EOFError:
            found = "its process died"
        process.kill()
        process.join()
        verdicts[kind] = found
        print(f"| {kind} | {found} |", flush=True)
    if options.page:
        options.page.write_text(page(verdicts), "utf-8")


if __name__ == "__main__":
    main()
