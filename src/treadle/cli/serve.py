"""The command `treadle serve`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from treadle.cli.flags import MaybeBundle, Strict, takes
from treadle.common.errors import OptionError
from treadle.serving.openai.params import ServeParams, print_settings, read_settings

app = typer.Typer()


@app.command(name="serve")
@takes(serving=ServeParams)
def serve_command(
    bundle: MaybeBundle = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with options as keys; or TREADLE_CONFIG")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="print all options and end")] = False,
    strict: Strict = False,
    *,
    serving: dict[str, Any],
) -> None:
    """Serve a bundle, or a base and a folder of adapters, to clients of OpenAI's API.

    Every option is also an environment variable (TREADLE_PORT ...).
    """
    params, origins = read_settings(serving, os.environ, config)
    if print_config:
        print(print_settings(params, origins))
        return
    try:
        from treadle.serving.openai.serve import serve
    except ImportError as error:
        raise OptionError(f"the server needs {error.name}: pip install 'treadle[serve]'") from error
    from treadle.bundle.base_model import quiet_libraries

    quiet_libraries()
    serve(None if bundle is None else str(bundle), params, strict=strict)
