"""`treadle convert`: the folder that it writes, in real PEFT, gives what the original gives in its own program.

Names and layouts of other programs are written here as those write them; the sources are in
`treadle.lora.foreign_keys`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import load_file, save_file
from test_vectors import assert_close, llama, logits
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from treadle.bundle.conversion import ConvertParams, convert_adapter
from treadle.common.errors import AdapterError, OptionError
from treadle.lora.adapter import read_adapter
from treadle.lora.mixture import mix
from treadle.lora.other_formats import save_gguf
from treadle.lora.pickles import WORKER, read_pickle

from conftest import BASE, TINY, Run, save_adapter

Tensors = dict[str, Tensor]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
FIRST = "base_model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / BASE
    llama().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """An adapter of all layers as PEFT writes it."""
    return save_adapter(tmp_path / "peft", llama(), seed=3, r=4, lora_alpha=2, target_modules=ALL)


def by_peft(folder: Path, model: nn.Module | None = None) -> Tensor:
    """Return the logits of real PEFT with an adapter, which must move them."""
    base = model if model is not None else llama()
    before = logits(base)
    after = logits(PeftModel.from_pretrained(base, folder).eval())
    assert (after - before).abs().max() > 0.05, "the adapter moves nothing: the comparison would be empty"
    return after


def factors(folder: Path) -> Tensors:
    """Return an adapter's factors by module path and part, as in `model.layers.0.mlp.up_proj.A`."""
    tensors = load_file(folder / WEIGHTS)
    return {re.sub(r"\.lora_([AB])\.weight$", r".\1", key.removeprefix(FIRST)): each for key, each in tensors.items()}


# Pickles


def as_pickle(folder: Path, *, old: bool = False, edit: Callable[[Tensors], Any] = dict) -> Path:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(edit(tensors), folder / PICKLE, _use_new_zipfile_serialization=not old)
    return folder


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before PyTorch 1.6"])
def test_a_pickle_becomes_safetensors(original: Path, tmp_path: Path, old: bool) -> None:
    expected = by_peft(original)
    as_pickle(original, old=old)
    with pytest.raises(AdapterError, match=rf"{PICKLE} is a pickle, which can run code: treadle convert {original} -o"):
        read_adapter(original)
    made = convert_adapter(original, tmp_path / "out")
    assert (made.kind, len(made.content.pairs)) == ("PEFT", 14)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {WEIGHTS, "adapter_config.json"}
    assert_close(by_peft(tmp_path / "out"), expected)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"use_rslora": True, "rank_pattern": {"v_proj": 2}}], ids=str)
def test_a_pickle_keeps_what_its_config_says(tmp_path: Path, config: dict[str, object]) -> None:
    folder = save_adapter(tmp_path / "one", llama(), lora_alpha=2, **config)
    expected = by_peft(folder)
    convert_adapter(as_pickle(folder), tmp_path / "out")
    assert_close(by_peft(tmp_path / "out"), expected)


class Code:
    """An object whose pickle asks for a program to be run."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def test_a_pickle_with_code_is_refused_and_the_code_does_not_run(original: Path, tmp_path: Path) -> None:
    as_pickle(original, edit=lambda tensors: tensors | {"x": Code(tmp_path / "ran")})
    with pytest.raises(AdapterError, match=r"asks for posix\.system to be run, and only tensors and plain values"):
        convert_adapter(original, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_the_process_that_reads_a_pickle_can_open_nothing(tmp_path: Path) -> None:
    """Its program, with the reading exchanged for what a pickle with code would do."""
    reading = 'held = torch.load(sys.stdin.buffer, map_location="cpu", weights_only=True)'
    trying = """
import socket
for attempt in (lambda: socket.socket(), lambda: open("/etc/hostname"), lambda: open(sys.argv[2], "w")):
    try:
        attempt()
        print("opened", file=sys.stderr)
    except OSError as error:
        print(error.errno, file=sys.stderr)
