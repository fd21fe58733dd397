"""A program that misbehaves fails alone: in its time, in its folder, and with everything that it started."""

import fcntl
import time
from contextlib import suppress
from pathlib import Path

import pytest

from treadle.experiments.sandbox import MAX_FILE_BYTES, passes

from conftest import Run

ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]


@pytest.mark.parametrize(
    "program",
    [
        ADD,
        "from __future__ import annotations\n" + ADD,
        "print('talks', end='')\n" + ADD,
        "import sys\nsys.stdout.buffer.write(b'\\xff')\n" + ADD,
        ADD + "\nname = 'é漢'",
        ADD + "\n" + "x = 1\n" * 30_000,  # longer than an argument of a command may be
        "import json, re, collections\n" + ADD,
        "import atexit\natexit.register(print, 'bye')\n" + ADD,
    ],
    ids=["plain", "future", "prints", "prints bytes", "letters", "long", "imports", "at its end"],
)
def test_a_right_program_passes(program):
    assert passes(program, TESTS)


@pytest.mark.parametrize(
    "program",
    [
        "",
        "def add(a, b):\n    return a - b",
        "def add(a, b):\n    return 3",
        "def add(a, b):",
        ADD + "\nx = '",
        ADD + '\nx = """',
        ADD + "\nraise ValueError",
        ADD + "\nexit(0)",
        ADD + "\nimport os\nos._exit(0)",
        ADD + "\nraise SystemExit",
        "print('ok')\nquit()",
        ADD + "\ninput()",
        ADD + "\n\0",
        ADD + "\nx = '\ud800'",
        ADD + "\nimport os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
        "def add(a, b):\n    return add(a, b)",
    ],
)
def test_a_program_that_is_wrong_or_ends_before_its_tests_fails(program):
    assert not passes(program, TESTS)


def test_every_test_must_hold_and_no_tests_prove_nothing():
    assert passes(ADD, TESTS[:1])
    assert not passes(ADD, [*TESTS, "assert add(1, 1) == 3"])
    assert not passes(ADD, ["assert add(1, 1) == 3", *TESTS])
    assert not passes(ADD, [])


@pytest.mark.parametrize("endless", ["while True:\n    pass", "import time\ntime.sleep(60)"])
@pytest.mark.parametrize("is_test", [False, True])
def test_what_does_not_end_is_killed_within_its_time(endless, is_test):
    started = time.monotonic()
    assert not passes("" if is_test else endless, [endless if is_test else "assert True"], seconds=0.5)
    assert 0.5 <= time.monotonic() - started < 5


def test_a_program_that_reads_its_input_finds_none_and_need_not_wait():
    started = time.monotonic()
    assert passes("import sys\ntext = sys.stdin.read()", ["assert text == ''"], seconds=20)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("program", ["x = bytearray(1 << 28)", "x = ['x']\nwhile len(x) < 1 << 26:\n    x += x"])
def test_memory_is_limited(program):
    assert not passes(program, ["assert len(x)"], memory=1 << 27)
    assert passes(program, ["assert len(x)"], seconds=60)


def test_files_are_limited():
    write = "with open('x', 'wb') as file:\n    file.write(bytes({size}))"
    assert passes(write.format(size=MAX_FILE_BYTES), ["assert True"])
    assert not passes(write.format(size=MAX_FILE_BYTES + 1), ["assert True"])
    assert not passes(f"print('x' * {MAX_FILE_BYTES})", ["assert True"])


@pytest.mark.parametrize(("tail", "passed"), [("", True), ("\nexit(1)", False), ("\nwhile True:\n    pass", False)])
def test_children_of_a_program_are_killed(tmp_path, tail, passed):
    lock = tmp_path / "lock"  # the child holds it as long as it lives
    program = (
        f"import fcntl, subprocess\nfile = open({str(lock)!r}, 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        f"subprocess.Popen(['sleep', '60'], pass_fds=[file.fileno()]){tail}"
    )
    assert passes(program, ["assert file"], seconds=2) is passed
    assert lock.exists()
    assert is_released(lock)


def is_released(lock: Path) -> bool:
    """Whether nobody holds a lock any more, within five seconds."""
    with lock.open() as file:
        for _ in range(100):
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(0.05)
    return False


def test_a_program_lives_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = "import os\nseen = os.path.exists('x')\nopen('x', 'w').close()\nfolder = os.getcwd()"
    here = [f"assert folder != {str(tmp_path)!r}"]
    assert passes(program, ["assert not seen", *here])
    assert passes(program, ["assert not seen", *here])  # nor does it meet the files of the one before
    assert not list(tmp_path.iterdir())


def test_our_environment_is_not_its(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert passes("import os", ["assert 'HF_TOKEN' not in os.environ"])


def test_the_command_says_that_programs_run_without_a_sandbox(run: Run) -> None:
    code, out, _ = run("eval", "--help")
    assert code == 0
    assert "there is no sandbox" in " ".join(out.split())
