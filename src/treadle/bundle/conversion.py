"""Turns an adapter of another program, or of another PEFT tuner, into an ordinary PEFT LoRA folder."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from treadle.bundle.base_model import load_model, load_outline
from treadle.common.documents import is_file, read_object
from treadle.common.errors import AdapterError, OptionError, problem_list
from treadle.common.tensor_files import read_tensors
from treadle.lora.adapter import Adapter
from treadle.lora.compatibility import alike, find_places, linear_shapes
from treadle.lora.content import AdapterContent
from treadle.lora.foreign_keys import NamedTensors, peft_names
from treadle.lora.gguf_adapter import read_gguf
from treadle.lora.mixture import Mixture
from treadle.lora.mlx_folder import MLX_FILES, read_mlx_folder
from treadle.lora.names import with_model_names
from treadle.lora.pair import LoraPair
from treadle.lora.peft_folder import (
    CONFIG_FILE,
    FOREIGN_SUFFIXES,
    MAX_CONFIG_BYTES,
    PEFT_TYPES,
    PICKLE_FILE,
    WEIGHTS_FILE,
    check_config,
    peft_content,
)  # fmt: skip
from treadle.lora.peft_tensors import sort_tensors
from treadle.lora.peft_writing import PREFIX, check_free, factor_tensors, lora_config, save_peft
from treadle.lora.pickles import read_pickle
from treadle.lora.tuners import merged_update
from treadle.lora.virtual_tokens import VIRTUAL_TYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIRST_FILES = (WEIGHTS_FILE, *MLX_FILES, PICKLE_FILE, "adapter_model.pt")
"""The first one in a folder is the adapter; the last name is torchtune's."""
SUFFIXES = (".safetensors", ".npz", *FOREIGN_SUFFIXES)


@dataclass(frozen=True)
class ConvertParams:
    """How an adapter is converted.

    Attributes:
        base: folder or hub id of the base model; "" = not given, and not every format needs it.
        alpha: lora_alpha of training, where no file of the adapter says it.
        rank: the largest rank of a module made of another tuner; None = as large as it takes.
    """

    base: str = ""
    alpha: float | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise OptionError(f"rank must be at least 1, or none, not {self.rank}.")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise OptionError(f"alpha must be a positive number, not {self.alpha:g}.")


class Conversion(NamedTuple):
    """The result: the program or tuner, the content written, and the mixture where an error may have been made."""

    kind: str
    content: AdapterContent
    mixture: Mixture | None = None


class _Made(NamedTuple):
    """A PEFT adapter before it is written."""

    kind: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    mixture: Mixture | None = None


def convert_adapter(
    source: Path, output: Path, params: ConvertParams | None = None, *, overwrite: bool = False
) -> Conversion:
    """Read one adapter of another program or tuner, and write it as a PEFT LoRA folder.

    Args:
        source: its folder or file.
        output: the folder to write, made where it is missing.
        params: the base and what else the format does not say; None = nothing is known.
        overwrite: replace an adapter that is there.

    Raises:
        AdapterError: it is damaged, is no LoRA, or needs what is not given; lists every problem.
        OptionError: an adapter is there, or the system refuses to write.
        ModelError: the base is needed and cannot be loaded.
    """
    params = params or ConvertParams()
    check_free(output, overwrite=overwrite)
    file = adapter_file(source)
    made = _make(file, params)
    check_config(made.config, file.stem, file)
    content = peft_content(made.config, made.tensors, source.resolve().name, source)
    if params.base:
        _check_shapes(content, load_outline(params.base), source)
    save_peft(output, made.config, made.tensors)
    return Conversion(made.kind, content, made.mixture)


def adapter_file(source: Path) -> Path:
    """Return the file of tensors in an adapter's folder, or the file itself.

    Raises:
        AdapterError: there is none, or several, and nothing says which one is the adapter.
    """
    if is_file(source):
        if source.suffix not in SUFFIXES:
            raise AdapterError(f"{source}: files that are read end in {', '.join(SUFFIXES)}.")
        return source
    if first := next((source / name for name in FIRST_FILES if is_file(source / name)), None):
        return first
    found = [each for each in sorted(source.glob("*")) if each.suffix in SUFFIXES and is_file(each)]
    if len(found) == 1:
        return found[0]
    held = f"it holds {', '.join(each.name for each in found)}: name one" if found else "it holds no adapter"
    raise AdapterError(f"{source}: {held}; files that are read end in {', '.join(SUFFIXES)}.")


