"""The options of the server: one declaration each for the flag, the environment variable and the key in a file."""

from dataclasses import dataclass
from typing import Literal

from treadle.common.errors import OptionProblem
from treadle.common.options import check_fields, option, raise_problems
from treadle.serving.openai.hosts import is_pattern

SECRETS = ("api_key", "admin_key")
"""Fields that are never printed."""
BASE = "base"


@dataclass(frozen=True)
class ServeParams:
    """How a bundle is served: where, to whom, and how much of it."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 = any free one", at_least=0, at_most=65535)
    model_name: str | None = option(None, "what requests call the routed model, besides auto; none = the bundle's name")
    device: str | None = option(None, "torch device; none = CUDA where there is one")
    dtype: str | None = option(None, "float32, bfloat16 or float16; none = float32 on a CPU")
    pack: Literal["auto", "always", "never"] = option(
        "auto", "a second copy of the weights as oneDNN packs them; auto = on AMD's CPUs, where it takes at most a GiB"
    )
    max_batch: int = option(32, "sequences that share a forward pass; more wait", at_least=1)
    max_queue: int = option(64, "sequences that may wait; beyond, requests get 429", at_least=0)
    prompt_chunk: int = option(
        256,
        "prompt tokens read between two steps at most, of several prompts twice; fewer where streams would stall",
        at_least=1,
    )
    kv_memory: int | None = option(
        None,
        "MiB of keys and values of running sequences at most; none = half of the free memory, 80 % of a GPU's",
        at_least=1,
    )
    prefix_cache: int = option(256, "MiB of keys and values kept for prompts that begin alike; 0 = none", at_least=0)
    max_prompt_tokens: int | None = option(None, "tokens of a prompt at most; none = what the model reads", at_least=1)
    max_tokens: int = option(2048, "tokens that a choice may ask for at most", at_least=1)
    max_recompute_tokens: int = option(
        512, "tokens of prompt and answer at most with past recompute; 0 = refuse it", at_least=0
    )
    max_prompts: int = option(64, "prompts of one request at most", at_least=1)
    max_n: int = option(16, "choices a prompt at most", at_least=1)
    max_messages: int = option(512, "messages of a chat at most", at_least=1)
    max_logprobs: int = option(20, "likeliest tokens that a request may ask for at most", at_least=0)
    max_values: int = option(
        500_000, "log-probabilities and weights of one answer at most, over all its choices and tokens", at_least=1
    )
    max_stops: int = option(16, "stop strings of a request at most", at_least=0)
    max_body: int = option(4 << 20, "bytes of a request's body at most", at_least=1)
    read_timeout: float = option(30.0, "seconds in which a request's body must have arrived", at_least=1)
    request_timeout: float = option(600.0, "seconds after which a request is given up", at_least=1)
    keep_alive: int = option(30, "seconds that an idle connection stays open", at_least=0)
    shutdown_timeout: float = option(30.0, "seconds that running requests get after SIGTERM", at_least=0)
    api_key: tuple[str, ...] = option((), "a key that requests must bring (Authorization: Bearer KEY)")
    api_key_file: str | None = option(None, "file of keys: one a line, then the adapters it may use (a,b); none = all")
    admin_key: str | None = option(None, "the key that may add and remove adapters; none = nobody may")
    adapter_dir: str | None = option(None, "folder below which adapters that are added must lie; none = none can be")
    tls_cert: str | None = option(None, "file with the TLS certificate chain")
    tls_key: str | None = option(None, "file with the TLS private key")
    cors_origin: tuple[str, ...] = option((), "web origin that may call the server")
    allowed_host: tuple[str, ...] = option(
        (), "name of this server in requests (Host), besides localhost and addresses; *.NAME = all below it, * = any"
    )
    page: bool = option(True, "serve the page at /, which shows the routing")
    log_format: Literal["text", "json"] = option("text", "text or json: one line a request")
    log_prompts: bool = option(False, "write prompts and answers to the log")

    def __post_init__(self) -> None:
        """Check every field; one message lists all problems."""
        problems = check_fields(self)
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
