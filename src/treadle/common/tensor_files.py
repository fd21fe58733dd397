"""Reads files of tensors that somebody else wrote: the header is judged before any tensor is touched."""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from treadle.common.documents import open_file
from treadle.common.errors import TreadleError, shown
from treadle.common.memory import side_by_side

DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL")
"""As safetensors names them: those that every torch can copy."""
MOST_HEADER = 32 << 20
"""Bytes of a header; one of 300,000 tensors is shorter."""
LONGEST_NAME = 1000
"""Characters of a tensor's name."""


MOST_EXPANSION = 100
"""How many times its own size a compressed file may hold."""


class TensorFile(NamedTuple):
    """The content of a file: tensors, as copies in memory of their own, and metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_tensors(file: Path, error_type: type[TreadleError]) -> TensorFile:
    """Read a safetensors file; an error of `error_type` says why it cannot be read."""
    with open_file(file, error_type) as opened:
        header = int.from_bytes(opened.read(8), "little")
    if header > MOST_HEADER:
        raise error_type(f"{file} cannot be read: its header has {header} bytes; allowed: {MOST_HEADER}")
    try:
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            for name in names:
                if len(name) > LONGEST_NAME or tensors.get_slice(name).get_dtype() not in DTYPES:
                    why = f"{len(name)} characters or a dtype other than {', '.join(DTYPES)}"
                    raise error_type(f"{file} cannot be read: the tensor {shown(name)} has {why}")
            # copies: a mapped file that somebody truncates later ends the process with SIGBUS
            copies = side_by_side({name: tensors.get_tensor(name) for name in names})
            return TensorFile(copies, dict(tensors.metadata() or {}))
    except (SafetensorError, OSError) as error:
        raise error_type(f"{file} cannot be read: {error}") from error


def read_npz(file: Path, error_type: type[TreadleError]) -> TensorFile:
    """Read numpy's archive of arrays, without pickles; an error of `error_type` says why it cannot be read."""
    tensors: dict[str, Tensor] = {}
    try:
        with open_file(file, error_type) as opened, zipfile.ZipFile(opened) as archive:
            size, held = file.stat().st_size, sum(entry.file_size for entry in archive.infolist())
            if held > MOST_EXPANSION * size:
                raise error_type(f"{file} cannot be read: it holds {held} bytes in {size}")
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as arrays:
                for name in arrays.files:
                    array = arrays[name]
                    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
                        kind = array.dtype if isinstance(array, np.ndarray) else "no array"
                        raise error_type(f"{file} cannot be read: {shown(name)} is {kind}; save it as safetensors")
                    tensors[name] = torch.from_numpy(np.ascontiguousarray(array))
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise error_type(f"{file} cannot be read: {error}") from error
    return TensorFile(tensors, {})
