"""Refuses an adapter that cannot fit by the shapes in its file's header, before anything of its factors is read."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from treadle.common.errors import AdapterError, problem_list
from treadle.lora.adapter import TENSOR_NAME, WEIGHTS_FILE

Shapes = Mapping[str, tuple[int, int]]
"""The (in, out) of linear layers, by path."""


def check_outline(folder: Path, name: str, shapes: Shapes) -> None:
    """Raise an AdapterError that lists the factors that fit no layer of a model with these shapes.

    What else is wrong, a missing file too, is left to `read_adapter`; so are paths, which PEFT may have renamed.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        return
    try:
        with safe_open(file, "pt") as opened:
            sizes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
    except (SafetensorError, OSError, ValueError):
        return
    if problems := list(_problems(sizes, shapes)):
        raise AdapterError(problem_list(f"adapter {name!r} ({folder}) does not fit the model:", problems))


def _problems(sizes: Mapping[str, tuple[int, ...]], shapes: Shapes) -> Iterator[str]:
    inputs, outputs = ({shape[side] for shape in shapes.values()} for side in (0, 1))
    for key, size in sizes.items():
        found = TENSOR_NAME.match(key)
        if found is None or len(size) != 2:
            continue
        if found["side"] == "A" and size[1] not in inputs:
            yield f"{key} is {size} (r, in); no linear layer of the model has {size[1]} inputs"
        if found["side"] == "B" and size[0] not in outputs:
            yield f"{key} is {size} (out, r); no linear layer of the model has {size[0]} outputs"
