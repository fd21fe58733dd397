"""Trains one LoRA adapter with TRL's SFTTrainer and writes a plain PEFT folder.

The loss is on this adapter's own answers only. A share of the sequences joins two or three examples, of this and of
other tasks, because an adapter that has only ever seen one example a sequence hurts in a second turn.
"""

import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.bundle.base_model import load_model, load_tokenizer
from treadle.bundle.centroid_files import save_centroid
from treadle.bundle.token_embedder import find_embedder
from treadle.common.errors import DataError, OptionError, TreadleError, problem_list, unknown_name
from treadle.common.files import digest
from treadle.common.writing import check_writable, put_all, workplace, write_text
from treadle.experiments.params import TrainParams
from treadle.experiments.tasks import SEPARATOR, Example
from treadle.lora.peft_folder import CONFIG_FILE
from treadle.routing.centroids import Centroids
from treadle.routing.fitting import centroid_of

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

IGNORED_LABEL = -100
"""The label that PyTorch's cross entropy skips."""
CHECKPOINTS_FOLDER, RECIPE_FILE = "checkpoints", "recipe.json"
"""Folder of an unfinished run, and the file of the params that it was started with."""
ALL_LINEAR_TARGET = "all-linear"
"""PEFT's name for every linear layer but the last."""


def train_adapter(
    base: str,
    examples: Sequence[Example],
    output: Path,
    *,
    others: Sequence[Example] = (),
    params: TrainParams | None = None,
    embedder: str | None = None,
) -> Path:
    """Train an adapter for `base` on `examples` and write it to the folder `output` as bfloat16 safetensors.

    A run that was stopped goes on from its last checkpoint when it is started again with the same arguments. Beside the
    factors lie `losses.jsonl` and, where `embedder` is given, the centroid of the examples, which `treadle fit` takes
    instead of sample texts. Under `accelerate launch` or `torchrun` each process trains on its share of the sequences
    (a step has `batch_size` of each), and the main process writes.

    Args:
        base: folder or hub id of the base model; the adapter's config names it as given here.
        examples: this adapter's own examples; the loss is on their completions and the end-of-text after them.
        output: the PEFT folder to write; it must not hold an adapter yet.
        others: examples of other tasks, which appear in joined sequences without loss.
        params: the recipe.
        embedder: its name, as `treadle fit` takes it.
    """
    _check_libraries()
    params = params or TrainParams()
    is_done = (output / CONFIG_FILE).exists()
    if is_done and not (output / RECIPE_FILE).exists():
        raise OptionError(f"{output} holds an adapter already; name another folder or remove it.")
    check_writable(output / CONFIG_FILE)  # before the hours of training, not after
    tokenizer = load_tokenizer(base)
    rows = list(training_rows(tokenizer, examples, others, params))
    recipe = json.dumps({"base": base, **asdict(params), "rows": digest(rows)}, indent=2) + "\n"
    _check_recipe(output, recipe)
    if is_done:  # and was killed before it could clean up
        _clean(output)
        return output
    own = _centroid(output.name, examples, embedder, base) if embedder else None
    model = load_model(base, device="cpu", dtype=params.dtype)  # the trainer knows this process's GPU
    _check_targets(model, params)
    trainer = _trainer(model, tokenizer, rows, output, params)
    if trainer.is_world_process_zero():
        write_text(output / RECIPE_FILE, recipe)  # now that it can be trained
    _run(trainer, output / CHECKPOINTS_FOLDER)
    if trainer.is_world_process_zero():
        with workplace(output) as place:
            made = place / "adapter"
            _save(trainer.model, base, made)
            _save_losses(trainer.state.log_history, made)
            if own is not None:
                training = {"base": base, "examples": len(rows), **asdict(params)}
                save_centroid(made, own, str(embedder), training)
            put_all(made, output, CONFIG_FILE)
        _clean(output)
    return output


