"""Timings: arms take turns and are compared with the first; suites measure what they say, on a tiny model."""

import gc
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benching import SHORT, endless, open_lab

import treadle
from treadle.common.errors import OptionError, TreadleError
from treadle.common.params import RoutingParams
from treadle.engine.engine import Engine
from treadle.engine.runners.passes import PassInput, PassOutput
from treadle.engine.runners.runner import Runner
from treadle.experiments import memory_use, workbench
from treadle.experiments.memory_use import (
    BASE_ARM,
    CLASS_ARM,
    ENGINE_ARM,
    IMPORTS_ARM,
    ProcessCost,
    measure_processes,
    peak_table,
    plain_command,
    run_process,
)
from treadle.experiments.plots import ratios_figure
from treadle.experiments.pools import random_adapters
from treadle.experiments.router_speed import Decisions
from treadle.experiments.suites import check_lab, measure
from treadle.experiments.timing import Elsewhere, Machine, Table, TableLine, interleave, lines, markdown
from treadle.experiments.workbench import COPY_ARM, OFF_ARM, Lab, Steps, is_acting, routings, start_batch, step_bytes
from treadle.lora.compatibility import linear_shapes
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.sentence_embedder import SentenceEmbedder

from conftest import Run


@pytest.fixture
def lab(bundle: Path) -> Lab:
    return open_lab(bundle)


def reroute(lab: Lab, **options: object) -> Lab:
    """The same with another default routing."""
    own = replace(lab.bundle.router.params, **options)
    lab.engine.router = replace(lab.engine.router, params=own)
    return lab


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
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    found = Machine.of(engine.model, file)
    assert (found.device, found.cores, found.versions["treadle"]) == ("A CPU: fast", 3, treadle.__version__)
    assert found.versions["python"] in str(found)
    assert Machine.of(engine.model, tmp_path / "none").device == platform.machine()


def test_markdown_leaves_out_columns_that_nothing_fills() -> None:
    table = Table(
        "decode", "One step", (TableLine("a", "b1", 0.05, 0.04, 0.06, 1.0), TableLine("b", "b1", note="not run: why"))
    )
    assert markdown(table).splitlines() == [
        "One step:",
        "",
        "| setting | arm | ms (quartiles) | ratio | note |",
        "|---|---|---|---|---|",
        "| b1 | a | 50.0 (40.0-60.0) | 1.000 |  |",
        "| b1 | b |  |  | not run: why |",
    ]


@pytest.mark.parametrize("name", ["decode", "prefill", "router"])
def test_each_suite_compares_its_arms_with_the_first(lab: Lab, name: str) -> None:
    tables = list(measure(lab, [name]))
    assert {table.suite for table in tables} == {name}
    for table in tables:
        assert len(table.lines) > 1
        assert table.lines[0].ratio == 1
        assert all(line.seconds and line.seconds > 0 for line in table.lines if "not run" not in line.note)


def test_steps_are_compared_with_routing_off_and_shares_are_of_a_copy_in_the_same_rounds(lab: Lab) -> None:
    _, steps = measure(lab, ["decode"])
    timed = {line.arm: line for line in steps.lines if line.seconds}
    *arms, copy = timed.values()
    assert arms[0].arm == OFF_ARM
    assert {"treadle, every 1", "every 1, rank 8 on all linear layers"} <= timed.keys()
    assert {"mixed rows: every 1, one adapter, base", "prompts of different lengths, every 1"} <= timed.keys()
    assert all(line.bandwidth and line.mean for line in arms)
    assert (copy.arm, copy.ratio, copy.bandwidth) == (COPY_ARM, None, None)
    notes = {line.arm: line.note for line in steps.lines if not line.seconds}
    assert notes.keys() == {"every 1, combine linear", "every 1, combine paper"}
    assert all("rank" in note for note in notes.values())


def test_a_batch_of_one_has_no_rows_that_differ(lab: Lab) -> None:
    _, steps = measure(replace(lab, params=replace(SHORT, batch=(1,))), ["decode"])
    assert not any("mixed" in line.arm or "lengths" in line.arm for line in steps.lines)


