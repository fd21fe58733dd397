"""The documents name what there is."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from itertools import pairwise
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


def test_what_the_server_says_of_itself_is_in_its_documents() -> None:
    spec = importlib.util.spec_from_file_location("make_server", ROOT / "docs" / "make_server.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stale = [name for name, make in module.PAGES.items() if (ROOT / "docs" / name).read_text("utf-8") != make()]
    assert stale == [], "run: python docs/make_server.py"


def test_the_results_are_short() -> None:
    lines = (ROOT / "docs" / "results.md").read_text("utf-8").splitlines()
    assert len(lines) <= 300, "move what did not help, and older tables, into the lab notes (docs/lab-*.md)"


def test_the_house_rules_name_every_package() -> None:
    house = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    packages = {file.parent.name for file in (ROOT / "src" / "treadle").glob("*/__init__.py")}
    assert {name for name in packages if f"| `{name}` |" not in house} == set()


OUTSIDE = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "demo/README.md",
    "benchmarks/skills/README.md",
]
"""Documents that are no pages of the site; `make docs` checks the links of the others."""


def headings(file: Path) -> set[str]:
    """Return the anchors of a document's headings."""
    titles = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", OUTSIDE)
def test_links_between_documents_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", (ROOT / name).read_text("utf-8"))
    found = [((ROOT / name).parent / path if path else ROOT / name, anchor) for path, anchor in links]
    dead = [
        f"{file}#{anchor}" for file, anchor in found if not file.exists() or (anchor and anchor not in headings(file))
    ]
    assert dead == []


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the first sentence of each docstring in a file, those of constants too."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield getattr(node, "lineno", 1), first_sentence(text)
            for before, after in pairwise(node.body):
                value = after.value if isinstance(after, ast.Expr) else None
                is_text = isinstance(value, ast.Constant) and isinstance(value.value, str)
                if isinstance(before, ast.Assign | ast.AnnAssign) and is_text:
                    yield after.lineno, first_sentence(value.value)


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.])\s", text.split("\n\n", maxsplit=1)[0].replace("\n", " "))[0]


def test_a_docstring_says_first_who_does_what_in_twenty_words() -> None:
    riddles = [
        f"{file.relative_to(ROOT)}:{line}: {sentence}"
        for file in (ROOT / "src" / "treadle").rglob("*.py")
        for line, sentence in docstrings(file)
        if re.match(r"(Of|What|Return what)\b", sentence) or len(sentence.split()) > 20
    ]
    assert riddles == []
