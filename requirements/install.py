"""Makes an environment from the locks of this folder: `install.py VENV SET [SET ...]`, a SET being the name of a lock.

Each package comes from its lock, with the hashes that stand there and without anything that it asks for itself. What
pip says is shown where it fails.
"""

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
TOGETHER = {"demo", "dev", "vllm"}
"""The locks that need torch, and are completed by treadle itself."""


def quietly(*command: str | Path) -> None:
    """Run a command; show what it printed, and end, if it fails."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, check=False, cwd=HERE.parent, **output)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        sys.exit(f"failed with exit code {done.returncode}: {' '.join(map(str, command))}")


def install(python: Path, *arguments: str | Path) -> None:
    """Install with pip, without what the packages require; Python compiles a file when it is first imported."""
    quietly(python, "-m", "pip", "install", "--no-deps", "--no-compile", *arguments)


def install_lock(python: Path, name: str) -> None:
    """Install all packages of one lock."""
    install(python, "--require-hashes", "-r", HERE / f"{name}.txt")


def torch_build(python: Path) -> str:
    """Return the version of torch that pip would choose here, with the build behind a plus; nothing is installed."""
    line = next(line for line in (HERE / "torch.txt").read_text("utf-8").splitlines() if line.startswith("torch=="))
    options = ("--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--report", "-", line.rstrip(" \\"))
    done = subprocess.run([python, "-m", "pip", "install", *options], check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"pip finds no {line}\n{done.stderr}")
    return str(json.loads(done.stdout)["install"][0]["metadata"]["version"])


def install_torch(python: Path) -> None:
    """Install the build of torch that pip finds, and CUDA's packages where that build asks for them."""
    install_lock(python, "torch-cpu" if torch_build(python).endswith("+cpu") else "torch")
    program = "import importlib.metadata as metadata; print(*metadata.requires('torch'), sep='\\n')"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    if asks_for_cuda(done.stdout.splitlines()):
        install_lock(python, "torch-cuda")


def asks_for_cuda(requires: Sequence[str]) -> bool:
    """Return whether the requirements of a torch name CUDA's packages; each says itself on which systems it counts."""
    return any(each.startswith(("nvidia-", "cuda-", "triton")) for each in requires)


def main() -> None:
    """Make or complete an environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="VENV")
    parser.add_argument("sets", nargs="+", metavar="SET", choices=[file.stem for file in HERE.glob("*.txt")])
    asked = parser.parse_args()
    python = asked.folder.absolute() / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not python.exists():
        venv.create(asked.folder, with_pip=True)
    install_lock(python, "build")
    if not TOGETHER.isdisjoint(asked.sets):
        install_torch(python)
    for name in asked.sets:
        install_lock(python, name)
    if not TOGETHER.isdisjoint(asked.sets):
        install(python, "--no-build-isolation", "--editable", ".")


if __name__ == "__main__":
    main()
