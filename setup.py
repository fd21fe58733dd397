"""Makes the package's long description of README.md, without links that are dead outside the repository.

With a `Repository` in pyproject's urls they become links to its files; without one only their words stay.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


def long_description(readme: str, repository: str | None) -> str:
    """Return the README with absolute links, or without its relative links and pictures."""
    target = r"(!?)\[([^\]]*)\]\((?!https?://)([^)]+)\)"
    if repository:
        return re.sub(target, rf"\1[\2]({repository.rstrip('/')}/\3)", readme)
    return re.sub(target, lambda link: "" if link[1] else link[2], readme)


class BuildPy(build_py):
    """Adds `py.typed` to what is built, which tells type checkers that the package is typed."""

    def run(self) -> None:
        """Build, then write the marker."""
        super().run()
        if not self.editable_mode:
            Path(self.build_lib, "treadle", "py.typed").touch()


if __name__ == "__main__":
    urls = tomllib.loads((HERE / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    setup(
        cmdclass={"build_py": BuildPy},
        long_description=long_description((HERE / "README.md").read_text("utf-8"), urls.get("Repository")),
        long_description_content_type="text/markdown",
    )