sys.exit()
"""
    assert reading in WORKER
    program = WORKER.replace(reading, trying)
    command = [sys.executable, "-I", "-c", program, "0", str(tmp_path / "written")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    assert done.stderr.split()[-3:] == ["24"] * 3  # too many open files
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([1, 2], "it holds a list, not tensors by name"),
        ({"epoch": 3}, "it holds entries that are no tensors: epoch"),
        ({}, "it is empty"),
        (b"x" * 100, "it is no pickle of tensors, or a damaged one"),
    ],
    ids=str,
)
def test_a_pickle_without_tensors_is_refused(tmp_path: Path, held: Any, message: str) -> None:
    file = tmp_path / "adapter.pt"
    if isinstance(held, bytes):
        file.write_bytes(held)
    else:
        torch.save(held, file)
    with pytest.raises(AdapterError, match=f"adapter.pt cannot be read: {message}"):
        read_pickle(file)


# Names


RENAMED: dict[str, Callable[[str], str]] = {
    "the adapter's name inside": lambda key: key.replace(".weight", ".default.weight"),
    "no prefix": lambda key: key.removeprefix(FIRST),
    "loralib": lambda key: key.removeprefix(FIRST).removesuffix(".weight"),
    "a pipeline of diffusers": lambda key: key.replace(FIRST, "text_encoder."),
    "diffusers' old names": lambda key: (
        key.replace(FIRST, "text_encoder.")
        .replace("lora_A", "lora_linear_layer.down")
        .replace("lora_B", "lora_linear_layer.up")
    ),
    "down and up": lambda key: key.removeprefix(FIRST).replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
}


@pytest.mark.parametrize("rename", RENAMED.values(), ids=RENAMED)
def test_other_names_of_the_same_tensors(original: Path, tmp_path: Path, rename: Callable[[str], str]) -> None:
    expected = by_peft(original)
    renamed = {rename(key): each for key, each in load_file(original / WEIGHTS).items()}
    save_file(renamed, original / WEIGHTS)
    convert_adapter(original, tmp_path / "out")
    assert_close(by_peft(tmp_path / "out"), expected)
    alone = tmp_path / "alone" / "weights.safetensors"  # without a config
    alone.parent.mkdir()
    save_file(renamed, alone)
    with pytest.raises(AdapterError, match=r"nothing says the alpha .* \(--alpha\)"):
        convert_adapter(alone, tmp_path / "two")
    convert_adapter(alone, tmp_path / "two", ConvertParams(alpha=2))
    assert_close(by_peft(tmp_path / "two"), expected)
    alphas = {key.partition(".lora")[0] + ".alpha": torch.tensor(2.0) for key in renamed}
    save_file(renamed | alphas, alone)  # it has all that is needed
    convert_adapter(alone, tmp_path / "three")
    assert_close(by_peft(tmp_path / "three"), expected)


TORCHTUNE = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}


def paired(rows: Tensor, heads: int) -> Tensor:
    """Return a head's rows as torchtune's `_permute` orders them: 0, half, 1, half + 1 ..."""
    halves = [each.chunk(2) for each in rows.chunk(heads)]
    return torch.cat([torch.stack([first, second], 1).flatten(0, 1) for first, second in halves])


def as_torchtune(folder: Path, target: Path, *, pairs: bool) -> None:
    heads = {"q_proj": TINY["num_attention_heads"], "k_proj": TINY["num_key_value_heads"]}
    written: Tensors = {}
    for key, each in factors(folder).items():
        _, _, layer, name = key.split(".", 3)
        module, _, side = name.rpartition(".")
        kind = module.rpartition(".")[2]
        rows = paired(each, heads[kind]) if pairs and side == "B" and kind in heads else each
        written[f"layers.{layer}.{TORCHTUNE[module]}.lora_{side.lower()}.weight"] = rows
    torch.save(written, target)


def qwen2() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**TINY, max_position_embeddings=128, initializer_range=0.1)).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_torchtune(tmp_path: Path, kind: str) -> None:
    """Its Llama turns pairs of rows, its Qwen2 halves; the config beside it is the one that it writes for PEFT."""
    model = {"llama": llama, "qwen2": qwen2}[kind]
    original = save_adapter(tmp_path / "peft", model(), seed=3, lora_alpha=2, target_modules=ALL)
    expected = by_peft(original, model())
    model().save_pretrained(tmp_path / "base")
    tune = tmp_path / "epoch_0"
    tune.mkdir()
    as_torchtune(original, tune / "adapter_model.pt", pairs=kind == "llama")
    config = {"r": 4, "lora_alpha": 2, "target_modules": ALL, "peft_type": "LORA", "base_model_name_or_path": "org/one"}
    (tune / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="orders the rows of queries and keys by heads: give the base"):
        convert_adapter(tune, tmp_path / "out")
    made = convert_adapter(tune, tmp_path / "out", ConvertParams(str(tmp_path / "base")))
    assert made.kind == "torchtune"
    assert_close(by_peft(tmp_path / "out", model()), expected)


def shared_inputs(folder: Path) -> Tensors:
    """Give queries, keys and values one A, and gates and ups, on disk, too: that is what Megatron trains."""
    own = factors(folder)
    for layer in (0, 1):
        for first, *others in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                               ("mlp.gate_proj", "mlp.up_proj")):  # fmt: skip
            for other in others:
                own[f"model.layers.{layer}.{other}.A"] = own[f"model.layers.{layer}.{first}.A"].clone()
    save_file(
        {re.sub(r"\.([AB])$", r".lora_\1.weight", FIRST + key): each for key, each in own.items()}, folder / WEIGHTS
    )
    return own


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return rows as Megatron keeps them: for each key, its queries, the key, the value."""
    groups = TINY["num_key_value_heads"]
    parts = zip(q.chunk(groups), k.chunk(groups), v.chunk(groups), strict=True)
    return torch.cat([each for part in parts for each in part])


