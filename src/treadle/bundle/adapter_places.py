"""Finds adapters where people keep them: in folders and on the hub, each with sample texts beside it or without.

FOLDER/math/adapter_config.json ...     an adapter called math
FOLDER/math/samples.txt                 or .jsonl, .jsonl.gz: texts of the kind it was trained for
FOLDER/math/centroid.safetensors        or what `treadle train --embedder` writes
"""

import os
from collections.abc import Sequence
from pathlib import Path

from treadle.bundle.bundle_files import BUNDLE_FILE
from treadle.bundle.centroid_files import CENTROID_FILE, RECORD_FILE
from treadle.common.documents import is_file
from treadle.common.errors import AdapterError, OptionError, first_of, reason_of
from treadle.lora.mlx_folder import MLX_FILES
from treadle.lora.peft_folder import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, *MLX_FILES, PICKLE_FILE)
"""One of these says that a folder is meant to hold an adapter, if perhaps a damaged one."""
SAMPLES_FILES = ("samples.jsonl", "samples.jsonl.gz", "samples.txt")
"""The first that is there counts."""
MAX_LISTED_FOLDERS = 5


def adapters_below(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Return the adapters of a folder, name -> path: its sub-folders, or the folder itself where it is one.

    Returns:
        the adapters in the order of their names, and the names of sub-folders that hold none.

    Raises:
        OptionError: there is no such folder, or it holds no adapter.
    """
    if not folder.is_dir():
        raise OptionError(f"--adapters {str(folder)!r} is not a folder; name one whose sub-folders hold adapters.")
    if holds_adapter(folder):
        return {folder.resolve().name: str(folder)}, []
    inner = sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    found = {each.name: str(each) for each in inner if holds_adapter(each)}
    others = [each.name for each in inner if each.name not in found]
    if not found:
        is_bundle = is_file(folder / BUNDLE_FILE)
        hint = f"it is a bundle: give {folder} without --base" if is_bundle else _what_lies_in(others)
        what = f"--adapters {str(folder)!r} holds no adapter"
        raise OptionError(f"{what}, which is a sub-folder with {CONFIG_FILE} and {WEIGHTS_FILE}; {hint}.")
    return found, others


def holds_adapter(folder: Path) -> bool:
    """Return whether a folder is meant to hold an adapter."""
    return any(is_file(folder / name) for name in ADAPTER_FILES)


def _what_lies_in(names: Sequence[str]) -> str:
    return f"its sub-folders are {', '.join(first_of(names, MAX_LISTED_FOLDERS))}" if names else "it has no sub-folders"


def adapter_place(given: str | Path, name: str, *, with_pickle: bool = False) -> Path:
    """Return an adapter's folder on this machine; a hub id is fetched, or taken from the hub's cache.

    A pickle is fetched only for a caller that converts it.

    Raises:
        AdapterError: there is no such folder and no such adapter on the hub, or the hub has a pickle alone.
    """
    folder = Path(given).expanduser()
    if os.path.isdir(folder):
        return folder
    text = str(given)
    if isinstance(given, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise AdapterError(f"adapter {name!r}: {text!r} is no folder, and no hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted = [*ADAPTER_FILES[:-1], *SAMPLES_FILES, CENTROID_FILE, RECORD_FILE]
    try:
        fetched = Path(snapshot_download(text, allow_patterns=[*wanted, PICKLE_FILE] if with_pickle else wanted))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise AdapterError(f"adapter {name!r}: {text!r} is no folder, and the hub says: {reason_of(error)}") from error
    if not with_pickle and not any(is_file(fetched / name) for name in (WEIGHTS_FILE, *MLX_FILES)):
        way = f"if it has a pickle, treadle convert {text} -o NEW makes a PEFT folder of it"
        raise AdapterError(f"adapter {name!r}: {text!r} has no {WEIGHTS_FILE} on the hub; {way}")
    return fetched


def samples_beside(folder: Path) -> Path | None:
    """Return the file of sample texts in an adapter's folder; None = it has none."""
    return next((folder / name for name in SAMPLES_FILES if is_file(folder / name)), None)
