"""Reads a PEFT folder, and refuses features that cannot be blended, by name.

It reads only `adapter_config.json` and safetensors, so that PEFT itself, which takes seconds to import, is not needed.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from treadle.common.documents import is_file, read_object
from treadle.common.errors import SHOWN, AdapterError, AdapterWarning, problem_list, shown
from treadle.common.tensor_files import read_tensors
from treadle.lora.content import AdapterContent, content_problems
from treadle.lora.fused_names import fused_names, of_experts
from treadle.lora.initial import KNOWN_INITS
from treadle.lora.pair import LoraPair
from treadle.lora.patterns import match_ends
from treadle.lora.peft_tensors import PeftTensors, sort_tensors
from treadle.lora.vectors import LayerVectors
from treadle.lora.virtual_tokens import VIRTUAL_FIELDS, VIRTUAL_TYPES, read_virtual

MAX_CONFIG_BYTES = 16 << 20
CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FOREIGN_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".gguf")
"""Endings of files that only `treadle convert` reads."""

PEFT_TYPES = ("LORA", "IA3", *VIRTUAL_TYPES)
REFUSED_FEATURES = {
    "trainable_token_indices": "it replaces rows of the embedding, which cannot be blended; train without it",
    "layer_replication": "it changes the number of layers of the base model; train on a base that has them",
    "alora_invocation_tokens": "an activated LoRA acts only after its invocation tokens; train a plain one",
    "use_qalora": "QA-LoRA pools its input; the factors do not fit the layer; train a plain LoRA",
    "use_bdlora": "BD-LoRA keeps its factors in blocks; train a plain LoRA",
    "arrow_config": "it is an Arrow router, not an adapter; name the adapters behind it",
    "kasa_config": "KaSA changes the base weights; train a plain LoRA",
    "monteclora_config": "MonteCLoRA samples its weights; train a plain LoRA",
}
"""Fields of PEFT's configs that ask for more than factors and vectors, with the reason for refusing them."""
REFUSED_INITS = {
    "pissa": "its initial factors were found by a random method, so they cannot be found again",
    "corda": "its initial factors follow from data, which the folder does not hold",
    "loftq": "training began from a quantised base, so the factors alone are not the update",
}
"""Beginnings of `init_lora_weights` that change the base weights too, with the reason for refusing them.

PEFT reloads EVA and LoRA-GA as plain LoRA, and so they are read.
"""
HARMLESS_FIELDS = frozenset(
    "peft_type peft_version auto_mapping base_model_name_or_path revision task_type inference_mode r target_modules "
    "target_parameters exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora use_dora lora_bias "
    "modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config "
    "megatron_core loftq_config eva_config corda_config lora_ga_config velora_config qalora_group_size runtime_config "
    "ensure_weight_tying feedforward_modules init_ia3_weights".split()
)
"""Fields that are read here, or that matter only to training."""


def read_peft_folder(folder: Path, name: str) -> AdapterContent:
    """Read a PEFT folder with `adapter_config.json` and `adapter_model.safetensors`.

    `target_modules` and the like are what training asked for, and are not read: the tensors say what was trained.

    Raises:
        AdapterError: it is incomplete, damaged, or cannot be blended; lists every problem.
    """
    config = _read_config(folder, name)
    check_config(config, name, folder / CONFIG_FILE)
    return peft_content(config, _read_tensors(folder, name), name, folder)


