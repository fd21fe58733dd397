"""Gives the tensors of other programs the names that PEFT writes.

program        names (module = path inside the base, N = number of the layer)
older PEFT     module.lora_A.default.weight, module.lora_A (loralib), with base_model.model. before it or not
diffusers      text_encoder.module.lora_A.weight, lora_linear_layer.down.weight; also lora_down.weight and alpha
torchtune      layers.N.attn.q_proj.lora_a.weight (torchtune/models/convert_weights.py, tune_to_peft_adapter_weights)
NeMo 2 and     decoder.layers.N.self_attention.linear_qkv.adapter.linear_in.weight; canonical LoRA has .adapter_q behind
Megatron       .adapter (nemo/collections/llm/gpt/model/llama.py and llama_nemotron.py, convert_state; Megatron-Bridge's
               models/conversion/peft_bridge.py)
NeMo 1         model.decoder.layers.N.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight
               (scripts/nlp_language_modeling/merge_lora_weights/merge.py)

Megatron's queries, keys and values are one module, group by group: the queries of a group, its key, its value.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from treadle.common.errors import AdapterError, problem_list
from treadle.lora.rotary_rows import num_heads, to_halves

OUTER = re.compile(
    r"^(?:base_model\.model\.)?(?:(?:text_encoder(?:_\d)?|transformer)\.(?=(?:model\.)?layers\.|lm_head\.))?"
)
"""Beginnings of names before a path; diffusers names the part of its pipeline."""
SPELLINGS = (
    (re.compile(r"\.(?:lora_down|lora\.down|lora_linear_layer\.down)\.weight$"), ".lora_A.weight"),
    (re.compile(r"\.(?:lora_up|lora\.up|lora_linear_layer\.up)\.weight$"), ".lora_B.weight"),
    (re.compile(r"\.lora_([AB])$"), r".lora_\1.weight"),
    (re.compile(r"\.lora_([AB])\.(?!weight$|bias$)[^.]+\.(weight|bias)$"), r".lora_\1.\2"),
    (re.compile(r"\.lora_embedding_([AB])\.[^.]+$"), r".lora_embedding_\1"),
    (re.compile(r"\.lora_magnitude_vector\.(?:[^.]+\.)?weight$"), ".lora_magnitude_vector"),
    (re.compile(r"\.ia3_l\.[^.]+$"), ".ia3_l"),
)
"""Endings of names, and PEFT's own; the name of an adapter inside a name is left out."""
ALPHA = re.compile(r"(?P<module>.+?)(?:\.lora)?\.alpha")
TORCHTUNE = re.compile(r"(?:(?P<layer>layers\.\d+)\.)?(?P<name>[\w.]+)\.(?P<part>lora_a|lora_b|magnitude)(?:\.weight)?")
TORCHTUNE_NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
TORCHTUNE_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
IN_PAIRS, IN_HALVES = ("llama", "mistral", "gemma"), ("qwen2", "qwen3")
"""Types of bases whose queries and keys torchtune keeps in another order of rows (`rotary_rows`), and in the same."""
MEGATRON = re.compile(
    r"(?:.+\.)?layers\.(?P<layer>\d+)\.(?:self_attention|mlp)\."
    r"(?:linear_(?P<new>qkv|proj|fc1|fc2)\.adapter(?:\.adapter_(?P<new_part>\w+))?"
    r"|adapter_layer\.lora_(?:unfused_)?(?P<old>kqv|dense_attention|hto4h|4htoh)_adapter(?:\.(?P<old_part>\w+)_adapter)?)"
    r"\.linear_(?P<side>in|out)\.weight"
)
QUERIES = {each: f"self_attn.{each}_proj" for each in "qkv"}
GATES = {each: f"mlp.{each}_proj" for each in ("gate", "up")}
OUTPUT, DOWN = {"": "self_attn.o_proj"}, {"": "mlp.down_proj"}
MEGATRON_NAMES = {
    "qkv": QUERIES, "proj": OUTPUT, "fc1": GATES, "fc2": DOWN,
    "kqv": QUERIES, "dense_attention": OUTPUT, "hto4h": GATES, "4htoh": DOWN,
}  # fmt: skip
"""Names of Megatron's modules -> parts -> our names; a tensor that names no part is of all of them."""


@dataclass(frozen=True)
class NamedTensors:
    """Tensors by PEFT's names.

    Attributes:
        program: whose names they had.
        tensors: name in a PEFT file -> tensor.
        alphas: module path -> its alpha, where it lay beside the factors.
    """

    program: str
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    alphas: dict[str, float] = field(default_factory=dict[str, float])


