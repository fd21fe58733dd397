"""Runs vLLM's own decoding beside treadle's: a process in vLLM's environment makes the same calls, one at a time."""

import json
import os
import select
import subprocess
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import torch

from treadle.common.errors import TreadleError
from treadle.common.files import locate
from treadle.experiments.timing import Elsewhere
from treadle.experiments.workbench import cache_bytes

from . import vllm_worker

if TYPE_CHECKING:
    from treadle.experiments.workbench import Lab

    from .peers import PeerOptions, Peers

ANSWER_SECONDS = 900
"""Seconds that one answer may take: the first includes the start, and where vLLM compiles, minutes of that."""
BLOCK_TOKENS = 128
"""The most tokens of a block of vLLM's cache on a CPU."""
VLLM_ARMS = {"vLLM, base": "base", "vLLM, one adapter": "lora"}


class VllmWorker:
    """The process, and what it is told; it starts with the first call.

    Attributes:
        about: its versions, mode and threads, when it has answered.
    """

    def __init__(self, python: str, options: dict[str, Any]) -> None:
        self.about = ""
        self._python, self._options = python, options
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] = tempfile.TemporaryFile()  # what it prints
        self._why_not = ""  # it does not answer any more; it is not started again

    @classmethod
    def start(cls, lab: "Lab", peers: "PeerOptions") -> "VllmWorker":
        """Return the worker of a bench: its base, dtype and first adapter, room for its largest batch."""
        params, model, first = lab.params, lab.engine.model, lab.bundle.adapters[0]
        length, rows = params.prompt + params.tokens + 1, max(params.batch)
        blocks = -(-length // BLOCK_TOKENS) + 1
        options: dict[str, Any] = {
            "model": locate(lab.bundle.base_model),
            "adapter": str(first.source.resolve()),
            "rank": max(pair.rank for pair in first.pairs.values()),
            "dtype": lab.dtype,
            "device": model.device.type,
            "eager": not peers.vllm_compile,
            "length": length,
            "rows": rows,
            "cache": 2 * rows * blocks * BLOCK_TOKENS * cache_bytes(model),
        }
        return cls(peers.vllm, options)

    def __enter__(self) -> "VllmWorker":
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the process."""
        self.close()
        self._said.close()

    def call(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> Elsewhere:
        """Make `tokens` tokens a row; return the seconds by the worker's clock, or raise a TreadleError."""
        request = {"arm": arm, "prompts": [list(ids) for ids in prompts], "tokens": tokens}
        process = self._running()
        reading, writing = process.stdout, process.stdin
        assert reading is not None and writing is not None  # noqa: PT018 both are pipes
        writing.write(json.dumps(request).encode() + b"\n")
        writing.flush()
        is_there = select.select([reading], [], [], ANSWER_SECONDS)[0]
        line = reading.readline() if is_there else b""
        if not line:
            self._why_not = self._end(is_late=not is_there)
            raise TreadleError(self._why_not)
        answer = json.loads(line)
        if "error" in answer:
            raise TreadleError(f"vLLM: {answer['error']}")
        self.about = answer["about"]
        return Elsewhere(answer["seconds"])

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is not None:
            return self._process
        if self._why_not:
            raise TreadleError(self._why_not)
        if not Path(self._python).is_file():
            raise TreadleError(f"no {self._python}; `make test-vllm` makes it, --vllm names another Python with vLLM")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores are shared in turn
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_PLUGINS": "",  # stock: treadle's own plugin may lie there
        }
        command = [self._python, "-P", str(vllm_worker.__file__)]  # -P: modules beside it are not vLLM's
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=environment
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._options).encode() + b"\n")
        return self._process

    def _end(self, *, is_late: bool) -> str:
        """End the process that gives no answer; return why."""
        self.close()
        if is_late:
            return f"vLLM gave no answer in {ANSWER_SECONDS} s"
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()
        return f"vLLM's process ended: {said[-1] if said else 'no message'}"


def vllm_peers(worker: VllmWorker, prompts: Sequence[Sequence[int]], tokens: int) -> "Peers":
    """Return vLLM's arms: each unit is a call that makes `tokens` tokens a row of `prompts`."""
    return {name: partial(worker.call, arm, prompts, tokens) for name, arm in VLLM_ARMS.items()}
