"""Runs `python -m treadle` in a forked process, which has imported all: another Python takes longer to than to work."""

import logging
import multiprocessing
import os
import runpy
import sys
from multiprocessing.process import BaseProcess
from typing import TextIO

FORK = multiprocessing.get_context("fork")


def start_command(*arguments: object, **environment: str) -> tuple[BaseProcess, TextIO]:
    """Start a command; return the process, and what it writes to stderr."""
    reader, writer = os.pipe()
    process = FORK.Process(target=_run, args=(list(map(str, arguments)), environment, writer), daemon=True)
    process.start()
    os.close(writer)
    return process, os.fdopen(reader)


def _run(arguments: list[str], environment: dict[str, str], log: int) -> None:
    os.environ.update(environment)
    os.dup2(log, 2)
    os.close(log)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.stdout = sys.stderr
    logging.getLogger().handlers.clear()  # pytest's
    sys.argv = ["treadle", *arguments]
    runpy.run_module("treadle", run_name="__main__", alter_sys=True)
