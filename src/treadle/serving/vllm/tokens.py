"""The tokenizer by which a server's token ids become the text that weights are made from. Nothing here imports vLLM."""

from typing import TYPE_CHECKING, Any

from treadle.bundle.base_model import load_tokenizer
from treadle.engine.tokenization import Detokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_of(model_config: Any) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that vLLM was given, by its name and revision.

    Raises:
        ModelError: it cannot be loaded, or it is not a fast one.
    """
    tokenizer = load_tokenizer(
        model_config.tokenizer,
        revision=model_config.tokenizer_revision,
        trust_remote_code=bool(model_config.trust_remote_code),
    )
    Detokenizer(tokenizer)  # refuses what each request would be refused for
    return tokenizer