def test_the_arms_keep_the_routing_of_the_bundle() -> None:
    own = RoutingParams(score="cosine", rule="boosted", boost=7.0, every=5, combine="paper")
    off, two, one = routings(own).values()
    assert (off, two, one) == (RoutingParams.base(), replace(own, every=2), replace(own, every=1))
    fixed = RoutingParams.one("math")
    assert list(routings(fixed).values()) == [RoutingParams.base(), fixed]
    assert (is_acting(own), is_acting(fixed), is_acting(RoutingParams.base())) == (True, True, False)


@pytest.mark.parametrize("routing", [{"rule": "fixed", "fixed": {"math": 1.0}}, {"prefill": "causal"}, {"lag": 1}])
def test_any_routing_of_a_bundle_can_be_measured(lab: Lab, routing: dict[str, object]) -> None:
    short = replace(lab, params=replace(SHORT, batch=(1,), rounds=1))
    tables = list(measure(reroute(short, **routing), ["decode", "prefill", "router"]))
    assert all(table.lines[0].seconds for table in tables)


def test_texts_longer_than_the_context_are_refused_before_anything_is_timed_all_in_one_error(
    lab: Lab, run: Run, bundle: Path
) -> None:
    check_lab(lab, ["decode", "prefill", "router", "memory"])
    long = replace(lab, params=replace(SHORT, tokens=505, long_prompt=512))
    with pytest.raises(OptionError) as refused:
        check_lab(long, ["decode", "prefill", "router"])
    for said in ("--prompt + --tokens: texts of 521", "--long-prompt: texts of 513", "at most 512"):
        assert said in str(refused.value)
    code, out, err = run("bench", bundle, "--suite", "prefill", "--long-prompt", 600)
    assert (code, out) == (1, "")
    assert "texts of 601 tokens" in err


# The router


def test_a_decision_comes_after_an_untimed_step_of_the_base(lab: Lab, embedder: StaticEmbedder) -> None:
    calls: list[str] = []
    engine = lab.engine

    class NotedRunner(Runner):
        def run(self, given: PassInput) -> PassOutput:
            calls.extend(["step"] if given.is_step else [])
            return super().run(given)

    class NotedEmbedder(StaticEmbedder):
        def finish(self, views: Sequence[Any]) -> Any:
            calls.append("decision")
            return super().finish(views)

    engine.runner = NotedRunner(engine.model, engine.blend, engine.runner.own)
    engine.router = replace(engine.router, embedder=NotedEmbedder(embedder.model))
    [table] = measure(lab, ["router"])
    made = calls[calls.index("step") :]  # texts are read before that
    assert made.count("decision") == (len(table.lines) - 1) * (SHORT.tokens + 2)
    assert all(made[place - 1] == "step" for place, call in enumerate(made) if call == "decision")
    assert table.lines[0].bandwidth


def test_texts_of_decisions_are_the_bundles_samples_and_differ_between_streams(lab: Lab) -> None:
    decisions = Decisions(lab, streams=3, length=20)
    first = len(decisions.pieces[0])
    decisions()
    assert [len(pieces) for pieces in decisions.pieces] == [first + 1] * 3
    samples = "".join(text for texts in lab.bundle.samples.values() for text in texts)
    assert all("".join(pieces) in samples * 9 for pieces in decisions.pieces)
    assert len({tuple(pieces) for pieces in decisions.pieces}) == 3


class Slow(SentenceEmbedder):
    """A sentence embedder that has the vectors of a static one."""

    def __init__(self, other: StaticEmbedder) -> None:
        self.id, self.dim, self.encode = other.id, other.dim, other.encode


def test_an_embedder_that_reads_every_text_anew_gets_fewer_texts_and_a_note(lab: Lab, embedder: StaticEmbedder) -> None:
    lab.engine.router = replace(lab.engine.router, embedder=Slow(embedder))
    lab = replace(lab, sizes=replace(lab.sizes, max_slow_tokens=1024))
    [table] = measure(lab, ["router"])
    notes = {line.arm: line.note for line in table.lines if not line.seconds}
    assert list(notes) == ["64 x one decision, text of 64 tokens"]
    assert "at most 1024 tokens" in notes["64 x one decision, text of 64 tokens"]


