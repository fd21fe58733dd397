"""Timings: arms take turns and are compared with the first; suites measure what they say, on a tiny model."""

import gc
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import treadle
from treadle import machine, suites
from treadle.adapters import read_adapter
from treadle.bundle import read_bundle
from treadle.compatible import linear_shapes
from treadle.errors import OptionError, TreadleError
from treadle.generate import Engine
from treadle.params import BenchParams, RoutingParams
from treadle.peers import cached_peers, uncached_peers
from treadle.pools import random_adapters
from treadle.processes import measure_processes, run_process
from treadle.suites import Lab, measure, step_bytes
from treadle.timing import Elsewhere, Line, Table, interleave, lines, markdown

from conftest import Run

SHORT = BenchParams(batch=(2,), prompt=12, tokens=8, rounds=2, long_prompt=20, paper_text=16, sentence="/nowhere")


@pytest.fixture
def lab(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr(suites, "bandwidth", lambda device: 1e9)
    monkeypatch.setattr(suites, "POOLS", (2, 5))
    monkeypatch.setattr(suites, "TEXT_LENGTHS", (16, 64))
    return Lab.open(read_bundle(bundle), None, None, SHORT)


def test_arms_take_turns_each_round_begins_with_the_next_and_warm_up_rounds_are_not_timed() -> None:
    calls: list[str] = []
    arms = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleave(arms, rounds=2, warm_up=2, before={"b": lambda: calls.append("-")})
    assert "".join(calls) == "a-bc" + "-bca" + "ca-b" + "a-bc"
    assert [len(each) for each in seconds.values()] == [2, 2, 2]


def test_no_garbage_is_collected_while_a_clock_runs_and_then_as_before() -> None:
    seen: list[bool] = []
    interleave({"a": lambda: seen.append(gc.isenabled())}, rounds=1)
    assert (seen, gc.isenabled()) == ([False, False], True)
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError):
            interleave({"a": lambda: 1 / 0}, rounds=1)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_a_unit_took_in_another_process_counts_instead_of_our_clock() -> None:
    assert interleave({"a": lambda: Elsewhere(123.0), "b": lambda: 123.0}, rounds=1)["a"] == [123.0]
    assert interleave({"b": lambda: 123.0}, rounds=1)["b"][0] < 1


def test_lines_compare_medians_with_the_first_arm_and_quartiles_lie_among_what_was_measured() -> None:
    base, other = lines(
        {"base": [1.0, 2.0, 9.0], "other": [3.0, 3.0, 3.0]}, "here", tokens=4, read={"base": 10}, peak=20,
        notes={"other": "differs"},
    )  # fmt: skip
    assert (base.seconds, base.ratio, base.tokens_per_second, base.bandwidth) == (2.0, 1.0, 2.0, 0.25)
    assert (other.seconds, other.ratio, other.bandwidth, other.note) == (3.0, 1.5, None, "differs")
    assert (base.low, base.high) == (1.5, 5.5)
    assert (lines({"two": [1.0, 2.0]}, "here")[0].low, lines({"two": [1.0, 2.0]}, "here")[0].high) == (1.25, 1.75)


def test_a_machine_says_its_cores_and_versions(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: A CPU: fast\nprocessor\t: 1\nmodel name\t: A CPU: fast\n")
    monkeypatch.setattr(machine, "CPU_FILE", file)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    found = machine.Machine.of(engine.model)
    assert (found.device, found.cores, found.versions["treadle"]) == ("A CPU: fast", 3, treadle.__version__)
    assert found.versions["python"] in str(found)
    monkeypatch.setattr(machine, "CPU_FILE", tmp_path / "none")
    assert machine.Machine.of(engine.model).device == platform.machine()


def test_markdown_leaves_out_columns_that_nothing_fills() -> None:
    table = Table("decode", "One step", (Line("a", "b1", 0.05, 0.04, 0.06, 1.0), Line("b", "b1", note="not run: why")))
    assert markdown(table).splitlines() == [
        "One step:",
        "",
        "| setting | arm | ms (quartiles) | ratio | note |",
        "|---|---|---|---|---|",
        "| b1 | a | 50.0 (40.0-60.0) | 1.000 |  |",
        "| b1 | b |  |  | not run: why |",
    ]


@pytest.mark.parametrize("name", ["decode", "prefill", "router", "adapters"])
def test_each_suite_compares_its_arms_with_the_first(lab: Lab, name: str) -> None:
    tables = list(measure(lab, [name]))
    assert {table.suite for table in tables} == {name}
    for table in tables:
        assert len(table.lines) > 1
        assert table.lines[0].ratio == 1
        assert all(line.seconds and line.seconds > 0 for line in table.lines)


def test_steps_are_compared_with_routing_off_and_unequal_ranks_leave_out_their_combines(lab: Lab) -> None:
    _, steps = measure(lab, ["decode"])
    arms = [line.arm for line in steps.lines]
    assert arms[0] == "treadle, routing off"
    assert "every 1, rank 8 on all linear layers" in arms
    assert not any("combine" in arm for arm in arms)
    assert all(line.bandwidth for line in steps.lines)


def test_peers_run_and_those_that_cannot_say_why(lab: Lab) -> None:
    calls, single = measure(lab, ["peers"])
    ran = {line.arm for line in calls.lines if line.seconds}
    assert {"transformers generate, base", "PEFT, one adapter", "PEFT, one adapter merged"} <= ran
    notes = {line.arm: line.note for line in (*calls.lines, *single.lines) if not line.seconds}
    assert "same r value" in notes["the paper's loop"]
    assert "same r value" in notes["PEFT, add_weighted_adapter every 2 tokens"]


def test_a_peer_that_merges_changes_what_the_model_computes(lab: Lab, equal_folders: dict[str, Path]) -> None:
    from treadle.peers import Merging

    model = lab.engine.model
    lab.engine.detach()
    merging = Merging(lab, model, equal_folders)
    outputs = []
    for weights in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]):
        merging.blend(weights)
        outputs.append(merging.model(input_ids=model.dummy_inputs["input_ids"]).logits)
    assert not outputs[0].allclose(outputs[1])


