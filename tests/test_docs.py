"""The documents name what there is."""

import re
from pathlib import Path

import pytest
import typer

from treadle.cli.main import app

ROOT = Path(__file__).parents[1]
COMMANDS = typer.main.get_command(app).commands


def sections() -> dict[str, str]:
    parts = re.split(r"^## treadle (\w+)$", (ROOT / "docs" / "cli.md").read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_command_line_document_has_every_command() -> None:
    assert list(sections()) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_document_has_every_flag(name: str) -> None:
    params = COMMANDS[name].params
    flags = {flag for param in params for flag in (*param.opts, *param.secondary_opts) if flag.startswith("-")}
    columns = re.findall(r"^  (-.*?)(?:  |<|$)", sections()[name], flags=re.MULTILINE)  # before the type and the help
    written = {flag for column in columns for flag in re.findall(r"-[\w-]+", column)}
    assert written == flags | {"--help"}, "run: python docs/make_cli.py"


def test_the_house_rules_name_every_package() -> None:
    house = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    packages = {file.parent.name for file in (ROOT / "src" / "treadle").glob("*/__init__.py")}
    assert {name for name in packages if f"| `{name}` |" not in house} == set()