def test_layings_are_counted(lab: Lab) -> None:
    engine = lab.pool(40, rank=16, targets=("q_proj", "v_proj"))
    first, second, third = (
        Steps(engine, start_batch(engine, lab.prompts(1, 8), 9, RoutingParams.one(name)))
        for name in engine.adapter_names[:3]
    )
    for steps in (first, first, second, first, second, third):  # two stay beside each other, three do not
        steps()
    assert [each.num_layings for each in (first, second, third)] == [2, 1, 1]


def test_a_step_reads_weights_cache_and_factors(lab: Lab) -> None:
    weights = sum(parameter.nbytes for parameter in lab.engine.model.parameters())
    embedding = lab.engine.model.get_input_embeddings().weight.nbytes
    cache = 2 * 2 * 2 * 8 * 4 * 10 * 3  # keys and values, layers, heads, head, bytes, tokens, rows
    base = step_bytes(lab.engine, 3 * 10, is_blended=False)
    assert base == weights - embedding + cache
    ranks = {"q": (4 + 2 + 3), "v": (4 + 2 + 3), "k": 2, "o": 2, "gate": 3, "down": 3}
    inner = {"q": 32, "v": 32, "k": 32, "o": 32, "gate": 32, "down": 48}
    outer = {"q": 32, "v": 16, "k": 16, "o": 32, "gate": 48, "down": 32}
    factors = 2 * 4 * sum(rank * (inner[name] + outer[name]) for name, rank in ranks.items())
    assert step_bytes(lab.engine, 3 * 10, is_blended=True) == base + factors


def test_a_config_without_grouped_queries_has_a_head_of_keys_for_each_of_queries(lab: Lab) -> None:
    grouped = workbench.cache_bytes(lab.engine.model)
    del lab.engine.model.config.num_key_value_heads
    assert workbench.cache_bytes(lab.engine.model) == 2 * grouped


def test_random_adapters_fit_every_layer_that_is_named(engine: Engine) -> None:
    adapters = random_adapters(engine.model, "base", 2, rank=3, targets=["q_proj", "up_proj"])
    shapes = linear_shapes(engine.model)
    assert [adapter.name for adapter in adapters] == ["a0", "a1"]
    for path, pair in adapters[1].pairs.items():
        assert (pair.a.shape[1], pair.b.shape[0]) == shapes[path]
    assert len(adapters[0].pairs) == 4
    with pytest.raises(OptionError, match="no linear layer called wq"):
        random_adapters(engine.model, "base", 2, rank=3, targets=["q_proj", "wq"])


def test_processes_are_measured_from_outside() -> None:
    small, large = ([sys.executable, "-c", f"x = bytearray({size} << 20)"] for size in (1, 120))
    spent = measure_processes({"small": small, "large": large}, rounds=1)
    assert spent["large"][0].peak - spent["small"][0].peak > 100 << 20
    with pytest.raises(TreadleError, match=r"failed: .*gone wrong"):
        run_process([sys.executable, "-c", "raise SystemExit('gone wrong')"])


def test_peaks_are_compared_with_the_sum_of_what_a_process_must_hold(lab: Lab) -> None:
    spent = {
        name: [ProcessCost(1.0, size << 20)] * 2
        for name, size in ((IMPORTS_ARM, 100), (CLASS_ARM, 104), (BASE_ARM, 110), (ENGINE_ARM, 121))
    }
    needed, plain, own = peak_table(lab, spent).lines
    assert needed.peak is not None
    weights = sum(parameter.nbytes for parameter in lab.engine.model.parameters())
    adapters = sum(adapter.num_bytes() for adapter in lab.bundle.adapters)
    text = len(lab.bundle.samples["math"][0]) + SHORT.tokens  # a token a byte
    assert needed.peak == (100 << 20) + weights + adapters + 2 * 2 * 2 * 8 * 4 * text
    assert own.ratio == (121 << 20) / needed.peak
    assert plain.ratio == (110 << 20) / needed.peak
    assert "1.100 of transformers'" in own.note
    assert "takes 4 more" in needed.note