def test_a_step_reads_weights_cache_and_factors(lab: Lab) -> None:
    weights = sum(parameter.nbytes for parameter in lab.engine.model.parameters())
    embedding = lab.engine.model.get_input_embeddings().weight.nbytes
    cache = 2 * 2 * 2 * 8 * 4 * 10 * 3  # keys and values, layers, heads, head, bytes, tokens, rows
    base = step_bytes(lab.engine, RoutingParams.base(), batch=3, length=10)
    assert base == weights - embedding + cache
    ranks = {"q": (4 + 2 + 3), "v": (4 + 2 + 3), "k": 2, "o": 2, "gate": 3, "down": 3}
    inner = {"q": 32, "v": 32, "k": 32, "o": 32, "gate": 32, "down": 48}
    outer = {"q": 32, "v": 16, "k": 16, "o": 32, "gate": 48, "down": 32}
    factors = 2 * 4 * sum(rank * (inner[name] + outer[name]) for name, rank in ranks.items())
    assert step_bytes(lab.engine, RoutingParams(), batch=3, length=10) == base + factors


def test_random_adapters_fit_every_layer_that_is_named(engine: Engine) -> None:
    adapters = random_adapters(engine.model, "base", 2, rank=3, targets=["q_proj", "up_proj"])
    shapes = linear_shapes(engine.model)
    assert [adapter.name for adapter in adapters] == ["a0", "a1"]
    for path, pair in adapters[1].pairs.items():
        assert (pair.a.shape[1], pair.b.shape[0]) == shapes[path]
    assert len(adapters[0].pairs) == 4
    with pytest.raises(OptionError, match="no linear layer called wq"):
        random_adapters(engine.model, "base", 2, rank=3, targets=["wq"])


def test_processes_are_measured_from_outside() -> None:
    small, large = ([sys.executable, "-c", f"x = bytearray({size} << 20)"] for size in (1, 120))
    spent = measure_processes({"small": small, "large": large}, rounds=1)
    assert spent["large"][0].peak - spent["small"][0].peak > 100 << 20
    with pytest.raises(TreadleError, match=r"failed: .*gone wrong"):
        run_process([sys.executable, "-c", "raise SystemExit('gone wrong')"])


def test_a_missing_sentence_embedder_leaves_the_paper_out(lab: Lab, equal_folders: dict[str, Path]) -> None:
    adapters = tuple(read_adapter(folder, name) for name, folder in equal_folders.items())
    equal = replace(lab, bundle=replace(lab.bundle, adapters=adapters))
    assert "/nowhere" in uncached_peers(equal, [1, 2, 3], "/nowhere")["the paper's loop"].reason
    merged = cached_peers(equal, [[1, 2, 3]], 4)["PEFT, add_weighted_adapter every 2 tokens"]
    merged()


def test_the_command_prints_tables_or_one_json_object(run: Run, bundle: Path) -> None:
    options = ["--suite", "prefill", "--rounds", 1, "--batch", 1, "--batch", 2, "--long-prompt", 12]
    code, out, _ = run("bench", bundle, *options)
    assert code == 0
    assert "| float32, batch 2 | blended |" in out
    code, out, _ = run("bench", bundle, *options, "--json")
    document = json.loads(out)
    assert document["batch"] == [1, 2]
    assert (document["dtype"], document["threads"]) == ("float32", torch.get_num_threads())
    assert document["copied_bytes_per_second"] > 0
    assert {"treadle", "python", "torch"} <= set(document["versions"])
    assert document["tables"][0]["lines"][0]["ratio"] == 1


def test_wrong_options_are_named_before_anything_is_measured(run: Run, bundle: Path) -> None:
    code, _, err = run("bench", "/nowhere", "--suite", "decod,speed", "--tokens", 0, "--batch", 0)
    assert code == 1
    assert "decode" in err
    assert "speed" in err
    assert "tokens must be at least 8" in err
    assert "batch names numbers of rows" in err
    code, _, err = run("bench", bundle, "--batch", "many")
    assert (code, "expected a number or a list of numbers, got ['many']" in err) == (1, True)
