"""Arrows point inward: edges -> core -> errors; and what needs no torch does not wait for it."""

import ast
import pydoc
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import treadle
from treadle.common.moved import MOVED
from treadle.common.options import meanings

PACKAGE = Path(treadle.__file__).parent
LEVELS = {
    "common": 0, "lora": 1, "routing": 1, "bundle": 2, "engine": 3, "experiments": 4, "serving": 4, "cli": 5,
    "__main__": 6,
}  # fmt: skip
"""Packages may import what is below them, and nothing beside them."""


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"}


def imported(module: str) -> set[str]:
    """Modules of the package that a module imports anywhere in it, inside functions too; "" is the package itself."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {name for name in inner if name.removeprefix("treadle.") in MODULES}
            names |= known | ({node.module or ""} if known != inner else set())
    own = {name.removeprefix("treadle").removeprefix(".") for name in names if name.split(".")[0] == "treadle"}
    assert own <= {"", *MODULES}, f"{module}: unknown modules {own}"
    return own


def test_the_walk_sees_imports_inside_functions():
    assert "engine.scoring" in imported("engine.engine")  # inside a function
    assert "lora.blend" in imported("engine.scoring")  # for types alone


def test_packages_import_only_what_is_below_them():
    found = set()
    for module in MODULES:
        package = module.split(".")[0]
        for other in imported(module):
            above = other.split(".")[0]
            if above != package and (not other or LEVELS[above] >= LEVELS[package]):
                found.add((module, other))
    assert found == set()


def test_modules_import_each_other_in_no_circle():
    """In a circle no module can be read, or tried, without the others; imports for types count too."""
    graph = {module: imported(module) - {"", module} for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # a CycleError names the modules


def test_the_top_holds_eight_packages():
    names = {path.name for path in PACKAGE.iterdir() if path.is_file() or any(path.glob("*.py"))}
    assert names == {*LEVELS} - {"__main__"} | {"__init__.py", "__main__.py"}


def test_errors_and_options_stand_below_everything():
    assert imported("common.errors") == imported("common.moved") == imported("common.version") == set()
    assert imported("common.options") == {"common.errors"}
    assert imported("common.params") == {"common.errors", "common.options"}
    assert imported("common.documents") == {"common.errors"}
    assert imported("routing.samples") == set()


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_what_needs_no_model_loads_no_torch():
    light = modules_after(
        "import treadle, treadle.common.errors, treadle.common.options, treadle.common.params, treadle.routing.router"
        ", treadle.experiments.tasks, treadle.experiments.data"
    )
    assert not light & {"torch", "transformers", "peft", "model2vec", "sentence_transformers", "datasets"}
    assert "numpy" in light


def test_options_load_no_numpy():
    assert not modules_after("import treadle, treadle.common.params, treadle.experiments.tasks") & {
        "numpy",
        "torch",
        "safetensors",
    }


def test_public_names_all_resolve():
    assert sorted(treadle.__all__) == treadle.__all__
    for name in {*treadle.__all__} - {"__version__"}:
        assert getattr(treadle, name).__name__ == name


def test_dir_and_help_show_the_public_names_and_what_each_option_means() -> None:
    assert {name for name in dir(treadle) if not name.startswith("__")} == {*treadle.__all__} - {"__version__"}
    page = pydoc.plaintext.document(treadle)
    assert "class Engine" in page
    assert "load(bundle:" in page
    assert "SUBMODULES" not in page
    for options in (treadle.RoutingParams, treadle.SamplingParams):
        told = pydoc.plaintext.document(options)
        for name, meaning in meanings(options).items():
            assert f"{name}: {meaning}." in told


@pytest.mark.parametrize("old", [*MOVED, "treadle.bundle", "treadle.routing"])
def test_modules_of_0_1_still_import_and_warn(old: str) -> None:
    new = (
        MOVED.get(old) or {"treadle.bundle": "treadle.bundle.bundle", "treadle.routing": "treadle.routing.router"}[old]
    )
    name = next(name for name, each in vars(import_module(new)).items() if getattr(each, "__module__", "") == new)
    with pytest.warns(DeprecationWarning, match=f"{old}.{name} is {new}.{name} now".replace(".", r"\.")):
        assert getattr(import_module(old), name) is getattr(import_module(new), name)


def test_options_of_experiments_still_import_from_where_they_were() -> None:
    for name in ("EvalParams", "TrainParams", "BenchParams"):
        with pytest.warns(DeprecationWarning, match=f"is treadle.experiments.params.{name} now"):
            getattr(import_module("treadle.params"), name)


def test_a_name_that_no_module_had_is_an_import_error() -> None:
    for module in ("treadle.embed", "treadle.routing"):
        with pytest.raises(AttributeError, match="nothing_of_this_name"):
            import_module(module).nothing_of_this_name  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        import_module("treadle.never")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'treadle' has no attribute 'blendd'"):
        treadle.blendd  # noqa: B018
