"""Reads a PEFT LoRA folder into an `Adapter`, and refuses features that cannot be blended, by name.

It reads only `adapter_config.json` and safetensors, so that PEFT itself, which takes seconds to import, is not needed.
It does not know models: `treadle.lora.compatibility` compares an adapter with one. An adapter of another type is read
here into the same `LoraPair`s.
"""

import hashlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from treadle.common.documents import is_file, read_object
from treadle.common.errors import SHOWN, AdapterError, problem_list, shown
from treadle.common.tensor_files import read_tensors
from treadle.lora.pair import LoraPair, range_problems
from treadle.lora.patterns import match_ends, match_whole

MAX_CONFIG_BYTES = 16 << 20
CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

REFUSED_FEATURES = {
    "use_dora": "DoRA rescales the base weights, which is not a sum of updates",
    "modules_to_save": "it replaces whole modules of the base model, which cannot be blended",
    "trainable_token_indices": "it replaces rows of the embedding, which cannot be blended",
    "lora_bias": "it adds a bias to the update; train it without",
    "layer_replication": "it changes the number of layers of the base model",
    "target_parameters": "it adapts parameters that do not belong to a linear layer",
    "alora_invocation_tokens": "an activated LoRA acts only after its invocation tokens",
    "use_qalora": "QA-LoRA pools its input; the factors do not fit the layer",
    "use_bdlora": "BD-LoRA keeps its factors in blocks",
    "arrow_config": "it is an Arrow router, not an adapter; name the adapters behind it",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples its weights",
}
"""Fields of PEFT's LoraConfig that do more than add low-rank updates, with the reason for refusing them."""
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` that change the base weights too, so that the factors alone are not the update."""
HARMLESS_FIELDS = frozenset(
    "peft_type peft_version auto_mapping base_model_name_or_path revision task_type inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora init_lora_weights layers_to_transform "
    "layers_pattern rank_pattern alpha_pattern megatron_config megatron_core loftq_config eva_config corda_config "
    "lora_ga_config velora_config qalora_group_size runtime_config ensure_weight_tying".split()
)
"""Fields that are read here, or that matter only to training."""
BASE_WEIGHT = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+?)(?:\.base_layer)?\.weight$")
"""A whole weight. PEFT saves the base's own beside factors of the head, or if the vocabulary was resized."""
MATRIX_AXES = 2
TENSOR_NAME = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?!weight$)[^.]+)?\.weight$"
)
LAYER_INDEX = re.compile(r".*?\.[^.]*\.(\d+)\.")
"""The number of the layer in a module path, by PEFT's rule."""


@dataclass(frozen=True)
class Adapter:
    """One PEFT LoRA adapter: a named set of factor pairs.

    Attributes:
        name: used by routing, results and the command line.
        base_model: named in its config.
        pairs: module path inside the base model -> its factors.
        source: the folder it was read from.
        targets: `target_modules` of its config: module names, or a regular expression.
        excluded: `exclude_modules` of its config, in the same form.
        layers: `layers_to_transform` of its config; None = all.
        weights: module path -> whole weight (out, in) saved beside the factors; it must equal the base's.
        identity: a digest of factors and scales, whatever the name; unique for an adapter made in memory.
    """

    name: str
    base_model: str
    pairs: Mapping[str, LoraPair]
    source: Path
    targets: tuple[str, ...] | str = ()
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor], compare=False, repr=False)
    identity: str = field(default_factory=lambda: uuid4().hex, compare=False, repr=False)

    def declared(self, modules: Sequence[str]) -> list[str]:
        """Return the module paths that the config targets, by PEFT's rules.

        Raises:
            AdapterError: a regular expression takes too much time or memory.
        """
        excluded = _matched(self.excluded, modules)
        return [
            module
            for module, is_target, is_excluded in zip(modules, _matched(self.targets, modules), excluded, strict=True)
            if is_target and not is_excluded and self._has_layer(module)
        ]

    def _has_layer(self, module: str) -> bool:
        if self.layers is None:
            return True
        index = LAYER_INDEX.match(module)
        return index is not None and int(index[1]) in self.layers

    def num_bytes(self) -> int:
        """Return the size of all factors in bytes."""
        return sum(t.numel() * t.element_size() for pair in self.pairs.values() for t in (pair.a, pair.b))


def read_adapter(path: str | Path, name: str | None = None) -> Adapter:
    """Read a PEFT LoRA folder.

    Args:
        path: the folder with `adapter_config.json` and `adapter_model.safetensors`.
        name: of the adapter; None takes the folder's name.

    Raises:
        AdapterError: it is incomplete, damaged, or cannot be blended; lists every problem.
    """
    folder = Path(path)
    name = name or folder.resolve().name
    config = _read_config(folder, name)
    unknown = sorted(key for key in config.keys() - HARMLESS_FIELDS - REFUSED_FEATURES.keys() if config[key])
    if unknown:
        warnings.warn(f"adapter {name!r}: unknown fields that may matter: {', '.join(unknown)}", stacklevel=2)
    tensors = _read_tensors(folder, name)
    weights = _take_weights(tensors)
    pairs, tensor_problems = _pair_up(tensors, config)
    problems = [*_config_problems(config), *tensor_problems, *_selection_problems(config, list(pairs))]
    if problems:
        raise AdapterError(problem_list(f"adapter {name!r} ({folder}) cannot be blended:", problems))
    layers = config.get("layers_to_transform")
    return Adapter(
        name=name,
        base_model=config.get("base_model_name_or_path") or "",
        pairs=pairs,
        source=folder,
        targets=_pattern(config.get("target_modules")),
        excluded=_pattern(config.get("exclude_modules")),
        layers=None if layers is None else tuple([layers] if isinstance(layers, int) else layers),
        weights=weights,
        identity=_identity(pairs),
    )


def _identity(pairs: Mapping[str, LoraPair]) -> str:
    """Return a digest of the factors and scales of all modules."""
    digest = hashlib.sha256()
    for module, pair in sorted(pairs.items()):
        digest.update(f"{module} {pair.scale} {pair.rank} {pair.a.dtype} {pair.b.dtype}".encode())
        for factor in (pair.a, pair.b):
            digest.update(factor.contiguous().view(torch.uint8).numpy().data)  # hashed without a copy
    return digest.hexdigest()


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not is_file(file):
        raise AdapterError(f"adapter {name!r}: {folder} is not a PEFT folder: it has no {CONFIG_FILE}.")
    try:
        config = read_object(file, AdapterError, MAX_CONFIG_BYTES)
    except AdapterError as error:
        raise AdapterError(f"adapter {name!r}: {error}") from error
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise AdapterError(f"adapter {name!r}: its peft_type is {str(kind)[:SHOWN]}; only LORA can be blended.")
    if malformed := list(_malformed_fields(config)):
        raise AdapterError(problem_list(f"adapter {name!r}: {file} is malformed:", malformed))
    return config


def _malformed_fields(config: dict[str, Any]) -> Iterator[str]:
    """Yield a problem for each field whose value the rest of this module could not read."""
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        yield f"base_model_name_or_path must be a text, not {shown(base)}"
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key) or {}
        if not isinstance(value, dict) or not all(map(_is_positive, value.values())) or "" in value:
            yield f"{key} must map module names or regular expressions to positive numbers, not {shown(value)}"
    for key in ("target_modules", "exclude_modules"):
        value = config.get(key) or []
        if not isinstance(value, str) and not (
            isinstance(value, list) and all(isinstance(name, str) for name in value)
        ):
            yield f"{key} must be a list of module names or a regular expression, not {shown(value)}"
    layers = config.get("layers_to_transform")
    listed = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(type(layer) is int for layer in listed):
        yield f"layers_to_transform must be a layer's number or a list of them, not {shown(layers)}"


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _config_problems(config: dict[str, Any]) -> Iterator[str]:
    if (config.get("bias") or "none") != "none":
        yield f"bias={shown(config['bias'])}: it trains biases of the base model, which cannot be blended"
    yield from (f"{key}: {why}" for key, why in REFUSED_FEATURES.items() if config.get(key))
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        yield f"init_lora_weights={init!r} changes the base weights; convert it to a plain LoRA with PEFT first"
    for key in ("r", "lora_alpha"):
        if not _is_positive(config.get(key)):
            yield f"{key} must be a positive number, not {shown(config.get(key))}"


def _read_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    file = folder / WEIGHTS_FILE
    if not is_file(file):
        hint = ""
        if is_file(folder / PICKLE_FILE):
            hint = f" {PICKLE_FILE} is a pickle, which can run code: load it with PEFT and save it as safetensors."
        raise AdapterError(f"adapter {name!r}: {folder} has no {WEIGHTS_FILE}.{hint}")
    try:
        return read_tensors(file, AdapterError).tensors
    except AdapterError as error:
        raise AdapterError(f"adapter {name!r}: {error}") from error


def _take_weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the whole weights from a file's tensors and return them by module path."""
    names = {key: found for key in tensors if ".lora_" not in key and (found := BASE_WEIGHT.match(key))}
    return {found["module"]: tensors.pop(key) for key, found in names.items() if tensors[key].dim() == MATRIX_AXES}


def _sides(tensors: dict[str, torch.Tensor], problems: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the factors of each module by side, A or B; add the other tensors to `problems`."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        found = TENSOR_NAME.match(key)
        if not found:
            problems.append(_foreign_tensor(key))
            continue
        sides.setdefault(found["module"], {})[found["side"]] = tensor
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            problems.append(f"{key} is {tensor.dtype}; factors are float32, float16 or bfloat16")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{key} holds NaN or infinite values")
    return sides


def _pair_up(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> tuple[dict[str, LoraPair], list[str]]:
    """Return the factor pairs of all modules, and all problems of the tensors."""
    problems: list[str] = []
    sides = _sides(tensors, problems)
    try:
        ranks = _by_pattern(config, "rank_pattern", "r", list(sides))
        alphas = _by_pattern(config, "alpha_pattern", "lora_alpha", list(sides))
    except AdapterError as error:
        return {}, [*problems, str(error)]
    pairs: dict[str, LoraPair] = {}
    for (module, factors), rank, alpha in zip(sides.items(), ranks, alphas, strict=True):
        if problem := _pair_problem(module, factors, rank):
            problems.append(problem)
        elif len(factors) == 2:
            pairs[module] = LoraPair(factors["A"], factors["B"], _scale(alpha, factors["A"].shape[0], config))
    if not problems and not pairs:
        problems.append("it holds no factors")
    if not problems:
        problems += range_problems(pairs, torch.float32)
    if pairs and not any(pair.b.any() for pair in pairs.values()):
        problems.append("all its B factors are zero: it changes nothing (was it saved before training?)")
    return pairs, problems


def _foreign_tensor(key: str) -> str:
    if "lora_magnitude_vector" in key:
        return f"{key}: a DoRA magnitude; DoRA cannot be blended"
    if "lora_embedding_" in key:
        return f"{key}: factors of an embedding, not of a linear layer"
    return f"{key}: not a LoRA factor"


def _pair_problem(module: str, factors: dict[str, torch.Tensor], expected: Any) -> str | None:
    if len(factors) < 2:
        missing = "B" if "A" in factors else "A"
        return f"{module}: lora_{missing} is missing"
    a, b = factors["A"], factors["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        return f"{module}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit: need (r, in), (out, r)"
    if a.shape[0] != expected:
        return f"{module}: its factors have rank {a.shape[0]}, its config says {expected}"
    return None


def _scale(alpha: Any, rank: int, config: dict[str, Any]) -> float:
    if not _is_positive(alpha):
        return 1.0  # reported by _config_problems
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _selection_problems(config: dict[str, Any], modules: Sequence[str]) -> Iterator[str]:
    """Yield a problem for each module-selecting field whose regular expression cannot be used."""
    for field_name in ("target_modules", "exclude_modules"):
        try:
            _matched(_pattern(config.get(field_name)), modules)
        except AdapterError as error:
            yield f"{field_name}: {error}"


def _by_pattern(config: dict[str, Any], field: str, otherwise: str, modules: Sequence[str]) -> list[Any]:
    """Return for each module the value of the first matching pattern of `field`, or the value of `otherwise`."""
    patterns: dict[str, Any] = config.get(field) or {}
    values, default = list(patterns.values()), config.get(otherwise)
    try:
        return [default if first is None else values[first] for first in match_ends(list(patterns), modules)]
    except AdapterError as error:
        raise AdapterError(f"{field}: {error}") from error


def _pattern(value: Any) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else tuple(value or ())


def _matched(patterns: tuple[str, ...] | str, modules: Sequence[str]) -> list[bool]:
    """Return whether `target_modules` (a regular expression, or module names) matches each module path."""
    if patterns == "all-linear":
        return [False] * len(modules)
    if isinstance(patterns, str):
        return match_whole(patterns, modules)
    return [any(module == name or module.endswith(f".{name}") for name in patterns) for module in modules]
