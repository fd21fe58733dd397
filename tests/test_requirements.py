"""The locks hold everything that pyproject.toml asks for, each file by its hash; and the scripts around them."""

import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
LOCKS = sorted(FOLDER.glob("*.txt"))


def script(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{file.stem}_script", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entries(name: str) -> list[str]:
    """Each requirement of a lock with its hashes on one line."""
    text = (FOLDER / f"{name}.txt").read_text("utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def versions(*names: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name in names:
        for entry in entries(name):
            package, version = re.match(r"([\w.-]+)==([^\s;]+)", entry).groups()
            found.setdefault(canonicalize_name(package), set()).add(version)
    return found


def unmet(requirements: Iterable[str], locked: dict[str, set[str]]) -> list[str]:
    parsed = [Requirement(each) for each in requirements]
    return [
        str(each)
        for each in parsed
        if not (found := locked.get(canonicalize_name(each.name))) or not all(map(each.specifier.contains, found))
    ]


@pytest.mark.parametrize("file", LOCKS, ids=lambda file: file.stem)
def test_every_line_is_one_version_with_hashes(file: Path) -> None:
    pattern = r"[\w.-]+==[\w.+]+( ; [^\\]+?)?(\s+--hash=sha256:[0-9a-f]{64})+"
    assert [entry for entry in entries(file.stem) if not re.fullmatch(pattern, entry)] == []
    assert entries(file.stem)


def test_the_locks_hold_what_the_project_asks_for() -> None:
    lock = script(FOLDER / "lock.py")
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(lock.DEV_EXTRAS) == extras.keys() - {
        "vllm",
        "docs",
        "all",
    }  # the first two have environments of their own
    assert extras["all"] == [
        f"treadle[{','.join(each for each in extras if each not in {'vllm', 'docs', 'dev', 'all'})}]"
    ]
    assert unmet(extras["docs"], versions("docs")) == [], "run: make lock LOCK_ARGS="
    for name, asked in {"dev": lock.DEV_EXTRAS, "demo": lock.DEMO_EXTRAS}.items():
        wanted = [*PROJECT["project"]["dependencies"], *(each for extra in asked for each in extras[extra])]
        assert unmet(wanted, versions(name, "torch")) == [], "run: make lock LOCK_ARGS="
    assert unmet(PROJECT["build-system"]["requires"], versions("build")) == []


def test_a_requirement_that_is_missing_or_too_old_is_seen() -> None:
    assert unmet(["torch>=99", "nothing-such", "torch>=2"], versions("torch")) == ["torch>=99", "nothing-such"]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.in")), ids=lambda file: file.stem)
def test_each_lock_has_what_its_source_names(file: Path) -> None:
    lines = [line for line in file.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    assert unmet(lines, versions(file.stem)) == [], "run: make lock LOCK_ARGS="


def test_environments_agree() -> None:
    dev, demo = versions("dev"), versions("demo")
    assert {name: found for name, found in demo.items() if dev.get(name) != found} == {}
    assert versions("torch-cpu") == {"torch": {f"{version}+cpu" for version in versions("torch")["torch"]}}
    shared = versions("torch-cuda").keys() & dev.keys()
    assert shared == set(), "CUDA's packages are installed only beside a torch that asks for them"


@pytest.mark.parametrize(
    ("requires", "is_cuda"),
    [
        (["filelock", "sympy>=1.13.3", "networkx"], False),
        (["filelock", 'cuda-toolkit[cublas]==13.0.3; platform_system == "Linux"'], True),
        (['nvidia-cudnn-cu12==9.1; platform_system == "Linux" and platform_machine == "x86_64"'], True),
        ([], False),
    ],
)
def test_cudas_packages_follow_the_torch_that_was_installed(requires: list[str], is_cuda: bool) -> None:
    assert script(FOLDER / "install.py").asks_for_cuda(requires) == is_cuda


def test_an_installation_is_silent_until_it_fails(capfd: pytest.CaptureFixture[str]) -> None:
    install = script(FOLDER / "install.py")
    install.quietly(sys.executable, "-c", "print('noise')")
    assert capfd.readouterr() == ("", "")
    with pytest.raises(SystemExit, match="exit code 3"):
        install.quietly(sys.executable, "-c", "print('the reason'); raise SystemExit(3)")
    assert "the reason" in capfd.readouterr().err


def test_the_long_description_has_no_dead_link() -> None:
    make = script(ROOT / "setup.py").long_description
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "](docs/" in readme
    links = re.findall(r"\]\(([^)]+)\)", make(readme, None))
    assert [link for link in links if not link.startswith("https://")] == []
    assert "(https://example.org/tree/main/docs/server.md)" in make(readme, "https://example.org/tree/main/")
    there = re.findall(r"\]\((?!https?:)([^)#]+)", readme)
    assert [link for link in there if not (ROOT / link).exists()] == []
