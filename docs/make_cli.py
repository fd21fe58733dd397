"""Writes docs/cli.md from the commands' own help: `python docs/make_cli.py`."""

from pathlib import Path

import typer

from treadle.cli.main import app

WIDTH = 100
"""Columns of the help texts."""


def document() -> str:
    """Return docs/cli.md: what `treadle COMMAND --help` prints, command by command."""
    group = typer.main.get_command(app)
    parts = ["# The command line\n\nWhat `treadle COMMAND --help` prints; written by `docs/make_cli.py`."]
    for name, command in group.commands.items():
        context = typer.Context(command, info_name=f"treadle {name}", terminal_width=WIDTH, max_content_width=WIDTH)
        parts.append(f"## treadle {name}\n\n```\n{command.get_help(context).strip()}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "cli.md").write_text(document(), "utf-8")
