"""Whatever is damaged in a file ends in a refusal of ours: a short, seeded form of benchmarks/fuzz.py."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def fuzzing() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return import_module("fuzz")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def root(fuzzing: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    fuzzing.make_all(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # such as that of an adapter's unknown field
def test_a_damaged_file_of_any_format_is_read_or_refused(
    fuzzing: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # it takes seconds to import
    faults: list[str] = []
    for name in fuzzing.FORMATS:
        fuzzing.fuzz(root, name, 10, 0, lambda title, trace: faults.append(f"{title}\n{trace}"))
    assert not faults, "\n".join(faults)