def peft_content(config: dict[str, Any], tensors: dict[str, Tensor], name: str, place: Path) -> AdapterContent:
    """Return the content of an adapter whose config `check_config` has checked; `place` is named in errors.

    Raises:
        AdapterError: it is damaged, or cannot be blended; lists every problem.
    """
    is_virtual = config.get("peft_type") in VIRTUAL_TYPES
    known = HARMLESS_FIELDS | REFUSED_FEATURES.keys() | (VIRTUAL_FIELDS if is_virtual else frozenset())
    unknown = sorted(key for key in config.keys() - known if config[key])
    if unknown:
        what = f"adapter {name!r}: unknown fields that may matter: {', '.join(unknown)}"
        warnings.warn(what, AdapterWarning, stacklevel=4)
    base = config.get("base_model_name_or_path") or ""
    if is_virtual:
        virtual, problems = read_virtual(tensors, config)
        if problems:
            raise AdapterError(problem_list(f"adapter {name!r} ({place}) cannot be blended:", problems))
        return AdapterContent(base, {}, virtual=virtual)
    found = sort_tensors(tensors)
    pairs = _pairs(found, config)
    vectors = _vectors(found, pairs, config)
    tensor_problems = found.problems or content_problems(pairs, vectors, found.weights)
    if problems := [*_config_problems(config), *tensor_problems]:
        raise AdapterError(problem_list(f"adapter {name!r} ({place}) cannot be blended:", problems))
    return AdapterContent(base, pairs, vectors, _initial(config) or "", found.weights)


def _initial(config: dict[str, Any]) -> str | None:
    """Return how training began, if the initial factors follow from the base's weights alone; else None."""
    init = str(config.get("init_lora_weights")).lower()
    return init if init in KNOWN_INITS else None


def _by_beginning(reasons: Mapping[str, str], init: Any) -> str | None:
    """Return the reason for refusing an `init_lora_weights`; None if it is not refused."""
    return next((why for name, why in reasons.items() if str(init).lower().startswith(name)), None)


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not is_file(file):
        what = f"adapter {name!r}: {folder} is not a PEFT folder: it has no {CONFIG_FILE}."
        raise AdapterError(what + convert_hint(folder))
    try:
        return read_object(file, AdapterError, MAX_CONFIG_BYTES)
    except AdapterError as error:
        raise AdapterError(f"adapter {name!r}: {error}; save or download it again") from error


def check_config(config: dict[str, Any], name: str, file: Path) -> None:
    """Raise an AdapterError if a config, read from `file`, is of another kind than PEFT_TYPES, or malformed."""
    if (kind := config.get("peft_type", "LORA")) not in PEFT_TYPES:
        allowed = ", ".join(PEFT_TYPES)
        what = f"adapter {name!r}: its peft_type is {str(kind)[:SHOWN]}; {allowed} can be blended."
        way = f"treadle convert {file.parent} -o NEW --base BASE makes a LoRA of most kinds, and tells the error"
        raise AdapterError(f"{what} What to do: {way}.")
    if malformed := list(_malformed_fields(config)):
        raise AdapterError(problem_list(f"adapter {name!r}: {file} is malformed:", malformed))


def convert_hint(folder: Path) -> str:
    """Return the way to read another program's files in a folder; "" if it holds none."""
    others = [each.name for each in sorted(folder.glob("*")) if each.suffix in FOREIGN_SUFFIXES and is_file(each)]
    if not others:
        return ""
    pickle = " is a pickle, which can run code" if others[0] == PICKLE_FILE else " is another program's"
    return f" {others[0]}{pickle}: treadle convert {folder} -o NEW makes a PEFT folder of it."


def _malformed_fields(config: dict[str, Any]) -> Iterator[str]:
    """Yield a problem for each field whose value the rest of this module could not read."""
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        yield f"base_model_name_or_path must be a text, not {shown(base)}"
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
        yield f"target_parameters must be a list of names, not {shown(targets)}"
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key) or {}
        if not isinstance(value, dict) or not all(map(_is_positive, value.values())) or "" in value:
            yield f"{key} must map module names or regular expressions to positive numbers, not {shown(value)}"


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _config_problems(config: dict[str, Any]) -> Iterator[str]:
    yield from (f"{key}: {why}" for key, why in REFUSED_FEATURES.items() if config.get(key))
    init = config.get("init_lora_weights")
    reason = _by_beginning(REFUSED_INITS, init)
    if reason and _initial(config) is None:
        yield f"init_lora_weights={init!r}: {reason}; save it as a plain LoRA with PEFT first"
    for key in ("r", "lora_alpha") if config.get("peft_type", "LORA") == "LORA" else ():
        if not _is_positive(config.get(key)):
            yield f"{key} must be a positive number, not {shown(config.get(key))}"


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    file = folder / WEIGHTS_FILE
    if not is_file(file):
        raise AdapterError(f"adapter {name!r}: {folder} has no {WEIGHTS_FILE}.{convert_hint(folder)}")
    try:
        return read_tensors(file, AdapterError).tensors
    except AdapterError as error:
        raise AdapterError(f"adapter {name!r}: {error}; save or download it again") from error


