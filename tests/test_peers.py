"""Peers of benchmarks/peers: other libraries run with the same adapters, and many adapters in one engine."""

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
from benching import endless, open_lab

from benchmarks.peers import vllm_worker
from benchmarks.peers.__main__ import main
from benchmarks.peers.peers import (
    MERGE_ARM,
    PAPER_ARM,
    Merging,
    Missing,
    PeerOptions,
    cached_peers,
    tried,
    uncached_peers,
)
from benchmarks.peers.suite_adapters import adapters, dictated_rows, drifting, load_apart, save_adapter
from benchmarks.peers.suite_peers import peers
from benchmarks.peers.vllm_peer import VllmWorker
from treadle.common.errors import OptionError, TreadleError
from treadle.engine.engine import Engine
from treadle.experiments.pools import random_adapters
from treadle.experiments.suites import measure
from treadle.experiments.timing import Elsewhere
from treadle.experiments.workbench import COPY_ARM, Lab
from treadle.lora.adapter import read_adapter

NOWHERE = PeerOptions(paper_text=16, sentence="/nowhere", vllm="/nowhere/python")


@pytest.fixture
def lab(bundle: Path) -> Lab:
    return open_lab(bundle)


def in_this_process(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Run the program of `python -c` here: another process takes seconds to import."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", command[2:])
        exec(command[2], {})
    return subprocess.CompletedProcess(command, 0, printed.getvalue(), "")


def made_pool(lab: Lab, root: Path) -> Path:
    """Write five random adapters as PEFT does."""
    for adapter in random_adapters(lab.engine.model, lab.bundle.base_model, 5, rank=16, targets=["q_proj", "v_proj"]):
        save_adapter(root / "pool" / adapter.name, adapter, ["q_proj", "v_proj"])
    return root / "pool"


def test_pools_are_stepped_and_loaded(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", in_this_process)
    steps, loaded = adapters(lab, pools=(2, 5), num_steps=6)
    assert [line.arm for line in steps.lines] == ["2 adapters", "5 adapters", COPY_ARM]
    assert all(line.bandwidth and line.mean and "laid out anew" in line.note for line in steps.lines[:2])
    [line] = loaded.lines
    own = load_apart(lab, made_pool(lab, tmp_path)).own
    assert line.seconds
    assert f"their own bytes: {own / 2**20:.0f} MiB" in line.note
    assert own == 5 * 4 * 16 * 2 * ((32 + 32) + (32 + 16))  # adapters, bytes, rank, layers, q and v


def test_texts_go_from_one_domain_to_the_next_whatever_the_model_says(lab: Lab) -> None:
    samples = [[1] * 40, [2] * 40, list(range(100, 140))]
    text = drifting(samples, 1, 100)
    assert [text[place] for place in range(0, 96, 16)] == [2, 100, 1, 2, 116, 1]
    assert len(text) == 100
    rows = dictated_rows(lab, lab.engine, 2, 30)
    batch = lab.engine.new_batch(end_ids=frozenset())
    batch.join(rows)
    for _ in range(10):
        batch.step()
    for index, row in enumerate(rows):
        assert row.ids == drifting(lab.sample_ids(), index, 42)[: len(row.ids)]
        assert len(row.ids) == 12 + 11


def test_a_pool_that_does_not_load_is_a_line(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "first\nno room")

    monkeypatch.setattr(subprocess, "run", failing)
    steps, loaded = adapters(lab, pools=(2, 5), num_steps=2)
    assert steps.lines[0].seconds
    assert loaded.lines[0].note.endswith("in a process of its own failed: no room")


def test_a_base_with_other_layer_names_loses_no_suite(lab: Lab) -> None:
    [table] = adapters(lab, pools=(2, 5), targets=("wq", "wv"))
    assert [line.note for line in table.lines] == [
        "not run: OptionError: the base has no linear layer called wq, wv"
    ] * 2


def test_a_saved_adapter_is_read_back(engine: Engine, tmp_path: Path) -> None:
    [adapter] = random_adapters(engine.model, "base", 1, rank=3, targets=["q_proj", "v_proj"])
    read = read_adapter(save_adapter(tmp_path / "a0", adapter, ["q_proj", "v_proj"]))
    assert read.pairs.keys() == adapter.pairs.keys()
    for path, pair in read.pairs.items():
        assert pair.scale == adapter.pairs[path].scale
        assert pair.a.equal(adapter.pairs[path].a.float())


def test_peers_run_and_those_that_cannot_say_why(lab: Lab) -> None:
    calls, single = peers(lab, NOWHERE)
    ran = {line.arm for line in calls.lines if line.seconds}
    assert calls.lines[0].arm == "transformers generate, base"
    assert {"treadle, every 1", "PEFT, one adapter", "PEFT, one adapter merged"} <= ran
    notes = {line.arm: line.note for line in (*calls.lines, *single.lines) if not line.seconds}
    assert "same r value" in notes[PAPER_ARM]
    assert "same r value" in notes[MERGE_ARM]
    assert "no /nowhere/python" in notes["vLLM, base"]
    ratios = {line.arm: line.ratio for line in single.lines if line.seconds}
    assert next(iter(ratios)) == "transformers, base, one step with its cache"
    assert "transformers, base, the whole text" in ratios
    assert {line.arm for line in single.lines if line.bandwidth} == {"treadle, every 1"}


def test_rows_of_peers_do_not_end_early_and_a_peer_that_fails_is_a_line(lab: Lab, bundle: Path) -> None:
    endless(lab)
    calls, _ = measure(lab, ["decode"])
    assert calls.lines[0].seconds
    merged = cached_peers(lab, [[1, 2, 3]], 4)["PEFT, one adapter"]
    merged()  # it would say how many tokens it made, were they fewer

    def broken() -> None:
        raise KeyError("no such key\nand more")

    found = tried({"whole": lambda: None, "broken": broken, "absent": Missing("why")})
    assert (found["broken"], found["absent"]) == (Missing("KeyError: 'no such key\\nand more'"), Missing("why"))
    assert not isinstance(found["whole"], Missing)


def test_lines_of_another_job_say_so(lab: Lab, equal_folders: dict[str, Path]) -> None:
    adapters = tuple(read_adapter(folder, name) for name, folder in equal_folders.items())
    equal = replace(lab, bundle=replace(lab.bundle, adapters=adapters))
    calls, single = peers(equal, NOWHERE)
    notes = {line.arm: line.note for line in (*calls.lines, *single.lines)}
    assert notes[MERGE_ARM] == "the first row's mixture serves all rows"
    assert "batch 1 only" in notes["PEFT X-LoRA, untrained"]


def test_a_peer_that_merges_changes_what_the_model_computes(lab: Lab, equal_folders: dict[str, Path]) -> None:
    model = lab.engine.model
    lab.engine.detach()
    merging = Merging(lab, model, equal_folders)
    outputs = []
    for weights in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]):
        merging.blend(weights)
        outputs.append(merging.model(input_ids=model.dummy_inputs["input_ids"]).logits)
    assert not outputs[0].allclose(outputs[1])


