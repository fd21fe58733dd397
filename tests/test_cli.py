import json
import shutil
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from treadle.cli.console import new_console, print_coloured
from treadle.cli.main import main
from treadle.cli.progress import progress

from conftest import SAMPLES, Run, edit_config


def test_generate_prints_what_the_engine_gives(run: Run, bundle: Path) -> None:
    import treadle

    done = treadle.load(bundle).generate("add three", sampling=treadle.SamplingParams(max_tokens=8))
    code, out, _ = run("generate", bundle, "--prompt", "add three", "--raw", "--max-tokens", 8, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["text"] == done.text
    assert document["weights"] == done.weights.tolist()
    assert document["routing"]["every"] == 2
    code, _, err = run("generate", bundle, "--prompt", "add three", "--max-tokens", 8)
    assert code == 0
    line = next(each for each in err.splitlines() if each.startswith("mean weights: "))
    shares = dict(zip(line.split()[2::2], map(float, line.split()[3::2]), strict=True))
    assert list(shares) == ["math", "science", "code", "base"]
    assert sum(shares.values()) == pytest.approx(1, abs=0.021)


def test_generate_takes_routing_flags_and_writes_a_trace(run: Run, bundle: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    flags = ["--fixed", "math=0.7,code=0.3", "--max-tokens", 3, "--stop", "\n", "--trace", trace]
    code, _, _ = run("generate", bundle, "--prompt", "add", *flags)
    document = json.loads(trace.read_text())
    assert code == 0
    assert document["adapter_names"] == ["math", "science", "code"]
    assert document["weights"][0] == pytest.approx([0.7, 0.0, 0.3])
    assert document["sampling"]["stop"] == ["\n"]
    flags = ["--temperature", 0.9, "--seed", 1, "--routing-temperature", 7, "--every", "none"]
    _, out, _ = run("generate", bundle, "--prompt", "add", "--max-tokens", 2, "--json", *flags)
    document = json.loads(out)
    assert (document["sampling"]["temperature"], document["routing"]["temperature"]) == (0.9, 7.0)
    assert document["routing"]["every"] is None


def test_generate_takes_the_smallest_top_p_and_is_greedy_then(run: Run, bundle: Path) -> None:
    asked = ("generate", bundle, "--prompt", "add three", "--max-tokens", 4, "--json")
    code, drawn, _ = run(*asked, "--temperature", 1, "--top-p", "1e-46")
    _, greedy, _ = run(*asked)
    assert code == 0
    assert json.loads(drawn)["text"] == json.loads(greedy)["text"]


@pytest.mark.filterwarnings("always::treadle.AdapterWarning")
def test_a_base_of_another_name_is_one_line_and_with_strict_an_error(run: Run, bundle: Path) -> None:
    asked = ("generate", bundle, "--prompt", "add", "--max-tokens", 2, "--json")
    _, expected, _ = run(*asked)
    edit_config(bundle / "adapters/math", base_model_name_or_path="unsloth/tiny-llama-bnb-4bit")
    code, out, err = run(*asked)
    assert code == 0
    assert json.loads(out)["text"] == json.loads(expected)["text"]
    (line,) = [each for each in err.splitlines() if "unsloth" in each]
    assert line.startswith("treadle: warning: the base is '")
    assert line.endswith("'math' on 'unsloth/tiny-llama-bnb-4bit'. The shapes decide whether they fit.")
    code, out, err = run(*asked, "--strict")
    assert (code, out) == (1, "")
    assert "'math' on 'unsloth/tiny-llama-bnb-4bit'" in err


def test_generate_sends_a_message_where_the_base_has_a_template_and_raw_the_text(run: Run, bundle: Path) -> None:
    flags = ["--max-tokens", 4, "--json", "--fixed", "math=1"]

    def tokens(prompt: str, *more: str) -> list[int]:
        code, out, _ = run("generate", bundle, "--prompt", prompt, *more, *flags)
        assert code == 0
        return json.loads(out)["token_ids"]

    message, chat, raw = tokens("add"), tokens("add", "--chat"), tokens("add", "--raw")
    assert message == chat == tokens("user: add\nassistant:", "--raw")
    assert raw != message
    base = Path(json.loads((bundle / "bundle.json").read_text())["base_model"])
    for file in (base / "chat_template.jinja", base / "tokenizer_config.json"):
        if file.exists() and file.suffix == ".jinja":
            file.unlink()
    assert tokens("add") == raw
    code, _, err = run("generate", bundle, "--prompt", "add", "--chat", *flags)
    assert code == 1
    assert "chat template" in err


def test_an_answer_that_ends_at_once_is_explained(run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path(json.loads((bundle / "bundle.json").read_text())["base_model"])
    for flag, other in (("--raw", "--chat"), ("--chat", "--raw")):
        _, out, _ = run("generate", bundle, "--prompt", "add", flag, "--max-tokens", 1, "--json")
        (first,) = json.loads(out)["token_ids"]
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": first}))
        code, out, err = run("generate", bundle, "--prompt", "add", flag, "--max-tokens", 4)
        assert (code, out.strip()) == (0, "")
        assert f"the answer is empty: the model ended the text at once. Try {other}" in err


def test_a_chat_is_routed_as_what_it_says(run: Run, bundle: Path) -> None:
    messages = [{"role": "system", "content": "the atom"}, {"role": "user", "content": "add the sum"}]
    given = {"add the sum": "add the sum", json.dumps(messages): "the atom\n\nadd the sum", "[1, 2]": "[1, 2]"}
    for text, said in given.items():
        answers = [run("route", bundle, "--text", *flags, "--json") for flags in ([text, "--chat"], [said])]
        assert answers[0] == answers[1]
        assert answers[0][0] == 0
    _, out, _ = run("generate", bundle, "--prompt", json.dumps(messages), "--chat", "--max-tokens", 1, "--json")
    weights = json.loads(run("route", bundle, "--text", "the atom\n\nadd the sum", "--json")[1])["weights"]
    assert json.loads(out)["weights"][0] == pytest.approx(weights, abs=1e-5)
    assert run("route", bundle, "--text", "x", "--eval", "--tasks", "x=y")[0] == 2
    weights = [
        json.loads(run("route", bundle, "--text", json.dumps(messages), *flags, "--json")[1])["weights"]
        for flags in ([], ["--chat"], ["--raw"])
    ]
    assert weights[0] == weights[1] != weights[2]


def test_route_shows_weights_and_the_words_that_decided(run: Run, bundle: Path) -> None:
    shutil.rmtree(json.loads((bundle / "bundle.json").read_text())["base_model"])  # it is not loaded
    code, out, _ = run("route", bundle, "--text", "add the sum", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["names"][max(range(3), key=lambda i: document["weights"][i])] == "math"
    assert {word for word, _ in document["words"]} <= {"add", "the", "sum"}
    assert document["words"]
    _, out, _ = run("route", bundle, "--text", "add the sum")
    assert "words for the nearest" in out
    assert f"the base {document['base']:.3f}" in " ".join(out.replace("│", " ").split())
    assert document["base"] == pytest.approx(1 - sum(document["weights"]), abs=1e-6)
    assert "the base" not in run("route", bundle, "--text", "add the sum", "--fallback", "false")[1]


def test_fit_makes_a_bundle_that_generates(
    run: Run, bundle: Path, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    base = json.loads((bundle / "bundle.json").read_text())["base_model"]
    arguments: list[object] = ["--base", base, "--embedder", bundle / "embedder", "-o", tmp_path / "new"]
    for name, folder in adapter_folders.items():
        file = tmp_path / f"{name}.txt"
        file.write_text("\n".join(SAMPLES[name]))
        arguments += ["--adapter", f"{name}={folder}", "--samples", f"{name}={file}"]
    code, out, _ = run("fit", *arguments, "--every", 4, "--json")
    assert code == 0
    told = json.loads(out)
    assert told["samples"] == {name: len(texts) for name, texts in SAMPLES.items()}
    assert told["names"] == list(SAMPLES)
    assert 0 <= told["accuracy"] <= 1
    assert np.shape(told["confusion"]) == (3, 4)
    np.testing.assert_allclose(np.sum(told["confusion"], -1), 1, atol=1e-6)
    assert json.loads((tmp_path / "new" / "bundle.json").read_text())["routing"]["every"] == 4
    assert run("generate", tmp_path / "new", "--prompt", "add", "--max-tokens", 2)[0] == 0
    code, _, err = run("fit", *arguments)
    assert code == 1
    assert "holds a bundle already" in err
    code, out, _ = run("fit", *arguments, "--overwrite")
    assert code == 0
    out = " ".join(out.split())
    assert f"cross-validation: {told['accuracy']:.1%} of the samples' prompts are nearest to their own adapter" in out
    share = f"{told['confusion'][0][0]:.2f}"
    for part in ("adapter", "samples", "the base", *SAMPLES, share, "note: the router knows", "next: treadle generate"):
        assert part in out
    (tmp_path / "math.txt").write_text("add three")
    code, out, _ = run("fit", *arguments, "--overwrite")
    assert code == 0
    assert "cross-validation:" not in out
    assert "note: each adapter needs 2 samples at least for a cross-validation" in out
    code, out, _ = run("fit", *arguments, "--overwrite", "--json")
    assert (json.loads(out)["accuracy"], json.loads(out)["confusion"]) == (None, [])


OF_EXTRAS = (
    "sentence_transformers",
    "datasets",
    "trl",
    "lm_eval",
    "matplotlib",
    "gguf",
    "starlette",
    "uvicorn",
)


def test_a_plain_install_fits_with_its_own_embedder_and_generates(
    run: Run, bundle: Path, adapter_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in OF_EXTRAS:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    base = json.loads((bundle / "bundle.json").read_text())["base_model"]
    arguments: list[object] = ["--base", base, "-o", tmp_path / "new"]
    for name, folder in adapter_folders.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(SAMPLES[name]))
        arguments += ["--adapter", f"{name}={folder}", "--samples", f"{name}={tmp_path / name}.txt"]
    assert run("fit", *arguments)[0] == 0
    assert run("route", tmp_path / "new", "--text", "add three")[0] == 0
    assert run("generate", tmp_path / "new", "--prompt", "add", "--max-tokens", 2)[0] == 0


def test_doctor_reports_and_finds_the_adapter_that_moves_nothing(
    run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run("doctor", bundle, "--json")
    report = json.loads(out)
    assert code == 0
    assert [adapter["ranks"] for adapter in report["adapters"]] == [[4], [2], [3]]
    assert all(adapter["change"] > 1e-3 and adapter["norm"] > 0 for adapter in report["adapters"])
    assert all(adapter["cosines"][i] == pytest.approx(1.0) for i, adapter in enumerate(report["adapters"]))
    assert report["base_step"] > 0 < report["blended_step"]
    _, out, _ = run("doctor", bundle)
    assert "a step: base" in out
    assert "change: divergence from the base" in out
    assert out.splitlines()[-1] == "verdict: healthy. All 3 adapters load, and each changes what the base says."

    from safetensors.torch import load_file, save_file

    weights = bundle / "adapters" / "code" / "adapter_model.safetensors"
    save_file({key: tensor * 1e-5 for key, tensor in load_file(weights).items()}, weights)
    code, out, err = run("doctor", bundle)
    assert code == 1
    assert out.splitlines()[-1] == "verdict: 1 of 3 adapters need care; see below."
    assert "adapter 'code' changes nothing" in err


def test_progress_is_lines_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(4, seconds=0) as advance:
        advance("math, base", 1, False)
        advance("math, oracle", 2, True)
    with progress(4, seconds=60) as advance:
        for count in (1, 2, 1):
            advance("code", count, False)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" after ")[0] for line in lines] == [
        "math, base: 1 of 4", "math, oracle: 3 of 4", "code: 4 of 4"
    ]  # fmt: skip


def test_the_version_is_told(run: Run) -> None:
    import treadle

    assert run("--version") == (0, f"treadle {treadle.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "nowhere", "--prompt", "x"], 1, "nowhere is not a bundle: it has no bundle.json"),
        (["generate", "BUNDLE", "--prompt", "x", "--every", "often"], 1, "every must be a whole number"),
        (["generate", "BUNDLE", "--prompt", "x", "--every", "0", "--rule", "sofmax"], 1, "Did you mean 'softmax'"),
        (["generate", "BUNDLE", "--prompt", "x", "--fixed", "maths=1"], 1, "Did you mean 'math'"),
        (
            ["generate", "BUNDLE", "--prompt", "x", "--max-tokens", "-1", "--top-p", "7"],
            1,
            "top_p must be a finite number above 0",
        ),
        (["generate", "BUNDLE", "--prompt", ""], 1, "the prompt is empty"),
        (["generate", "BUNDLE", "--prompt", "x", "--dtype", "float12"], 1, "allowed are float32"),
        (["generate", "BUNDLE"], 2, "--prompt"),
        (["generate", "BUNDLE", "--prompt", "x", "--colour", "red"], 2, "--colour"),
        (["fit", "--base", "b", "--adapter", "x", "--samples", "x=y", "-o", "z"], 1, "--adapter takes name=PATH"),
        (["fit", "--base", "b", "--adapter", "a=b", "--samples", "c=d", "-o", "z"], 1, "--samples names c"),
        (["base", "org/model"], 2, "--gguf and --package"),
        (["base", "org/model", "--package", "no-such-package"], 1, "is not installed"),
    ],
)
def test_errors_are_for_the_person_who_must_fix_them(
    run: Run, bundle: Path, arguments: list[str], code: int, message: str
) -> None:
    ended, out, err = run(*[str(bundle) if argument == "BUNDLE" else argument for argument in arguments])
    assert ended == code
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from treadle.cli.main import main
    from treadle.common.errors import BundleError

    monkeypatch.setattr(sys, "argv", ["treadle", "--debug", "route", "nowhere", "--text", "x"])
    with pytest.raises(BundleError):
        main()


def test_fit_lists_everything_that_is_missing(run: Run, bundle: Path, tmp_path: Path) -> None:
    adapters = ["--adapter", "a=nowhere", "--adapter", f"math={bundle / 'adapters' / 'math'}"]
    missing = ["--adapter", f"code={bundle / 'adapters' / 'code'}", "--samples", "code=no.jsonl"]
    code, _, err = run("fit", "--base", "b", *adapters, *missing, "-o", tmp_path / "new")
    assert code == 1
    for part in (
        "adapter 'a': 'nowhere' is no folder, and no hub id such as org/name",
        "give sample texts of 'math'",
        "no.jsonl: no such file",
    ):
        assert part in err
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
def test_a_full_disk_behind_standard_output_is_told_in_one_line(monkeypatch, capfd):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "argv", ["treadle", "serve", "nowhere", "--print-config"])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 1
    assert capfd.readouterr().err == "treadle: output cannot be used: No space left on device\n"


def test_what_cannot_be_written_is_refused_before_anything_is_done(run: Run, tmp_path, bundle_folder):
    (tmp_path / "file").touch()
    for arguments in (
        ["fit", "--base", "nowhere", "--adapter=a=nowhere", "-o", tmp_path / "file/bundle"],
        ["generate", bundle_folder, "--prompt", "add", "--trace", tmp_path / "file/trace.json"],
        ["generate", bundle_folder, "--prompt", "add", "--trace", tmp_path],
        ["route", bundle_folder, "--eval", "--tasks", "math=nowhere", "-o", tmp_path / "file/results"],
        ["base", "../model", "--gguf", "nowhere.gguf"],
    ):
        code, _, err = run(*arguments)
        assert code == 1
        assert err.count("\n") == 1
        assert "name another" in err or "name a file" in err or "as on the hub" in err


def test_one_message_lists_what_is_wrong_with_flags_of_two_kinds(run: Run, bundle: Path) -> None:
    wrong = ["--every", "often", "--rule", "sofmax", "--top-p", "7", "--dtype", "f99", "--trace", "/dev/null/x"]
    code, _, err = run("generate", str(bundle), "--prompt", "x", *wrong)
    assert code == 1
    for part in ("every must be a whole number", "Did you mean 'softmax'", "top_p must be", "dtype 'f99'", "/dev/null"):
        assert part in err
    code, _, err = run("generate", "nowhere", "--prompt", "x", *wrong)
    assert code == 1
    for part in ("nowhere is not a bundle", "every must be a whole number", "top_p must be"):
        assert part in err


def test_fit_lists_every_bad_adapter_file_and_option(
    run: Run, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    given = {name: shutil.copytree(folder, tmp_path / name) for name, folder in adapter_folders.items()}
    (given["math"] / "adapter_model.safetensors").unlink()
    edit_config(given["science"], use_dora=True)
    (tmp_path / "good.txt").write_text("add three\n")
    adapters = [f"--adapter={name}={folder}" for name, folder in (given | {"gone": tmp_path / "gone"}).items()]
    samples = [f"--samples={name}={tmp_path}/{file}.txt" for name, file in (("math", "good"), ("code", "missing"))]
    code, _, err = run("fit", "--base", "b", *adapters, *samples, "--samples=other=x", "--every", "often", "-o",
                       str(tmp_path / "out"))  # fmt: skip
    assert code == 1
    for part in (
        "math has no adapter_model.safetensors",
        "use_dora",
        "gone' is no folder, and no hub id such as org/name",
        "missing.txt: no such file",
        "--samples names math, code, other",
        "every must be a whole number",
    ):
        assert part in " ".join(err.split()), part
    assert not (tmp_path / "out").exists()


def test_eval_lists_every_bad_task_arm_and_option(run: Run, bundle: Path, tmp_path: Path) -> None:
    code, _, err = run("eval", str(bundle), "--tasks", f"math={tmp_path}/none.jsonl", "--arms", "base,paper,linear",
                       "--limit", "0", "--dtype", "f99", "-o", str(tmp_path / "out"))  # fmt: skip
    assert code == 1
    for part in ("limit must be", "none.jsonl: no such file", "combine='paper' needs", "combine='linear' needs", "f99"):
        assert part in err, part


def test_a_token_is_plain_where_the_base_has_the_largest_share() -> None:
    console = Console(force_terminal=True, color_system="standard", file=StringIO())
    weights = np.array([[0.5, 0.1], [0.1, 0.5], [0.3, 0.2], [0.0, 0.0], [0.7, 0.9]], np.float32)
    with console.capture() as shown:
        print_coloured(console, "abcde", weights)
    styles = dict.fromkeys("abcde", "39") | {"a": "36", "b": "33", "e": "33"}
    assert shown.get() == "".join(f"\x1b[{style}m{letter}\x1b[0m" for letter, style in styles.items())


def test_a_table_in_a_file_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(*(f"a rather long heading {number}" for number in range(12)))
    table.add_row(*("0.123 (0.100 to 0.145)" for _ in range(12)))
    new_console().print(table)
    assert capsys.readouterr().out.count("0.123 (0.100 to 0.145)") == 12
