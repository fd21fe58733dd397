"""Tests use what is public: they patch no name of treadle and reach into none of its privates."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
PATCHERS = {"setattr", "setitem", "delattr", "delitem"}
PATCHED = {
    "sys.argv": "the command line of a program that is run in this process",
    "sys.stdin": "bytes that are no text reach a command",
    "sys.stdout": "a full disk behind a command",
    "sys.modules": "a library that is not installed, or a stand-in for one",
    "os.fsync": "a disk that refuses, or is not waited for",
    "os.link": "a file system without links",
    "fcntl.flock": "a file system without locks",
    "os.sched_getaffinity": "another number of cores",
    "subprocess.run": "a process that fails, must not start, or takes seconds to import what is here",
    "socket.getaddrinfo": "a host with several addresses",
    "hmac.compare_digest": "whether keys are compared in constant time cannot be seen from outside",
    "SFTTrainer.__init__": "a training run that stops or fails",
    "DynamicCache.reorder_cache": "whether a beam search moved rows",
    "sentence_transformers.SentenceTransformer": "how the library is asked for a model of the hub",
    "datasets.config.HF_DATASETS_CACHE": "read from the environment when the library was imported",
    "lm_eval.tasks.TaskManager": "the library's own 10,000 task files stay unread",
}
"""Names of other libraries that tests patch, and why there is no better way; environment variables are not listed."""
FOREIGN_PRIVATES = {
    "_replace",  # NamedTuple's
    "_exit",  # of os
    "_forward_hooks", "_forward_pre_hooks",  # torch's, of a module that must have none
    "_is_stateful",  # how transformers marks a model with a recurrent state
    "_reverse_permute_weights",  # transformers', which reads what llama.cpp's files hold
    "_reset_state",  # accelerate's, of processes that are forked
    "_preempt_request",  # vLLM's, which counts
}  # fmt: skip


def trees() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(TESTS.rglob("*.py")):
        yield str(file.relative_to(TESTS)), ast.parse(file.read_text("utf-8"))


def imported_from_treadle(tree: ast.Module) -> set[str]:
    """Names of a file that stand for modules of treadle or for what these hold."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in {"treadle", "benchmarks"}:
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname or "treadle" for alias in node.names if alias.name.split(".")[0] == "treadle"}
    return names


def patches(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield each patch of a file: the root of what is patched, and its name with the attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PATCHERS:
            target, *more = node.args
            if isinstance(target, ast.Constant):
                yield str(target.value).split(".")[0], str(target.value)
                continue
            name = ast.unparse(target)
            attribute = more[0].value if node.func.attr.endswith("attr") and isinstance(more[0], ast.Constant) else ""
            yield name.split(".")[0], f"{name}.{attribute}".rstrip(".")


def test_no_test_patches_a_name_of_treadle_and_the_others_are_listed() -> None:
    own = [
        f"{file}: {name}"
        for file, tree in trees()
        for root, name in patches(tree)
        if root == "treadle" or root in imported_from_treadle(tree)
    ]
    assert own == []
    assert {name for _, tree in trees() for _, name in patches(tree)} == set(PATCHED)


def test_no_test_reaches_into_a_private_of_treadle() -> None:
    found = [
        f"{file}:{node.lineno}: {ast.unparse(node)}"
        for file, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.endswith("__")
        and node.attr not in FOREIGN_PRIVATES
        and ast.unparse(node.value) not in {"self", "cls", "super()"}
    ]
    found += [
        f"{file}: {node.module}.{alias.name}"
        for file, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("treadle")
        for alias in node.names
        if alias.name.startswith("_") and alias.name != "__version__"
    ]
    assert found == []
