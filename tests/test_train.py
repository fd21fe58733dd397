import json
import socket
from collections.abc import Callable
from dataclasses import asdict
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from forking import start_command
from killing import kills
from peft import LoraConfig
from transformers import Gemma2Config, Gemma2ForCausalLM, TrainerCallback, TrainerState
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from treadle.bundle.centroid_files import read_centroid
from treadle.common.errors import AdapterError, DataError, OptionError
from treadle.common.files import digest
from treadle.experiments.checkpoints import MARK_FILE, CheckpointKeeper, keep_only, mark_whole, newest_whole
from treadle.experiments.completion_loss import CompletionTrainer
from treadle.experiments.tasks import Example
from treadle.experiments.train import IGNORED_LABEL, TrainParams, train_adapter, training_rows
from treadle.lora.adapter import read_adapter
from treadle.lora.blend import attach
from treadle.routing.centroids import Centroids
from treadle.routing.embedder import StaticEmbedder, load_embedder
from treadle.routing.fitting import fit
from treadle.routing.samples import STAGES

from conftest import BASE, TINY, Run, byte_tokenizer, tiny_llama

OWN = [Example(f"own question {index}?", f" own answer {index}") for index in range(12)]
OTHERS = [Example(f"foreign question {index}?", f" foreign answer {index}") for index in range(12)]
TOKENIZER = byte_tokenizer()


def learned(row: dict[str, list[int]]) -> list[int]:
    return [label for label in row["labels"] if label != IGNORED_LABEL]


def test_the_loss_is_on_the_answer_and_the_end_of_text() -> None:
    (row,) = training_rows(TOKENIZER, OWN[:1], (), TrainParams(join=0.0))
    assert TOKENIZER.decode(row["input_ids"][:-1]) == OWN[0].prompt + OWN[0].completion
    assert TOKENIZER.decode(learned(row)[:-1]) == OWN[0].completion
    assert learned(row)[-1] == row["input_ids"][-1] == TOKENIZER.eos_token_id
    assert len(row["labels"]) == len(row["input_ids"])


def test_joined_sequences_learn_this_adapters_own_answers_only() -> None:
    rows = list(training_rows(TOKENIZER, OWN, OTHERS, TrainParams(join=1.0)))
    texts = [TOKENIZER.decode(row["input_ids"], skip_special_tokens=True) for row in rows]
    assert len(rows) == len(OWN)
    assert all(2 <= text.count("question") <= 3 for text in texts)
    assert any("foreign" in text for text in texts)
    for text, row in zip(texts, rows, strict=True):
        answers = TOKENIZER.decode(learned(row), skip_special_tokens=True)
        assert "foreign" not in answers
        assert answers.count("own answer") == text.count("own answer") >= 1
        ends_in_own = "own" in text.rpartition("question")[2] and "foreign" not in text.rpartition("question")[2]
        assert (row["input_ids"][-1] == TOKENIZER.eos_token_id) == ends_in_own


