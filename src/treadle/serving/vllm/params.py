"""Reads the options of the plugin: under `treadle` in vLLM's `--additional-config`, or in the environment."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from treadle.common.errors import OptionError, OptionProblem
from treadle.common.options import check_fields, explained, option, raise_problems, read_options

KEY = "treadle"
"""The key in `--additional-config` and in a request's `vllm_xargs`, and the attribute of vLLM's objects."""
CONTENTS_KEY = "treadle_contents"
"""The key of a chat's contents in its rendered prompt and in its request's extra arguments; these are routed on."""
SUM_ONLY_REASON = "vLLM blends by combine 'sum' only; use sum, or the embedded engine (treadle serve) for the others"
"""Why a combine is refused, and the two ways out."""
NO_STATES_REASON = "vLLM's workers have the base model's states, and its scheduler decides the weights"
"""Why states are refused."""
BUNDLE_VARIABLE = "TREADLE_VLLM"
"""The environment variable that may hold the options instead: a bundle's folder, or a JSON object."""


@explained
@dataclass(frozen=True)
class PluginParams:
    """The options of the plugin: the bundle, and the room for adapters that come later."""

    bundle: str = option("", "folder of the bundle")
    base_model: str | None = option(None, "what this server's --model calls the bundle's base, if the names differ")
    max_adapters: int | None = option(
        None, "slots for adapters that come later; none = the bundle's adapters, fixed", at_least=1
    )
    max_rank: int | None = option(
        None, "largest rank that a slot has room for; none = the largest in the bundle", at_least=1
    )
    adapter_dir: str | None = option(None, "folder below which added adapters must lie; none = none can be added")

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
    if "combines" in options:  # older configurations have it
        raise OptionError(
            f"{KEY} in --additional-config: combines is no longer an option, leave it out: {SUM_ONLY_REASON}"
        )
    return read_options(PluginParams, options)


def params_of(vllm_config: Any) -> PluginParams | None:
    """Return the options in vLLM's configuration, where the start hook has left them; None = there is no bundle."""
    additional = vllm_config.additional_config
    return read_plugin_params(additional, {}) if isinstance(additional, dict) else None


def _from_environment(environ: Mapping[str, str]) -> Any:
    given = environ.get(BUNDLE_VARIABLE, "").strip()
    if not given.startswith("{"):
        return given or None
    try:
        return json.loads(given)
    except ValueError as error:
        raise OptionError(f"{BUNDLE_VARIABLE} is neither a folder nor JSON: {error}") from error