def megatron(own: Tensors, form: str) -> Tensors:
    """Return the tensors by NeMo 2's names (form new), by those of its canonical LoRA, or by NeMo 1's (form old)."""
    written: Tensors = {}
    for layer in (0, 1):
        path = f"model.layers.{layer}"
        attention, mlp = f"{path}.self_attn", f"{path}.mlp"
        q, k, v, gate, up = (
            {side: own[f"{each}_proj.{side}"] for side in "AB"}
            for each in (*(f"{attention}.{name}" for name in "qkv"), f"{mlp}.gate", f"{mlp}.up")
        )
        if form == "canonical":
            modules = {
                **{f"self_attention.linear_qkv.adapter.adapter_{n}": x for n, x in zip("qkv", (q, k, v), strict=True)},
                "mlp.linear_fc1.adapter.adapter_gate": gate,
                "mlp.linear_fc1.adapter.adapter_up": up,
            }
        else:
            qkv = {"A": q["A"], "B": grouped(q["B"], k["B"], v["B"])}
            fc1 = {"A": gate["A"], "B": torch.cat([gate["B"], up["B"]])}
            names = ("linear_qkv.adapter", "linear_fc1.adapter")
            if form == "old":
                names = ("adapter_layer.lora_kqv_adapter", "adapter_layer.lora_hto4h_adapter")
            modules = {f"self_attention.{names[0]}": qkv, f"mlp.{names[1]}": fc1}
        names = ("linear_proj.adapter", "linear_fc2.adapter")
        if form == "old":
            names = ("adapter_layer.lora_dense_attention_adapter", "adapter_layer.lora_4htoh_adapter")
        modules[f"self_attention.{names[0]}"] = {side: own[f"{attention}.o_proj.{side}"] for side in "AB"}
        modules[f"mlp.{names[1]}"] = {side: own[f"{mlp}.down_proj.{side}"] for side in "AB"}
        start = "model.decoder" if form == "old" else "decoder"
        for name, each in modules.items():
            written[f"{start}.layers.{layer}.{name}.linear_in.weight"] = each["A"]
            written[f"{start}.layers.{layer}.{name}.linear_out.weight"] = each["B"]
    return written


@pytest.mark.parametrize("form", ["new", "canonical", "old"])
def test_megatron(original: Path, tmp_path: Path, base: str, form: str) -> None:
    own = shared_inputs(original)
    expected = by_peft(original)
    file = tmp_path / "megatron.ckpt"
    torch.save({"state_dict": megatron(own, form)}, file)
    if form != "canonical":
        with pytest.raises(AdapterError, match="queries, keys and values in one module: give the base"):
            convert_adapter(file, tmp_path / "out", ConvertParams(alpha=2))
    assert convert_adapter(file, tmp_path / "out", ConvertParams(base, alpha=2)).kind == "Megatron"
    assert_close(by_peft(tmp_path / "out"), expected)


def test_what_has_no_place_in_peft_is_listed(tmp_path: Path, base: str) -> None:
    own = {"layers.0.attn.q_proj.lora_a.weight": torch.ones(4, 32), "layers.0.attn.norm.lora_a.weight": torch.ones(1)}
    save_file(own, tmp_path / "one.safetensors")
    with pytest.raises(
        AdapterError, match=r"of torchtune have no place .*\n  - layers.0.attn.norm.lora_a.weight \(1,\)"
    ):
        convert_adapter(tmp_path / "one.safetensors", tmp_path / "out", ConvertParams(base, alpha=2))
    experts = {f"decoder.layers.0.mlp.{name}.adapter.linear_in.weight": torch.ones(4, 32)
               for name in ("linear_fc1", "experts.linear_fc1")}  # fmt: skip
    save_file(experts, tmp_path / "one.safetensors")
    with pytest.raises(AdapterError, match=r"\n  - decoder.layers.0.mlp.experts.linear_fc1"):
        convert_adapter(tmp_path / "one.safetensors", tmp_path / "out", ConvertParams(base, alpha=2))
    assert not (tmp_path / "out").exists()


