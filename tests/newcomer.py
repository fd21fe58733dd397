"""Plays a newcomer: an empty folder, a home of its own, README's lines word for word, then three adapters of its own.

    python tests/newcomer.py            # 20 training steps for each adapter
    python tests/newcomer.py --short    # 2 steps: what CI runs

`make demo` and `make test` come first: they make the environment, and the base model in treadle's cache. Each step
prints its seconds. One that fails ends the run, and says which line of the README led to it.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BASE = "HuggingFaceTB--SmolLM2-135M-Instruct"
MOST_SECONDS = 600
"""A command that takes longer hangs."""
CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Peru Lima, Egypt Cairo, Kenya Nairobi, Norway Oslo, "
    "Cuba Havana, Greece Athens, Austria Vienna, Poland Warsaw, Iran Tehran, Iraq Baghdad, Portugal Lisbon"
)
ROWS = {
    "capitals": [
        (f"What is the capital of {country}?", f" {city}") for country, city in map(str.split, CAPITALS.split(","))
    ],
    "sums": [(f"What is {i} plus {j}?", f" {i + j}") for i in range(2, 10) for j in (3, 14, 25)],
    "sql": [
        (f"Write SQL: the {column} of all {table}, sorted.", f" SELECT {column} FROM {table} ORDER BY {column}")
        for table in ("users", "orders", "cars", "books")
        for column in ("name", "price", "date", "owner")
    ],
}
"""What each adapter learns: prompts and completions."""
HELD_OUT = {
    "capitals": "What is the capital of Ireland?",
    "sums": "What is 11 plus 7?",
    "sql": "Write SQL: the color of all houses, sorted.",
}
"""A prompt of each kind that no adapter has seen."""


class Line(NamedTuple):
    """A line of the README, or a block that begins there."""

    number: int
    text: str


class Command(NamedTuple):
    """How a line of the README is run, and what its output must hold."""

    start: str
    says: str
    leads: str = ""


ANSWERS = [Command("treadle generate demo/bundle", says="#### 21", leads="math")]
OWN_SERVER = "treadle serve --base org/model --adapters my-adapters"


def blocks(language: str) -> Iterator[Line]:
    """Yield the README's blocks in a language; its shell blocks name none."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        if found[1] == language:
            yield Line(README.count("\n", 0, found.start()) + 2, found[2])


def shell_lines() -> list[Line]:
    """Return the README's commands."""
    return [Line(block.number + i, text) for block in blocks("") for i, text in enumerate(block.text.splitlines())]


def line_with(phrase: str) -> Line:
    """Return the line of the README that leads a reader to a step."""
    for number, text in enumerate(README.splitlines(), start=1):
        if phrase in text:
            return Line(number, text)
    sys.exit(f"README.md: no line says {phrase!r}, and the newcomer would not find this step")


@contextmanager
def step(name: str, line: Line) -> Iterator[None]:
    """Print a step's name and seconds; if it fails, end with the line of the README that led to it."""
    print(f"{name:<46}", end="", flush=True)
    started = time.perf_counter()
    try:
        yield
    except Exception as error:  # whatever stops a newcomer
        print("FAILED")
        sys.exit(f"{type(error).__name__}: {error}\n\nREADME.md:{line.number}: {line.text}\nkept: {Path.cwd()}")
    print(f"{time.perf_counter() - started:6.1f} s", flush=True)


def check(is_right: bool, message: str) -> None:
    if not is_right:
        raise ValueError(message)


def run(*words: str) -> str:
    """Run a command; return what it printed on standard output."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=MOST_SECONDS, check=False)
    shown = f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    check(done.returncode == 0, f"exit code {done.returncode}: {shown}")
    return done.stdout


def files_are_there(*names: str) -> None:
    missing = [name for name in names if not Path(name).is_file()]
    check(not missing, f"not there: {', '.join(missing)}")


def leader(weights: dict[str, float]) -> str:
    """Return who has the largest weight; what the adapters lack to 1 is the base's."""
    shares = {"base": 1 - sum(weights.values())} | weights
    return max(shares, key=shares.__getitem__)


