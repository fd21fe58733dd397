"""Arrows point inward: edges -> core -> errors; and what needs no torch does not wait for it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import treadle

PACKAGE = Path(treadle.__file__).parent
CORE = {
    *(
        "errors",
        "files",
        "options",
        "params",
        "adapters",
        "layers",
        "stacking",
        "blend",
        "compatible",
        "supported",
        "rope",
        "chunk_step",
        "passes",
        "runner",
        "draws",
        "readings",
        "fast_step",
        "centroids",
        "change",
        "embed",
        "sentence",
        "routing",
        "sampling",
    ),
    *(
        "text",
        "chat",
        "pages",
        "cache",
        "rows",
        "prefixes",
        "batch",
        "completion",
        "generate",
        "score",
        "bundle",
        "models",
    ),
    *(
        "step_parts",
        "forms",
        "packs",
        "step_products",
        "stages",
        "graph_step",
        "kernels",
        "kernel_code",
        "products",
        "kernels_plain",
    ),
    *("bundle_files", "centroid_files", "documents", "embedder_files", "magnitudes", "patterns", "tensor_files"),
    "writing",
    "requested",
    "transformers_names",
    "samples",
    "fitting",
}


def imported(module: str) -> set[str]:
    """Modules of the package that a module imports anywhere in it, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    known = {file.stem for file in PACKAGE.glob("*.py")}
    return {name.split(".")[1] for name in names if name.startswith("treadle.")} & known


def test_the_walk_sees_imports_inside_functions():
    assert "generate" in imported("bundle")
    assert "routing" in imported("bundle")


@pytest.mark.parametrize("module", sorted(CORE))
def test_the_core_imports_nothing_of_the_edges(module):
    assert imported(module) - CORE == set()


def test_errors_and_options_stand_below_everything():
    assert imported("errors") == set()
    assert imported("options") == {"errors"}
    assert imported("params") == {"errors", "options"}
    assert imported("documents") == {"errors"}
    assert imported("tasks") == {"documents", "errors", "metrics", "samples"}
    assert imported("samples") == set()


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_what_needs_no_model_loads_no_torch():
    light = modules_after(
        "import treadle, treadle.errors, treadle.options, treadle.params, treadle.routing, treadle.tasks, treadle.data"
    )
    assert not light & {"torch", "transformers", "peft", "model2vec", "sentence_transformers", "datasets"}
    assert "numpy" in light


def test_options_load_no_numpy():
    assert not modules_after("import treadle, treadle.params, treadle.tasks") & {"numpy", "torch", "safetensors"}


def test_public_names_all_resolve():
    assert sorted(treadle.__all__) == treadle.__all__
    for name in treadle.__all__:
        assert getattr(treadle, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'treadle' has no attribute 'blendd'"):
        treadle.blendd  # noqa: B018
