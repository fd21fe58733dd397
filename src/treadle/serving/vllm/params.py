"""The options of the plugin: under `treadle` in vLLM's `--additional-config`, or in the environment."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from treadle.common.errors import OptionError, OptionProblem
from treadle.common.options import check_fields, option, raise_problems, read_options

KEY = "treadle"
"""Of `--additional-config`, of a request's `vllm_xargs`, and of what is attached to vLLM's objects."""
CONTENTS = "treadle_contents"
"""Of a rendered chat and of its request's extra arguments: the contents of its messages, which are routed on."""
SUM_ONLY = "vLLM blends by combine 'sum' only; use sum, or the embedded engine (treadle serve) for the others"
"""Why a combine is refused, and the two ways out."""
VARIABLE = "TREADLE_VLLM"
"""The environment variable that says the same: a bundle's folder, or a JSON object of options."""


@dataclass(frozen=True)
class PluginParams:
    """What a vLLM server blends, and what it keeps room for."""

    bundle: str = option("", "folder of the bundle")
    base_model: str | None = option(None, "the bundle's base, where this server's --model has another name for it")
    max_adapters: int | None = option(
        None, "slots for adapters that come later; none = the bundle's adapters, fixed", at_least=1
    )
    max_rank: int | None = option(
        None, "ranks that a slot has room for; none = the largest of the bundle's", at_least=1
    )
    adapter_dir: str | None = option(None, "folder below which adapters that are added must lie; none = none can be")

    def __post_init__(self) -> None:
        """Check every field; one message lists all problems."""
        problems = check_fields(self)
        if self.bundle == "":
            problems.append(OptionProblem(("bundle",), "bundle is missing: name the folder of a bundle"))
        if self.max_adapters is None and (self.max_rank is not None or self.adapter_dir is not None):
            text = "max_rank and adapter_dir are for adapters that come later: give max_adapters too"
            problems.append(OptionProblem(("max_adapters",), text))
        raise_problems(f"{KEY} in --additional-config:", problems)

    @property
    def is_hot(self) -> bool:
        """Whether adapters may come and go while the server runs."""
        return self.max_adapters is not None

    def document(self) -> dict[str, Any]:
        """Return the options as `--additional-config` may hold them."""
        return asdict(self)


def read_plugin_params(additional: Any, environ: Mapping[str, str] = os.environ) -> PluginParams | None:
    """Return the options in `--additional-config`, else those in the environment; None = vLLM runs as it is.

    Raises:
        OptionError: they cannot be read, or something is wrong with them.
    """
    configured = cast(Mapping[str, Any], additional).get(KEY) if isinstance(additional, Mapping) else None
    if configured is None:
        configured = _from_environment(environ)
    if configured is None:
        return None
    if isinstance(configured, str):
        configured = {"bundle": configured}
    if not isinstance(configured, Mapping):
        raise OptionError(
            f"{KEY} in --additional-config: a bundle's folder or an object of options, not {configured!r}"
        )
    options = cast(Mapping[str, Any], configured)
    if "combines" in options:  # an option until 0.1
        raise OptionError(f"{KEY} in --additional-config: combines is no longer an option, leave it out: {SUM_ONLY}")
    return read_options(PluginParams, options)


def _from_environment(environ: Mapping[str, str]) -> Any:
    given = environ.get(VARIABLE, "").strip()
    if not given.startswith("{"):
        return given or None
    try:
        return json.loads(given)
    except ValueError as error:
        raise OptionError(f"{VARIABLE} is neither a folder nor JSON: {error}") from error