def test_rows_are_a_function_of_the_seed() -> None:
    first, again, other = (
        list(training_rows(TOKENIZER, OWN, OTHERS, TrainParams(join=0.5, seed=seed))) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_what_is_too_long_is_left_out_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    long = Example("x" * 400, " y")
    rows = list(training_rows(TOKENIZER, [*OWN[:2], long], OTHERS, TrainParams(join=1.0, max_tokens=40)))
    assert len(rows) == 2  # the two fall back to their single examples
    assert "left out 1 of 3 examples" in capsys.readouterr().err
    with pytest.raises(DataError, match="every example is longer than max_tokens=40"):
        list(training_rows(TOKENIZER, [long], (), TrainParams(max_tokens=40)))
    with pytest.raises(DataError, match="no example"):
        list(training_rows(TOKENIZER, [], (), TrainParams()))


def test_params_refuse_nonsense_all_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        TrainParams(rank=0, steps=-1, join=2.0, targets=(), seed=-1)
    for part in (
        "seed must be a whole number from 0",
        "rank must be a whole number of at least 1",
        "steps must be a whole number",
        "join must be a finite number from 0 to 1",
        "targets must be the name of one module or more",
    ):
        assert part in str(caught.value)
    assert TrainParams(targets=("q_proj,v_proj", "o_proj")).targets == ("q_proj", "v_proj", "o_proj")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_training_through_trl_writes_a_folder_that_blends(tmp_path: Path) -> None:
    base = tmp_path / BASE
    tiny_llama().save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    targets = ("v_proj", "up_proj", "q_proj", "o_proj", "k_proj", "down_proj")
    params = TrainParams(steps=6, batch_size=4, rank=2, alpha=4, dtype="float32", learning_rate=1e-2, targets=targets)
    folder = train_adapter(str(base), OWN, tmp_path / "own", others=OTHERS, params=params)
    files = {"adapter_config.json", "adapter_model.safetensors", "losses.jsonl"}
    assert {file.name for file in folder.iterdir()} == files
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(targets), "the same run writes the same file"
    adapter = read_adapter(folder)
    assert adapter.base_model == str(base)
    assert {pair.rank for pair in adapter.pairs.values()} == {2}
    blend = attach(model := tiny_llama(), [adapter])
    row = next(training_rows(TOKENIZER, OWN, (), TrainParams(join=0.0)))
    assert nll(model, row, blend, [1.0]) < nll(model, row, blend, None) - 0.05
    with pytest.raises(OptionError, match="holds an adapter already"):
        train_adapter(str(base), OWN, folder, params=params)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_all_linear_layers_are_trained_and_a_start_that_failed_leaves_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / BASE
    tiny_llama().save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    params = TrainParams(steps=2, batch_size=4, rank=2, alpha=4, dtype="float32", targets=("all-linear",))
    with monkeypatch.context() as broken:
        broken.setattr(SFTTrainer, "__init__", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_adapter(str(base), OWN, tmp_path / "own", params=TrainParams(steps=3))
    pairs = read_adapter(train_adapter(str(base), OWN, tmp_path / "own", params=params)).pairs
    assert len(pairs) == 2 * 7, "of two layers, all seven"


def nll(model: object, row: dict[str, list[int]], blend: object, weights: list[float] | None) -> float:
    with torch.inference_mode(), blend.using(weights):
        return float(model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_two_processes_train_one_adapter_each_on_its_share(tmp_path: Path) -> None:
    base, data = tmp_path / BASE, tmp_path / "own.jsonl"
    tiny_llama().save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    data.write_text("".join(json.dumps({"prompt": e.prompt, "completion": e.completion}) + "\n" for e in OWN))
    params = TrainParams(steps=10, batch_size=2, rank=2, dtype="float32")
    one = train_adapter(str(base), OWN, tmp_path / "one", params=params)
    options = ["--steps=10", "--batch-size=2", "--rank=2", "--dtype=float32"]
    command = ["train", "--base", base, "--data", data, "-o", tmp_path / "two", *options]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    # as torchrun does
    shared_by_all = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    AcceleratorState._reset_state(reset_partial_state=True)  # or the forked ones would know that there is one process
    started = [
        start_command(*command, RANK=rank, LOCAL_RANK=rank, **shared_by_all) for rank in "01"
    ]  # as torchrun does
    for process, log in started:
        with log:
            said = log.read()
        process.join(30)
        assert process.exitcode == 0, said
    (alone,), (shared,) = (map(json.loads, (folder / "losses.jsonl").open()) for folder in (one, tmp_path / "two"))
    assert shared["num_input_tokens_seen"] > 1.8 * alone["num_input_tokens_seen"]  # read by both, in as many steps
    assert read_adapter(tmp_path / "two").pairs.keys() == read_adapter(one).pairs.keys()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_stopped_run_goes_on_and_leaves_losses_and_a_centroid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedder: StaticEmbedder
) -> None:
    base = tmp_path / BASE
    tiny_llama().save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    embedder.save(tmp_path)
    name = str(tmp_path / "embedder")
    params = TrainParams(steps=24, batch_size=2, rank=2, dtype="float32")
    whole = train_adapter(str(base), OWN, tmp_path / "whole", params=params, embedder=name)

    steps: list[int] = []

    class Stopped(TrainerCallback):
        def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
            steps.append(state.global_step)
            if len(steps) == 13:
                raise KeyboardInterrupt

    monkeypatch.setattr(SFTTrainer, "__init__", partialmethod(SFTTrainer.__init__, callbacks=[Stopped()]))
    with pytest.raises(KeyboardInterrupt):
        train_adapter(str(base), OWN, tmp_path / "again", params=params, embedder=name)
    with pytest.raises(OptionError, match="holds a run of another recipe"):
        train_adapter(str(base), OWN, tmp_path / "again", params=TrainParams(steps=30), embedder=name)
    with pytest.raises(OptionError, match="holds a run of another recipe"):
        train_adapter(str(base), OWN[1:], tmp_path / "again", params=params, embedder=name)
    folder = train_adapter(str(base), OWN, tmp_path / "again", params=params, embedder=name)
    files = {"adapter_config.json", "adapter_model.safetensors", "losses.jsonl", "treadle.json", "centroid.safetensors"}
    assert {file.name for file in folder.iterdir()} == files
    losses, expected = ([json.loads(line) for line in (each / "losses.jsonl").open()] for each in (folder, whole))
    assert [entry["step"] for entry in losses] == [10, 20]
    assert steps == [*range(1, 14), *range(11, 25)], "it goes on from the checkpoint of step 10"
    assert losses[0]["grad_norm"] == expected[0]["grad_norm"]
    assert losses[1]["learning_rate"] == expected[1]["learning_rate"]
    assert losses[1]["loss"] == pytest.approx(expected[1]["loss"], rel=0.02)  # the order within an epoch may differ
    loaded = load_embedder(name)
    router = fit({}, loaded, fitted=[read_centroid(folder, "own")])
    fresh = fit({"own": OWN}, loaded)
    np.testing.assert_allclose(router.centroids.means, fresh.centroids.means)
    for stage in STAGES:
        one, other = (each.centroids.stages[stage] for each in (router, fresh))
        np.testing.assert_allclose(one.means, other.means, atol=1e-6)
        np.testing.assert_allclose(one.factors, other.factors, atol=1e-6)
    assert router.names == ("own",)
    with pytest.raises(OptionError, match="the centroids of own were made by the embedder"):
        Centroids.empty("another embedder", 8).join(router.centroids)
    with pytest.raises(AdapterError, match="adapter 'own' has a centroid already"):
        router.centroids.join(router.centroids)


def checkpoint(folder: Path, step: int) -> Path:
    made = folder / f"checkpoint-{step}"
    (made / "deep").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.pt", "deep/trainer_state.json"):
        (made / name).write_text(f"{name} of {step}")
    return made


DAMAGES = {
    "never marked": lambda each: (each / MARK_FILE).unlink(),
    "mark cut short": lambda each: (each / MARK_FILE).write_text("{"),
    "mark of nothing": lambda each: (each / MARK_FILE).write_text("{}"),
    "file missing": lambda each: (each / "optimizer.pt").unlink(),
    "file cut short": lambda each: (each / "deep/trainer_state.json").write_text(""),
    "file of the same size": lambda each: (each / "optimizer.pt").write_text("optimizer.pt of 99"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    assert newest_whole(tmp_path / "nowhere") is None
    whole = mark_whole(checkpoint(tmp_path, 9))
    newer = mark_whole(checkpoint(tmp_path, 20))
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_whole(tmp_path) == newer
    damage(newer)
    assert newest_whole(tmp_path) == whole
    keep_only(tmp_path, whole)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["checkpoint-9", "checkpoint-best"]


def test_the_checkpoint_before_stays_until_the_new_one_is_marked(tmp_path: Path) -> None:
    mark_whole(checkpoint(tmp_path, 10))
    args = SimpleNamespace(output_dir=str(tmp_path))
    state, control = SimpleNamespace(global_step=20, is_world_process_zero=True), SimpleNamespace(should_save=True)

    def write() -> None:
        keeper = CheckpointKeeper()
        keeper.on_step_end(args, state, control)
        checkpoint(tmp_path, 20)
        keeper.on_save(args, state, control)

    found = []
    for _ in kills(write):
        newest = newest_whole(tmp_path)
        found.append(newest and newest.name)
        keep_only(tmp_path, None)
        mark_whole(checkpoint(tmp_path, 10))
    assert set(found) == {"checkpoint-10", "checkpoint-20"}
    assert sorted(found) == found
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint-20"]


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 576 vs 534"), OSError(28, "No space left on device")])
def test_only_what_fails_while_a_checkpoint_is_written_is_said_of_it(tmp_path: Path, error: Exception) -> None:
    keeper = CheckpointKeeper()
    with pytest.raises(type(error)), keeper.told(tmp_path):
        raise error
    keeper.on_step_end(None, None, SimpleNamespace(should_save=True))
    with pytest.raises(
        OptionError, match=r"a checkpoint in .* cannot be written: (RuntimeError: unexpected|No space)"
    ) as caught:
        with keeper.told(tmp_path):
            raise error
    assert "\n" not in str(caught.value)


def test_a_result_that_is_whole_needs_only_tidying_up_and_others_files_stay(tmp_path: Path) -> None:
    base, output = tmp_path / BASE, tmp_path / "own"
    tiny_llama().save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    (output / "checkpoints/mine").mkdir(parents=True)
    with pytest.raises(OptionError, match="checkpoints is there, but not of a run of treadle"):
        train_adapter(str(base), OWN, output)
    params = TrainParams(steps=2)
    rows = list(training_rows(TOKENIZER, OWN, (), params))
    recipe = {"base": str(base), **asdict(params), "rows": digest(rows)}
    (output / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    (output / "adapter_config.json").write_text("{}")
    (output / "README.md").write_text("mine")
    assert train_adapter(str(base), OWN, output, params=params) == output
    assert {each.name for each in output.iterdir()} == {"adapter_config.json", "README.md"}
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="cannot hold files"):
        train_adapter(str(base), OWN, tmp_path / "file/own", params=params)


def test_what_cannot_be_trained_is_refused_before_it_begins(tmp_path: Path) -> None:
    base = tmp_path / BASE
    tiny_llama().save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    with pytest.raises(OptionError, match=r"unknown target 'q_pro'\. Did you mean 'q_proj'"):
        train_adapter(str(base), OWN, tmp_path / "own", params=TrainParams(targets=("q_pro",)))
    with pytest.raises(OptionError) as caught:
        train_adapter(str(base), OWN, tmp_path / "own", params=TrainParams(targets=("q_proj", "lm_head", "x_proj")))
    assert "target 'lm_head' is the output layer, which TRL cannot train. Allowed: " in str(caught.value)
    assert "unknown target 'x_proj'" in str(caught.value)
    assert str(caught.value).count("lm_head") == 1  # what cannot be trained is not offered
    with pytest.raises(OptionError, match="all-linear stands for all of them"):
        train_adapter(str(base), OWN, tmp_path / "own", params=TrainParams(targets=("all-linear", "q_proj")))
    assert not (tmp_path / "own").exists()
    for rate in (float("nan"), float("inf"), 0.0):
        with pytest.raises(OptionError, match="learning_rate must be a finite number above 0"):
            TrainParams(learning_rate=rate)


def test_an_adapter_without_a_centroid_asks_for_samples(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"holds no centroid\.safetensors: give sample texts of 'math'"):
        read_centroid(tmp_path, "math")


def capped_gemma() -> Gemma2ForCausalLM:
    """A random Gemma 2, which caps its logits."""
    torch.manual_seed(0)
    config = Gemma2Config(**TINY, final_logit_softcapping=2.0, initializer_range=0.3)
    return Gemma2ForCausalLM(config)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [tiny_llama, capped_gemma])
def test_the_loss_on_a_cpu_is_that_of_trl(tmp_path: Path, make: Callable[[], Any]) -> None:
    rows = list(training_rows(TOKENIZER, OWN[:4], OTHERS, TrainParams(join=0.5)))
    found = {}
    for trainer_class in (SFTTrainer, CompletionTrainer):
        args = SFTConfig(tmp_path, max_length=None, report_to="none", bf16=False, use_cpu=True)
        lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        trainer = trainer_class(make(), args, train_dataset=Dataset.from_list(rows), processing_class=TOKENIZER,
                                peft_config=lora)  # fmt: skip
        torch.manual_seed(0)
        for name, parameter in trainer.model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter)
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(50))
        loss.backward()
        learned = [each.grad for each in trainer.model.parameters() if each.requires_grad]
        found[trainer_class] = loss.detach(), learned
    (expected, gradients), (actual, own) = found.values()
    torch.testing.assert_close(actual, expected)
    assert len(own) == 2 * 2
    torch.testing.assert_close(own, gradients)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_packed_sequences_do_not_see_each_other(tmp_path: Path) -> None:
    base = tmp_path / BASE
    model = tiny_llama()
    model.save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    options = {"join": 0.0, "packing": True, "max_tokens": 100}  # three of the rows into each
    still = TrainParams(steps=10, batch_size=12, rank=2, learning_rate=1e-12, dtype="float32", **options)
    folder = train_adapter(str(base), OWN, tmp_path / "packed", params=still)
    (logged,) = map(json.loads, (folder / "losses.jsonl").read_text().splitlines())
    rows = list(training_rows(TOKENIZER, OWN, (), still))
    assert 2 * max(len(row["input_ids"]) for row in rows) <= still.max_tokens, "nothing would be packed"
    counts = [len(learned(row)) for row in rows]
    blend = attach(model, [read_adapter(folder)])
    alone = sum(count * nll(model, row, blend, None) for count, row in zip(counts, rows, strict=True)) / sum(counts)
    assert logged["loss"] == pytest.approx(alone, abs=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_command_trains_on_chats_and_on_rows_of_a_template(run: Run, tmp_path: Path) -> None:
    base = tmp_path / BASE
    tiny_llama().save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    messages = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "three"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "all?", "a": "SELECT"}) + "\n")
    (tmp_path / "sql.json").write_text(json.dumps({"name": "sql", "prompt": "Q: {q}", "completion": " {a}"}))
    common = ["train", "--base", base, "--steps", 1, "--rank", 2, "--dtype", "float32", "--json"]
    for task, data in (("chat", "chats.jsonl"), (tmp_path / "sql.json", "rows.jsonl")):
        output = tmp_path / Path(str(task)).stem
        also = [f"--also=chat={tmp_path / 'chats.jsonl'}", "--join", 1.0]
        code, out, err = run(*common, "--data", tmp_path / data, "--task", task, *also, "-o", output)
        assert code == 0, err
        assert json.loads(out)["examples"] == 1  # and nothing else
        assert read_adapter(output).pairs
        assert "'loss'" in err
    assert "\r" not in err  # a log gets no bar; the first also has that of the base, which this test wrote
    code, _, err = run(*common, "--data", tmp_path / "rows.jsonl", "--task", "chatt", "-o", tmp_path / "no")
    assert code == 1
    assert "Did you mean 'chat'?" in err
