"""Routing by itself, and figures: what they show is what the router and the result files say."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from treadle.bundle.bundle import read_bundle, save_bundle
from treadle.cli.console import quality_tables
from treadle.common.errors import DataError, OptionError
from treadle.common.params import RoutingParams
from treadle.engine.engine import Engine
from treadle.experiments.arms import choose_arms
from treadle.experiments.evaluate import evaluate
from treadle.experiments.params import EvalParams
from treadle.experiments.plots import FIGURES, draw_all
from treadle.experiments.results import write_bench
from treadle.experiments.router_quality import route_quality
from treadle.experiments.sets import load_sets
from treadle.experiments.study import QUALITY_FILE, Study
from treadle.experiments.tasks import Example
from treadle.experiments.timing import Table, TableLine
from treadle.lora.adapter import read_adapter
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.fitting import fit
from treadle.routing.router import Router

from conftest import SAMPLES, Run, tiny_llama

HELD_OUT = {
    "math": [
        Example("three plus add", " sum four"),
        Example("atom heat", " heat sum four plus three add", bare="add four"),
    ],
    "code": [Example("def list", " return loop")],
}


def test_confusion_counts_the_nearest_adapter_of_each_kind_of_text(router: Router) -> None:
    quality = route_quality(router, HELD_OUT, RoutingParams(score="cosine"))
    assert quality.names == ("math", "science", "code")
    assert quality.confusion["template"] == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert quality.confusion["bare"][0] == [1.0, 0.0, 0.0]  # the one example that has a bare form
    assert quality.confusion["half"][0] == [0.5, 0.5, 0.0]
    assert quality.confusion["answer"][0] == [1.0, 0.0, 0.0]  # the answer has made the second one clear
    assert quality.accuracy["template"] == pytest.approx((0.5 + 1.0) / 2)  # a mean over domains, not over examples
    np.testing.assert_allclose(np.diag(quality.cosines), 1.0, atol=1e-5)
    prompts = [example.prompt for example in HELD_OUT["math"]]
    np.testing.assert_allclose(quality.distributions["math"], router.scores(prompts, RoutingParams(score="cosine")))
    assert quality.separation > 1


def test_a_domain_without_texts_of_a_kind_does_not_count_there(router: Router) -> None:
    given = {**HELD_OUT, "science": [Example("atom cell", " heat")]}
    params = RoutingParams(score="cosine")
    assert route_quality(router, given, params).accuracy["bare"] == 1.0  # of math alone: no other has bare texts


def test_route_eval_counts_all_tasks_of_an_adapter_and_takes_no_routing_flags(
    tmp_path: Path, bundle: Path, run: Run
) -> None:
    rows = [{"question": f"add {i}", "answer": "sum"} for i in range(3)]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "more", "adapter": "math", "prompt": "{question} plus", "completion": " {answer}"}
    (tmp_path / "more.json").write_text(json.dumps(task))
    tasks = ["--tasks", f"math={tmp_path / 'math.jsonl'}", "--tasks", f"{tmp_path}/more.json={tmp_path}/math.jsonl"]
    code, out, err = run("route", bundle, "--eval", *tasks, "--json")
    assert code == 0, err
    assert len(json.loads(out)[0]["distributions"]["math"]) == 6
    code, _, err = run("route", bundle, "--eval", *tasks, "--score", "cosine", "--window", "8")
    assert code == 1
    assert "leave out score, window" in err


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '[{"names": []}]'])
def test_a_damaged_file_of_routing_quality_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / QUALITY_FILE).write_text(text)
    with pytest.raises(DataError, match=QUALITY_FILE):
        draw_all([tmp_path], tmp_path / "figures")


def test_unknown_domains_and_no_examples_are_refused(router: Router) -> None:
    with pytest.raises(OptionError, match="Did you mean 'math'"):
        route_quality(router, {"maths": HELD_OUT["math"]}, RoutingParams())
    with pytest.raises(OptionError, match="at least one"):
        route_quality(router, {}, RoutingParams())


@pytest.fixture(scope="module")
def results(
    tokenizer: PreTrainedTokenizerFast,
    adapter_folders: dict[str, Path],
    embedder: StaticEmbedder,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    root = tmp_path_factory.mktemp("results")
    adapters = [read_adapter(folder, name) for name, folder in adapter_folders.items()]
    engine = Engine(tiny_llama(), tokenizer, adapters, fit(SAMPLES, embedder))
    rows = [{"question": f"add {i} plus?", "answer": f"sum {i}\n#### {i}"} for i in range(6)]
    (root / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = EvalParams(limit=3, max_tokens=12)
    arms = choose_arms(["base", "every-1", "every-2", "every-4", "prompt", "boost-1", "boost-2", "boost-4", "window-16",
                        "window-32"], engine.adapter_names, engine.router.params)  # fmt: skip
    evaluate(engine, load_sets([f"math={root / 'math.jsonl'}"], params), arms, root / "out", params)
    return root / "out"


def test_every_figure_is_drawn_from_the_files_alone_and_always_the_same(
    results: Path, tmp_path: Path, bundle: Path, run: Run
) -> None:
    rows = results.with_name("math.jsonl")
    code, out, _ = run("route", bundle, "--eval", "--tasks", f"math={rows}", "-o", results, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((results / QUALITY_FILE).read_text())
    lines = (TableLine("base", "batch 1", 1.0, 0.9, 1.2, 1.0), TableLine("routed", "batch 1", 1.1, 1.0, 1.3, 1.1))
    write_bench(results, ["decode"], {"dtype": "float32", "batch": [1]}, [Table("decode", "One step", lines)])
    first = {file.name: file.read_bytes() for file in draw_all([results], tmp_path / "a")}
    assert set(first) == {f"{name}.{ending}" for name in FIGURES for ending in ("svg", "pdf")}
    fonts = [content for name, content in first.items() if name.endswith(".pdf")]
    assert all(b"/FontFile2" in content and b"/Type3" not in content for content in fonts)
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in (results / QUALITY_FILE, *results.glob("bench-*.json")):
        shutil.copy(file, alone)
    code, out, _ = run("plot", alone, "-o", tmp_path / "b")
    assert code == 0
    again = {Path(file).name: Path(file).read_bytes() for file in out.split()}
    assert again.keys() == {
        f"{name}.{ending}" for name in ("confusion", "cosines", "ratios") for ending in ("svg", "pdf")
    }
    assert again == {name: first[name] for name in again}


def test_lines_show_the_values_in_the_order_of_the_option(results: Path) -> None:
    study = Study.read([results])
    values = {row.arm: row.value for row in study.get("math", "nll")}
    (axis,) = [axis for axis in FIGURES["every"](study).axes if axis.get_visible()]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "4", "none"]
    shown = axis.lines[0].get_ydata()
    assert list(shown) == [values[arm] for arm in ("every-1", "every-2", "every-4", "prompt")]


def test_arms_of_another_bundle_are_a_line_of_their_own(results: Path) -> None:
    study = Study.read([results])
    others = [
        replace(row, arm=f"{row.arm}@other", value=row.value + 1, versions={**row.versions, "fingerprint": "other"})
        for row in study.results
    ]
    both = replace(study, results=(*study.results, *others))
    (axis,) = [axis for axis in FIGURES["every"](both).axes if axis.get_visible()]
    own, other = (np.array(line.get_ydata()) for line in axis.lines)
    np.testing.assert_allclose(other, own + 1)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["every-1", "every-1@other"]


def test_an_arm_that_generated_nothing_has_no_speed(results: Path) -> None:
    study = Study.read([results])
    still = [replace(row, tokens_per_second=0.0) if row.arm == "base" else row for row in study.results]
    [legend] = FIGURES["speed"](replace(study, results=tuple(still))).legends
    shown = {text.get_text() for text in legend.get_texts()}
    assert shown == {row.arm for row in study.results} - {"base"}


def test_a_folder_without_results_says_what_writes_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`treadle eval` and `treadle bench -o` write them"):
        draw_all([tmp_path], tmp_path / "figures")


# The command line


def test_eval_and_sweep_print_and_keep_the_same_results(tmp_path: Path, bundle: Path, run: Run) -> None:
    rows = tmp_path / "math.jsonl"
    rows.write_text("".join(json.dumps({"question": f"add {i}", "answer": f"#### {i}"}) + "\n" for i in range(5)))
    code, out, err = run("eval", bundle, "--tasks", f"math={rows}", "--arms", "base,oracle", "--limit", "3",
                         "--no-generate", "-o", tmp_path / "out", "--json")  # fmt: skip
    assert code == 0, err
    found = {result["arm"]: result for result in json.loads(out)}
    assert set(found) == {"base", "oracle"}
    assert found["base"]["n"] == 3
    code, out, err = run("eval", bundle, "--tasks", f"math={rows}", "--arms", "base,uniform", "--limit", "3",
                         "--no-generate", "-o", tmp_path / "out", "--json")  # fmt: skip
    assert code == 0, err
    assert {result["arm"] for result in json.loads(out)} == {"base", "oracle", "uniform"}
    assert "6 of 6" in err, "a log counts what was there, too"
    (tmp_path / "sweep.toml").write_text(
        f'tasks = ["math={rows}"]\nalso = ["base"]\nlimit = 3\ngenerate = false\n[grid.k]\nevery = [1, "none"]\n'
    )
    code, out, err = run("sweep", bundle, tmp_path / "sweep.toml", "-o", tmp_path / "swept", "--json")
    assert code == 0, err
    swept = {result["arm"]: result["value"] for result in json.loads(out)}
    assert set(swept) == {"base", "k/every=1", "k/every=none"}
    assert swept["base"] == pytest.approx(found["base"]["value"])
    code, out, err = run("eval", bundle, "--tasks", "maths", "--arms", "best", "-o", tmp_path / "no")
    assert code == 1
    assert "unknown arm 'best'" in err
    assert "unknown task 'maths'. Did you mean 'math'" in err


def test_another_bundle_and_the_folder_are_looked_at_before_the_model_loads(
    tmp_path: Path, bundle: Path, run: Run
) -> None:
    for file in Path(read_bundle(bundle).base_model).glob("*.safetensors"):
        file.write_bytes(b"")  # it would not load
    rows = tmp_path / "math.jsonl"
    rows.write_text('{"question": "add", "answer": "#### 1"}\n')
    code, _, err = run(
        "eval", bundle, "--tasks", f"math={rows},maths", "--arms", "base@/nowhere", "-o", tmp_path / "no"
    )
    assert code == 1
    assert "/nowhere is not a bundle" in err
    assert "no such file" in err
    assert not (tmp_path / "no").exists()
    (tmp_path / "sweep.toml").write_text(f'tasks = ["math={rows}"]\n[arms.one]\nbundle = "/nowhere"\n')
    code, _, err = run("sweep", bundle, tmp_path / "sweep.toml", "-o", tmp_path / "no")
    assert (code, "/nowhere is not a bundle" in err) == (1, True)
    code, _, err = run("eval", bundle, "--tasks", f"math={rows}", "-o", rows)
    assert (code, "cannot be a folder" in err) == (1, True)


def test_routing_quality_is_told_for_every_score(
    tmp_path: Path, adapter_folders: dict[str, Path], embedder: StaticEmbedder, bundle: Path, run: Run
) -> None:
    rows = tmp_path / "math.jsonl"
    rows.write_text('{"question": "add", "answer": "#### 1"}\n')
    base = read_bundle(bundle).base_model
    one_each = fit({name: texts[:1] for name, texts in SAMPLES.items()}, embedder, RoutingParams(score="cosine"))
    save_bundle(tmp_path / "few", base=base, adapters=adapter_folders, router=one_each)
    code, out, err = run("route", tmp_path / "few", "--eval", "--tasks", f"math={rows}", "--json")
    assert code == 0, err
    assert [each["score"] for each in json.loads(out)] == ["cosine", "centred", "lda"]  # one sample is enough
    assert "left out" not in err
    alone = fit({"math": SAMPLES["math"]}, embedder)
    save_bundle(tmp_path / "one", base=base, adapters={"math": adapter_folders["math"]}, router=alone)
    code, out, err = run("route", tmp_path / "one", "--eval", "--tasks", f"math={rows}", "--json")
    assert code == 0, err
    found = json.loads(out, parse_constant=pytest.fail)[0]  # NaN is no JSON
    assert found["separation"] is None
    assert [(each["task"], each["source"], each["n"]) for each in found["asked"]] == [("math", str(rows), 1)]
    assert found["embedder"] == embedder.id
    assert run("route", tmp_path / "one", "--eval", "--tasks", f"math={rows}")[0] == 0


def test_one_text_an_adapter_is_enough_to_ask(embedder):
    router = fit({"math": ["add add"], "code": ["def def"]}, embedder, RoutingParams(score="centred"))
    quality = route_quality(router, {"math": [Example("add three", " four")]}, RoutingParams(score="centred"))
    assert quality.separation is not None
    assert np.isfinite(quality.separation)
    assert quality.accuracy["template"] == 1


def test_a_domain_without_examples_has_no_numbers(embedder):
    router = fit(SAMPLES, embedder)
    qualities = [route_quality(router, {"math": [Example("add three", " four")]}, RoutingParams())]
    *_, confusion = quality_tables(qualities)
    cells = [list(column.cells) for column in confusion.columns[1:]]
    assert all(cell == "-" for column in cells for cell in column[1:])  # science and code
    assert any(column[0] == "1.000" for column in cells)
