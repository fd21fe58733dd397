"""The server's options: one declaration each for the flag, the environment variable and the key in a file.

The command line wins over the environment, the environment over the file, the file over the defaults.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_origin, get_type_hints

from treadle.common.documents import check_depth, read_text
from treadle.common.errors import OptionError, OptionProblem, problem_list, unknown_name
from treadle.common.options import explained, meanings, option, raise_problems, read_options
from treadle.common.params import SourceParams
from treadle.serving.openai.hosts import is_pattern

SECRETS = ("api_key", "admin_key")
"""Fields that `print_settings` never prints."""
BASE = "base"
PREFIX = "TREADLE_"
"""Begins the names of the environment variables: TREADLE_PORT, TREADLE_API_KEY ..."""
CONFIG_VARIABLE = "TREADLE_CONFIG"
MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_BRACKETS = 256


@explained
@dataclass(frozen=True)
class ServeParams(SourceParams):
    """Options of the server: what it serves where there is no bundle, address, keys and limits."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 = any free one", at_least=0, at_most=65535)
    model_name: str | None = option(
        None, "name of the routed model in requests, besides auto; none = the bundle's name"
    )
    device: str | None = option(None, "torch device; none = CUDA if there is one")
    dtype: str | None = option(None, "float32, bfloat16 or float16; none = float32 on a CPU")
    pack: Literal["auto", "always", "never"] = option(
        "auto", "keep a second copy of the weights, packed by oneDNN; auto = on AMD's CPUs, if it takes at most a GiB"
    )
    max_batch: int = option(32, "sequences that share a forward pass; more wait", at_least=1)
    max_queue: int = option(64, "sequences that may wait; more get 429", at_least=0)
    prompt_chunk: int = option(
        256,
        "most prompt tokens read between two steps, twice as many for several prompts; fewer if streams would stall",
        at_least=1,
    )
    kv_memory: int | None = option(
        None,
        "most MiB of keys and values of running sequences; none = half of the free memory, 80 % of a GPU's",
        at_least=1,
    )
    prefix_cache: int = option(256, "MiB of keys and values kept for prompts that begin alike; 0 = none", at_least=0)
    max_prompt_tokens: int | None = option(None, "most tokens of a prompt; none = the model's context", at_least=1)
    max_tokens: int = option(2048, "most tokens that a choice may ask for", at_least=1)
    max_recompute_tokens: int = option(
        512, "most tokens of prompt and answer with past recompute; 0 = refuse it", at_least=0
    )
    max_prompts: int = option(64, "most prompts of one request", at_least=1)
    max_n: int = option(16, "most choices per prompt", at_least=1)
    max_messages: int = option(512, "most messages of a chat", at_least=1)
    max_logprobs: int = option(20, "most log-probabilities per token that a request may ask for", at_least=0)
    max_values: int = option(
        500_000, "most log-probabilities and weights of one answer, over all its choices and tokens", at_least=1
    )
    max_stops: int = option(16, "most stop strings of a request", at_least=0)
    max_body: int = option(4 << 20, "most bytes of a request's body", at_least=1)
    read_timeout: float = option(30.0, "seconds in which a request's body must arrive", at_least=1)
    request_timeout: float = option(600.0, "seconds after which a request is cancelled", at_least=1)
    keep_alive: int = option(30, "seconds that an idle connection stays open", at_least=0)
    shutdown_timeout: float = option(30.0, "seconds that running requests get after SIGTERM", at_least=0)
    api_key: tuple[str, ...] = option((), "key that requests must send (Authorization: Bearer KEY)")
    api_key_file: str | None = option(
        None, "file of keys, one per line, each followed by the adapters it may use (a,b) or by nothing (all)"
    )
    admin_key: str | None = option(None, "key that may add and remove adapters; none = nobody may")
    adapter_dir: str | None = option(None, "folder below which added adapters must lie; none = none can be added")
    tls_cert: str | None = option(None, "file with the TLS certificate chain")
    tls_key: str | None = option(None, "file with the TLS private key")
    cors_origin: tuple[str, ...] = option((), "web origin that may call the server")
    allowed_host: tuple[str, ...] = option(
        (), "name of this server in requests (Host), besides localhost and addresses; *.NAME = all names below, * = any"
    )
    page: bool = option(True, "serve the page at /, which shows the routing")
    log_format: Literal["text", "json"] = option("text", "text or json; one line per request")
    log_prompts: bool = option(False, "write prompts and answers to the log")

    def __post_init__(self) -> None:
        """Check every field; one message lists all problems."""
        problems = self.source_problems()
        wrong = {problem.options[0] for problem in problems}
        if not {"tls_cert", "tls_key", *SECRETS} & wrong:
            problems += [OptionProblem((), text) for text in self._key_problems()]
        if "allowed_host" not in wrong:
            problems += [OptionProblem(("allowed_host",), text) for text in self._host_problems()]
        if self.model_name == BASE:
            text = f"model_name {BASE!r} is what requests call the base model; give another one"
            problems.append(OptionProblem(("model_name",), text))
        raise_problems("server options:", problems)

    def _key_problems(self) -> list[str]:
        problems: list[str] = []
        if (self.tls_cert is None) != (self.tls_key is None):
            problems.append("tls_cert and tls_key go together: give both or neither")
        keys = [*self.api_key, *([] if self.admin_key is None else [self.admin_key])]
        if any(not key.strip() or not key.isascii() or any(c.isspace() for c in key) for key in keys):
            problems.append("a key is empty, or holds spaces or characters beyond ASCII")
        if len(set(keys)) < len(keys):
            problems.append("a key is given twice; the admin key must be one of its own")
        return problems

    def _host_problems(self) -> list[str]:
        allowed = "give it without scheme and path, such as treadle.example.org"
        return [
            f"allowed_host {host!r} is not a host's name; {allowed}"
            for host in self.allowed_host
            if not is_pattern(host)
        ]


