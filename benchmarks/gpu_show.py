"""Markdown tables of what benchmarks/gpu.py wrote to --output."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def show(files: Sequence[Path]) -> str:
    """Return the tables of all files."""
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    kinds = {kind: [line for line in lines if line["kind"] == kind] for kind in {line["kind"] for line in lines}}
    parts = [
        machines(kinds.get("machine", [])),
        steps([line for line in lines if line["kind"] in {"step", "out of memory"}]),
        whole_steps(kinds.get("engine step", [])),
        calls(kinds.get("call", [])),
        products(kinds.get("product", [])),
        compared(kinds.get("compare", [])),
    ]
    return "\n\n".join(part for part in parts if part)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; nothing without rows."""
    shown = ["| " + " | ".join(row) + " |" for row in rows]
    head = [f"{title}:", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*head, *shown]) if shown else ""


def machines(lines: Sequence[Line]) -> str:
    """Return a line for each run."""
    return "\n".join(f"{line['shape']}: {line['about']}, {line['copied_gb_s']:.0f} GB/s copied." for line in lines)


def pairs(lines: Sequence[Line], keys: Sequence[str]) -> list[tuple[Line, Line]]:
    """Return the lines of the two arms of each setting: off and blended."""
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault(tuple(line[key] for key in keys), []).append(line)
    return [(group[0], group[-1]) for group in groups.values()]


def steps(lines: Sequence[Line]) -> str:
    """Return steps on the device, a row for each setting."""
    columns = ("model, adapters", "context", "batch", "off, ms", "blended, ms (quartiles)", "ratio", "of bandwidth")
    rows: list[list[str]] = []
    for off, blended in pairs([line for line in lines if "context" in line], ("setting", "context", "batch")):
        row = [off["setting"], str(off["context"]), str(off["batch"])]
        if off["kind"] == "out of memory":
            rows.append([*row, off["note"], "", "", ""])
            continue
        middle = f"{blended['ms']:.2f} ({blended['low']:.2f}-{blended['high']:.2f})"
        shares = f"{off['bandwidth']:.0%}, {blended['bandwidth']:.0%}"
        rows.append([*row, f"{off['ms']:.2f}", middle, f"{blended['ratio']:.3f}", shares])
    return table("One step on the device, routing off and blended", columns, rows)


def whole_steps(lines: Sequence[Line]) -> str:
    """Return the engine's steps by the clock, a row for each setting."""
    columns = ("model, adapters", "context", "batch", "off, ms", "every 1, ms", "ratio", "tokens/s")
    rows = [
        [
            off["setting"],
            str(off["context"]),
            str(off["batch"]),
            f"{off['ms']:.2f}",
            f"{each['ms']:.2f}",
            f"{each['ratio']:.3f}",
            f"{each['tokens_s']:.0f}",
        ]
        for off, each in pairs(lines, ("setting", "context", "batch"))
    ]
    return table("One step of the engine by the clock, router, sampling and host included", columns, rows)


def calls(lines: Sequence[Line]) -> str:
    """Return calls, treadle's first; each peer was timed in turn with the two lines above it."""
    columns = ("batch", "the call", "arm", "ms a made token", "tokens/s")
    rows = [
        [str(line["batch"]), line["title"].split(";")[0], line["arm"], f"{line['ms']:.1f}", f"{line['tokens_s']:.0f}"]
        for line in lines
    ]
    return table("Whole calls, prompt included, each peer in turn with the two lines above it", columns, rows)


def products(lines: Sequence[Line]) -> str:
    """Return for each model and batch what share of the bandwidth cuBLAS and the fastest form of a product had."""
    names = list(dict.fromkeys(line["weight"] for line in lines if "+ A" not in line["weight"]))
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for line in lines:
        row = cells.setdefault((line["setting"].split(",")[0], line["batch"]), {})
        speeds = line["of_bandwidth"]
        row.setdefault(line["weight"], f"{speeds['torch']:.2f}, {speeds[line['best']]:.2f} {line['best']}")
    rows = [[model, str(batch), *(row.get(name, "") for name in names)] for (model, batch), row in cells.items()]
    title = "Products without adapters, share of the bandwidth: cuBLAS (`torch`), then the fastest form"
    return table(title, ("model", "batch", *names), rows)


def compared(lines: Sequence[Line]) -> str:
    """Return how far a step's logits are from those of the model's own forward."""
    columns = ("model, adapters", "batch", "arm", "relative error", "same likeliest token")
    rows = [
        [
            line["setting"],
            str(line["batch"]),
            line["arm"],
            f"{line['relative_error']:.3f}",
            f"{line['same_argmax']:.0%}",
        ]
        for line in lines
    ]
    return table("Logits of a step against the model's own forward, in the model's dtype", columns, rows)
