"""Reads tensors out of a pickle, in a process of its own that can open nothing: no file, no connection.

PyTorch's `weights_only` builds tensors and plain values alone. Should that ever have a hole, the process has already
given up the right to open anything, and its time and memory are limited.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from torch import Tensor

from treadle.common.documents import open_file
from treadle.common.errors import REASON_CHARACTERS, AdapterError
from treadle.common.tensor_files import read_tensors

SECONDS = 600
"""For the whole process: a large file is read, and written once."""
SPARE_BYTES, BYTES_PER_BYTE = 4 << 30, 6
"""Address space: what PyTorch itself maps, and what a file's bytes may become."""
NO_TENSORS = 3
GLOBAL = re.compile(r"\bGLOBAL (\S+)")
"""In PyTorch's words: what a pickle asks for beyond tensors."""
ERROR = re.compile(r"[\w.]*Error: ([^.]+)")
"""The first sentence of Python's last word."""
WORKER = f"""
import io, pickle, resource, sys
import torch
from safetensors.torch import save

sample = io.BytesIO()
torch.save({{"x": torch.ones(1)}}, sample)
sample.seek(0)
save(torch.load(sample, weights_only=True))  # all that is imported late is imported now
size = int(sys.argv[1])
space = {SPARE_BYTES} + {BYTES_PER_BYTE} * size
resource.setrlimit(resource.RLIMIT_AS, (space, space))
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # from here on neither files nor sockets can be opened
held = torch.load(sys.stdin.buffer, map_location="cpu", weights_only=True)
while isinstance(held, dict):
    inner = next((held[name] for name in ("state_dict", "adapter", "model") if isinstance(held.get(name), dict)), None)
    if inner is None:
        break
    held = inner
if not isinstance(held, dict):
    print(f"it holds a {{type(held).__name__}}, not tensors by name", file=sys.stderr)
    sys.exit({NO_TENSORS})
wrong = [str(name) for name, each in held.items() if not isinstance(each, torch.Tensor) or not isinstance(name, str)]
if wrong or not held:
    print("it holds entries that are no tensors: " + ", ".join(wrong[:5]) if wrong else "it is empty", file=sys.stderr)
    sys.exit({NO_TENSORS})
sys.stdout.buffer.write(save({{name: each.detach().clone().contiguous() for name, each in held.items()}}))
"""
"""Reads the pickle on its standard input, and prints the tensors as safetensors."""


def read_pickle(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a PyTorch pickle by name; those of a checkpoint's `state_dict` where it has one.

    Raises:
        AdapterError: it holds more than tensors and plain values, is damaged, or takes too much time or memory.
    """
    with open_file(file, AdapterError) as opened, tempfile.TemporaryDirectory(prefix="treadle-") as folder:
        written = Path(folder, "tensors.safetensors")
        with written.open("wb") as output:
            code, said = _run(opened.fileno(), output.fileno(), os.fstat(opened.fileno()).st_size)
        if code == 0:
            return read_tensors(written, AdapterError).tensors
    raise AdapterError(f"{file} cannot be read: {_reason(code, said)}; ask its author for safetensors")


def _run(source: int, target: int, size: int) -> tuple[int, str]:
    """Return the worker's exit code, -1 if it took too long, and what it printed on standard error."""
    command = [sys.executable, "-I", "-c", WORKER, str(size)]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, stdin=source, stdout=target, stderr=subprocess.PIPE, env=environment, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return -1, ""
    except OSError as error:
        raise AdapterError(f"no process can be started to read a pickle: {error.strerror}") from error
    return done.returncode, done.stderr.decode(errors="replace")


def _reason(code: int, said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if code == NO_TENSORS and lines:
        return lines[-1][:REASON_CHARACTERS]
    if code < 0:
        return "reading it takes too much time or memory"
    if asked := GLOBAL.search(said):
        return f"it asks for {asked[1]} to be run, and only tensors and plain values are read"
    errors = [found[1] for line in lines if (found := ERROR.match(line))]
    return f"it is no pickle of tensors, or a damaged one ({(errors or ['no reason given'])[-1][:REASON_CHARACTERS]})"
