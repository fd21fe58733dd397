"""`treadle doctor FOLDER`: what one adapter's folder holds, for which bases, and what would act."""

import json
from pathlib import Path

import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file
from test_mlx import as_mlx, peft_folder

from treadle.experiments.adapter_doctor import examine_folder

from conftest import BASE, Run, edit_config, save_adapter, tiny_llama

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A base in a cache of its own, beside one that nothing here fits."""
    monkeypatch.setenv("TREADLE_HOME", str(tmp_path / "home"))
    model = tiny_llama()
    model.save_pretrained(tmp_path / "home" / "models" / "org--tiny")
    model.config.hidden_size = 64
    model.config.save_pretrained(tmp_path / "home" / "models" / "org--wide")
    return "org/tiny"


def test_a_lora_is_described_by_its_tensors(tmp_path: Path, base: str) -> None:
    folder = save_adapter(tmp_path / "math", target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2})
    report = examine_folder(folder, base)
    tensors = load_file(folder / WEIGHTS)
    assert (report.kind, report.base_model, report.ranks, report.scales) == ("LoRA", BASE, (2, 4), (2, 4))
    shapes = {each.name: (each.modules, each.shapes) for each in report.targets}
    assert shapes == {"down_proj": (2, ((48, 32),)), "q_proj": (2, ((32, 32),))}
    assert (report.layers, report.tensors, report.dtypes) == ((0, 1), len(tensors), ("float32",))
    assert report.num_bytes == sum(each.nbytes for each in tensors.values())
    assert report.cached == ("org/tiny",)
    assert report.fit is not None
    assert (report.fit.acting, report.fit.missing, report.fit.misfits) == (4, (), ())


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("DoRA", {"use_dora": True}),
        ("LoRA with biases", {"bias": "lora_only", "target_modules": ["q_proj"]}),
        ("LoRA with saved weights", {"modules_to_save": ["lm_head"]}),
        ("PiSSA", {"init_lora_weights": "pissa"}),
    ],
)
def test_kinds_are_named(tmp_path: Path, base: str, kind: str, config: dict[str, object]) -> None:
    model = tiny_llama()
    if "bias" in config:
        model.config.attention_bias = True
        model = type(model)(model.config)
    assert examine_folder(save_adapter(tmp_path / "one", model, **config)).kind == kind


def test_ia3_and_mlx_are_named(tmp_path: Path, base: str, run: Run) -> None:
    model = get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    for name, parameter in model.named_parameters():
        if ".ia3_" in name:
            parameter.data += 1
    model.save_pretrained(tmp_path / "scales")
    report = examine_folder(tmp_path / "scales", base)
    assert (report.kind, report.ranks, report.fit and report.fit.acting) == ("IA3", (), 2)
    code, out, _ = run("doctor", tmp_path / "scales")
    assert (code, "modules  k_proj\n" in out) == (0, True)
    folder = as_mlx(peft_folder(tmp_path / "peft"), tmp_path / "mlx")
    assert examine_folder(folder).kind == "LoRA, of mlx-lm"


def test_a_base_that_lacks_modules_is_told_apart_from_one_that_does_not_fit(
    tmp_path: Path, base: str, run: Run
) -> None:
    model = tiny_llama()
    model.config.num_hidden_layers = 1
    model.config.save_pretrained(tmp_path / "short")
    folder = save_adapter(tmp_path / "math")
    code, out, err = run("doctor", folder, "--base", tmp_path / "short")
    assert (code, err) == (0, "")
    assert f"{tmp_path / 'short'}: 2 modules act; the base lacks model.layers.1.self_attn.q_proj, " in out
    code, out, err = run("doctor", folder, "--base", "org/wide")
    assert code == 1
    assert "org/wide: it cannot act" in out
    assert out.splitlines()[-1] == "verdict: not for this base; see below"
    assert f"treadle: {folder} does not fit org/wide:\n" in err
    assert "model.layers.0.self_attn.q_proj is (64, 32) (in, out), its factors are (32, 32) (and 1 more like it)" in err


def test_the_command_prints_it(tmp_path: Path, base: str, run: Run) -> None:
    folder = save_adapter(tmp_path / "math")
    edit_config(folder, new_trick=True)
    code, out, err = run("doctor", folder, "--base", base)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "math: LoRA; treadle blends it",
        "  base     tiny-llama (by its config)",
        "  rank     4; scale 2",
        "  layers   0-1",
        "  modules  q_proj 2 x (32, 32), v_proj 2 x (32, 16) (in, out)",
        f"  tensors  8 in float32, {sum(each.nbytes for each in load_file(folder / WEIGHTS).values())} bytes",
        "  note     adapter 'math': unknown fields that may matter: new_trick",
        "  fits     org/tiny in treadle's cache, by shapes",
        "  on       org/tiny: 4 modules act",
        "verdict: healthy on this base",
    ]
    told = json.loads(run("doctor", folder, "--json")[1])
    assert (told["kind"], told["layers"], told["problem"], told["fit"]) == ("LoRA", [0, 1], "", None)


def test_what_cannot_be_blended_is_told_with_the_way_out(tmp_path: Path, base: str, run: Run) -> None:
    folder = save_adapter(tmp_path / "old")
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    code, out, err = run("doctor", folder)
    assert (code, out) == (1, "old: treadle cannot blend it\nverdict: cannot be used as it is; see below\n")
    assert f"adapter_model.bin is a pickle, which can run code: treadle convert {folder} -o NEW" in err
    broken = save_adapter(tmp_path / "broken")
    save_file({"x": torch.ones(1)}, broken / WEIGHTS)
    code, out, err = run("doctor", broken, "--json")
    assert (code, "x: not a LoRA factor" in json.loads(out)["problem"]) == (1, True)
    assert "x: not a LoRA factor" in err


def test_bundles_and_bases_are_examined_as_before(bundle: Path, run: Run, tmp_path: Path) -> None:
    assert "a step: base" in run("doctor", bundle)[1]
    assert run("doctor", tmp_path / "nowhere")[0] == 1