def test_a_missing_sentence_embedder_leaves_the_paper_out(lab: Lab, equal_folders: dict[str, Path]) -> None:
    adapters = tuple(read_adapter(folder, name) for name, folder in equal_folders.items())
    equal = replace(lab, bundle=replace(lab.bundle, adapters=adapters))
    assert "/nowhere" in uncached_peers(equal, [1, 2, 3], "/nowhere")[PAPER_ARM].reason
    merged = cached_peers(equal, [[1, 2, 3]], 4)[MERGE_ARM]
    merged()


ANSWERS = """#!{python}
import json, sys
options = json.loads(sys.stdin.readline())
for line in sys.stdin:
    asked = json.loads(line)
    if asked["arm"] == "lora":
        sys.exit("out of memory")
    right = [options["length"], len(asked["prompts"]), asked["tokens"], sys.argv[1]] == [21, 2, 8, "-P"]
    print(json.dumps({{"seconds": 12.5, "about": "vLLM 0"}} if right else {{"error": "TypeError: what"}}), flush=True)
"""


def test_vllm_counts_its_own_seconds_and_what_it_says_becomes_a_line(lab: Lab, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(ANSWERS.format(python=sys.executable))
    python.chmod(0o755)
    with VllmWorker.start(lab, replace(NOWHERE, vllm=str(python))) as worker:
        assert (worker.call("base", [[1], [2]], 8), worker.about) == (Elsewhere(12.5), "vLLM 0")
        with pytest.raises(TreadleError, match="vLLM: TypeError: what"):
            worker.call("base", [[1], [2]], 9)
        with pytest.raises(TreadleError, match="vLLM's process ended: out of memory"):
            worker.call("lora", [[1], [2]], 8)
        with pytest.raises(TreadleError, match="out of memory"):  # it is not started again
            worker.call("base", [[1], [2]], 8)


def test_the_worker_imports_nothing_of_treadle() -> None:
    code = Path(vllm_worker.__file__).read_text()
    assert not re.search(r"^\s*(from|import) treadle", code, re.MULTILINE)


def test_the_command_prints_the_tables_and_keeps_them(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = "--batch 1 --prompt 12 --tokens 8 --rounds 1 --paper-text 16 --sentence /nowhere --vllm /nowhere/python"
    main([str(bundle), *short.split(), "-o", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "| float32, batch 1 | PEFT, one adapter |" in out
    assert "not run: TreadleError: no /nowhere/python" in out
    [file] = (tmp_path / "out").iterdir()
    assert len(json.loads(file.read_text())["tables"]) == 2
    with pytest.raises(OptionError, match="--paper-text"):
        main([str(bundle), *short.split(), "--paper-text", "600"])