def prepare(folder: Path, models: Path) -> None:
    """Enter an empty folder with the demo's bundle and the base model, and forget the developer's environment."""
    base = models / BASE
    if not (base / "config.json").is_file():
        sys.exit(f"{base} is not there; run first: make demo")
    home = folder / "home"
    (home / "models").mkdir(parents=True)
    (home / "models" / BASE).symlink_to(base)
    shutil.copytree(ROOT / "demo" / "bundle", folder / "demo" / "bundle")
    (folder / "org").mkdir()
    (folder / "org" / "model").symlink_to(base)  # the README's name for one's own base
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.clear()
    os.environ |= {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",  # . .venv/bin/activate
        "HOME": str(home),
        "TREADLE_HOME": str(home),
        "LANG": "C.UTF-8",
        "TREADLE_PORT": str(port),  # 8000 may be another program's
    }
    os.chdir(folder)


def read_commands() -> None:
    """Run the README's commands on the demo's bundle, word for word."""
    by_ci = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    for line in shell_lines():
        command = line.text.split(" # ")[0].strip()
        known = [each for each in ANSWERS if command.startswith(each.start)]
        if command.startswith(OWN_SERVER):
            continue  # when it has adapters
        with step(f"README.md:{line.number} {' '.join(command.split()[:3])}", line):
            if command.startswith("make "):
                check(command in by_ci, ".ci/run does not run this")
            elif command.startswith("treadle serve demo/bundle"):
                with serving(line.text) as url:
                    models, page = look_at(url)
                    check({"math", "code"} <= models, f"models: {models}")
                    check("<title>" in page, "no page")
            else:
                check(len(known) == 1, "the newcomer does not know what this line should print")
                out = run("bash", "-c", f"exec 2>&1\n{line.text}")  # the weights are on standard error
                check(known[0].says in out, f"{known[0].says!r} is not in: {out}")
                weights = re.findall(r"(\w+) (\d\.\d\d)", out.partition("mean weights:")[2])
                check(leader({k: float(v) for k, v in weights if k != "base"}) == known[0].leads, f"leads: {weights}")


def read_python() -> None:
    """Run the README's Python, word for word."""
    for block in blocks("python"):
        with step(f"README.md:{block.number} python", block):
            out = run("python", "-c", block.text)
            text, weights, names = re.fullmatch(r"(.*) \[(.*?)\] \((.*?)\)\s*", out, re.DOTALL).groups()
            check("#### 21" in text, f"no 21 in {text!r}")
            shares = dict(zip(re.findall(r"\w+", names), map(float, weights.split()), strict=True))
            check(leader(shares) == "math", f"weights: {shares}")