def test_processes_make_all_their_tokens(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    endless(lab)
    assert memory_use.answer(str(lab.bundle.folder), "cpu", "float32", "0", "10", "abc") == 10
    names: dict[str, Any] = {}
    monkeypatch.setattr(sys, "argv", plain_command(lab.bundle.base_model, "cpu", "float32", 10, "abc")[2:])
    exec(memory_use.PLAIN_CODE, names)
    assert names["made"].shape == (1, 13)


def test_the_memory_suite_measures_these_processes(lab: Lab) -> None:
    asked: list[dict[str, list[str]]] = []

    def measured(commands: dict[str, list[str]], rounds: int) -> dict[str, list[ProcessCost]]:
        asked.append(commands)
        return {name: [ProcessCost(1.0, 100 << 20)] * rounds for name in commands}

    start, helped, peaks = memory_use.memory(lab, measured)
    assert [line.arm for line in start.lines] == ["transformers, base", "treadle generate"]
    assert (helped.lines[0].seconds, len(peaks.lines)) == (1.0, 3)
    first, _, whole = asked
    assert all("cpu" in command for command in (*first.values(), whole[BASE_ARM], whole[ENGINE_ARM]))
    assert [str(SHORT.tokens) in command for command in whole.values()] == [False, False, True, True]


# The command


def test_the_command_prints_tables_or_one_json_object(run: Run, bundle: Path) -> None:
    options = ["--suite", "prefill,prefill", "--rounds", 1, "--batch", "1,2", "--batch", 2, "--long-prompt", 12]
    code, out, _ = run("bench", bundle, *options)
    assert code == 0
    assert out.count("| float32, batch 2 | blended |") == 1
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
    assert "tokens must be a whole number of at least 8" in err
    assert "batch must be whole numbers of at least 1" in err
    code, _, err = run("bench", bundle, "--batch", "many")
    assert (code, "batch must be whole numbers of at least 1, not ['many']" in err) == (1, True)


def test_what_a_run_measured_is_kept_and_drawn(run: Run, bundle: Path, tmp_path: Path) -> None:
    options = ["--suite", "prefill", "--rounds", 1, "--batch", "1,2", "--long-prompt", 12, "-o", tmp_path / "out"]
    for _ in range(2):  # the later run replaces the one before
        assert run("bench", bundle, *options)[0] == 0
    [file] = (tmp_path / "out").iterdir()
    assert file.name == "bench-prefill-float32-batch-1-2.json"
    assert json.loads(file.read_text())["versions"]["treadle"] == treadle.__version__
    code, out, _ = run("plot", tmp_path / "out", "-o", tmp_path / "figures")
    assert (code, [Path(line).name for line in out.split()]) == (0, ["ratios.svg", "ratios.pdf"])
    file.write_text('{"tables": [{}]}')
    code, _, err = run("plot", tmp_path / "out", "-o", tmp_path / "figures")
    assert (code, "is not what treadle bench -o writes" in err) == (1, True)
    code, _, err = run("bench", bundle, "-o", file)
    assert (code, "cannot be a folder" in err) == (1, True)


def test_ratios_are_drawn_with_their_quartiles_and_lines_that_did_not_run_are_not() -> None:
    made = (
        TableLine("base", "b1", 2.0, 1.0, 4.0, 1.0),
        TableLine("own", "b1", 3.0, 2.0, 5.0, 1.5),
        TableLine("no", "b1", note="why"),
    )
    figure = ratios_figure([asdict(Table("decode", "One step", made)), asdict(Table("decode", "Alone", made[:1]))])
    [axis] = figure.axes
    drawn = [line.get_xdata() for line in axis.lines if len(line.get_xdata()) == 2]
    assert [list(each) for each in drawn[:2]] == [[1.0, 2.5], [0.5, 2.0]]  # from below
    assert [label.get_text() for label in axis.get_yticklabels()] == ["own", "base"]
    assert ratios_figure([]) is None


def test_suites_of_other_programs_are_refused_by_the_command_that_has_them(run: Run, bundle: Path) -> None:
    code, _, err = run("bench", bundle, "--suite", "decode,peers,adapters")
    assert code == 1
    assert "python -m benchmarks.peers BUNDLE --suite peers adapters" in err