def _check_libraries() -> None:
    try:
        for name in ("datasets", "trl.trainer.sft_trainer"):
            import_module(name)
    except ImportError as error:
        raise TreadleError("training needs: pip install 'treadle[train]'") from error


def _trainer(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], output: Path, params: TrainParams) -> Any:
    from datasets import Dataset
    from trl.trainer.sft_trainer import SFTTrainer

    from treadle.experiments.completion_loss import CompletionTrainer

    args = _trainer_config(output, params)
    return (CompletionTrainer if args.use_cpu else SFTTrainer)(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        peft_config=_lora(params),
    )


def _run(trainer: "SFTTrainer", checkpoints: Path) -> None:
    """Train, from the newest whole checkpoint where there is one."""
    from treadle.experiments.checkpoints import CheckpointKeeper, keep_only, newest_whole

    last = newest_whole(checkpoints)
    if trainer.is_world_process_zero():
        keep_only(checkpoints, last)
    keeper = CheckpointKeeper()
    trainer.add_callback(keeper)
    with redirect_stdout(sys.stderr), keeper.told(checkpoints):  # its progress goes there, too
        trainer.train(resume_from_checkpoint=str(last) if last else None)


def _centroid(name: str, examples: Sequence[Example], embedder: str, base: str) -> Centroids:
    """Return the centroid of an adapter's own examples."""
    return centroid_of(name, examples, find_embedder(embedder, base))


def _save_losses(history: Sequence[dict[str, Any]], output: Path) -> None:
    losses = [json.dumps(entry) + "\n" for entry in history if "loss" in entry]
    (output / "losses.jsonl").write_text("".join(losses), "utf-8")


def _clean(output: Path) -> None:
    """Remove the files that only an unfinished run needs; the recipe last, because it marks the folder as ours."""
    shutil.rmtree(output / CHECKPOINTS_FOLDER, ignore_errors=True)
    (output / RECIPE_FILE).unlink(missing_ok=True)


def _lora(params: TrainParams) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        target_modules=ALL_LINEAR_TARGET if params.targets == (ALL_LINEAR_TARGET,) else list(params.targets),
        task_type="CAUSAL_LM",
    )