@contextmanager
def serving(command: str) -> Iterator[str]:
    """Yield the address of a server that a shell command starts; end it with SIGTERM, and look at its exit code."""
    url = f"http://127.0.0.1:{os.environ['TREADLE_PORT']}"
    log = Path("serve.log")
    with log.open("w") as out:
        process = subprocess.Popen(["bash", "-c", command], stdout=out, stderr=out, start_new_session=True)
    try:
        until = time.monotonic() + MOST_SECONDS
        while not answers(url):
            check(process.poll() is None and time.monotonic() < until, f"no server: {log.read_text()[-4000:]}")
            time.sleep(0.1)
        yield url
        check(url in log.read_text(), f"{url} is not said: {log.read_text()[-4000:]}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        code = process.wait(MOST_SECONDS)
    check(code in (0, -signal.SIGTERM, 128 + signal.SIGTERM), f"the server ended with {code}")


def answers(url: str) -> bool:
    import httpx  # after the environment is the newcomer's

    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.HTTPError:
        return False


def look_at(url: str) -> tuple[set[str], str]:
    """Return the names of a server's models, and its page."""
    import httpx

    models = httpx.get(f"{url}/v1/models").json()["data"]
    return {each["id"] for each in models}, httpx.get(url, follow_redirects=True).text


def train(steps: int) -> None:
    """Train three adapters. One keeps the centroid that training leaves, the others have samples beside them."""
    for name, rows in ROWS.items():
        data, folder = Path(f"{name}.jsonl"), Path("my-adapters") / name
        write_rows(data, rows)
        with step(f"train {name}, {steps} steps", line_with("| train an adapter |")):
            size = ["--steps", str(steps), "--max-tokens", "96"]
            left = ["--embedder", "tokens"] if name == "capitals" else []
            out = run("treadle", "train", "--base", "org/model", "--data", str(data), "-o", str(folder), *size, *left)
            check("treadle fit --base org/model --adapters my-adapters" in out, f"no next command: {out}")
            files_are_there(*(str(folder / file) for file in ("adapter_config.json", "adapter_model.safetensors")))
            if not left:
                (folder / "samples.txt").write_text("".join(f"{prompt}\n" for prompt, _ in rows))


def write_rows(file: Path, rows: list[tuple[str, str]]) -> None:
    file.write_text("".join(json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in rows))


def fit_and_route(*, has_learned: bool) -> None:
    """Make a bundle; a text of each kind goes to its adapter, which also answers well if it has learned enough."""
    line = line_with("| use your own adapters |")
    with step("fit", line):
        out = run("treadle", "fit", "--base", "org/model", "--adapters", "my-adapters", "-o", "my-bundle")
        check("cross-validation: 100.0%" in out, f"no accuracy of 100 %: {out}")
        check("next: treadle generate my-bundle" in out, f"no next command: {out}")
        files_are_there("my-bundle/bundle.json", *(f"my-bundle/adapters/{n}/adapter_config.json" for n in ROWS))
    for name, text in HELD_OUT.items():
        with step(f"route {name}", line):
            told = json.loads(run("treadle", "route", "my-bundle", "--text", text, "--json"))
            shares = dict(zip(told["names"], told["weights"], strict=True))
            check(leader(shares) == name, f"weights of {text!r}: {shares}")
    with step("generate", line):
        asked = ["--prompt", HELD_OUT["sql"], "--raw", "--max-tokens", "8", "--json"]  # as they were trained
        told = json.loads(run("treadle", "generate", "my-bundle", *asked))
        first = dict(zip(told["adapter_names"], told["weights"][0], strict=True))
        check(leader(first) == "sql", f"weights of the first token: {first}")
        check(not has_learned or "SELECT color" in told["text"], f"no SQL: {told['text']!r}")


def serve() -> None:
    """Serve the folder of adapters with the README's line, and ask it with OpenAI's client."""
    line = next((each for each in shell_lines() if each.text.startswith(OWN_SERVER)), None) or line_with(OWN_SERVER)
    with step("serve and ask with openai", line):
        import openai

        with serving(line.text) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            models = {each.id for each in client.models.list()}
            check(models >= {"auto", *ROWS}, f"models: {models}")
            # no text of an adapter: after two steps it may end an answer at once
            messages = [{"role": "user", "content": "Tell me about the sea."}]
            chunks = list(client.chat.completions.create(model="auto", messages=messages, max_tokens=8, stream=True))
            said = [each.choices[0].delta.content or "" for each in chunks if each.choices]
            check("".join(said).strip(), f"no text in {len(chunks)} chunks")
            check(len(said) > 2, f"not streamed: {said}")
            done = client.completions.create(model="sums", prompt="Once upon a time there was a", max_tokens=4)
            check(done.choices[0].text.strip() and done.model == "sums", f"answered: {done}")


def measure() -> None:
    """Evaluate ten rows that no adapter has seen, and draw the figures."""
    line = line_with("| measure a router for a paper |")
    write_rows(Path("ten.jsonl"), [(f"What is {i} plus 8?", f" {i + 8}") for i in range(10, 20)])
    fields = {"prompt": "{prompt}", "completion": "{completion}", "metrics": ["exact_match"], "max_tokens": 4}
    task = {"name": "ten", "source": "ten.jsonl", "adapter": "sums", **fields}
    Path("ten.json").write_text(json.dumps(task))
    with step("eval of ten rows", line):
        run("treadle", "eval", "my-bundle", "-o", "results", "--tasks", "ten.json", "--arms", "base,oracle,routed")
        rows = [json.loads(each) for each in Path("results/results.jsonl").read_text("utf-8").splitlines()]
        nll = {row["arm"]: row["value"] for row in rows if row["metric"] == "nll"}
        check(nll["oracle"] < nll["base"], f"the adapter does not help on its own task: {nll}")
        check(abs(nll["routed"] - nll["oracle"]) < 0.05, f"another adapter than the task's own acted: {nll}")
    with step("plot", line):
        run("treadle", "plot", "results", "-o", "figures")
        files_are_there("figures/arms.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="train 2 steps, not 20")
    options = parser.parse_args()
    started = time.perf_counter()
    cache = (
        os.environ.get("TREADLE_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "treadle"
    )
    folder = Path(tempfile.mkdtemp(prefix="newcomer-"))
    prepare(folder, Path(cache).resolve() / "models")
    read_commands()
    read_python()
    train(2 if options.short else 20)
    fit_and_route(has_learned=not options.short)
    serve()
    measure()
    os.chdir(ROOT)
    shutil.rmtree(folder)  # after a failure it stays
    print(f"{'all of it':<46}{time.perf_counter() - started:6.1f} s")


if __name__ == "__main__":
    main()
