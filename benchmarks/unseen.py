"""Asks what becomes of tasks that no adapter was made for: answer NLL of the base and of the routed model.

    python benchmarks/unseen.py --data ../shared/data [--bundle demo/bundle] [--limit 60] [--work work/unseen]

The four tasks are yes-no questions, commonsense, translation and dialogue (`benchmarks/router_rows.py`, test rows). The
rows are written to the work folder, and `treadle eval` measures them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from router_rows import MORE, load_rows

BUNDLE = Path(__file__).parents[1] / "demo" / "bundle"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--work", type=Path, default=Path("work/unseen"))
    parser.add_argument("--limit", type=int, default=60, help="rows of each task")
    parser.add_argument("--arms", default="base,routed")
    options = parser.parse_args()
    tasks = write_tasks(options.data, options.work)
    named = [entry for task in tasks for entry in ("--tasks", task)]
    command = [sys.executable, "-m", "treadle", "eval", options.bundle, *named, "--arms", options.arms, "--limit",
               options.limit, "--no-generate", "--dtype", "bfloat16", "-o", options.work / "results"]  # fmt: skip
    sys.exit(subprocess.run(list(map(str, command)), check=False).returncode)


def write_tasks(data: Path, work: Path) -> list[str]:
    """Write each task and its rows; return them as `treadle eval --tasks` takes them."""
    work.mkdir(parents=True, exist_ok=True)
    fields = {key: f"{{{key}}}" for key in ("prompt", "completion", "bare")}
    examples = load_rows(data)["test"]
    tasks: list[str] = []
    for name in MORE:
        rows = [{key: getattr(each, key) for key in fields} for each in examples[name]]
        file, task = work / f"{name}.jsonl", work / f"{name}.json"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        task.write_text(json.dumps({"name": name, **fields}, indent=2) + "\n", "utf-8")
        tasks.append(f"{task}={file}")
    return tasks


if __name__ == "__main__":
    main()
