"""The command that examines: `treadle doctor`, of a bundle, of one adapter or of the installed vLLM."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treadle.cli.flags import Device, Dtype, Json, Strict, open_source, takes
from treadle.common.errors import TreadleError, problem_list
from treadle.common.options import named
from treadle.common.params import SourceParams

if TYPE_CHECKING:
    from treadle.bundle.bundle import Bundle

app = typer.Typer()


@app.command()
@takes(source=SourceParams)
def doctor(  # noqa: PLR0913, PLR0917 a command's parameters are its flags
    bundle: Annotated[
        Path | None,
        typer.Argument(
            help="folder of a bundle, or of one adapter (with --base it is judged against it); or give --base and "
            "--adapters instead",
            metavar="BUNDLE|ADAPTER",
        ),
    ] = None,
    samples: Annotated[
        list[str] | None, typer.Option(help="name=FILE of texts to use instead of those that the bundle keeps")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="examine the installed vLLM instead of a bundle")] = False,
    strict: Strict = False,
    as_json: Json = False,
    *,
    source: dict[str, Any],
) -> None:
    """Examine a bundle, or a base and a folder of adapters: check that each adapter acts, time a step.

    Of one adapter's folder it says what it holds, for which bases, and what would act; nothing is loaded. Exit 1 if
    something is wrong.
    """
    if bundle is not None and not vllm and source.keys() <= {"base"} and _is_adapter(bundle):
        _doctor_adapter(bundle, source.get("base"), as_json)
        return
    if vllm == (bundle is not None or bool(source)):
        raise typer.BadParameter("give a BUNDLE, or an ADAPTER, or --base and --adapters, or --vllm")
    if vllm:
        _doctor_vllm(as_json)
        return
    from treadle.bundle.base_model import quiet_libraries
    from treadle.engine.sample_files import load_texts

    quiet_libraries()
    texts = {name: load_texts(file)[:8] for name, file in named(samples or [], "--samples").items()}
    _doctor_bundle(open_source(bundle, source, strict=strict), texts, device, dtype, as_json)


def _doctor_bundle(
    bundle: "Bundle", texts: Mapping[str, Sequence[str]], device: str | None, dtype: str | None, as_json: bool
) -> None:
    """Load a bundle, measure it and print what was found; raise if something is wrong."""
    from treadle.experiments.doctor import examine

    report = examine(bundle, samples=texts, device=device, dtype=dtype)
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        from treadle.cli.console import LEGEND, new_console, report_tables, verdict

        console = new_console()
        console.print(f"base {report.base_model} on {report.device} in {report.dtype}")
        console.print(*report_tables(report), sep="\n")
        if report.state_layer is not None:
            spans = " and ".join(map(str, report.state_spans))
            console.print(f"its states after layer {report.state_layer} decide: means of the last {spans} tokens")
        base, blended = report.base_step * 1000, report.blended_step * 1000
        console.print(f"a step: base {base:.1f} ms, blended {blended:.1f} ms, ratio {blended / base:.3f} (medians)")
        console.print(LEGEND, style="dim")
        console.print(verdict(report))
    if report.problems:
        raise TreadleError("; ".join(report.problems))


def _is_adapter(folder: Path) -> bool:
    from treadle.bundle.adapter_places import holds_adapter
    from treadle.bundle.bundle_files import BUNDLE_FILE
    from treadle.lora.peft_folder import convert_hint

    return not (folder / BUNDLE_FILE).exists() and (holds_adapter(folder) or bool(convert_hint(folder)))


def _doctor_adapter(folder: Path, base: str | None, as_json: bool) -> None:
    """Examine one adapter's folder and print what was found; raise if it cannot be blended, or not on this base."""
    from treadle.bundle.base_model import quiet_libraries
    from treadle.cli.console import adapter_lines
    from treadle.experiments.adapter_doctor import examine_folder

    quiet_libraries()
    report = examine_folder(folder, base)
    print(json.dumps(asdict(report)) if as_json else "\n".join(adapter_lines(report)))
    if report.problem:
        raise TreadleError(report.problem)
    if report.fit and report.fit.misfits:
        raise TreadleError(problem_list(f"{folder} does not fit {base}:", report.fit.misfits))


def _doctor_vllm(as_json: bool) -> None:
    """Examine the vLLM that is installed and print what was found; raise if something is wrong."""
    from treadle.serving.vllm.selftest import examine_vllm

    report = examine_vllm()
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        print(f"vLLM {report.version}")
        for version, tested in report.known.items():
            print(f"  knows {version}.x: {tested}")
        if report.difference is not None and report.change is not None:
            print(f"  one forward against the plain formula: off by {report.difference:.1e} nats; "
                  f"the adapters change it by {report.change:.1e}")  # fmt: skip
        print("verdict: " + ("see below" if report.problems else "healthy: the plugin can run in it"))
    if report.problems:
        raise TreadleError("; ".join(report.problems))
