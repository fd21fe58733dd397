"""Sorts the tensors of a PEFT file by their names: factors, vectors and whole weights of each module."""

import re
from dataclasses import dataclass, field

from torch import Tensor

from treadle.lora.pair import number_problem

PREFIX, ADAPTER = r"^(?:base_model\.model\.)?(?P<module>.+)", r"(?:\.(?!weight$|bias$)[^.]+)?"
"""The beginning of a name, and the adapter's name inside it, which older releases wrote."""
TENSOR_NAME = re.compile(rf"{PREFIX}\.lora_(?P<side>[AB]){ADAPTER}\.weight$")
EMBEDDING_NAME = re.compile(rf"{PREFIX}\.lora_embedding_(?P<side>[AB]){ADAPTER}$")
"""Factors of an embedding: A (r, vocabulary) and B (size of a vector, r)."""
VECTOR_NAMES = {
    "magnitude": re.compile(rf"{PREFIX}\.lora_magnitude_vector{ADAPTER}(?:\.weight)?$"),
    "update_bias": re.compile(rf"{PREFIX}\.lora_B{ADAPTER}\.bias$"),
    "ia3": re.compile(rf"{PREFIX}\.ia3_l{ADAPTER}$"),
    "whole_bias": re.compile(r"^(?!.*\.lora_)(?:base_model\.model\.)?(?P<module>.+?)(?:\.base_layer)?\.bias$"),
}
"""Names of vectors, by what they are."""
BASE_WEIGHT = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+?)(?:\.base_layer)?\.weight$")
"""A whole weight. PEFT saves the base's own beside factors of the head, or if the vocabulary was resized."""
FOREIGN_NAME = re.compile(
    r"lora_[ab]\b|adapter\w*\.(?:\w+\.)*linear_(?:in|out)\b|\blora_?\w*\.(?:down|up)\b|lora_(?:down|up)\b|\.alpha$"
)
"""In names that `treadle.lora.foreign_keys` knows."""
MATRIX_AXES = 2


@dataclass(frozen=True)
class PeftTensors:
    """The tensors of a file, by module path.

    Attributes:
        factors: module path -> side, A or B -> factor.
        vectors: module path -> a key of VECTOR_NAMES -> vector.
        weights: module path -> whole weight (out, in).
        problems: a line for each tensor that cannot be used.
    """

    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    vectors: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    problems: list[str] = field(default_factory=list[str])


def sort_tensors(tensors: dict[str, Tensor]) -> PeftTensors:
    """Sort the tensors of a file by their names and shapes."""
    found = PeftTensors()
    for key, tensor in tensors.items():
        if factor := TENSOR_NAME.match(key) or EMBEDDING_NAME.match(key):
            found.factors.setdefault(factor["module"], {})[factor["side"]] = tensor
        elif vector := _vector_name(key, tensor):
            name, module = vector
            found.vectors.setdefault(module, {})[name] = tensor
        elif weight := _saved_weight(key, tensor):
            found.weights[weight["module"]] = tensor
            continue  # compared with the base's as it is
        else:
            found.problems.append(_foreign_tensor(key))
            continue
        if problem := number_problem(key, tensor):
            found.problems.append(problem)
    return found


def _saved_weight(key: str, tensor: Tensor) -> re.Match[str] | None:
    """Return the match of a whole weight's name; None for other tensors."""
    is_other = tensor.dim() != MATRIX_AXES or ".lora_" in key or FOREIGN_NAME.search(key)
    return None if is_other else BASE_WEIGHT.match(key)


def _vector_name(key: str, tensor: Tensor) -> tuple[str, str] | None:
    """Return the kind and the module of a vector; None for other tensors. IA3 writes its vectors with two axes."""
    if tensor.dim() != 1 and ".ia3_l" not in key:
        return None
    matches = ((name, pattern.match(key)) for name, pattern in VECTOR_NAMES.items())
    return next(((name, match["module"]) for name, match in matches if match), None)


def _foreign_tensor(key: str) -> str:
    if FOREIGN_NAME.search(key):
        return f"{key}: not a LoRA factor; it is named as another program does: try treadle convert"
    if ".lora_" not in key and BASE_WEIGHT.match(key):
        return f"{key}: a whole weight that is no matrix (modules_to_save), which cannot be blended; train without it"
    return f"{key}: not a LoRA factor; save the adapter without it"
