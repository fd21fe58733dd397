"""A tiny model, a byte tokenizer, adapters of unequal ranks and a static embedder of a few words: no network.

Functions import what they use: the process that hands tests to workers reads this file, and needs no PyTorch.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

    from treadle.engine.engine import Engine
    from treadle.lora.adapter import Adapter
    from treadle.routing.embedder import StaticEmbedder
    from treadle.routing.router import Router
    from treadle.routing.states import StateClasses

collect_ignore = [] if find_spec("vllm") else ["vllm_plugin"]
"""The plugin's tests need vLLM, in an environment of its own: `make test-vllm`."""
# pytest's workers share the cores: tiny products on two threads each take five times as long as on one, and a vLLM on
# two threads beside other programs many times as long. Read when PyTorch is imported, here and in processes of tests
os.environ["OMP_NUM_THREADS"] = "1"
# no test needs the network, and none may wait for it; read when huggingface_hub is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# workers and the processes that tests start would otherwise compile the tests and the package each time
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
BASE = "tiny-llama"
Run = Callable[..., tuple[int, str, str]]
"""Arguments of the command line -> exit code, stdout, stderr."""
WORDS = [
    "add",
    "sum",
    "three",
    "four",
    "plus",
    "cell",
    "atom",
    "planet",
    "heat",
    "def",
    "return",
    "list",
    "loop",
    "the",
]
SAMPLES = {
    "math": ["add three plus four", "the sum plus three", "four plus four add", "sum add three"],
    "science": ["the atom heat", "planet heat cell", "cell atom planet the", "heat the planet"],
    "code": ["def loop return list", "return the list", "loop def list def", "list return loop"],
}
RANKS = {"math": 4, "science": 2, "code": 3}
TARGETS = {
    "math": ["q_proj", "v_proj"],
    "science": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "code": ["q_proj", "v_proj", "gate_proj", "down_proj"],
}

TINY = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
"""Of a decoder with two layers and grouped queries, by the names of transformers' configurations."""


def pytest_collection_finish() -> None:
    """Set what the libraries hold for ever apart: it need not be looked through whenever garbage is collected."""
    gc.collect()
    gc.freeze()


def tiny_llama() -> LlamaForCausalLM:
    """A random Llama of two layers with grouped queries, the same every time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, max_position_embeddings=512, initializer_range=0.3)).eval()


def calm(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model's weights smaller: logits near 1 keep rounding far below the tolerance of 1e-5."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.4)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so characters span tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<unused>", "<end>", "<pad>"])
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<end>",
        pad_token="<pad>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def save_adapter(folder: Path, model: PreTrainedModel | None = None, seed: int = 0, **config: object) -> Path:
    """Write a PEFT adapter with random factors (B included) for a model, through PEFT itself."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = model if model is not None else tiny_llama()
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(**options))
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    wrapped.peft_config["default"].base_model_name_or_path = BASE
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    wrapped.unload()
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    """Change fields of an adapter's config on disk."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="session")
def adapter_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters of unequal ranks and target modules."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(root / name, seed=index, r=RANKS[name], target_modules=TARGETS[name])
        for index, name in enumerate(SAMPLES, 1)
    }


@pytest.fixture(scope="session")
def equal_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters of equal ranks and target modules."""
    root = tmp_path_factory.mktemp("equal")
    return {name: save_adapter(root / name, seed=index) for index, name in enumerate(SAMPLES, 1)}


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def embedder() -> StaticEmbedder:
    """A static embedder that knows a few words and every character, so that generated bytes move the weights.

    It knows general text by its characters: the base has a share.
    """
    characters = [*map(chr, range(33, 127)), "\ufffd"]
    return embedder_of([*WORDS, *characters, *(f"##{character}" for character in characters)])


@pytest.fixture(scope="session")
def terse() -> StaticEmbedder:
    """A static embedder that knows a few words and nothing of general text: the adapters share all weight."""
    return embedder_of([word for word in WORDS if word != "the"])


