"""Matches module paths with the names and regular expressions of an adapter's config, by PEFT's rules.

An expression of Python's `re` may backtrack forever, and it holds the interpreter meanwhile. Engines of linear time
lack the look-ahead of published configs, and other engines differ from PEFT's `re`. So expressions run in `re` in a
separate process with limits on time and memory. Plain names, the usual case, are compared here.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from treadle.common.errors import AdapterError, shown

WALL_SECONDS, CPU_SECONDS, MEMORY_BYTES = 4.0, 1, 1 << 29
"""Limits for all expressions of a config together; memory is address space."""
MAX_EXPRESSION_CHARACTERS = 100_000
PLAIN = re.compile(r"[A-Za-z0-9_.-]+")
"""A name, in which a dot matches any character; it matches in linear time."""
WORKER = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({CPU_SECONDS}, {CPU_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
expressions, paths = json.load(sys.stdin)
compiled = []
for index, expression in enumerate(expressions):
    try:
        compiled.append(re.compile(expression).match)
    except (re.error, OverflowError, RecursionError) as error:
        json.dump([index, f"{{type(error).__name__}}: {{error}}"], sys.stdout)
        sys.exit()
json.dump([[next((i for i, match in enumerate(compiled) if match(path)), None) for path in paths]], sys.stdout)
"""
"""Prints [indices of the first expression that matches each path], or [index of an invalid expression, reason]."""


def match_ends(patterns: Sequence[str], paths: Sequence[str], wall_seconds: float = WALL_SECONDS) -> list[int | None]:
    """Return for each module path the index of the first pattern that matches its end, as PEFT's get_pattern_key does.

    Raises:
        AdapterError: a pattern is not a regular expression, or all of them together take too much time or memory.
    """
    return list(_first(tuple(patterns), tuple(paths), wall_seconds))


@lru_cache(256)
def _first(patterns: tuple[str, ...], paths: tuple[str, ...], wall_seconds: float) -> tuple[int | None, ...]:
    """Return for each path the index of the first pattern that matches."""
    expressions = [rf"(.*\.)?({pattern})$" for pattern in patterns]
    if all(map(PLAIN.fullmatch, patterns)):
        matches = [re.compile(expression).match for expression in expressions]
        return tuple(next((i for i, match in enumerate(matches) if match(path)), None) for path in paths)
    if long := [pattern for pattern in patterns if len(pattern) > MAX_EXPRESSION_CHARACTERS]:
        raise AdapterError(f"an expression has {len(long[0])} characters; {MAX_EXPRESSION_CHARACTERS} at most are read")
    answer = _ask(json.dumps([expressions, paths]), wall_seconds)
    if answer is None:
        listed = ", ".join(map(shown, patterns[:3])) + (", ..." if len(patterns) > 3 else "")
        raise AdapterError(
            f"the regular expression {listed} takes more than {CPU_SECONDS} s or {MEMORY_BYTES >> 20} MiB; "
            "name the modules"
        )
    if len(answer) == 2:
        raise AdapterError(f"{shown(patterns[answer[0]])} is no regular expression: {answer[1]}")
    return tuple(answer[0])


def _ask(request: str, wall_seconds: float) -> list[Any] | None:
    """Return the answer of a worker process; None if it was stopped."""
    command = [sys.executable, "-I", "-S", "-c", WORKER]
    try:
        done = subprocess.run(command, input=request.encode(), capture_output=True, timeout=wall_seconds, check=False)
    except subprocess.TimeoutExpired:
        return None
    except OSError as error:
        raise AdapterError(f"no process can be started to try regular expressions: {error.strerror}") from error
    return json.loads(done.stdout) if done.returncode == 0 else None
