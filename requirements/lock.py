"""Writes the locks of this folder: every package that make installs, with its version and the hashes of its files.

`make lock` takes the newest of everything; `python requirements/lock.py` keeps the versions that the locks have and
adds what pyproject.toml and the .in files now need. It reads metadata and downloads no wheel.

torch has locks of its own, and `install.py` chooses. Where pip finds PyTorch's CPU build, that is torch-cpu.txt,
written by hand. Elsewhere it is torch.txt: on Linux a CUDA build, which needs the gigabytes of torch-cuda.txt too.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = "pyproject.toml"
DEMO_EXTRAS = ("gguf", "serve")
DEV_EXTRAS = ("dev", "gguf", "sentence", "train", "data", "eval", "plots", "serve")
OLDEST_PYTHON = "3.11"
HEADER = "# Written by `make lock`; do not edit.\n"


def compiled(*arguments: str, python: str = OLDEST_PYTHON) -> str:
    """Return the requirements that uv resolves for a version of Python."""
    command = ["pip", "compile", "--quiet", "--no-header", "--python-version", python, *arguments]
    done = subprocess.run(
        [sys.executable, "-m", "uv", *command], check=False, capture_output=True, text=True, cwd=HERE.parent
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def names(requirements: str) -> set[str]:
    """Return the names of the packages in a requirements file."""
    return set(re.findall(r"^([A-Za-z0-9._-]+)==", requirements, re.MULTILINE))


def lock(target: str, *sources: str, arguments: Sequence[str] = (), upgrade: bool) -> str:
    """Write one lock; return its text. What it has already is kept, unless `upgrade` is true."""
    file = HERE / target
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "lock.txt"
        if file.exists() and not upgrade:
            output.write_text(file.read_text("utf-8"), "utf-8")
        options = ("--universal", "--generate-hashes", "--no-annotate", "--output-file", str(output), *arguments)
        compiled(*sources, *options)
        text = HEADER + output.read_text("utf-8").removeprefix(HEADER)
    file.write_text(text, "utf-8")
    print(f"{file.relative_to(HERE.parent)}: {len(names(text))} packages")
    return text


def torch_names() -> list[str]:
    """Return torch and the packages that only its CUDA build needs."""
    source = "requirements/torch.in"
    everywhere = names(compiled(source, "--python-platform", "windows", "--no-annotate"))
    return ["torch", *sorted(names(compiled(source, "--universal", "--no-annotate")) - everywhere)]


def lock_torch(cuda_names: Sequence[str], upgrade: bool) -> None:
    """Write the locks of torch and of what its CUDA build needs."""
    text = lock("torch.txt", "requirements/torch.in", arguments=["--no-deps"], upgrade=upgrade)
    version, cpu_version = (
        re.findall(r"^torch==([\d.]+)", each, re.MULTILINE)[0]
        for each in (text, (HERE / "torch-cpu.txt").read_text("utf-8"))
    )
    if version != cpu_version:
        sys.exit(f"torch-cpu.txt has {cpu_version}, torch.in {version}: write the wheel's version and sha256 there.")
    others = sorted(names(compiled("requirements/torch.in", "--universal", "--no-annotate")) - set(cuda_names))
    lock("torch-cuda.txt", "requirements/torch.in", arguments=left_out(["torch", *others]), upgrade=upgrade)


def left_out(packages: Sequence[str]) -> list[str]:
    """Return uv's options that resolve some packages and do not write them."""
    return [part for name in packages for part in ("--no-emit-package", name)]


def extras(found: Sequence[str]) -> list[str]:
    """Return uv's options for some extras."""
    return [part for name in found for part in ("--extra", name)]


def lock_docs(upgrade: bool) -> None:
    """Write the lock of the documentation's tools alone: the site is built without treadle's own packages."""
    project = tomllib.loads((HERE.parent / PROJECT).read_text("utf-8"))["project"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "docs.in"
        source.write_text("\n".join(project["optional-dependencies"]["docs"]), "utf-8")
        lock("docs.txt", str(source), upgrade=upgrade)


def main() -> None:
    """Write all locks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions")
    upgrade = parser.parse_args().upgrade
    for name in ("build", "tools"):
        lock(f"{name}.txt", f"requirements/{name}.in", upgrade=upgrade)
    lock_docs(upgrade)
    torch = torch_names()
    lock_torch(torch, upgrade)
    without_torch = [*left_out(torch), "--constraints", "requirements/torch.in"]
    lock("dev.txt", PROJECT, arguments=[*extras(DEV_EXTRAS), *without_torch], upgrade=upgrade)
    same = ["--constraints", "requirements/dev.txt"]
    lock("demo.txt", PROJECT, arguments=[*extras(DEMO_EXTRAS), *without_torch, *same], upgrade=upgrade)
    for name in ("models", "bundle", "vllm"):
        lock(f"{name}.txt", f"requirements/{name}.in", arguments=["--no-deps"], upgrade=upgrade)


if __name__ == "__main__":
    main()