def _pairs(found: PeftTensors, config: dict[str, Any]) -> dict[str, LoraPair]:
    """Return the factor pairs of all modules; problems are added to `found`."""
    fused = fused_names(list(found.factors), config.get("target_parameters") or [])
    sides = {fused.get(module, module): factors for module, factors in found.factors.items()}
    try:
        ranks = _by_pattern(config, "rank_pattern", "r", list(sides))
        alphas = _by_pattern(config, "alpha_pattern", "lora_alpha", list(sides))
    except AdapterError as error:
        found.problems.append(str(error))
        return {}
    pairs: dict[str, LoraPair] = {}
    for (module, factors), rank, alpha in zip(sides.items(), ranks, alphas, strict=True):
        if problem := _pair_problem(module, factors, rank, is_fused=module in fused.values()):
            found.problems.append(problem)
            continue
        a, b, scale = factors["A"], factors["B"], _scale(alpha, rank, config)
        pairs[module] = of_experts(a, b, scale, int(rank)) if module in fused.values() else LoraPair(a, b, scale)
    return pairs


def _vectors(found: PeftTensors, pairs: Mapping[str, LoraPair], config: dict[str, Any]) -> dict[str, LayerVectors]:
    """Return the vectors of all modules; problems are added to `found`."""
    switches = {"magnitude": "use_dora", "update_bias": "lora_bias"}
    vectors: dict[str, LayerVectors] = {}
    for module, given in found.vectors.items():
        for name, switch in switches.items():
            if name in given and (not config.get(switch) or module not in pairs):
                why = (
                    f"its config does not say {switch}; correct it"
                    if module in pairs
                    else "it has no factors beside it; save it again"
                )
                found.problems.append(f"{module}: {name.replace('_', ' ')}: {why}")
        made = dict[str, Tensor | None](magnitude=given.get("magnitude"), whole_bias=given.get("whole_bias"))
        if "update_bias" in given and module in pairs:
            made["bias"] = given["update_bias"].float() * pairs[module].scale
        if (scale := given.get("ia3")) is not None:
            made["in_scale" if len(scale) == 1 else "out_scale"] = scale.flatten()  # (1, in) or (out, 1)
        vectors[module] = LayerVectors(**made)
    if config.get("use_dora"):
        bare = [module for module in pairs if "magnitude" not in found.vectors.get(module, {})]
        found.problems.extend(
            f"{module}: use_dora: lora_magnitude_vector is missing; save it again, or correct use_dora"
            for module in bare
        )
    return vectors


def _pair_problem(module: str, factors: dict[str, Tensor], expected: Any, *, is_fused: bool) -> str | None:
    if len(factors) < 2:
        missing = "B" if "A" in factors else "A"
        return f"{module}: lora_{missing} is missing; save or download it again"
    a, b = factors["A"], factors["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        shapes = f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}"
        return f"{module}: {shapes} do not fit: need (r, in), (out, r); save it again"
    if is_fused and _is_positive(expected) and a.shape[0] % expected == 0:
        return None  # the rank is that of one expert
    if a.shape[0] != expected:
        return f"{module}: its factors have rank {a.shape[0]}, its config says {expected}; correct r or rank_pattern"
    return None


def _scale(alpha: Any, rank: Any, config: dict[str, Any]) -> float:
    if not _is_positive(alpha):
        return 1.0  # reported by _config_problems
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _by_pattern(config: dict[str, Any], field: str, otherwise: str, modules: Sequence[str]) -> list[Any]:
    """Return for each module the value of the first matching pattern of `field`, or the value of `otherwise`."""
    patterns: dict[str, Any] = config.get(field) or {}
    values, default = list(patterns.values()), config.get(otherwise)
    try:
        return [default if first is None else values[first] for first in match_ends(list(patterns), modules)]
    except AdapterError as error:
        raise AdapterError(f"{field}: {error}") from error