# GGUF and mlx-lm


def test_gguf_comes_back(original: Path, tmp_path: Path, base: str) -> None:
    pytest.importorskip("gguf")
    mixture = mix([read_adapter(original, "one")], {"one": 1.0})
    save_gguf(mixture, tmp_path / "gguf", llama().config)
    with pytest.raises(AdapterError, match="names its modules by the base's kind: give the base"):
        convert_adapter(tmp_path / "gguf", tmp_path / "out")
    with pytest.raises(AdapterError, match=r"adapter.gguf is another program's: treadle convert"):
        read_adapter(tmp_path / "gguf")
    convert_adapter(tmp_path / "gguf", tmp_path / "out", ConvertParams(base))
    assert_close(by_peft(tmp_path / "out"), by_peft(original))


@pytest.mark.parametrize("alpha", [0.0, 6.0])
def test_gguf_has_the_scale_of_llama_cpp(original: Path, tmp_path: Path, base: str, alpha: float) -> None:
    """Alpha over rank; 1 where alpha is 0 (llama.cpp's `llama_adapter_lora_weight::get_scale`)."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    a, b = np.ones((4, 48), np.float16), np.full((32, 4), 0.5, np.float32)
    writer.add_tensor("blk.1.ffn_down.weight.lora_a", a)
    writer.add_tensor("blk.1.ffn_down.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = convert_adapter(tmp_path / "one.gguf", tmp_path / "out", ConvertParams(base))
    (module, pair), *_ = made.content.pairs.items()
    assert (module, pair.scale) == ("model.layers.1.mlp.down_proj", alpha / 4 if alpha else 1.0)


def test_a_damaged_gguf_is_refused(tmp_path: Path, base: str) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "one.gguf").write_bytes(b"GGUF" + b"\3\0\0\0" + b"\xff" * 40)
    with pytest.raises(AdapterError, match=r"one.gguf cannot be read as GGUF"):
        convert_adapter(tmp_path / "one.gguf", tmp_path / "out", ConvertParams(base))


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("npz", [False, True], ids=["safetensors", "npz"])
def test_mlx(tmp_path: Path, use_dora: bool, npz: bool) -> None:
    from test_mlx import as_mlx, peft_folder

    peft = peft_folder(tmp_path / "peft", use_dora=use_dora)
    made = convert_adapter(as_mlx(peft, tmp_path / "mlx", npz=npz), tmp_path / "out")
    assert made.kind == "mlx-lm"
    assert_close(by_peft(tmp_path / "out"), by_peft(peft))


# Other tuners of PEFT

TUNERS: dict[str, PeftConfig] = {
    "LoHa": peft.LoHaConfig(r=2, alpha=2, target_modules=["q_proj", "down_proj"]),
    "LoKr": peft.LoKrConfig(r=2, alpha=2, target_modules=["q_proj"]),
    "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "OFT": peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "down_proj"]),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    "HRA": peft.HRAConfig(r=4, target_modules=["q_proj"]),
    "AdaLoRA": peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, total_step=10, target_modules=["q_proj"]),
    "FourierFT": peft.FourierFTConfig(n_frequency=20, target_modules=["q_proj"]),
}


def save_tuner(folder: Path, config: PeftConfig) -> tuple[Path, PeftModel]:
    """Write an adapter of any tuner with random weights; return its folder and PEFT's own model."""
    torch.manual_seed(5)
    model = get_peft_model(llama(), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * (0.02 if ".oft_" in name or "boft" in name else 0.3)
    model.save_pretrained(folder)
    return folder, model.eval()


@pytest.mark.filterwarnings("ignore")  # what tuners say of themselves
@pytest.mark.parametrize("config", TUNERS.values(), ids=TUNERS)
def test_another_tuner_is_exact_at_full_rank(tmp_path: Path, base: str, config: PeftConfig) -> None:
    folder, model = save_tuner(tmp_path / "one", config)
    with pytest.raises(AdapterError, match=r"treadle convert .* --base BASE makes a LoRA of most kinds"):
        read_adapter(folder)
    with pytest.raises(AdapterError, match=r"its update depends on the base; give it \(--base\)"):
        convert_adapter(folder, tmp_path / "out")
    made = convert_adapter(folder, tmp_path / "out", ConvertParams(base))
    assert made.mixture is not None
    assert made.mixture.error == 0
    assert_close(by_peft(tmp_path / "out"), logits(model))


@pytest.mark.filterwarnings("ignore")
def test_a_smaller_rank_is_as_near_as_peft_s_own_conversion(tmp_path: Path, base: str) -> None:
    folder, model = save_tuner(tmp_path / "one", TUNERS["LoHa"])
    _, theirs = convert_to_lora(model, rank=2)
    made = convert_adapter(folder, tmp_path / "out", ConvertParams(base, rank=2))
    assert made.mixture is not None
    assert {pair.rank for pair in made.content.pairs.values()} == {2}
    lost = whole = 0.0
    for module, pair in made.content.pairs.items():
        product = theirs[f"{FIRST}{module}.lora_B.weight"] @ theirs[f"{FIRST}{module}.lora_A.weight"]
        assert_close(pair.scale * pair.b @ pair.a, product, 1e-4)
        change = model.get_submodule(FIRST + module).get_delta_weight("default")
        lost, whole = lost + float((change - product).square().sum()), whole + float(change.square().sum())
    assert made.mixture.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_tuner_that_changes_no_weight_is_refused(tmp_path: Path, base: str) -> None:
    config = peft.CPTConfig(
        cpt_token_ids=[1, 2, 3], cpt_mask=[1] * 3, cpt_tokens_type_mask=[1] * 3, task_type="CAUSAL_LM"
    )
    folder, _ = save_tuner(tmp_path / "one", config)
    with pytest.raises(AdapterError, match="CPT adds virtual tokens and changes no weight"):
        convert_adapter(folder, tmp_path / "out", ConvertParams(base))


@pytest.mark.filterwarnings("ignore")
def test_virtual_tokens_in_a_pickle_become_safetensors(tmp_path: Path, base: str) -> None:
    folder, _ = save_tuner(tmp_path / "one", peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    before = read_adapter(folder).identity
    convert_adapter(as_pickle(folder), tmp_path / "out", ConvertParams(base))
    assert read_adapter(tmp_path / "out").identity == before


# The command


def test_the_command_writes_a_folder(run: Run, original: Path, tmp_path: Path, base: str) -> None:
    as_pickle(original)
    code, out, err = run("convert", original, "-o", tmp_path / "out", "--base", base)
    assert (code, err) == (0, "")
    assert out == f"wrote {tmp_path / 'out'}: PEFT; 14 modules of rank 4\n"
    code, _, err = run("convert", original, "-o", tmp_path / "out")
    assert (code, "holds an adapter already; name another folder, or --overwrite it" in err) == (1, True)
    code, out, _ = run("convert", original, "-o", tmp_path / "out", "--overwrite", "--json")
    told = json.loads(out)
    assert (told["kind"], told["modules"], told["ranks"], told["error"]) == ("PEFT", 14, [4], None)


@pytest.mark.filterwarnings("ignore")
def test_the_command_tells_the_error(run: Run, tmp_path: Path, base: str) -> None:
    folder, _ = save_tuner(tmp_path / "one", TUNERS["LoHa"])
    code, out, err = run("convert", folder, "-o", tmp_path / "out", "--base", base)
    assert code == 0, err
    assert "exact: the ranks are as large as it takes" in out
    code, out, _ = run("convert", folder, "-o", tmp_path / "two", "--base", base, "--rank", 2)
    assert "relative error of the update: " in out


def test_an_adapter_of_another_base_is_refused_with_both_shapes(run: Run, original: Path, tmp_path: Path) -> None:
    config = llama().config
    config.hidden_size = 64
    config.save_pretrained(tmp_path / "wide")
    code, _, err = run("convert", as_pickle(original), "-o", tmp_path / "out", "--base", tmp_path / "wide")
    assert code == 1
    assert "does not fit this base" in err
    assert "model.layers.0.self_attn.q_proj is (64, 32) (in, out), its factors are (32, 32)" in err
    assert not (tmp_path / "out").exists()


def test_what_to_read_must_be_clear(original: Path, tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        shutil.copyfile(original / WEIGHTS, tmp_path / name)
    with pytest.raises(AdapterError, match=r"it holds a.pt, b.pt: name one"):
        convert_adapter(tmp_path, tmp_path / "out")
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(AdapterError, match=r"notes.txt: files that are read end in .safetensors, .npz, .bin"):
        convert_adapter(tmp_path / "notes.txt", tmp_path / "out")
    with pytest.raises(AdapterError, match="nowhere: it holds no adapter"):
        convert_adapter(tmp_path / "nowhere", tmp_path / "out")
    for params in ({"rank": 0}, {"alpha": -1.0}):
        with pytest.raises(OptionError, match="must be"):
            ConvertParams(**params)
