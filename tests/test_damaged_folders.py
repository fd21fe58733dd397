"""Damaged and foreign folders of adapters: each ends in one message that says what is wrong where, and what to do.

A folder of 200 adapters with three bad ones is in test_preparing, damaged bundles are in test_bundle. Files that only
`treadle convert` reads are in test_convert.
"""

import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_mlx import as_mlx
from test_vectors import llama
from test_vectors import save as save_kind
from torch import Tensor, nn

from treadle.common.errors import AdapterError
from treadle.lora.adapter import read_adapter
from treadle.lora.blend import attach

from conftest import edit_config, save_adapter

Tensors = dict[str, Tensor]
Damage = Callable[[Path], object]
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MLX, NPZ = "adapters.safetensors", "adapters.npz"
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
FIRST = "base_model.model."
Q_A, Q_B, V_A, V_B = (f"{FIRST}{module}.lora_{side}.weight" for module in (Q, V) for side in "AB")
M, IA3 = f"{FIRST}{Q}.lora_magnitude_vector", f"{FIRST}{V}.ia3_l"
A, B = f"{Q}.lora_a", f"{Q}.lora_b"
HEAD, EMBEDDING, NORM = (f"{FIRST}{path}.weight" for path in ("lm_head", "model.embed_tokens", "model.norm"))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good adapter of each kind."""
    root = tmp_path_factory.mktemp("good")
    save_adapter(root / "lora", llama())
    for kind in ("DoRA", "IA3"):
        save_kind(root / kind.lower(), kind)
    single = save_adapter(root / "single", llama(), target_modules=["layers.0.self_attn.q_proj"])
    as_mlx(single, root / "mlx")
    as_mlx(single, root / "npz", npz=True)
    return root


# What is done to them


def tensors(change: Callable[[Tensors], Tensors], file: str = WEIGHTS) -> Damage:
    def damage(folder: Path) -> None:
        changed = change(load_file(folder / file))
        save_file({key: each.contiguous() for key, each in changed.items()}, folder / file)

    return damage


def mlx(change: Callable[[Tensors], Tensors]) -> Damage:
    return tensors(change, MLX)


def config(**changes: object) -> Damage:
    return lambda folder: edit_config(folder, **changes)


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def without(*keys: str) -> Callable[[Tensors], Tensors]:
    return lambda held: {key: each for key, each in held.items() if key not in keys}


def remove(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def write(file: str, content: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(content)


def cut(file: str, at: int) -> Damage:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:at])


def pickled(file: str) -> Damage:
    """The adapter as a pickle under another name, in the place of safetensors."""

    def damage(folder: Path) -> None:
        torch.save(load_file(folder / WEIGHTS), folder / "new")
        (folder / WEIGHTS).unlink()
        (folder / "new").rename(folder / file)

    return damage


def renamed(*pairs: tuple[str, str]) -> Damage:
    """The adapter with other names of its tensors."""

    def change(held: Tensors) -> Tensors:
        for old, new in pairs:
            held = {key.replace(old, new): each for key, each in held.items()}
        return held

    return tensors(change)


def scaled(side: str, factor: float) -> Callable[[Tensors], Tensors]:
    return lambda held: {key: each * factor if f"lora_{side}" in key else each for key, each in held.items()}


def npz(**arrays: Any) -> Damage:
    return lambda folder: np.savez(folder / NPZ, **arrays)


def bomb(folder: Path) -> None:
    np.savez_compressed(folder / NPZ, **{A: np.zeros((2000, 2000), np.float32)})


def text_in_archive(folder: Path) -> None:
    with zipfile.ZipFile(folder / NPZ, "w") as archive:
        archive.writestr(f"{A}.npy", "no array")


AGAIN = "; save or download it again"
CORRECT = "; correct r or rank_pattern"
PARAMETERS: dict[str, Any] = {"rank": 4, "scale": 10.0, "alpha": 16.0, "dropout": 0.0}
FOLDERS: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    # files
    "no config": ("lora", remove(CONFIG), (f"it has no {CONFIG}.",)),
    "config not JSON": ("lora", write(CONFIG, b"r: 4"), (f"{CONFIG} cannot be read as JSON: ", AGAIN)),
    "config cut": ("lora", cut(CONFIG, 50), (f"{CONFIG} cannot be read as JSON: ", AGAIN)),
    "config a list": ("lora", write(CONFIG, b"[]"), (f"{CONFIG} does not hold an object.", AGAIN)),
    "config not text": (
        "lora",
        write(CONFIG, b"\xff{}"),
        (f"{CONFIG} cannot be read: it is not UTF-8 (byte 0)", AGAIN),
    ),
    "config empty": ("lora", write(CONFIG, b""), (f"{CONFIG} cannot be read as JSON: ", AGAIN)),
    "config with a key twice": (
        "lora",
        write(CONFIG, b'{"r": 1, "r": 2}'),
        (CONFIG, "the key 'r' is there twice", AGAIN),
    ),
    "no weights": ("lora", remove(WEIGHTS), (f"has no {WEIGHTS}.",)),
    "weights truncated": ("lora", cut(WEIGHTS, -100), (f"{WEIGHTS} cannot be read: ", AGAIN)),
    "weights cut in the header": ("lora", cut(WEIGHTS, 5), (f"{WEIGHTS} cannot be read: ", AGAIN)),
    "weights empty": ("lora", write(WEIGHTS, b""), (f"{WEIGHTS} cannot be read: ", AGAIN)),
    "weights a pointer of Git LFS": (
        "lora",
        write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 17\n"),
        (f"{WEIGHTS} cannot be read: ", AGAIN),
    ),
    "weights a page of the web": (
        "lora",
        write(WEIGHTS, b"<!DOCTYPE html><html>"),
        (f"{WEIGHTS} cannot be read", AGAIN),
    ),
    "a pickle named safetensors": ("lora", pickled(WEIGHTS), (f"{WEIGHTS} cannot be read: ", AGAIN)),
    "no tensors": ("lora", tensors(lambda _: {}), ("it holds no factors; save it again",)),
    # of other programs
    "only a pickle": (
        "lora",
        pickled(PICKLE),
        (f"{PICKLE} is a pickle, which can run code: treadle convert ", "-o NEW"),
    ),
    "torchtune's file": (
        "lora",
        pickled("adapter_model.pt"),
        ("adapter_model.pt is another program's: treadle convert",),
    ),
    "a checkpoint without a config": (
        "lora",
        both(pickled("one.ckpt"), remove(CONFIG)),
        (f"it has no {CONFIG}. one.ckpt is another program's: treadle convert",),
    ),
    "torchtune's names": (
        "single",
        renamed((f"{FIRST}model.", ""), ("lora_A", "lora_a"), ("lora_B", "lora_b")),
        ("layers.0.self_attn.q_proj.lora_a.weight: not a LoRA factor; ", "try treadle convert"),
    ),
    "Megatron's names": (
        "single",
        tensors(lambda held: held | {"decoder.layers.0.mlp.linear_fc2.adapter.linear_in.weight": torch.ones(4, 48)}),
        ("linear_fc2.adapter.linear_in.weight: not a LoRA factor; ", "try treadle convert"),
    ),
    "down and up": (
        "single",
        tensors(lambda held: held | {f"{Q}.lora_down.weight": torch.ones(4, 32)}),
        (f"{Q}.lora_down.weight: not a LoRA factor; ", "try treadle convert"),
    ),
    "AdaLoRA": (
        "lora",
        config(peft_type="ADALORA"),
        ("its peft_type is ADALORA; LORA, IA3", "treadle convert ", "--base"),
    ),
    "LoHa": ("lora", config(peft_type="LOHA"), ("its peft_type is LOHA; LORA, IA3", "treadle convert ", "--base BASE")),
    "a kind of tomorrow": ("lora", config(peft_type="NEW"), ("its peft_type is NEW; LORA, IA3", "treadle convert ")),
    # features of PEFT
    "saved tokens": (
        "lora",
        config(trainable_token_indices=[1]),
        ("trainable_token_indices: it replaces rows", "; train"),
    ),
    "aLoRA": ("lora", config(alora_invocation_tokens=[7]), ("alora_invocation_tokens: an activated LoRA", "; train a")),
    "copied layers": (
        "lora",
        config(layer_replication=[[0, 2]]),
        ("layer_replication: it changes the number", "; train"),
    ),
    "QA-LoRA": ("lora", config(use_qalora=True), ("use_qalora: QA-LoRA pools its input", "; train a plain LoRA")),
    "BD-LoRA": (
        "lora",
        config(use_bdlora={"nblocks": 2}),
        ("use_bdlora: BD-LoRA keeps its factors", "; train a plain LoRA"),
    ),
    "Arrow": (
        "lora",
        config(arrow_config={"top_k": 2}),
        ("arrow_config: it is an Arrow router", "name the adapters behind it"),
    ),
    "KaSA": (
        "lora",
        config(kasa_config={"r": 2}),
        ("kasa_config: KaSA changes the base weights", "; train a plain LoRA"),
    ),
    "MonteCLoRA": (
        "lora",
        config(monteclora_config={"a": 1}),
        ("monteclora_config: MonteCLoRA samples", "; train a plain"),
    ),
    "fast PiSSA": (
        "lora",
        config(init_lora_weights="pissa_niter_2"),
        ("init_lora_weights='pissa_niter_2': its initial factors were", "save it as a plain LoRA with PEFT first"),
    ),
    "LoftQ": (
        "lora",
        config(init_lora_weights="LoftQ"),
        ("init_lora_weights='LoftQ': training began from a quantised base", "save it as a plain LoRA with PEFT first"),
    ),
    "CorDA": (
        "lora",
        config(init_lora_weights="corda"),
        ("init_lora_weights='corda': its initial factors follow from data", "save it as a plain LoRA with PEFT first"),
    ),
    # values of the config
    "rank 0": ("lora", config(r=0), ("\n  - r must be a positive number, not 0",)),
    "alpha a truth": ("lora", config(lora_alpha=True), ("\n  - lora_alpha must be a positive number, not true",)),
    "alpha a text": ("lora", config(lora_alpha="16"), ("\n  - lora_alpha must be a positive number, not '16'",)),
    "alpha null": ("lora", config(lora_alpha=None), ("\n  - lora_alpha must be a positive number, not null",)),
    "another rank": ("lora", config(r=8), (f"{Q}: its factors have rank 4, its config says 8", CORRECT)),
    "pattern no expression": (
        "lora",
        config(rank_pattern={"[": 2}),
        ("rank_pattern: '[' is no regular expression: error",),
    ),
    "pattern with flags": (
        "lora",
        config(alpha_pattern={"(?i)q_proj": 2}),
        ("alpha_pattern: '(?i)q_proj' is no regular expression: error: global flags",),
    ),
    **{
        f"{field} {value}": (
            "lora",
            config(**{field: value}),
            (f"{CONFIG} is malformed:\n  - {field} must map module names or regular expressions to positive numbers",),
        )
        for field, value in (
            ("rank_pattern", ["q_proj"]),
            ("rank_pattern", {"q_proj": True}),
            ("alpha_pattern", {"q_proj": "16"}),
            ("alpha_pattern", {"q_proj": -1}),
        )
    },
    "base a number": (
        "lora",
        config(base_model_name_or_path=123),
        (f"{CONFIG} is malformed:\n  - base_model_name_or_path must be a text, not 123",),
    ),
    # tensors
    "no B": ("lora", tensors(without(Q_B)), (f"{Q}: lora_B is missing", AGAIN)),
    "no A": ("lora", tensors(without(V_A)), (f"{V}: lora_A is missing", AGAIN)),
    "NaN": (
        "lora",
        tensors(lambda t: t | {Q_A: t[Q_A] / 0 * 0}),
        (f"{Q_A} holds NaN or infinite values; take an earlier",),
    ),
    "infinite": ("lora", tensors(lambda t: t | {V_B: t[V_B] / 0}), (f"{V_B} holds NaN or infinite values; take an",)),
    "integers": (
        "lora",
        tensors(lambda t: t | {Q_A: t[Q_A].int()}),
        (f"{Q_A} is torch.int32; factors are float32, float16 or bfloat16; save it as one of these",),
    ),
    "eight bits": (
        "lora",
        tensors(lambda t: t | {V_A: t[V_A].to(torch.float8_e4m3fn)}),
        (f"{V_A} is torch.float8_e4m3fn; factors are float32, float16 or bfloat16; save it as one of these",),
    ),
    "ranks of A and B": (
        "lora",
        tensors(lambda t: t | {Q_B: t[Q_B][:, :3]}),
        (f"{Q}: lora_A (4, 32) and lora_B (32, 3) do not fit: need (r, in), (out, r); save it again",),
    ),
    "transposed": (
        "lora",
        tensors(lambda t: t | {Q_A: t[Q_A].T, Q_B: t[Q_B].T}),
        (f"{Q}: its factors have rank 32, its config says 4", CORRECT),
    ),
    "three axes": (
        "lora",
        tensors(lambda t: t | {Q_A: t[Q_A][None]}),
        (f"{Q}: lora_A (1, 4, 32) and lora_B (32, 4) do not",),
    ),
    "factors of rank 0": (
        "lora",
        tensors(lambda t: t | {Q_A: t[Q_A][:0], Q_B: t[Q_B][:, :0]}),
        (f"{Q}: lora_A (0, 32) and lora_B (32, 0) do not fit",),
    ),
    "rank of one module": (
        "lora",
        tensors(lambda t: t | {Q_A: t[Q_A][:2], Q_B: t[Q_B][:, :2]}),
        (f"{Q}: its factors have rank 2, its config says 4", CORRECT),
    ),
    "all B zero": (
        "lora",
        tensors(scaled("B", 0)),
        ("all its B factors are zero: it changes nothing (was it saved before",),
    ),
    "foreign tensor": (
        "lora",
        tensors(lambda t: t | {f"{FIRST}lm_head.scale": torch.ones(260, 32)}),
        (f"{FIRST}lm_head.scale: not a LoRA factor; save the adapter without it",),
    ),
    "bias of an update": (
        "lora",
        tensors(lambda t: t | {Q_B.replace("weight", "bias"): torch.ones(32)}),
        (f"{Q}: update bias: its config does not say lora_bias; correct it",),
    ),
    "bias of an A": (
        "lora",
        tensors(lambda t: t | {Q_A.replace("weight", "bias"): torch.ones(4)}),
        (f"{Q_A[:-6]}bias: not a LoRA factor; save the adapter without it",),
    ),
    "half of an embedding": (
        "lora",
        tensors(lambda t: t | {f"{FIRST}model.embed_tokens.lora_embedding_A": torch.ones(4, 260)}),
        ("model.embed_tokens: lora_B is missing", AGAIN),
    ),
    **{
        f"overflow by {name}": (
            "lora",
            damage,
            (f"{Q}: its scale and factors reach ", "too large for float32 (allowed: "),
        )
        for name, damage in {
            "alpha": config(lora_alpha=1e300),
            "alpha of a module": config(alpha_pattern={"q_proj": 1e300}),
            "A": tensors(scaled("A", 1e38)),  # finite numbers, an infinite product
            "B": tensors(scaled("B", 1e38)),
            "A times B": tensors(lambda t: scaled("A", 1e25)(scaled("B", 1e25)(t))),  # each factor alone is fine
            "float64": tensors(lambda t: {key: each.double() * 1e200 for key, each in t.items()}),
        }.items()
    },
    # DoRA and IA3
    "magnitude without DoRA": (
        "lora",
        tensors(lambda t: t | {M: torch.ones(32)}),
        (f"{Q}: magnitude: its config does not say use_dora; correct it",),
    ),
    "no magnitude": (
        "dora",
        tensors(without(M)),
        (f"{Q}: use_dora: lora_magnitude_vector is missing; save it again, or",),
    ),
    "magnitude of another size": (
        "dora",
        tensors(lambda t: t | {M: t[M][:5]}),
        (f"math: {Q}: its magnitude is (5,), the layer needs (32,)", "name the base that they were trained on"),
    ),
    "NaN in a magnitude": (
        "dora",
        tensors(lambda t: t | {M: t[M] * float("nan")}),
        (f"{M} holds NaN or infinite values",),
    ),
    "magnitude of integers": ("dora", tensors(lambda t: t | {M: t[M].int()}), (f"{M} is torch.int32; factors are",)),
    "magnitude without factors": (
        "dora",
        tensors(without(Q_A, Q_B)),
        (f"{Q}: magnitude: it has no factors beside it; save it again",),
    ),
    "bias of a layer that has none": (
        "dora",
        tensors(lambda t: t | {f"{FIRST}{Q}.base_layer.bias": torch.ones(32)}),
        (f"{Q}: it replaces the bias, and the layer has none",),
    ),
    "IA3 of another size": (
        "ia3",
        tensors(lambda t: t | {IA3: t[IA3][:7]}),
        (f"math: {V}: its out_scale is (7,), the layer needs (16,)",),
    ),
    "NaN in IA3": ("ia3", tensors(lambda t: t | {IA3: t[IA3] / 0}), (f"{IA3} holds NaN or infinite values",)),
    "IA3 that does nothing": (
        "ia3",
        tensors(lambda t: {key: torch.ones_like(each) for key, each in t.items()}),
        ("all its scales are 1: it changes nothing",),
    ),
    "IA3 without tensors": ("ia3", tensors(lambda _: {}), ("it holds no factors; save it again",)),
    # of another base
    "another width": (
        "single",
        tensors(lambda t: {Q_A: torch.ones(4, 64), Q_B: torch.ones(64, 4)}),
        (f"math: {Q} is (32, 32) (in, out), its factors are (64, 64)", "name the base that they were trained on"),
    ),
    "other names": (
        "single",
        renamed(("layers", "blocks")),
        ("math: the model has no module model.blocks.0.self_attn.q_proj",),
    ),
    "factors of a norm": (
        "single",
        tensors(
            lambda t: (
                t
                | {
                    NORM.replace("weight", f"lora_{s}.weight"): torch.ones(x)
                    for s, x in (("A", (4, 32)), ("B", (32, 4)))
                }
            )
        ),
        ("math: the model has no linear layer model.norm",),
    ),
    "a saved norm": (
        "single",
        tensors(lambda t: t | {NORM: torch.ones(32)}),
        (f"{NORM}: a whole weight that is no matrix (modules_to_save)", "; train without it"),
    ),
    "a narrow head": (
        "single",
        tensors(lambda t: t | {HEAD: torch.ones(260, 31)}),
        ("math: it replaces lm_head.weight of shape (260, 32) by one of (260, 31)",),
    ),
    "a vocabulary that grew": (
        "single",
        tensors(lambda t: t | {EMBEDDING: torch.ones(270, 32)}),
        ("it replaces model.embed_tokens.weight of shape (260, 32) by one of (270, 32) whose rows differ",),
    ),
    "NaN in a saved weight": (
        "single",
        tensors(lambda t: t | {HEAD: torch.full((260, 32), float("nan"))}),
        ("it replaces lm_head.weight by one with NaN or infinite values",),
    ),
    # mlx-lm
    "mlx: no lora_b": ("mlx", mlx(without(B)), (f"{Q}: lora_b is missing", AGAIN)),
    "mlx: no magnitude": ("mlx", config(fine_tune_type="dora"), (f"{Q}: m is missing", AGAIN)),
    "mlx: a magnitude without DoRA": (
        "mlx",
        mlx(lambda t: t | {f"{Q}.m": torch.ones(32)}),
        (f"{Q}: it has a magnitude m, but the config's fine_tune_type is not dora; correct it",),
    ),
    "mlx: ranks": (
        "mlx",
        mlx(lambda t: t | {B: t[B][:2]}),
        (f"{Q}: lora_a (32, 4) and lora_b (2, 32) do not fit: need (in, r), (r, out); save it again",),
    ),
    "mlx: experts": (
        "mlx",
        mlx(lambda t: t | {A: torch.ones(3, 4, 32), B: torch.ones(3, 32, 4)}),
        (f"{Q}: lora_a (3, 4, 32) and lora_b (3, 32, 4) are for a stack of experts", "; train without it"),
    ),
    "mlx: foreign": (
        "mlx",
        mlx(lambda t: t | {f"{Q}.linear.weight": torch.ones(32, 32)}),
        (f"{Q}.linear.weight: not lora_a, lora_b or m of an MLX adapter; save the adapter without it",),
    ),
    "mlx: NaN": ("mlx", mlx(lambda t: t | {A: t[A] / 0 * 0}), (f"{A} holds NaN or infinite values",)),
    "mlx: integers": ("mlx", mlx(lambda t: t | {A: t[A].int()}), (f"{A} is torch.int32; factors are",)),
    "mlx: zero": ("mlx", mlx(scaled("b", 0)), ("all its B factors are zero",)),
    "mlx: empty": ("mlx", mlx(lambda _: {}), ("it holds no factors; save it again",)),
    "mlx: alpha beside scale": (
        "mlx",
        config(lora_parameters=PARAMETERS),
        (
            "lora_parameters has alpha=16.0: old releases of mlx-lm",
            "Write the factor that it was trained with into scale",
        ),
    ),
    "mlx: scale 0": (
        "mlx",
        config(lora_parameters={"scale": 0}),
        ("lora_parameters: scale must be a positive number, not 0",),
    ),
    "mlx: scale a text": ("mlx", config(lora_parameters={"scale": "2"}), ("scale must be a positive number, not '2'",)),
    "mlx: parameters a list": ("mlx", config(lora_parameters=[1]), ("lora_parameters must be an object, not [1]",)),
    "mlx: whole weights": ("mlx", config(fine_tune_type="full"), ("its fine_tune_type is full", "Train a LoRA.")),
    "mlx: base a number": ("mlx", config(model=3), (CONFIG, "model must be a text, not 3")),
    "npz: a pickle inside": ("npz", npz(**{A: np.array([{"a": 1}], object)}), (f"{NPZ} cannot be read: ", AGAIN)),
    "npz: a bomb": ("npz", bomb, (f"{NPZ} cannot be read: it holds 16000",)),
    "npz: no archive": ("npz", write(NPZ, b"x" * 100), (f"{NPZ} cannot be read: ", AGAIN)),
    "npz: no array": ("npz", text_in_archive, (NPZ, "is no array; save it as safetensors")),
    "npz: truncated": ("npz", cut(NPZ, 200), (f"{NPZ} cannot be read: ", AGAIN)),
    "npz: complex numbers": ("npz", npz(a=np.ones(2, complex)), (NPZ, "'a' is complex128; save it as safetensors")),
}
"""What the folder is called: the kind of good adapter in it, what is done to it, and what the message must hold."""
SEVERAL = re.compile("overflow|another rank|rank 0$|torchtune's names|magnitude without factors|transposed")
"""In names of folders with more than one problem."""


@pytest.mark.parametrize("name", FOLDERS)
def test_a_damaged_folder_ends_in_one_message(good: Path, tmp_path: Path, name: str) -> None:
    kind, damage, says = FOLDERS[name]
    folder = shutil.copytree(good / kind, tmp_path / "math")
    damage(folder)
    with pytest.raises(AdapterError) as caught:
        attach(llama(), [read_adapter(folder)])
    text = str(caught.value)
    assert [said for said in says if said not in text] == [], text
    assert str(folder) in text or "the adapters do not fit the model; name the base" in text
    assert "'math'" in text or "math: " in text
    if not SEVERAL.search(name):
        assert text.count("\n  - ") <= 1, text


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "single", "mlx", "npz"])
def test_without_damage_they_load(good: Path, kind: str) -> None:
    model = llama()
    with torch.inference_mode():
        base = model(input_ids=torch.arange(8)[None]).logits
        with attach(model, [read_adapter(good / kind)]).using([1.0]):
            assert not torch.equal(model(input_ids=torch.arange(8)[None]).logits, base)


def test_there_are_enough_of_them() -> None:
    assert len(FOLDERS) > 100


def test_an_adapted_row_of_length_zero_is_refused(good: Path) -> None:
    model = llama()
    nn.init.zeros_(model.get_submodule(Q).weight)
    folder = good / "dora"
    adapter = read_adapter(folder)
    zero = {path: type(pair)(pair.a, pair.b * 0, pair.scale) for path, pair in adapter.pairs.items() if path == Q}
    adapter = type(adapter)(**{**vars(adapter), "pairs": {**adapter.pairs, **zero}})
    with pytest.raises(AdapterError, match=rf"{Q}: a row of W \+ s B A is zero"):
        attach(model, [adapter])


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nowhere is not a PEFT folder"):
        read_adapter(tmp_path / "nowhere")


def test_all_problems_are_in_one_message(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good / "lora", tmp_path / "math")
    edit_config(folder, use_qalora=True, layer_replication=[[0, 2]], init_lora_weights="corda")
    tensors(lambda held: without(Q_B)(held) | {V_A: held[V_A] / 0, "extra": torch.ones(1)})(folder)
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    head, *problems = str(caught.value).splitlines()
    assert head == f"adapter 'math' ({folder}) cannot be blended:"
    named = {re.split(r":? ", problem.removeprefix("  - "))[0] for problem in problems}
    assert named == {"use_qalora", "layer_replication", "init_lora_weights='corda'", V_A, "extra", Q}