def embedder_of(pieces: list[str]) -> StaticEmbedder:
    """Return a static embedder with a random vector of each word piece, the same every time."""
    import numpy as np
    from model2vec import StaticModel
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import BertPreTokenizer

    from treadle.routing.embedder import StaticEmbedder

    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(["[UNK]", *pieces]))}
    core = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = BertPreTokenizer()
    vectors = np.random.default_rng(0).normal(size=(len(vocabulary), 8)).astype(np.float32)
    return StaticEmbedder(StaticModel(vectors, core, max_length=None))


@pytest.fixture(scope="session")
def router(embedder: StaticEmbedder) -> Router:
    """A router of all samples; nothing changes it, and a fit takes half a second."""
    from treadle.routing.fitting import fit

    return fit(SAMPLES, embedder)


@pytest.fixture(scope="session")
def adapters(adapter_folders: dict[str, Path]) -> list[Adapter]:
    from treadle.lora.adapter import read_adapter

    return [read_adapter(folder, name) for name, folder in adapter_folders.items()]


@pytest.fixture(scope="session")
def classes(tokenizer: PreTrainedTokenizerFast, adapters: list[Adapter]) -> StateClasses:
    """Classes over the states that the tiny base model has of all samples."""
    from treadle.engine.state_fitting import fit_states

    return fit_states(tiny_llama(), tokenizer, SAMPLES, adapters)[0]


@pytest.fixture
def engine(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, adapter_folders: dict[str, Path], router: Router
) -> Engine:
    from treadle.engine.engine import Engine
    from treadle.lora.adapter import read_adapter

    adapters = [read_adapter(folder, name) for name, folder in adapter_folders.items()]
    return Engine(model, tokenizer, adapters, router)


@pytest.fixture
def peft_model() -> Callable[..., PeftModel]:
    """Load adapters into the tiny model with the real PEFT, for comparison."""
    from peft import PeftModel

    def build(folders: dict[str, Path], base: PreTrainedModel | None = None) -> PeftModel:
        first, *rest = folders.items()
        wrapped = PeftModel.from_pretrained(base if base is not None else tiny_llama(), first[1], adapter_name=first[0])
        for name, folder in rest:
            wrapped.load_adapter(folder, adapter_name=name)
        return wrapped.eval()

    return build


@pytest.fixture
def bundle(tmp_path: Path, adapter_folders: dict[str, Path], router: Router) -> Path:
    from treadle.bundle.bundle import save_bundle

    tiny_llama().save_pretrained(tmp_path / BASE)
    byte_tokenizer().save_pretrained(tmp_path / BASE)
    base = str(tmp_path / BASE)
    samples = {name: texts[:1] for name, texts in SAMPLES.items()}
    return save_bundle(tmp_path / "bundle", base=base, adapters=adapter_folders, router=router, samples=samples)


@pytest.fixture(scope="session")
def bundle_folder(
    tmp_path_factory: pytest.TempPathFactory, adapter_folders: dict[str, Path], embedder: StaticEmbedder
) -> Path:
    """A bundle on disk that no test changes, without samples."""
    return bundle_without_samples(tmp_path_factory.mktemp("served"), adapter_folders, embedder)


def bundle_without_samples(root: Path, adapters: dict[str, Path], embedder: StaticEmbedder) -> Path:
    """Write a tiny base and a bundle of these adapters below `root`; return the bundle's folder."""
    from treadle.bundle.bundle import save_bundle
    from treadle.routing.fitting import fit

    tiny_llama().save_pretrained(root / BASE)
    byte_tokenizer().save_pretrained(root / BASE)
    return save_bundle(root / "bundle", base=str(root / BASE), adapters=adapters, router=fit(SAMPLES, embedder))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line; return exit code, stdout and stderr."""
    from treadle.cli.main import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["treadle", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call
