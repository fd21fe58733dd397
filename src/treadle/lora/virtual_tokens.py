"""Virtual tokens before every text: what prefix tuning, prompt tuning and P-tuning train.

PEFT writes one tensor for all three. Prefix tuning trains the keys and values of each layer. The others train vectors
that the base reads as if they were tokens' embeddings, and so their keys and values follow from the base alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from treadle.common.errors import shown
from treadle.lora.pair import number_problem

PREFIX_TYPE, EMBEDDING_TYPES = "PREFIX_TUNING", ("PROMPT_TUNING", "P_TUNING")
VIRTUAL_TYPES = (PREFIX_TYPE, *EMBEDDING_TYPES)
VIRTUAL_TENSOR = "prompt_embeddings"
VIRTUAL_FIELDS = frozenset(
    "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers encoder_hidden_size "
    "prefix_projection init_weights prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs "
    "encoder_reparameterization_type encoder_num_layers encoder_dropout".split()
)
"""Fields of their configs that are read here, or that matter only to training."""


@dataclass(frozen=True)
class VirtualTokens:
    """The virtual tokens of one adapter; either embeddings or states are there.

    Attributes:
        embeddings: (M, H), read by the base before the text.
        states: (L, 2, heads, M, head), keys and values of each layer.
        is_placed: the keys are rotated to the positions -M to -1, so that texts begin at 0. PEFT's own are not: it
            lets texts begin at M.
    """

    embeddings: Tensor | None = None
    states: Tensor | None = None
    is_placed: bool = False

    @property
    def given(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        named = {"embeddings": self.embeddings, "states": self.states}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def read_virtual(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[VirtualTokens, list[str]]:
    """Return the virtual tokens of a PEFT file, and its problems; with any, there are no tokens."""
    problems = list(_problems(tensors, config))
    if problems:
        return VirtualTokens(), problems
    found = tensors[VIRTUAL_TENSOR]  # (M, H), or (M, 2 * L * H) of a prefix
    if config["peft_type"] != PREFIX_TYPE:
        return VirtualTokens(embeddings=found), []
    num_layers, num_heads = config["num_layers"], config["num_attention_heads"]
    states = found.view(len(found), num_layers, 2, num_heads, -1)
    return VirtualTokens(states=states.permute(1, 2, 3, 0, 4).contiguous()), []


def _problems(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{key}: not a virtual token" for key in tensors if key != VIRTUAL_TENSOR)
    found, is_prefix = tensors.get(VIRTUAL_TENSOR), config["peft_type"] == PREFIX_TYPE
    sizes = ["num_virtual_tokens", "token_dim", *(["num_layers", "num_attention_heads"] if is_prefix else [])]
    wrong = [key for key in sizes if not _is_size(config.get(key))]
    yield from (f"{key} must be a positive whole number, not {shown(config.get(key))}" for key in wrong)
    if config.get("num_transformer_submodules") not in (None, 1):
        yield "its virtual tokens are of an encoder and a decoder; a base is a decoder alone"
    if found is None:
        yield f"{VIRTUAL_TENSOR} is missing"
        return
    if problem := number_problem(VIRTUAL_TENSOR, found):
        yield problem
    if wrong:
        return
    wide = config["token_dim"] * (2 * config["num_layers"] if is_prefix else 1)
    wanted = config["num_virtual_tokens"], wide
    if tuple(found.shape) != wanted:
        yield f"{VIRTUAL_TENSOR} is {tuple(found.shape)}, its config says {wanted}"
    if is_prefix and config["token_dim"] % config["num_attention_heads"]:
        yield f"token_dim {config['token_dim']} is no multiple of num_attention_heads {config['num_attention_heads']}"


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0
