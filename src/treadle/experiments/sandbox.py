"""Runs a generated program against tests in a process of its own, with limits on time, memory and files.

This is no sandbox against attackers. The limits stop accidents (endless loops, memory bombs); a hostile program can
still read, change and send what the user can. Run untrusted models in a container.
"""

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

TIMEOUT_SECONDS = 5.0
MEMORY_BYTES = 1 << 30
"""Bytes of address space."""
MAX_FILE_BYTES = 1 << 20
"""Bytes that a file may grow to."""


def passes(program: str, tests: Sequence[str], *, seconds: float = TIMEOUT_SECONDS, memory: int = MEMORY_BYTES) -> bool:
    """Return whether `program` followed by all of `tests` (assert statements) ends without an error in time.

    Args:
        program: Python source.
        tests: statements that raise where the program is wrong; no tests means that nothing passes.
        seconds: of wall-clock and of processor time.
        memory: bytes of address space.
    """
    if not tests or "\0" in program:
        return False
    # the last line proves that the tests were reached: a program that calls exit(0) before them fails
    done = os.urandom(8).hex()
    source = "\n".join([program, *tests, f"print({done!r})"])
    try:
        encoded = source.encode()
    except UnicodeEncodeError:  # a lone surrogate is no Python
        return False
    code, output = _run(encoded, seconds, memory)
    return code == 0 and done.encode() in output  # bytes: it may print any


def _run(source: bytes, seconds: float, memory: int) -> tuple[int, bytes]:
    """Run a program within the limits; return its exit code, -1 if it took too long, and what it printed."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        file = Path(folder, "program.py")  # an argument may hold 128 KiB at most
        file.write_bytes(source)
        process = subprocess.Popen(
            [sys.executable, "-I", str(file)],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.DEVNULL,
            preexec_fn=limit,  # noqa: PLW1509 no threads of ours hold locks that the child needs before it execs
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            _kill_group(process.pid)
            process.wait()
        output.seek(0)
        return code, output.read()


def _kill_group(pid: int) -> None:
    """Kill the process and whatever it started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
