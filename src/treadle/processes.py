"""Processes of their own, measured from outside: peak resident memory, and seconds to the first token."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from treadle.errors import TreadleError

PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, dtype, tokens, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
ids = tokenizer(prompt, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=int(tokens), do_sample=False)[0]))
"""
"""What a user of transformers would write to see the base model's answer."""

LAUNCH = """
import os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
print(time.perf_counter() - started, usage.ru_maxrss)
sys.exit(process.returncode)
"""
"""A process counts the memory of the one that started it: a small one has to."""


class Spent(NamedTuple):
    """What a process took."""

    seconds: float
    peak: int  # bytes of resident memory


def measure_processes(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[Spent]]:
    """Run each command `rounds` times, in turn, after a first round that only fills the file cache."""
    spent: dict[str, list[Spent]] = {name: [] for name in commands}
    for round_index in range(rounds + 1):
        for name, command in commands.items():
            each = run_process(command)
            if round_index:
                spent[name].append(each)
    return spent


def run_process(command: Sequence[str]) -> Spent:
    """Run one command to its end; a TreadleError with its last line where it fails."""
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCH, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise TreadleError(f"{' '.join(command[:4])} ... failed: {said[-1]}")
    seconds, peak = done.stdout.split()
    return Spent(float(seconds), int(peak) * 1024)


def plain_command(folder: str, dtype: str, tokens: int, prompt: str) -> list[str]:
    """Return the command that generates with transformers and the bare base."""
    return [sys.executable, "-c", PLAIN, folder, dtype, str(tokens), prompt]


def treadle_command(bundle: str, dtype: str, tokens: int, prompt: str) -> list[str]:
    """Return the command that generates with treadle and a bundle."""
    command = [sys.executable, "-m", "treadle", "generate", bundle, "--prompt", prompt]
    return [*command, "--max-tokens", str(tokens), "--dtype", dtype]
