"""Evaluation on a tiny engine: its numbers are the engine's, nothing is measured twice, a kill loses nothing."""

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from model2vec import StaticModel

from treadle.bundle.bundle import read_bundle, save_bundle
from treadle.common.errors import DataError, OptionError
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.engine.scoring import score_under
from treadle.experiments.arms import Arm, choose_arms
from treadle.experiments.evaluate import evaluate
from treadle.experiments.metrics import LIBRARIES, METRICS
from treadle.experiments.params import EvalParams
from treadle.experiments.results import fractions_of, read_cell, read_results
from treadle.experiments.sets import StreamPart, join_streams, load_sets, score_streams, turns_of
from treadle.experiments.tasks import TASKS, Example
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.fitting import fit

from conftest import SAMPLES

ROWS = {
    "math": [{"question": f"add {i} plus {i}?", "answer": f"sum {i}\n#### {2 * i}"} for i in range(8)],
    "science": [
        {
            "question": f"which atom {i}?",
            "choices": {"text": ["cell", "heat", "planet"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[i % 3],
        }
        for i in range(8)
    ],
}
QUICK = EvalParams(limit=4, max_tokens=5)


@pytest.fixture
def specs(tmp_path: Path) -> list[str]:
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"{name}={tmp_path / name}.jsonl" for name in ROWS]


def arms(engine: Engine, *names: str) -> list[Arm]:
    return choose_arms(names, engine.adapter_names, engine.router.params)


# Values


def test_nll_and_generations_of_a_cell_are_the_engines(engine: Engine, specs: list[str], tmp_path: Path) -> None:
    sets = load_sets(specs[:1], QUICK)
    evaluate(engine, sets, arms(engine, "base", "routed", "oracle"), tmp_path / "out", QUICK)
    examples = sets[0].examples
    prompts = [example.prompt for example in examples]
    for name, params in [
        ("base", RoutingParams.base()), ("routed", engine.router.params), ("oracle", RoutingParams.one("math"))
    ]:  # fmt: skip
        scores = engine.score(prompts, [example.completion for example in examples], routing=params)
        rows = read_cell(tmp_path / "out", name, "math")
        assert [row["values"]["nll"][0] for row in rows] == pytest.approx([-float(each.sum()) for each in scores])
        assert [row["values"]["nll"][1] for row in rows] == [len(each) for each in scores]
        done = engine.generate(prompts, sampling=SamplingParams(max_tokens=5), routing=params)
        assert [row["text"] for row in rows] == [each.text for each in done]
        np.testing.assert_allclose(rows[0]["weights"], done[0].weights, atol=6e-4)
    values = {(r.arm, r.metric): r for r in read_results(tmp_path / "out")}
    total = np.sum([row["values"]["nll"] for row in rows], axis=0)
    assert values["oracle", "nll"].value == pytest.approx(total[0] / total[1])
    assert values["oracle", "nll"].routing is None
    assert values["routed", "nll"].low < values["routed", "nll"].value < values["routed", "nll"].high
    assert values["base", "exact_number"].tokens > 0


def test_the_chosen_option_is_the_likeliest(engine: Engine, specs: list[str], tmp_path: Path) -> None:
    params = replace(QUICK, generate=False)
    sets = load_sets(specs[1:], params)
    evaluate(engine, sets, arms(engine, "code"), tmp_path, params)
    hits = []
    for example, row in zip(sets[0].examples, read_cell(tmp_path, "code", "science"), strict=True):
        logs = [
            engine.score([example.prompt], [each], routing=RoutingParams.one("code"))[0] for each in example.options
        ]
        best = example.options[int(np.argmax([each.mean() for each in logs]))]
        assert row["values"]["option"] == [float(best == example.completion), 1.0]
        assert row["values"]["nll"][0] == pytest.approx(
            -logs[example.options.index(example.completion)].sum(), abs=1e-4
        )
        hits.append(best == example.completion)
    assert 0 < sum(hits) < len(hits), "all alike: the comparison would be weak"


def test_shots_stand_before_every_prompt_and_are_not_asked(specs: list[str]) -> None:
    (alone,), (shown,) = load_sets(specs[:1], EvalParams(limit=6)), load_sets(specs[:1], EvalParams(limit=4, shots=2))
    shots, asked = alone.examples[:2], alone.examples[2:]
    before = "".join(f"{shot.prompt}{shot.completion}\n\n" for shot in shots)
    assert [each.prompt for each in shown.examples] == [before + each.prompt for each in asked]


def test_a_chat_asks_by_the_template_what_the_prompt_asks(engine: Engine, specs: list[str], tmp_path: Path) -> None:
    params = replace(QUICK, chat=True)
    sets, plain = load_sets(specs, params), load_sets(specs, QUICK)
    evaluate(engine, sets, arms(engine, "base", "routed"), tmp_path / "out", params)
    for each, other in zip(sets, plain, strict=True):
        contents = [example.prompt.removesuffix("\n\nAnswer:") for example in other.examples]
        chats = [[{"role": "user", "content": content}] for content in contents]
        completions = [example.completion.lstrip() for example in other.examples]
        for arm, routing in (("base", RoutingParams.base()), ("routed", None)):
            scores = engine.score(chats, completions, routing=routing)
            rows = read_cell(tmp_path / "out", arm, each.name)
            assert [row["values"]["nll"][0] for row in rows] == pytest.approx([-float(each.sum()) for each in scores])
            max_tokens = SamplingParams(max_tokens=5, stop=each.task.stop if each.task else ())
            done = engine.generate(chats, sampling=max_tokens, routing=routing)
            assert [row["text"] for row in rows] == [each.text for each in done]
    assert sets[1].examples[0].options == ("A", "B", "C")
    with pytest.raises(DataError, match="a running text has no chat template"):
        load_sets([*specs, "stream"], params)


# Streams


def example(prompt: str, completion: str) -> Example:
    return Example(prompt, completion)


def part(adapter: str, prompt: str, completion: str) -> StreamPart:
    return StreamPart(adapter, example(prompt, completion), TASKS[adapter])


STREAM = (
    part("math", "add three plus", " four"),
    part("code", "def loop", " return list"),
    part("math", "sum plus", " three"),
)


def texts(part: int) -> tuple[str, str]:
    """Everything before the answer of a part, and the answer."""
    before = "\n\n".join(each.example.prompt + each.example.completion for each in STREAM[:part])
    return before + "\n\n" * (part > 0) + STREAM[part].example.prompt, STREAM[part].example.completion


def test_a_streams_answers_are_scored_as_one_running_text(engine: Engine) -> None:
    params = RoutingParams(every=2, window=9)
    (found,) = score_streams(engine, [STREAM], params)
    prompt, last = texts(2)
    rest = (prompt + last).removeprefix(STREAM[0].example.prompt)
    (whole,) = engine.score([STREAM[0].example.prompt], [rest], routing=params)
    np.testing.assert_allclose(found[0], whole[: len(found[0])], atol=1e-5)
    np.testing.assert_allclose(found[2], whole[-len(found[2]) :], atol=1e-5)
    assert [len(each) for each in found] == [len(part.example.completion.encode()) for part in STREAM]


def test_the_turns_of_a_conversation_have_everything_before_them_as_prompt() -> None:
    assert [(turn.prompt, turn.completion) for turn in turns_of(STREAM)] == [texts(part) for part in range(3)]


def test_a_conversations_answers_are_scored_and_judged_by_their_tasks(
    engine: Engine, specs: list[str], tmp_path: Path
) -> None:
    (mixed,) = load_sets([*specs, "conversation"], QUICK, only=["conversation"])
    evaluate(engine, [mixed], arms(engine, "routed", "oracle"), tmp_path / "out", QUICK)
    for arm in ("routed", "oracle"):
        for index, stream in enumerate(mixed.streams):
            points = 0.0
            for turn, (before, owner) in enumerate(zip(turns_of(stream), stream, strict=True), 1):
                routing = RoutingParams.one(owner.adapter) if arm == "oracle" else engine.router.params
                choices = before.options or (before.completion,)
                scores = dict(
                    zip(choices, engine.score([before.prompt] * len(choices), choices, routing=routing), strict=True)
                )
                nll, count = fractions_of(tmp_path / "out", arm, "conversation", f"nll-{turn}")[index]
                assert nll == pytest.approx(-scores[before.completion].sum(), abs=1e-4)
                assert count == len(scores[before.completion])
                if before.options:
                    points += max(scores, key=lambda choice: scores[choice].mean()) == before.completion
                    continue
                sampling = SamplingParams(max_tokens=QUICK.max_tokens, stop=owner.task.stop)
                (done,) = engine.generate([before.prompt], sampling=sampling, routing=routing)
                points += METRICS[owner.task.metrics[0]](done.text, before)
            assert fractions_of(tmp_path / "out", arm, "conversation", "answer")[index] == (points, len(stream))


def test_without_texts_a_conversations_choices_alone_are_judged(
    engine: Engine, specs: list[str], tmp_path: Path
) -> None:
    params = replace(QUICK, generate=False)
    (mixed,) = load_sets([*specs, "conversation"], params, only=["conversation"])
    evaluate(engine, [mixed], arms(engine, "base"), tmp_path / "out", params)
    counts = [count for _, count in fractions_of(tmp_path / "out", "base", "conversation", "answer")]
    assert counts == [sum(part.adapter == "science" for part in stream) for stream in mixed.streams]


def test_the_oracle_reads_each_part_under_its_own_adapter(engine: Engine) -> None:
    (running,) = score_streams(engine, [STREAM[:1]], None)
    (alone,) = engine.score([texts(0)[0]], [texts(0)[1]], routing=RoutingParams.one("math"))
    np.testing.assert_allclose(running[0], alone, atol=1e-5)
    (second,) = engine.score([texts(1)[0]], [texts(1)[1]], routing=RoutingParams.one("code"))
    (mixed,) = score_streams(engine, [STREAM], None)
    assert np.abs(mixed[1] - second).max() > 1e-3, "the first part was read under another adapter"


def test_streams_change_domain_at_every_joint_and_use_no_example_twice() -> None:
    pools = {name: [part(name, f"{name} {i}", f" {i}") for i in range(30)] for name in ("math", "code", "science")}
    streams = join_streams(pools, 12, seed=3)
    assert len(streams) == 12
    assert {len(stream) for stream in streams} == {2, 3, 4}
    used = [part.example.prompt for stream in streams for part in stream]
    assert len(set(used)) == len(used)
    for stream in streams:
        assert all(a.adapter != b.adapter for a, b in pairwise(stream))
        assert all(part.example.prompt.startswith(part.adapter) for part in stream)
    assert streams == join_streams(pools, 12, seed=3) != join_streams(pools, 12, seed=4)
    assert len(join_streams(pools, 999, seed=0)) < 46, "the pools ran dry"


def test_identical_rows_of_options_score_as_each_alone(engine: Engine) -> None:
    pairs = [([5, 6, 7], [8]), ([5, 6, 7], [9]), ([5, 6], [7, 8])]
    traces = [np.tile(np.float32([0.2, 0.5, 0.3]), (len(a) + len(b) - 1, 1)) for a, b in pairs]
    together = score_under(engine, pairs, traces, RoutingParams())
    for pair, trace, row in zip(pairs, traces, together, strict=True):
        np.testing.assert_allclose(row, score_under(engine, [pair], [trace], RoutingParams())[0], atol=1e-5)


# Files


def test_finished_cells_are_not_measured_again_and_cut_ones_are(
    engine: Engine, specs: list[str], tmp_path: Path
) -> None:
    measured: list[str] = []

    def note(name: str, count: int, was_done: bool) -> None:
        measured.extend([] if was_done else [name])

    params, output = replace(QUICK, generate=False), tmp_path / "out"
    sets, chosen = load_sets([*specs, "stream"], params), arms(engine, "base", "routed")
    first = evaluate(engine, sets, chosen, output, params, note)
    assert len(measured) == 6
    assert evaluate(engine, sets, chosen, output, params, note) == first
    assert len(measured) == 6
    lines = (output / "results.jsonl").read_text()
    (output / "results.jsonl").write_text(lines[:-40])  # killed while it wrote the last line
    again = evaluate(engine, sets, chosen, output, params, note)
    assert measured[6:] == ["routed on stream"]
    assert [(r.arm, r.task, r.metric, r.value) for r in again] == [(r.arm, r.task, r.metric, r.value) for r in first]
    assert fractions_of(output, "base", "stream", "nll-1")[0][1] > 0


def test_results_of_other_settings_rows_or_arms_are_not_added_to(
    engine: Engine, specs: list[str], tmp_path: Path
) -> None:
    params, output = replace(QUICK, generate=False), tmp_path / "out"
    sets = load_sets(specs[:1], params)
    evaluate(engine, sets, arms(engine, "routed"), output, params)
    with pytest.raises(OptionError, match=r"limit was 4, is 5\n.*seed was 0, is 1"):
        evaluate(engine, sets, arms(engine, "routed"), output, replace(params, limit=5, seed=1))
    other = [Arm("routed", RoutingParams(every=7))]
    with pytest.raises(OptionError, match="arm routed had other options on math"):
        evaluate(engine, sets, other, output, params)
    with pytest.raises(OptionError, match="task math had the rows of"):
        evaluate(engine, [replace(sets[0], source="elsewhere")], arms(engine, "routed"), output, params)
    edited = tuple(replace(each, prompt=each.prompt + "!") for each in sets[0].examples)
    with pytest.raises(OptionError, match=r"task math had other rows of .*, or another form of them"):
        evaluate(engine, [replace(sets[0], examples=edited)], arms(engine, "routed"), output, params)
    first, *others = engine.blend.adapters
    engine.blend.adapters = (replace(first, identity="another"), *others)
    with pytest.raises(OptionError, match=r"fingerprint was '.*', is '"):
        evaluate(engine, sets, arms(engine, "routed"), output, params)
    assert len(read_results(output)) == 1


def test_an_arm_that_the_adapters_do_not_allow_is_refused_before_anything_is_measured(
    engine: Engine, specs: list[str], tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="combine='linear' needs adapters of equal ranks"):
        evaluate(engine, load_sets(specs, QUICK), arms(engine, "base", "linear"), tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


# Other bundles' centroids


@pytest.fixture
def other_embedder(embedder: StaticEmbedder) -> StaticEmbedder:
    """Knows the same words by other vectors, so that it weighs otherwise."""
    model = embedder.model
    vectors = np.random.default_rng(1).normal(size=model.embedding.shape).astype(np.float32)
    return StaticEmbedder(StaticModel(vectors, model.tokenizer, max_length=None))


@pytest.fixture
def other_bundle(bundle: Path, adapter_folders: dict[str, Path], other_embedder: StaticEmbedder) -> Path:
    """The same adapters under another embedder's centroids."""
    base = read_bundle(bundle).base_model
    router = fit(SAMPLES, other_embedder)
    return save_bundle(bundle.with_name("other"), base=base, adapters=adapter_folders, router=router)


def test_an_arm_of_another_bundle_is_routed_by_its_embedder_and_centroids(
    engine: Engine, other_bundle: Path, specs: list[str], tmp_path: Path
) -> None:
    sets, output, own = load_sets([*specs, "stream"], QUICK), tmp_path / "out", engine.router
    chosen = arms(engine, "routed", f"routed@{other_bundle}")
    found = {(r.arm, r.task, r.metric): r for r in evaluate(engine, sets, chosen, output, QUICK)}
    assert engine.router is own
    other = replace(read_bundle(other_bundle).router, params=own.params)
    engine.router = other  # as if the engine had been made so
    plain = {(r.task, r.metric): r for r in evaluate(engine, sets, arms(engine, "routed"), tmp_path / "plain", QUICK)}
    assert {key: found[f"routed@{other_bundle}", *key].value for key in plain} == {
        key: result.value for key, result in plain.items()
    }
    assert found["routed", "math", "nll"].value != plain["math", "nll"].value
    assert found["routed", "math", "nll"].versions["embedder"] == own.embedder.id
    assert found[f"routed@{other_bundle}", "math", "nll"].versions["embedder"] == other.embedder.id
    weights = [read_cell(tmp_path / "plain", "routed", "math"), read_cell(output, f"routed@{other_bundle}", "math")]
    assert [row["weights"] for row in weights[0]] == [row["weights"] for row in weights[1]]


def test_another_bundles_centroids_are_not_mixed_with_those_of_before(
    engine: Engine, other_bundle: Path, adapter_folders: dict[str, Path], embedder: StaticEmbedder, specs: list[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    sets, output = load_sets(specs[:1], QUICK), tmp_path / "out"
    chosen = arms(engine, "routed", f"routed@{other_bundle}")
    first = evaluate(engine, sets, chosen, output, QUICK)
    assert evaluate(engine, sets, chosen, output, QUICK) == first
    base = read_bundle(other_bundle).base_model
    save_bundle(other_bundle, base=base, adapters=adapter_folders, router=fit(SAMPLES, embedder), overwrite=True)
    with pytest.raises(OptionError, match=r"arm routed@.*other had other centroids on math"):
        evaluate(engine, sets, chosen, output, QUICK)
    assert read_results(output) == first


def test_a_bundle_of_other_adapters_or_of_none_is_refused_before_anything_is_measured(
    engine: Engine, other_bundle: Path, adapter_folders: dict[str, Path], other_embedder: StaticEmbedder,
    specs: list[str], tmp_path: Path,
) -> None:  # fmt: skip
    base = read_bundle(other_bundle).base_model
    swapped = {**adapter_folders, "math": adapter_folders["code"]}
    save_bundle(tmp_path / "swapped", base=base, adapters=swapped, router=fit(SAMPLES, other_embedder))
    turned = fit(dict(reversed(SAMPLES.items())), other_embedder)
    save_bundle(tmp_path / "turned", base=base, adapters=adapter_folders, router=turned)
    folders = [tmp_path / name for name in ("swapped", "turned", "missing")]
    chosen = arms(engine, "linear", *(f"routed@{folder}" for folder in folders), f"linear@{other_bundle}")
    with pytest.raises(OptionError) as caught:
        evaluate(engine, load_sets(specs, QUICK), chosen, tmp_path / "out", QUICK)
    for problem, count in (
        ("swapped has other adapters (math); an arm needs one of the same", 1),
        ("turned has its adapters in another order: code, science, math", 1),
        ("missing is not a bundle", 1),
        ("combine='linear' needs adapters of equal ranks", 2),
    ):
        assert str(caught.value).count(problem) == count, problem
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_settings_that_cannot_be_read_are_named(engine: Engine, specs: list[str], tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(DataError, match=r"settings\.json"):
        evaluate(engine, load_sets(specs, QUICK), arms(engine, "base"), tmp_path, QUICK)


def test_results_go_into_a_folder(engine: Engine, specs: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="file cannot be a folder"):
        evaluate(engine, load_sets(specs, QUICK), arms(engine, "base"), tmp_path / "file", QUICK)


def test_a_metric_that_applies_to_no_example_has_no_result(engine: Engine, specs: list[str], tmp_path: Path) -> None:
    (task,) = load_sets(specs[:1], QUICK)
    assert task.task is not None
    odd = replace(task, task=replace(task.task, metrics=("pass_at_1", "exact_number")))
    for _ in range(2):  # the second time, what is there is whole
        found = evaluate(engine, [odd], arms(engine, "base"), tmp_path, QUICK)
        assert [result.metric for result in found] == ["nll", "exact_number"]
        assert "NaN" not in (tmp_path / "results.jsonl").read_text()


def test_an_answer_ends_where_a_next_example_would_begin(engine: Engine, specs: list[str], tmp_path: Path) -> None:
    (task,) = load_sets(specs[:1], QUICK)
    assert task.task is not None
    evaluate(engine, [task], arms(engine, "base"), tmp_path / "all", QUICK)
    whole = [row["text"] for row in read_cell(tmp_path / "all", "base", "math")]
    stop = whole[0][2:4]
    stopped = replace(task, task=replace(task.task, stop=(stop,)))
    evaluate(engine, [stopped], arms(engine, "base"), tmp_path / "stopped", QUICK)
    texts = [row["text"] for row in read_cell(tmp_path / "stopped", "base", "math")]
    assert texts == [text.partition(stop)[0] for text in whole]
    assert texts != whole


def test_a_text_beyond_the_models_context_is_refused(engine: Engine) -> None:
    context = engine.context
    assert context is not None
    with pytest.raises(OptionError, match=f"reads at most {context} tokens.*\n  - row 1 has"):
        engine.score(["add", "add " * context], [" sum", " sum"])


def test_what_would_fail_in_a_later_cell_is_refused_before_the_first(
    engine: Engine, specs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = load_sets(specs, QUICK)
    long = replace(second.examples[0], prompt="x" * 600)
    assert second.task is not None
    LIBRARIES["rouge_l"].cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)  # as if it was not installed
    later = replace(second, examples=(long,), task=replace(second.task, metrics=("letter", "rouge_l")))
    with pytest.raises(OptionError, match=r"(?s)task science: the model reads at most.*rouge_l needs: pip"):
        evaluate(engine, [first, later], arms(engine, "base"), tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def test_the_rows_of_a_stream_are_in_its_file(engine: Engine, specs: list[str], tmp_path: Path) -> None:
    sets = load_sets([*specs, "stream"], QUICK, ["stream"])
    evaluate(engine, sets, arms(engine, "base"), tmp_path, QUICK)
    assert [row["parts"] for row in read_cell(tmp_path, "base", "stream")] == [
        [[part.example.prompt, part.example.completion] for part in stream] for stream in sets[0].streams
    ]


def test_progress_tells_cells_that_were_done_before(engine: Engine, specs: list[str], tmp_path: Path) -> None:
    sets = load_sets(specs[:1], QUICK)
    evaluate(engine, sets, arms(engine, "base"), tmp_path, QUICK)
    told: list[tuple[str, int, bool]] = []
    evaluate(engine, sets, arms(engine, "base", "uniform"), tmp_path, QUICK, lambda *cell: told.append(cell))
    assert told == [("base on math", 4, True), ("uniform on math", 4, False)]


def test_streams_join_examples_without_their_shots_and_of_all_tasks(specs: list[str], tmp_path: Path) -> None:
    plain, shown = (load_sets([*specs, "stream"], replace(QUICK, shots=shots))[-1] for shots in (0, 2))
    for each in (plain, shown):
        prompts = [part.example.prompt for stream in each.streams for part in stream]
        assert prompts
        assert all(prompt.count("Question:") == 1 for prompt in prompts)
    task = {"name": "more", "adapter": "math", "prompt": "Question: {question}", "completion": " {answer}"}
    (tmp_path / "more.json").write_text(json.dumps(task))
    more = load_sets([*specs, f"{tmp_path / 'more.json'}={tmp_path / 'math.jsonl'}", "stream"], EvalParams(limit=8))
    used = {part.example.prompt for stream in more[-1].streams for part in stream if part.adapter == "math"}
    assert {prompt.endswith("Answer:") for prompt in used} == {True, False}, "of both tasks of the adapter"


def test_streams_without_an_adapter_for_the_oracle_and_without_short_examples_are_refused(
    engine: Engine, specs: list[str], tmp_path: Path
) -> None:
    task = {"name": "own", "prompt": "Question: {question}", "completion": " {answer}"}
    (tmp_path / "own.json").write_text(json.dumps(task))
    own = f"{tmp_path / 'own.json'}={tmp_path / 'math.jsonl'}"
    sets = load_sets([specs[1], own, "stream"], QUICK, ["stream"])
    with pytest.raises(OptionError, match="unknown adapter 'own'"):
        evaluate(engine, sets, arms(engine, "oracle"), tmp_path / "out", QUICK)
    rows = [{"question": "x" * 3000, "answer": "y"}] * 3
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="no two examples are short enough"):
        load_sets([f"math={tmp_path / 'long.jsonl'}", specs[1], "stream"], QUICK)


def test_everything_wrong_with_tasks_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_sets(["maths=x.jsonl", f"math={tmp_path}/no.jsonl", f"{tmp_path}/no.json"], QUICK)
    for part in ("Did you mean 'math'?", "no.jsonl: no such file", "no.json cannot be read"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="two at least"):
        load_sets(["stream"], QUICK)
    with pytest.raises(DataError, match="math= names no file"):
        load_sets(["math="], QUICK)


def test_tasks_may_only_lend_their_examples(specs: list[str]) -> None:
    (alone,) = load_sets([*specs, "stream"], QUICK, ["stream"])
    assert alone == load_sets([*specs, "stream"], QUICK)[-1]
    with pytest.raises(OptionError, match="Did you mean 'stream'"):
        load_sets([*specs, "stream"], QUICK, ["streams"])
