"""The snippets of the documents run: on a tiny base, in a folder in which the names that they use exist."""

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import torch
import typer
from safetensors.torch import load_file

from treadle.bundle.bundle import save_bundle
from treadle.cli.main import app
from treadle.routing.router import Router

from conftest import SAMPLES, Run, byte_tokenizer, edit_config, save_adapter, tiny_llama
from serving import Serving, serving

COMMANDS = typer.main.get_command(app).commands
DOCS = Path(__file__).parents[1] / "docs"
SERVED = {"server.md", "http.md"}
"""Pages whose snippets ask a server that runs."""
ELSEWHERE = {"vllm.md"}
"""Pages whose snippets need what the tests do not install."""
ADMIN = "admin-key"
OTHER_PROGRAMS = {".", "make", "pip", "curl"}
"""What a line of a shell snippet may begin with, besides treadle."""


class Snippet(NamedTuple):
    page: str
    line: int
    language: str
    text: str


def snippets(file: Path) -> Iterator[Snippet]:
    text = file.read_text("utf-8")
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Snippet(file.name, text.count("\n", 0, found.start()) + 1, found[1], found[2])


SNIPPETS = [each for file in sorted(DOCS.glob("*.md")) for each in snippets(file)]
PAGES = sorted({each.page for each in SNIPPETS if each.language in ("python", "bash")} - ELSEWHERE - SERVED)


@pytest.fixture
def workplace(tmp_path: Path, adapter_folders: dict[str, Path], router: Router, monkeypatch) -> Path:
    """A folder with all that the snippets name: a base, bundles, adapters with and without samples, rows."""
    base = tmp_path / "org" / "model"
    tiny_llama().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    for name, folder in adapter_folders.items():
        plain, mine = tmp_path / "plain-adapters" / name, tmp_path / "my-adapters" / name
        shutil.copytree(folder, plain)
        edit_config(plain, base_model_name_or_path="org/model")
        shutil.copytree(plain, mine)
        (mine / "samples.txt").write_text("\n".join(SAMPLES[name]))
    save_adapter(tmp_path / "org" / "law-lora", base_model_name_or_path="org/model")
    plain = {name: tmp_path / "plain-adapters" / name for name in adapter_folders}
    save_bundle(tmp_path / "demo" / "bundle", base=str(base), adapters=plain, router=router, samples=SAMPLES)
    write_pickle(tmp_path / "plain-adapters" / "math", tmp_path / "old-adapter")
    write_rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TREADLE_HOME", str(tmp_path / "home"))
    return tmp_path


def write_pickle(adapter: Path, folder: Path) -> None:
    """Write an adapter as PEFT did at first."""
    folder.mkdir()
    shutil.copy(adapter / "adapter_config.json", folder)
    torch.save(load_file(adapter / "adapter_model.safetensors"), folder / "adapter_model.bin")


def write_rows(folder: Path) -> None:
    rows = {
        "math": [{"question": f"add {i} plus {i}?", "answer": f"sum {i}\n#### {2 * i}"} for i in range(8)],
        "science": [
            {
                "question": f"which atom {i}?",
                "choices": {"text": ["cell", "heat", "planet"], "label": ["A", "B", "C"]},
                "answerKey": "ABC"[i % 3],
            }
            for i in range(8)
        ],
        "questions": [{"question": f"list of loop {i}", "query": f"select {i}"} for i in range(8)],
        "sql": [{"prompt": f"list of loop {i}", "completion": f" select {i}"} for i in range(8)],
    }
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell snippet."""
    for line in text.replace("\\\n", " ").splitlines():
        quoted = re.sub(r"\$'(.*?)'", lambda found: shlex.quote(found[1].replace("\\n", "\n")), line)
        if words := shlex.split(quoted, comments=True):
            yield words


def run_shell(snippet: Snippet, run: Run) -> None:
    for program, *words in commands(snippet.text):
        assert program in {"treadle", *OTHER_PROGRAMS}, f"{snippet.page}:{snippet.line}"
        if program == "treadle":
            is_server = words[0] == "serve"  # would not end
            code, out, err = run(*words, *(["--print-config"] if is_server else []))
            assert code == 0, f"{snippet.page}:{snippet.line}: {' '.join(words)}\n{out}{err}"


def run_python(snippet: Snippet, names: dict[str, object]) -> None:
    exec(compile("\n" * snippet.line + snippet.text, str(DOCS / snippet.page), "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of_a_page_run_in_their_order(page: str, workplace: Path, run: Run) -> None:
    names: dict[str, object] = {"__name__": page}
    files = iter(re.findall(r"(?:Write|file) `(\w+\.(?:json|toml))`", (DOCS / page).read_text("utf-8")))
    own = [snippet for snippet in SNIPPETS if snippet.page == page]
    assert own
    for snippet in own:
        if snippet.language == "python":
            run_python(snippet, names)
        elif snippet.language == "bash":
            run_shell(snippet, run)
        elif snippet.language in ("json", "toml"):
            (workplace / next(files)).write_text(snippet.text)


def ask(words: list[str], served: Serving) -> httpx.Response:
    """Ask a server what a command of curl asks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("-d", dest="data")
    parser.add_argument("-H", dest="header")
    parser.add_argument("-X", dest="method")
    asked = parser.parse_args(words)
    headers = {"Content-Type": "application/x-www-form-urlencoded"} if asked.data else {}
    if asked.header:
        headers["Authorization"] = asked.header.split(": ", 1)[1].replace("$ADMIN", ADMIN)
    method = asked.method or ("POST" if asked.data else "GET")
    return served.request(method, asked.address.removeprefix("localhost:8000"), content=asked.data, headers=headers)