def _check_targets(model: "PreTrainedModel", params: TrainParams) -> None:
    """Refuse targets that cannot be trained, naming those that can: the linear layers but the last."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()  # TRL's loss reads its weight, so factors on it would never be trained
    linear = {f".{path}": module for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    paths = [path for path, module in linear.items() if module is not head]
    names = sorted({path.rpartition(".")[2] for path in paths})
    wrong = [
        unknown_name("target", name, names)
        for name in params.targets
        if name != ALL_LINEAR_TARGET and not any(path.endswith(f".{name}") for path in linear)
    ]
    wrong += [
        f"target {name!r} is the output layer, which TRL cannot train. Allowed: {', '.join(names)}."
        for name in params.targets
        if any(path.endswith(f".{name}") and module is head for path, module in linear.items())
    ]
    if ALL_LINEAR_TARGET in params.targets and params.targets != (ALL_LINEAR_TARGET,):
        wrong.append(f"{ALL_LINEAR_TARGET} stands for all of them; leave out the others")
    if wrong:
        raise OptionError(problem_list("targets:", wrong))


def _check_recipe(output: Path, recipe: str) -> None:
    """Refuse to go on with a run of another recipe, or among checkpoints of somebody else."""
    file, checkpoints = output / RECIPE_FILE, output / CHECKPOINTS_FOLDER
    if file.exists() and file.read_text("utf-8") != recipe:
        raise OptionError(f"{output} holds a run of another recipe ({file.name}); name another folder or remove it.")
    if not file.exists() and checkpoints.exists() and not (checkpoints.is_dir() and not any(checkpoints.iterdir())):
        raise OptionError(f"{checkpoints} is there, but not of a run of treadle; name another folder or remove it.")


def _trainer_config(output: Path, params: TrainParams) -> "SFTConfig":
    import torch
    from trl.trainer.sft_config import SFTConfig

    return SFTConfig(
        output_dir=str(output / CHECKPOINTS_FOLDER),
        max_steps=params.steps,
        per_device_train_batch_size=params.batch_size,
        learning_rate=params.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(10, params.steps // 10),
        max_length=params.max_tokens if params.packing else None,  # training_rows has left out what is longer
        packing=params.packing,
        train_sampling_strategy="random" if params.packing else "group_by_length",
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),  # said, or several processes on CPUs would each train alone
        bf16=False,  # the base is loaded in params.dtype; autocast would convert it anew every step
        include_num_input_tokens_seen="non_padding",
        logging_steps=min(10, params.steps),
        save_strategy="steps",
        save_steps=max(10, params.steps // 4),
        disable_tqdm=not sys.stderr.isatty(),  # a log gets lines instead of a bar
        report_to="none",
        dataloader_pin_memory=False,
        seed=params.seed,
    )


def _save(model: Any, base: str, output: Path) -> None:
    """Write the adapter in bfloat16, half the bytes, with the name of its base as the user gave it."""
    import torch

    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.target_modules = sorted(config.target_modules)  # a set: its order would change from run to run
    model.save_pretrained(output)
    for extra in ("README.md", "training_args.bin"):  # PEFT's empty model card; a pickle of local paths
        (output / extra).unlink(missing_ok=True)


def training_rows(
    tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Example], others: Sequence[Example], params: TrainParams
) -> Iterator[dict[str, list[int]]]:
    """Yield `input_ids` and `labels` (IGNORED_LABEL where there is no loss) of one sequence an example, joined or not.

    A joined sequence that is longer than `params.max_tokens` falls back to its own example alone; an example that is
    too long by itself is left out.
    """
    if not examples:
        raise DataError("there is no example to train on")
    choose = random.Random(params.seed)
    companions = [*((example, True) for example in examples), *((example, False) for example in others)]
    too_long = 0
    for example in examples:
        parts = [(example, True)]
        if choose.random() < params.join:
            parts += [_pick(choose, companions, bool(others)) for _ in range(choose.randint(1, 2))]
            choose.shuffle(parts)
        row = _encode(tokenizer, parts)
        if len(row["input_ids"]) > params.max_tokens:
            row = _encode(tokenizer, [(example, True)])
        if len(row["input_ids"]) > params.max_tokens:
            too_long += 1
            continue
        yield row
    if too_long == len(examples):
        raise DataError(f"every example is longer than max_tokens={params.max_tokens}")
    if too_long:
        message = f"left out {too_long} of {len(examples)} examples: longer than {params.max_tokens} tokens"
        print(message, file=sys.stderr)


def _pick(choose: random.Random, pool: Sequence[tuple[Example, bool]], has_others: bool) -> tuple[Example, bool]:
    """Choose a companion: where there are other tasks, this task's own and a foreign example are equally likely."""
    own = choose.random() < 0.5 if has_others else True
    while True:
        example, is_own = choose.choice(pool)
        if is_own == own:
            return example, is_own


def _encode(tokenizer: Any, parts: Sequence[tuple[Example, bool]]) -> dict[str, list[int]]:
    """Tokenise (example, is its answer learned?) pairs into one sequence; end-of-text is learned after the last."""
    ids: list[int] = []
    labels: list[int] = []
    for index, (example, is_own) in enumerate(parts):
        prompt = tokenizer(SEPARATOR * (index > 0) + example.prompt, add_special_tokens=index == 0).input_ids
        answer = tokenizer(example.completion, add_special_tokens=False).input_ids
        if is_own and index == len(parts) - 1:
            answer.append(tokenizer.eos_token_id)
        ids += prompt + answer
        labels += [IGNORED_LABEL] * len(prompt) + (answer if is_own else [IGNORED_LABEL] * len(answer))
    return {"input_ids": ids, "labels": labels}