def read_settings(
    flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None
) -> tuple[ServeParams, dict[str, str]]:
    """Return the options, and the source of each field's value.

    Args:
        flags: fields given on the command line.
        environment: the variables of the process.
        file: YAML with fields as keys; None takes the one that TREADLE_CONFIG names, if any.

    Raises:
        OptionError: an unknown key, or a value that is not allowed.
    """
    file = file or (Path(environment[CONFIG_VARIABLE]) if environment.get(CONFIG_VARIABLE) else None)
    sources: list[tuple[str, Mapping[str, Any]]] = [
        (f"file {file}", read_file(file) if file else {}),
        ("environment", read_environment(environment)),
        ("command line", flags),
    ]
    origins = {entry.name: "default" for entry in fields(ServeParams)}
    values: dict[str, Any] = {}
    for source, given in sources:
        values |= given
        origins |= dict.fromkeys(given, source)
    return read_options(ServeParams, values), origins


def read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields that environment variables give; commas separate the entries of a list."""
    hints = get_type_hints(ServeParams)
    given: dict[str, Any] = {}
    for name, kind in hints.items():
        text = environment.get(PREFIX + name.upper())
        if text:
            given[name] = [part for part in text.split(",") if part] if get_origin(kind) is tuple else text
    return given


def read_file(file: Path) -> dict[str, Any]:
    """Return the fields of a YAML file; an unknown key is an OptionError that names the nearest."""
    import yaml

    try:
        text = read_text(file, OptionError, MAX_CONFIG_BYTES)
        if text.count("[") + text.count("{") > MAX_CONFIG_BRACKETS:  # yaml's time grows with their square
            raise OptionError(f"it has more than {MAX_CONFIG_BRACKETS} lists and objects")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise OptionError("an alias (*name) is not read, as a few may stand for more than memory holds")
        document: Any = yaml.safe_load(text)
        check_depth(document)
    except (ValueError, yaml.YAMLError) as error:  # yaml makes dates and numbers by Python's own constructors
        raise OptionError(f"config {str(file)!r} cannot be read: {error}") from error
    except RecursionError as error:
        raise OptionError(f"config {str(file)!r} cannot be read: it is nested too deeply") from error
    if not isinstance(document, dict):
        raise OptionError(f"config {str(file)!r} holds no keys; expected lines like port: 8000")
    given = {str(key).replace("-", "_"): value for key, value in cast(dict[Any, Any], document).items()}
    known = [entry.name for entry in fields(ServeParams)]
    if unknown := [unknown_name("key", key, known) for key in given if key not in known]:
        raise OptionError(problem_list(f"config {str(file)!r}:", unknown))
    return given


def print_settings(params: ServeParams, origins: Mapping[str, str]) -> str:
    """Return the options as YAML that can be read back, with their sources and meanings, but without keys."""
    lines: list[str] = []
    for name, meaning in meanings(ServeParams).items():
        value = getattr(params, name)
        is_secret = name in SECRETS and value
        plain = list(value) if isinstance(value, tuple) else value
        text = f"# {name}: (not shown)" if is_secret else f"{name}: {json.dumps(plain)}"  # JSON is YAML
        lines.append(f"{text}  # {origins[name]}; {meaning}")
    return "\n".join(lines)
