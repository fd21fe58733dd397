"""treadle as a model of lm-evaluation-harness: its numbers are the engine's, and HFLM's where no adapter acts."""

import json
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from treadle.bundle.bundle import save_bundle
from treadle.common.errors import OptionError
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.engine import Engine
from treadle.engine.scoring import CPU_BATCH_ROWS, score_greedy, score_ids

from conftest import tiny_llama

pytest.importorskip("lm_eval")


import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import warning_once

from treadle.experiments.lm_eval_model import TreadleLM, main

BASE = {"rule": "fixed", "fixed": {}, "every": None}
DOCS = [
    {"question": "add three plus", "choices": ["four", "five", "heat"], "gold": 0, "answer": "four"},
    {"question": "the planet", "choices": ["heat", "cell atom", "\u00e9t\u00e9"], "gold": 1, "answer": "heat"},
    {"question": "def loop return", "choices": ["list", "a", "b"], "gold": 2, "answer": "list"},
]
CONTEXTS = ["add three plus", "the planet ", "def loop \n", "", " ", "\u00e9t\u00e9", "x" * 600]
CONTINUATIONS = [" four", "four", " heat and the cell", "a", "b"]
TASKS = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
CHOICES = 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n'
TEXTS = """\
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["z", "<pad>"], max_gen_toks: 12, do_sample: false, num_beams: 1}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task of choices and a task of texts over the same rows."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    (folder / "choices.yaml").write_text(TASKS.format(name="choices", data=data, kind="multiple_choice") + CHOICES)
    (folder / "texts.yaml").write_text(TASKS.format(name="texts", data=data, kind="generate_until") + TEXTS)
    return folder


@pytest.fixture
def bundle(engine: Engine, adapter_folders: dict[str, Path], tmp_path: Path) -> Path:
    base = tmp_path / "tiny-llama"
    tiny_llama().save_pretrained(base)
    engine.tokenizer.save_pretrained(base)
    return save_bundle(tmp_path / "bundle", base=str(base), adapters=adapter_folders, router=engine.router)


@pytest.fixture
def reference(tokenizer: PreTrainedTokenizerFast) -> HFLM:
    return HFLM(tiny_llama(), tokenizer=tokenizer, batch_size=1)


def evaluate(lm: Any, folder: Path, names: Iterable[str] = ("choices", "texts")) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(model=lm, tasks=list(names), task_manager=manager, bootstrap_iters=0)


def instances(kind: Any, rows: Iterable[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, row, index) for index, row in enumerate(rows)]


def scoring() -> list[Instance]:
    return instances("loglikelihood", [(context, text) for context in CONTEXTS for text in CONTINUATIONS])


def generating(**options: Any) -> list[Instance]:
    given = {"until": ["\n"], "max_gen_toks": 16, **options}
    return instances("generate_until", [(context, dict(given)) for context in CONTEXTS if context.strip()])


def assert_equal_answers(mine: list[tuple[float, bool]], theirs: list[tuple[float, bool]], atol: float = 1e-4) -> None:
    np.testing.assert_allclose([total for total, _ in mine], [total for total, _ in theirs], atol=atol)
    assert [flag for _, flag in mine] == [flag for _, flag in theirs]


def test_a_run_gives_the_engines_numbers(engine: Engine, tasks: Path) -> None:
    results = evaluate(TreadleLM(engine), tasks)
    for row, doc in zip(results["samples"]["choices"], DOCS, strict=True):
        prompts, choices = [doc["question"]] * 3, [f" {choice}" for choice in doc["choices"]]
        expected = [float(scores.sum()) for scores in engine.score(prompts, choices)]
        np.testing.assert_allclose([float(answer[0][0]) for answer in row["resps"]], expected, atol=1e-4)
    sampling = SamplingParams(max_tokens=12, stop=("z",))
    for row, doc in zip(results["samples"]["texts"], DOCS, strict=True):
        assert row["resps"] == [[engine.generate(doc["question"], sampling=sampling).text]]
    assert results["config"]["routing"] == asdict(engine.router.params)


def test_without_adapters_a_run_is_that_of_lm_evals_own_model(engine: Engine, reference: HFLM, tasks: Path) -> None:
    mine, theirs = (evaluate(lm, tasks) for lm in (TreadleLM(engine, **BASE), reference))
    assert mine["results"] == theirs["results"]
    for one, other in zip(mine["samples"]["texts"], theirs["samples"]["texts"], strict=True):
        assert one["resps"] == other["resps"]


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_likelihoods_without_adapters_are_those_of_lm_evals_own_model(
    engine: Engine, reference: HFLM, batch_size: int | str
) -> None:
    asked = [
        request for request in scoring() if request.args[0] != " "
    ]  # of a mere space HFLM makes no token, and stops
    greedy = [
        (text, reference.generate_until(instances("g", [(text, {"max_gen_toks": 2})]))[0]) for text in ("add", "def")
    ]
    asked += instances("loglikelihood", greedy)
    mine = TreadleLM(engine, batch_size=batch_size, **BASE).loglikelihood(asked)
    assert_equal_answers(mine, reference.loglikelihood(asked))
    assert {flag for _, flag in mine} == {True, False}


def test_whole_texts_without_adapters_are_those_of_lm_evals_own_model(engine: Engine, reference: HFLM) -> None:
    asked = instances("loglikelihood_rolling", [("the planet heat",), ("add three " * 130,), ("",)])  # 512 tokens fit
    mine = TreadleLM(engine, **BASE).loglikelihood_rolling(asked)
    np.testing.assert_allclose(mine, reference.loglikelihood_rolling(asked), atol=2e-3, rtol=1e-6)
    assert mine[2] == 0


def test_texts_without_adapters_are_those_of_lm_evals_own_model(engine: Engine, reference: HFLM) -> None:
    lm = TreadleLM(engine, **BASE)
    assert lm.generate_until(generating()) == reference.generate_until(generating())
    stops = sorted(set("".join(lm.generate_until(generating()))))[:3]  # that do occur
    assert lm.generate_until(generating(until=stops)) == reference.generate_until(generating(until=stops))


@pytest.mark.parametrize("past", ["keep", "recompute"])
def test_greedy_texts_are_greedy_under_the_same_routing(engine: Engine, past: str) -> None:
    lm = TreadleLM(engine, every=1, past=past)
    routing = RoutingParams(every=1, past=past)
    done = engine.generate(["add three", "the cell"], sampling=SamplingParams(max_tokens=6), routing=routing)
    pairs = [
        (lm.tok_encode(text), list(each.token_ids)) for text, each in zip(["add three", "the cell"], done, strict=True)
    ]
    pairs += [(prompt, [*ids[:2], (ids[2] + 1) % 256, *ids[3:]]) for prompt, ids in pairs]
    scores = score_greedy(engine, pairs, routing)
    for (logprobs, _), plain in zip(scores, score_ids(engine, pairs, routing), strict=True):
        np.testing.assert_allclose(logprobs, plain, atol=1e-5)
    assert [bool(flags.all()) for _, flags in scores] == [True, True, False, False]
    assert [list(flags[:3]) for _, flags in scores[2:]] == [[True, True, False]] * 2


def test_options_of_one_token_share_a_row(engine: Engine) -> None:
    rows: list[int] = []
    engine.model.register_forward_pre_hook(lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True)
    asked = instances("loglikelihood", [(context, text) for text in "abcd" for context in ("add", "the", "def")])
    answers = TreadleLM(engine, batch_size=2).loglikelihood(asked)
    assert rows == [2, 1]
    expected = [float(scores.sum()) for scores in engine.score(*zip(*(request.args for request in asked), strict=True))]
    np.testing.assert_allclose([total for total, _ in answers], expected, atol=1e-5)


def test_long_contexts_are_cut_from_the_left_and_said_so_once(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    warning_once.cache_clear()
    lm = TreadleLM(engine)
    context = "the atom " * 70  # 630 tokens
    with caplog.at_level(logging.WARNING, "treadle"):
        texts = lm.generate_until(instances("generate_until", [(context, {"max_gen_toks": 12})] * 2))
        ((total, _),) = lm.loglikelihood(instances("loglikelihood", [(context + ".", " four")]))
    sampling = SamplingParams(max_tokens=12)
    assert texts == [engine.generate(context[-500:], sampling=sampling).text] * 2
    assert total == pytest.approx(engine.score([(context + ".")[-508:]], [" four"])[0].sum(), abs=1e-4)
    assert [record.message for record in caplog.records] == ["contexts are cut from the left: 512 tokens fit."]


def test_what_cannot_fit_is_an_error(engine: Engine) -> None:
    lm = TreadleLM(engine)
    with pytest.raises(OptionError, match="no room in the model's 512 tokens"):
        lm.loglikelihood(instances("loglikelihood", [("add", "x" * 513)]))
    with pytest.raises(OptionError, match="no room"):
        lm.generate_until(instances("generate_until", [("add", {"max_gen_toks": 512})]))
    with pytest.raises(OptionError, match="no token"):
        lm.loglikelihood(instances("loglikelihood", [("add", "")]))
    with pytest.raises(OptionError, match="prompt 1: the prompt is empty"):
        engine.generate_ids([[5], []])


def test_samples_follow_torchs_seed(engine: Engine) -> None:
    lm = TreadleLM(engine)

    def sampled(seed: int, **options: Any) -> list[str]:
        torch.manual_seed(seed)
        return lm.generate_until(generating(temperature=1.5, top_p=0.9, **options)[:2] * 2)

    first = sampled(0)
    assert sampled(0) == first
    assert sampled(1) != first
    assert first[: len(first) // 2] != first[len(first) // 2 :]  # repeats of a request differ
    assert sampled(0, do_sample=False) == lm.generate_until(generating()[:2] * 2)


def test_a_special_token_can_stop_a_text(engine: Engine) -> None:
    lm = TreadleLM(engine)
    so, on = lm.tok_encode("so"), lm.tok_encode("on")
    steps = iter([*so, 256, *so, 256, *on])  # 256 is "<unused>", not the end of a text; the first row ends there

    def forced(module: Any, given: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits + 1e4 * torch.nn.functional.one_hot(torch.tensor(next(steps)), 260)

    handle = engine.model.lm_head.register_forward_hook(forced)
    asked = [("add", {"until": until, "max_gen_toks": 5}) for until in ("<unused>", "x")]
    texts = [lm.generate_until(instances("generate_until", [row]))[0] for row in asked]
    handle.remove()
    assert texts == ["so", "soon"]


def test_an_option_of_generation_that_treadle_lacks_is_an_error(engine: Engine) -> None:
    with pytest.raises(OptionError, match="unknown option 'num_beams'"):
        TreadleLM(engine).generate_until(generating(num_beams=4))


def test_chat_messages_become_one_text(engine: Engine, reference: HFLM) -> None:
    lm = TreadleLM(engine)
    open_end = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "The sum"}]
    assert lm.apply_chat_template(open_end[:1]) == "user: add\nassistant:"
    assert lm.apply_chat_template(open_end, add_generation_prompt=False) == reference.apply_chat_template(
        open_end, False
    )
    assert lm.chat_template(True) == engine.tokenizer.chat_template
    assert lm.tokenizer_name == reference.tokenizer_name


def test_a_rendered_chat_is_routed_on_what_it_says(engine: Engine) -> None:
    messages = [{"role": "user", "content": "add three"}]
    lm = TreadleLM(engine, every=1)
    context = lm.apply_chat_template(messages)
    (text,) = lm.generate_until(instances("generate_until", [(context, {"until": [], "max_gen_toks": 5})]))
    params = RoutingParams(every=1)
    assert text == engine.generate(messages, sampling=SamplingParams(max_tokens=5), routing=params).text
    ((nats, _),) = lm.loglikelihood(instances("loglikelihood", [(context, " four")]))
    assert nats == pytest.approx(float(engine.score([messages], [" four"], routing=params)[0].sum()), abs=1e-3)


def test_a_text_that_begins_with_the_first_token_gets_no_second_one(
    engine: Engine, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine.tokenizer = beginning(tokenizer)
    lm, reference = TreadleLM(engine, **BASE), HFLM(tiny_llama(), tokenizer=engine.tokenizer)
    for text in ("add", "<unused>add"):
        assert lm.tok_encode(text) == reference.tok_encode(text) == [256, *lm.tok_encode("add", False)]
    assert lm.tok_encode("") == [256]
    asked = instances("loglikelihood", [("add", " four"), ("", "four"), ("<unused>add", " four")])
    assert_equal_answers(lm.loglikelihood(asked), reference.loglikelihood(asked))
    asked = instances("generate_until", [("<unused>add", {"max_gen_toks": 8}), ("the", {"max_gen_toks": 8})])
    assert lm.generate_until(asked[:1]) == reference.generate_until(asked[:1])


def beginning(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer that begins every text with a token."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = TemplateProcessing("<unused> $A", special_tokens=[("<unused>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<unused>", eos_token="<end>", pad_token="<pad>")


def test_options_lie_over_the_default_routing(engine: Engine) -> None:
    default = engine.router.params

    def routing(**given: Any) -> dict[str, Any]:
        found = TreadleLM(engine, **given).get_model_info()["routing"]
        return {name: value for name, value in found.items() if value != getattr(default, name)}

    assert routing() == {}
    assert routing(every=4, rule="top_k", top_k=1) == {"every": 4, "rule": "top_k", "top_k": 1}
    assert routing(lag=1, every="none", temperature=2) == {"lag": 1, "every": None, "temperature": 2.0}
    assert routing(fixed="math=0.7") == {"rule": "fixed", "fixed": {"math": 0.7}}
    assert routing(fixed="") == {"rule": "fixed", "fixed": {}}
    assert routing(fixed=None) == {}


def test_wrong_options_are_errors(engine: Engine) -> None:
    with pytest.raises(OptionError, match="unknown option 'evry'"):
        TreadleLM(engine, evry=2)
    with pytest.raises(OptionError, match="unknown adapter 'maths'"):
        TreadleLM(engine, fixed="maths=1")
    with pytest.raises(OptionError, match="loaded already"):
        TreadleLM(engine, dtype="bfloat16")
    for wrong in (0, -1, "many"):
        with pytest.raises(OptionError, match="batch"):
            TreadleLM(engine, batch_size=wrong)


def test_lm_eval_builds_it_by_name_from_a_bundle(engine: Engine, bundle: Path, tasks: Path) -> None:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model="treadle",
        model_args=f"bundle={bundle},dtype=float32,every=4,rule=top_k",
        device="cpu",
        batch_size=2,
        max_batch_size=CPU_BATCH_ROWS,
        tasks=["choices"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    routing = RoutingParams(every=4, rule="top_k")
    assert results["config"]["routing"] == asdict(routing)
    found = [[float(answer[0][0]) for answer in row["resps"]] for row in results["samples"]["choices"]]
    for totals, doc in zip(found, DOCS, strict=True):
        texts = [f" {choice}" for choice in doc["choices"]]
        expected = [float(scores.sum()) for scores in engine.score([doc["question"]] * 3, texts, routing=routing)]
        np.testing.assert_allclose(totals, expected, atol=1e-4)


@pytest.fixture
def command(bundle: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command line with some --model_args, in this process; lm-eval's own 10,000 task files stay unread."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))

    def run(options: str, *more: str) -> None:
        given = ["--model", "treadle", "--include_path", str(tasks), "--tasks", "choices,texts"]
        monkeypatch.setattr(sys, "argv", ["", *given, "--model_args", f"bundle={bundle},{options}", *more])
        main()

    return run


def test_the_command_line_runs_it(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command('fixed="math=0.7,code=0.3",dtype=float32', "--output_path", str(tmp_path / "out.json"))
    assert "|choices|" in capsys.readouterr().out
    (file,) = tmp_path.glob("out*.json")
    document = json.loads(file.read_text())
    assert document["config"]["routing"]["fixed"] == {"math": 0.7, "code": 0.3}
    assert set(document["results"]) == {"choices", "texts"}


def test_the_command_line_says_what_is_wrong(command: Callable[..., None]) -> None:
    with pytest.raises(SystemExit, match="treadle: unknown option 'evry'"):
        command("evry=2")