def _make(file: Path, params: ConvertParams) -> _Made:
    if file.name in MLX_FILES:
        return _of_content("mlx-lm", read_mlx_folder(file.parent, file, file.parent.name), params)
    if file.suffix == ".gguf":
        return _of_gguf(file, params)
    config_file = file.parent / CONFIG_FILE
    config = read_object(config_file, AdapterError, MAX_CONFIG_BYTES) if is_file(config_file) else {}
    tensors = read_pickle(file) if file.suffix in FOREIGN_SUFFIXES else read_tensors(file, AdapterError).tensors
    if config.get("peft_type", "LORA") not in PEFT_TYPES:
        return _of_tuner(config, tensors, file, params)
    if config.get("peft_type") in VIRTUAL_TYPES:
        return _Made("PEFT", config, tensors)
    outline = load_outline(params.base) if params.base else None
    named = peft_names(tensors, outline and outline.config.get_text_config())
    if (named.program == "PEFT" and config.get("r") and not named.alphas) or config.get("peft_type") == "IA3":
        return _Made("PEFT", config, named.tensors)
    return _of_names(named, config, file, params)


def _of_names(named: NamedTensors, config: dict[str, Any], file: Path, params: ConvertParams) -> _Made:
    """Return an adapter whose scales stand beside its tensors, in the config of its folder or among the options."""
    found = sort_tensors(named.tensors)
    default = params.alpha if params.alpha is not None else config.get("lora_alpha")
    pairs, problems, unknown = dict[str, LoraPair](), list(found.problems), list[str]()
    for module, sides in found.factors.items():
        if sides.keys() != {"A", "B"}:
            problems.append(f"{module}: lora_{min({'A', 'B'} - sides.keys())} is missing")
            continue
        alpha: Any = named.alphas.get(module, default)
        if type(alpha) not in (int, float) or not alpha > 0 or not len(sides["A"]):
            unknown.append(module)
            continue
        pairs[module] = LoraPair(sides["A"], sides["B"], alpha / len(sides["A"]))
    if problems:
        raise AdapterError(problem_list(f"{file} cannot be converted:", problems))
    if unknown:
        what = f"{file}: nothing says the alpha of its factors ({len(unknown)} modules, such as {unknown[0]})"
        raise AdapterError(f"{what}: give the one of its training (--alpha), or put {CONFIG_FILE} beside it.")
    magnitudes = {module: each["magnitude"] for module, each in found.vectors.items() if "magnitude" in each}
    base = params.base or config.get("base_model_name_or_path") or ""
    made = lora_config(pairs, base, use_dora=bool(magnitudes)) if pairs else config
    return _Made(named.program, made, named.tensors)


def _of_content(kind: str, content: AdapterContent, params: ConvertParams) -> _Made:
    """Return an adapter of factors and DoRA's magnitudes."""
    tensors = factor_tensors(content.pairs)
    for module, vectors in content.vectors.items():
        tensors |= {f"{PREFIX}{module}.lora_magnitude_vector": each for each in vectors.given.values()}
    config = lora_config(content.pairs, params.base or content.base_model, use_dora=bool(content.vectors))
    return _Made(kind, config, tensors)


def _of_gguf(file: Path, params: ConvertParams) -> _Made:
    if not params.base:
        raise AdapterError(f"{file}: GGUF names its modules by the base's kind: give the base (--base).")
    outline = load_outline(params.base)
    pairs = read_gguf(file, list(linear_shapes(outline)), outline.config)
    return _of_content("llama.cpp", AdapterContent(params.base, pairs), params)


def _of_tuner(config: dict[str, Any], tensors: dict[str, Tensor], file: Path, params: ConvertParams) -> _Made:
    """Return the update that an adapter of another tuner makes to the base's weights."""
    kind = str(config["peft_type"])
    if not params.base:
        raise AdapterError(f"{file.parent}: its peft_type is {kind}: its update depends on the base; give it (--base).")
    model: PreTrainedModel = load_model(params.base, device="cpu", dtype="float32")
    with TemporaryDirectory(prefix="treadle-") as folder:  # of safetensors, whatever it was
        save_peft(Path(folder), config, tensors)
        mixture = merged_update(model, Path(folder), params.rank)
    return _Made(kind, lora_config(mixture.pairs, params.base), factor_tensors(mixture.pairs), mixture)


def _check_shapes(content: AdapterContent, outline: "PreTrainedModel", source: Path) -> None:
    """Raise an AdapterError that lists what the base has no place for."""
    adapter = Adapter(source.name, "", content.pairs, source, content.vectors)
    _, missing, problems = find_places(outline, [with_model_names(outline, adapter)])
    if problems := problems or [f"the model has no module {path}" for path in missing[source.name]]:
        raise AdapterError(problem_list(f"{source} does not fit this base:", alike(problems)))
