"""Checkpoints of a training run: one counts once a list of all its files, with their digests, lies beside them."""

import hashlib
import json
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from treadle.common.documents import read_object
from treadle.common.errors import DataError, OptionError, reason_of
from treadle.common.writing import refusal_of, sync, write_text

MARK_FILE = "treadle-whole.json"
"""File name -> SHA-256 of each file of a checkpoint; written last."""
CHECKPOINT_PATTERN = re.compile(r"checkpoint-(\d+)")


class CheckpointKeeper(TrainerCallback):
    """Marks each checkpoint that the trainer has written as whole, then removes those before it."""

    def __init__(self) -> None:
        self._is_saving = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take note that the trainer is about to write; its own callback has decided before."""
        self._is_saving = control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark what the trainer has written, once every process has written its share."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            keep_only(folder, mark_whole(folder / f"checkpoint-{state.global_step}"))
        self._is_saving = False

    @contextmanager
    def told(self, folder: Path) -> Generator[None]:
        """Turn what goes wrong while a checkpoint is written into an OptionError of one line."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if not self._is_saving:
                raise
            reason = refusal_of(error) or reason_of(error)
            message = f"a checkpoint in {folder} cannot be written: {reason}; make room, then start the same run again."
            raise OptionError(message) from error


def mark_whole(checkpoint: Path) -> Path:
    """Force a checkpoint to the disk, list its files in it and return it."""
    sync(checkpoint)
    write_text(checkpoint / MARK_FILE, json.dumps(_digests(checkpoint), indent=1) + "\n")
    return checkpoint


def newest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder whose files are as they were when it was marked."""
    found = {int(name[1]): each for each in folder.glob("*") if (name := CHECKPOINT_PATTERN.fullmatch(each.name))}
    return next((found[step] for step in sorted(found, reverse=True) if _is_whole(found[step])), None)


def keep_only(folder: Path, kept: Path | None) -> None:
    """Remove all other checkpoints."""
    for each in folder.glob("*"):
        if each != kept and CHECKPOINT_PATTERN.fullmatch(each.name):
            shutil.rmtree(each, ignore_errors=True)


def _is_whole(checkpoint: Path) -> bool:
    try:
        marked = read_object(checkpoint / MARK_FILE, DataError)
    except DataError:  # a kill came before it
        return False
    return bool(marked) and _digests(checkpoint) == marked


def _digests(checkpoint: Path) -> dict[str, str]:
    files = sorted(each for each in checkpoint.rglob("*") if each.is_file() and each.name != MARK_FILE)
    return {str(each.relative_to(checkpoint)): _digest(each) for each in files}


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
