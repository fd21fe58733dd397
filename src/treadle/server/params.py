"""The options of the server: one declaration each for the flag, the environment variable and the key in a file."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from treadle.errors import OptionError, problem_list
from treadle.options import option

SECRETS = ("api_key", "admin_key")
"""Fields that are never printed."""
BASE = "base"


@dataclass(frozen=True)
class ServeParams:
    """How a bundle is served: where, to whom, and how much of it."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 = any free one")
    model_name: str | None = option(None, "what requests call the routed model, besides auto; none = the bundle's name")
    device: str | None = option(None, "torch device; none = CUDA where there is one")
    dtype: str | None = option(None, "float32, bfloat16 or float16; none = float32 on a CPU")
    pack: Literal["auto", "always", "never"] = option(
        "auto", "a second copy of the weights as oneDNN packs them; auto = on AMD's CPUs, where it takes at most a GiB"
    )
    max_batch: int = option(32, "sequences that share a forward pass; more wait")
    max_queue: int = option(64, "sequences that may wait; beyond, requests get 429")
    prompt_chunk: int = option(
        256, "prompt tokens read between two steps at most, of several prompts twice; fewer where streams would stall"
    )
    prefix_cache: int = option(256, "MiB of keys and values kept for prompts that begin alike; 0 = none")
    max_prompt_tokens: int | None = option(None, "tokens of a prompt at most; none = what the model reads")
    max_tokens: int = option(2048, "tokens that a choice may ask for at most")
    max_recompute_tokens: int = option(512, "tokens of prompt and answer at most with past recompute; 0 = refuse it")
    max_prompts: int = option(64, "prompts of one request at most")
    max_n: int = option(16, "choices a prompt at most")
    max_messages: int = option(512, "messages of a chat at most")
    max_logprobs: int = option(20, "likeliest tokens that a request may ask for at most")
    max_stops: int = option(16, "stop strings of a request at most")
    max_body: int = option(4 << 20, "bytes of a request's body at most")
    read_timeout: float = option(30.0, "seconds in which a request's body must have arrived")
    request_timeout: float = option(600.0, "seconds after which a request is given up")
    keep_alive: int = option(30, "seconds that an idle connection stays open")
    shutdown_timeout: float = option(30.0, "seconds that running requests get after SIGTERM")
    api_key: tuple[str, ...] = option((), "a key that requests must bring (Authorization: Bearer KEY)")
    api_key_file: str | None = option(None, "file of keys: one a line, then the adapters it may use (a,b); none = all")
    admin_key: str | None = option(None, "the key that may add and remove adapters; none = nobody may")
    adapter_dir: str | None = option(None, "folder below which adapters that are added must lie; none = none can be")
    tls_cert: str | None = option(None, "file with the TLS certificate chain")
    tls_key: str | None = option(None, "file with the TLS private key")
    cors_origin: tuple[str, ...] = option((), "web origin that may call the server")
    page: bool = option(True, "serve the page at /, which shows the routing")
    log_format: Literal["text", "json"] = option("text", "text or json: one line a request")
    log_prompts: bool = option(False, "write prompts and answers to the log")

    def __post_init__(self) -> None:
        """Check every field; one message lists all problems."""
        problems = [*self._number_problems(), *self._key_problems()]
        if self.model_name == BASE:
            problems.append(f"model_name {BASE!r} is what requests call the base model; give another one")
        if problems:
            raise OptionError(problem_list("server options:", problems))

    def _number_problems(self) -> list[str]:
        zero = ("max_queue", "prefix_cache", "max_recompute_tokens", "max_logprobs", "max_stops", "keep_alive")
        least = dict.fromkeys(zero, 0) | {"port": 0, "shutdown_timeout": 0}
        numbers: dict[str, Any] = {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if isinstance(getattr(self, entry.name), int | float) and not isinstance(getattr(self, entry.name), bool)
        }
        problems = [
            f"{name} must be at least {least.get(name, 1)}, not {value!r}"
            for name, value in numbers.items()
            if not least.get(name, 1) <= value < float("inf")
        ]
        if self.port > 65535:
            problems.append(f"port must be at most 65535, not {self.port}")
        return problems

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
