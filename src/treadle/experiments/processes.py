"""Processes of their own, measured from outside: peak resident memory, and seconds to the first token."""

import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from treadle.common.errors import TreadleError

IMPORTS = "import torch, transformers"
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, device, dtype, tokens, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
model.generation_config.eos_token_id = None
ids = tokenizer(prompt, return_tensors="pt").to(device)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=int(tokens), do_sample=False)[0]))
"""
"""What a user of transformers would write to see the base model's answer, but that no token ends it."""
ENDLESS = """
import sys
from treadle.experiments.workbench import answer
answer(*sys.argv[1:])
"""

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


def plain_command(folder: str, device: str, dtype: str, tokens: int, prompt: str) -> list[str]:
    """Return the command that generates with transformers and the bare base."""
    return [sys.executable, "-c", PLAIN, folder, device, dtype, str(tokens), prompt]


def treadle_command(bundle: str, device: str, dtype: str, tokens: int, prompt: str, *, pack: bool) -> list[str]:
    """Return the command that generates with treadle and a bundle; the end of the text may come first."""
    command = [sys.executable, "-m", "treadle", "generate", bundle, "--prompt", prompt, "--max-tokens", str(tokens)]
    return [*command, "--device", device, "--dtype", dtype, "--pack" if pack else "--no-pack"]


def endless_command(bundle: str, device: str, dtype: str, tokens: int, prompt: str, *, pack: bool) -> list[str]:
    """Return the command that generates with treadle's engine and a bundle, so many tokens whatever they are."""
    return [sys.executable, "-c", ENDLESS, bundle, device, dtype, str(int(pack)), str(tokens), prompt]


def resident_bytes() -> int:
    """Return this process's resident memory; where the system keeps no such file, the most that it has been."""
    file = Path("/proc/self/statm")
    if file.exists():
        return int(file.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
