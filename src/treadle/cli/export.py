"""The commands that write one ordinary adapter: `treadle export` and `treadle convert`."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treadle.cli.flags import Json, MaybeBundle, Strict, open_source, takes
from treadle.common.errors import OptionError, collect, raise_all, unknown_name
from treadle.common.params import RoutingParams, SourceParams, read_routing

if TYPE_CHECKING:
    from treadle.lora.mixture import Mixture

app = typer.Typer()
FORMATS = ("peft", "gguf", "mlx")


@app.command(name="export")
@takes(source=SourceParams)
def export_command(  # noqa: PLR0913 a command's parameters are its flags
    bundle: MaybeBundle = None,
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="the folder to write")],
    fixed: Annotated[
        str | None,
        typer.Option(help="name=weight pairs, such as math=0.7,code=0.3; default: the bundle's own"),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="largest rank of a module, by SVD; default: all ranks side by side, exact"),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="peft; gguf (adapter.gguf of llama.cpp); or mlx (a folder of mlx-lm)")
    ] = "peft",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an adapter that is there")] = False,
    strict: Strict = False,
    as_json: Json = False,
    source: dict[str, Any],
) -> None:
    """Write a fixed mixture as one ordinary PEFT adapter, for PEFT, vLLM and others; the error is printed."""
    from treadle.bundle.base_model import load_outline, quiet_libraries
    from treadle.lora.compatibility import linear_shapes
    from treadle.lora.mixture import check_linear, mix
    from treadle.lora.names import with_model_names

    quiet_libraries()
    if form not in FORMATS:
        raise OptionError(unknown_name("format", form, FORMATS))
    found = open_source(bundle, source, strict=strict)
    problems: list[str] = []
    given = {} if fixed is None else {"fixed": fixed}
    params = collect(problems, [partial(read_routing, given, found.router.params)])
    raise_all(problems)
    weights = _weights(params[0])
    outline = load_outline(found.base_model)
    mixture = mix([with_model_names(outline, adapter) for adapter in found.adapters], weights, rank)
    check_linear(mixture, linear_shapes(outline))
    _save(form, mixture, output, (found.base_model, outline.config), overwrite=overwrite)
    ranks = sorted({pair.rank for pair in mixture.pairs.values()})
    if as_json:
        told = {"adapter": str(output), "weights": dict(weights), "modules": len(mixture.pairs), "ranks": ranks}
        print(json.dumps({**told, "error": mixture.error, "worst": mixture.worst}))
        return
    shown = ", ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight)
    print(f"wrote {output}: {shown}; {len(mixture.pairs)} modules of rank {', '.join(map(str, ranks))}")
    print(
        _error_line(
            mixture, f"exact: {'the factors stand side by side' if rank is None else 'no module has a larger rank'}"
        )
    )


@app.command(name="convert")
def convert_command(  # noqa: PLR0913, PLR0917 a command's parameters are its flags
    source: Annotated[str, typer.Argument(help="folder, file or hub id of one adapter", metavar="IN")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the PEFT folder to write")],
    base: Annotated[
        str, typer.Option(help="folder or hub id of its base model; GGUF and most tuners of PEFT need it")
    ] = "",
    alpha: Annotated[float | None, typer.Option(help="lora_alpha of training, where no file says it")] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="largest rank of a module made of another tuner, by SVD; default: as large as it takes"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an adapter that is there")] = False,
    as_json: Json = False,
) -> None:
    """Read one adapter of another program or PEFT tuner, and write it as an ordinary PEFT LoRA folder.

    It reads .bin and other pickles (tensors alone, in a process that can open nothing), GGUF, mlx-lm, torchtune, NeMo
    and Megatron, old names of PEFT and diffusers, and LoHa, LoKr, VeRA, OFT, AdaLoRA and others.
    """
    from treadle.bundle.adapter_places import adapter_place
    from treadle.bundle.base_model import quiet_libraries
    from treadle.bundle.conversion import ConvertParams, convert_adapter

    quiet_libraries()
    place = Path(source) if Path(source).exists() else adapter_place(source, source, with_pickle=True)
    made = convert_adapter(place, output, ConvertParams(base, alpha, rank), overwrite=overwrite)
    ranks = sorted({pair.rank for pair in made.content.pairs.values()})
    mixture = made.mixture
    if as_json:
        told = {"adapter": str(output), "kind": made.kind, "modules": len(made.content.pairs), "ranks": ranks}
        print(json.dumps({**told, "error": mixture and mixture.error, "worst": mixture and mixture.worst}))
        return
    size = f"{len(made.content.pairs)} modules of rank {', '.join(map(str, ranks))}" if ranks else "no factors"
    print(f"wrote {output}: {made.kind}; {size}")
    if mixture:
        print(_error_line(mixture, "exact: the ranks are as large as it takes"))


def _error_line(mixture: "Mixture", exact: str) -> str:
    """Return the line that tells the error of a smaller rank; `exact` where there is none."""
    if mixture.worst is None:
        return exact
    module, largest = mixture.worst
    return f"relative error of the update: {mixture.error:.2%}; largest of one module: {largest:.2%} ({module})"


def _save(form: str, mixture: "Mixture", folder: Path, base: tuple[str, Any], *, overwrite: bool) -> None:
    """Write a mixture in one of the FORMATS, for a base of this name and configuration."""
    from treadle.lora.mixture import save_mixture
    from treadle.lora.other_formats import save_gguf, save_mlx

    name, config = base
    if form == "peft":
        save_mixture(mixture, folder, name, overwrite=overwrite)
    elif form == "gguf":
        save_gguf(mixture, folder, config, overwrite=overwrite)
    else:
        save_mlx(mixture, folder, config, overwrite=overwrite)


def _weights(params: RoutingParams) -> dict[str, float]:
    """Return the fixed weights of params; an OptionError where they are not a fixed sum."""
    if params.rule != "fixed":
        raise OptionError("one adapter has fixed weights; give --fixed name=weight pairs, such as math=0.7,code=0.3.")
    if params.combine != "sum":
        raise OptionError(f"combine {params.combine!r} is not a sum of updates; export writes combine 'sum' only.")
    return dict(params.fixed or {})