def peft_names(tensors: Mapping[str, Tensor], config: Any = None) -> NamedTensors:
    """Return the tensors of an adapter under PEFT's names.

    Args:
        tensors: by the names of one of the programs above.
        config: transformers' configuration of the base's text model; rows of queries and keys may need it.

    Raises:
        AdapterError: a name is unknown among the others of its program, or the base is needed and not given.
    """
    if any(key.endswith((".lora_a.weight", ".lora_b.weight")) for key in tensors):
        return _each("torchtune", tensors, lambda key, tensor: _from_torchtune(key, tensor, config))
    if any(map(MEGATRON.fullmatch, tensors)):
        return _each("Megatron", tensors, lambda key, tensor: _from_megatron(key, tensor, config))
    return _from_peft(tensors)


def _each(
    program: str, tensors: Mapping[str, Tensor], rename: Callable[[str, Tensor], dict[str, Tensor]]
) -> NamedTensors:
    """Return a program's tensors renamed one by one; one error lists all that cannot be."""
    found, problems = NamedTensors(program), list[str]()
    for key, tensor in tensors.items():
        try:
            found.tensors.update(rename(key, tensor))
        except AdapterError as error:
            problems.append(str(error))
    if problems:
        head = f"these tensors of {program} have no place in a PEFT adapter of a Llama-like base:"
        raise AdapterError(problem_list(head, list(dict.fromkeys(problems))))
    return found


def _from_peft(tensors: Mapping[str, Tensor]) -> NamedTensors:
    found = NamedTensors("PEFT")
    for key, tensor in tensors.items():
        name = OUTER.sub("", key)
        alpha = ALPHA.fullmatch(name)
        if alpha and tensor.numel() == 1:
            found.alphas[alpha["module"]] = float(tensor)
            continue
        for pattern, ending in SPELLINGS:
            name = pattern.sub(ending, name)
        found.tensors[f"base_model.model.{name}"] = tensor
    return found


def _from_torchtune(key: str, tensor: Tensor, config: Any) -> dict[str, Tensor]:
    match = TORCHTUNE.fullmatch(key)
    name = match and ("lm_head" if match["name"] == "output" else TORCHTUNE_NAMES.get(match["name"]))
    if not match or not name or (match["layer"] is None) != (name == "lm_head"):
        raise AdapterError(f"{key} {tuple(tensor.shape)}")
    module = f"model.{match['layer']}.{name}" if match["layer"] else name
    if match["part"] != "lora_a" and name.endswith(("q_proj", "k_proj")):
        tensor = _in_halves(module, tensor, config)
    return {f"base_model.model.{module}.{TORCHTUNE_PARTS[match['part']]}": tensor}


def _in_halves(module: str, rows: Tensor, config: Any) -> Tensor:
    """Return torchtune's rows (out, ...) of queries or keys in transformers' order."""
    if config is None:
        raise AdapterError("torchtune orders the rows of queries and keys by heads: give the base (--base)")
    if config.model_type in IN_HALVES:
        return rows
    if config.model_type not in IN_PAIRS:
        known = ", ".join(IN_PAIRS + IN_HALVES)
        raise AdapterError(f"a base of type {config.model_type!r}: its order of rows is not known; known are {known}")
    heads = num_heads(module, config)
    if not heads or len(rows) % (2 * heads):
        raise AdapterError(f"{module}: {tuple(rows.shape)} does not divide into the {heads} heads of the base")
    return to_halves(rows, heads)


def _from_megatron(key: str, tensor: Tensor, config: Any) -> dict[str, Tensor]:
    match = MEGATRON.fullmatch(key)
    names = match and MEGATRON_NAMES[match["new"] or match["old"]]
    part = match and (match["new_part"] or match["old_part"])
    if not match or not names or (part and part not in names):
        raise AdapterError(f"{key} {tuple(tensor.shape)}")
    chosen = {part: names[part]} if part else names
    if match["side"] == "in" or len(chosen) == 1:
        rows = dict.fromkeys(chosen, tensor)
    elif names is GATES:
        rows = dict(zip(names, tensor.chunk(2), strict=True))
    else:
        rows = _ungrouped(key, tensor, config)
    side = {"in": "A", "out": "B"}[match["side"]]
    return {
        f"base_model.model.model.layers.{match['layer']}.{chosen[each]}.lora_{side}.weight": own.clone()
        for each, own in rows.items()
    }


def _ungrouped(key: str, fused: Tensor, config: Any) -> dict[str, Tensor]:
    """Return the rows of queries, keys and values out of Megatron's groups (groups * (heads + 2) * size, r)."""
    if config is None:
        raise AdapterError("Megatron keeps queries, keys and values in one module: give the base (--base)")
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if len(fused) != (heads + 2 * groups) * size:
        raise AdapterError(f"{key} {tuple(fused.shape)}: the base needs {(heads + 2 * groups) * size} rows")
    grouped = fused.reshape(groups, heads // groups + 2, size, -1)
    queries, keys, values = grouped.split([heads // groups, 1, 1], 1)
    return {name: each.reshape(-1, fused.shape[1]) for name, each in zip("qkv", (queries, keys, values), strict=True)}