@pytest.mark.parametrize("page", sorted(SERVED))
def test_a_server_answers_the_snippets_of_its_pages(page: str, workplace: Path, run: Run) -> None:
    for name in ("poetry", "folder"):
        shutil.copytree(workplace / "plain-adapters" / "code", workplace / "below" / name)
    own = [each for each in SNIPPETS if each.page == page]
    with serving(Path("demo/bundle"), admin_key=ADMIN, adapter_dir=str(workplace / "below")) as served:
        for snippet in own:
            if snippet.language == "bash":
                run_shell(snippet, run)
                for program, *words in commands(snippet.text):
                    if program == "curl":
                        answer = ask(words, served)
                        assert answer.status_code < 400, f"{page}:{snippet.line}: {words}: {answer.text}"
            elif snippet.language == "python":
                run_python(snippet._replace(text=snippet.text.replace("http://localhost:8000", served.url)), {})


ERRORS = {
    "base model": "generate --base org/none --adapters plain-adapters --prompt x",
    "nowhere is not": "generate nowhere --prompt x",
    "no adapter has": "generate --base org/model --adapters plain-adapters --prompt x",
    "- plain-adapters": "fit --base org/model --adapters plain-adapters -o new",
    "- other": "generate --base org/model --adapter other=other --prompt x --strict",
    "unknown adapter": "generate demo/bundle --prompt x --fixed maths=1",
    "- rule boosted": "generate demo/bundle --prompt x --rule boosted",
    "sentence embedder": "fit --base org/model --adapters my-adapters --embedder all-MiniLM-L6-v2 -o new",
    "- openai/gsm8k": "eval demo/bundle -o results --tasks math --arms base",
    "Host: got": "",
}
"""How each message of the FAQ begins, and the command that provokes it; the last one is a server's."""
MESSAGES = {
    start: each.text.strip()
    for each in SNIPPETS
    if each.page == "faq.md" and each.language == "text"
    for start in ERRORS
    if each.text.startswith(start)
}


def test_the_faq_has_ten_messages() -> None:
    assert MESSAGES.keys() == ERRORS.keys()
    assert len(ERRORS) == 10


@pytest.mark.parametrize("start", [start for start in ERRORS if ERRORS[start]])
def test_a_message_of_the_faq_is_what_treadle_says(start: str, workplace: Path, run: Run) -> None:
    shutil.copytree(workplace / "plain-adapters" / "code", workplace / "other")
    edit_config(workplace / "other", base_model_name_or_path="other/base")
    code, _, said = run(*shlex.split(ERRORS[start]))
    assert code == 1
    assert says(MESSAGES[start], said), said


def test_the_server_says_what_the_faq_has(workplace: Path) -> None:
    with serving(Path("demo/bundle")) as served:
        answer = served.request("GET", "/v1/models", headers={"Host": "ai.example.org"})
    assert answer.status_code == 403
    assert says(MESSAGES["Host: got"], answer.json()["error"]["message"])


def says(message: str, text: str) -> bool:
    """Return whether a text holds a message in which an ellipsis stands for anything."""
    return re.search(re.escape(message).replace("…", ".+"), text) is not None


@pytest.mark.parametrize("page", sorted(ELSEWHERE))
def test_snippets_that_cannot_run_here_can_be_read(page: str) -> None:
    own = [each for each in SNIPPETS if each.page == page]
    assert own
    for snippet in own:
        if snippet.language == "python":
            compile(snippet.text, page, "exec")
        elif snippet.language == "bash":
            for program, *words in commands(snippet.text):
                if program == "treadle":
                    COMMANDS[words[0]].make_context(words[0], words[1:])


def test_every_block_says_what_it_is() -> None:
    known = {"python", "bash", "json", "toml", "yaml", "text"}
    assert [each[:3] for each in SNIPPETS if each.language not in known] == []
