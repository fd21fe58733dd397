"""Runs tests on the oldest or the newest packages that pyproject.toml allows: `trial.py WHICH FOLDER [PYTEST ...]`.

Run it with the Python of the locked environment. Packages whose versions differ from the locked ones are laid into
FOLDER, which is first on the path. torch stays as locked: for Linux its older releases come with CUDA only.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lock import DEV_EXTRAS, HERE, PROJECT, compiled, extras, left_out, torch_names

UV = (sys.executable, "-m", "uv")


def resolve(which: str) -> dict[str, str]:
    """Return the version of each package."""
    resolution = "lowest-direct" if which == "oldest" else "highest"
    chosen = [name for name in DEV_EXTRAS if which == "newest" or name != "dev"]  # the tests' own tools stay as locked
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    options = ("--resolution", resolution, "--no-annotate", "--constraints", "requirements/torch.in")
    text = compiled(PROJECT, *extras(chosen), *options, *left_out(torch_names()), python=version)
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, re.MULTILINE))


def installed() -> dict[str, str]:
    """Return the version of each package of this environment."""
    found = ((each.metadata["Name"], each.version) for each in importlib.metadata.distributions())
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def main() -> None:
    """Lay the packages out and run the tests."""
    which, folder, *arguments = sys.argv[1:]
    wanted, have = resolve(which), installed()
    changed = [f"{name}=={version}" for name, version in wanted.items() if have.get(name) != version]
    print(f"{which}: {len(changed)} of {len(wanted)} packages differ from the locked ones: {' '.join(changed)}")
    shutil.rmtree(folder, ignore_errors=True)
    if changed:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            print(*changed, sep="\n", file=file, flush=True)
            command = ("pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", folder)
            subprocess.run([*UV, *command, "-r", file.name], check=True)
    path = os.pathsep.join([str(Path(folder).absolute()), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", *arguments]
    done = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path}, cwd=HERE.parent)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
