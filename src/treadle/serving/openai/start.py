"""Checks a server before the model is loaded: one that cannot work must not say that it serves."""

import errno
import logging
import socket
import ssl
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from treadle.bundle.bundle import Bundle
from treadle.common.errors import OptionError, collect, one_or_list, unknown_name
from treadle.serving.openai.hosts import is_loopback
from treadle.serving.openai.keys import Keyring
from treadle.serving.openai.params import ServeParams
from treadle.serving.openai.targets import model_name

logger = logging.getLogger("treadle.serving.openai")

MISSING = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Errors of an address that this machine does not have, such as localhost's second."""
BACKLOG = 2048
"""Connections that the system holds until they are accepted; uvicorn's default."""


def check_start(bundle: Bundle, params: ServeParams) -> Keyring:
    """Return the keys of a server that can start, and log warnings for its operator.

    Raises:
        OptionError: the key file, the certificate, the folder of adapters or the model's name cannot be used; lists
            every problem.
    """
    problems: list[str] = []
    found = collect(problems, [lambda: Keyring(params)])
    collect(problems, [lambda: _check_tls(params), lambda: _check_folder(params), lambda: model_name(bundle, params)])
    if problems:
        raise OptionError(one_or_list("the server cannot start:", problems))
    (keys,) = found
    for warning in _warnings(bundle, params, keys):
        logger.warning(warning)
    return keys


@contextmanager
def bound(host: str, port: int) -> Generator[list[socket.socket]]:
    """Bind a port on every address of a host; nobody can connect before the server listens.

    Until then another process that starts may bind it too: the first to `listen` has it.

    Raises:
        OptionError: another process listens there, or this machine has no such address.
    """
    with ExitStack() as stack:
        with _worded(host, port):
            sockets = [stack.enter_context(each) for each in _bind(host, port)]
        yield sockets


def listen(sockets: Sequence[socket.socket], params: ServeParams) -> None:
    """Let clients connect to `bound` sockets; an OptionError says that another process was faster."""
    with _worded(params.host, params.port):
        for each in sockets:
            each.listen(BACKLOG)


@contextmanager
def _worded(host: str, port: int) -> Generator[None]:
    """Raise an OptionError with advice if the system refuses a port."""
    try:
        yield
    except OSError as error:
        what = f"cannot listen on {host}, port {port}: {error.strerror or error}"
        raise OptionError(f"{what}; give another --port (0 = any free) or --host") from error


def _bind(host: str, port: int) -> Generator[socket.socket]:
    """Yield a socket for each address of a host here; for port 0 the first chooses the port."""
    missing: OSError | None = None
    is_bound = False
    for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        try:
            taken = _bound(family, (address[0], port, *address[2:]))
        except OSError as error:
            if error.errno not in MISSING:
                raise
            missing = error
        else:
            is_bound, port = True, taken.getsockname()[1]
            yield taken
    if missing is not None and not is_bound:
        raise missing


def _bound(family: int, address: tuple[str | int, ...]) -> socket.socket:
    taken = socket.socket(family, socket.SOCK_STREAM)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        taken.bind(address)
    except OSError:
        taken.close()
        raise
    return taken


def _check_tls(params: ServeParams) -> None:
    if params.tls_cert is None or params.tls_key is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(params.tls_cert, params.tls_key)
    except OSError as error:  # ssl.SSLError is one
        raise OptionError(
            f"tls_cert {params.tls_cert!r} and tls_key {params.tls_key!r} cannot be used: {error}; give PEM files of a "
            "certificate chain and of its private key."
        ) from error


def _check_folder(params: ServeParams) -> None:
    if params.adapter_dir is not None and not Path(params.adapter_dir).is_dir():
        raise OptionError(f"adapter_dir {params.adapter_dir!r} is not a folder; make it, or name another one.")


def _warnings(bundle: Bundle, params: ServeParams, keys: Keyring) -> list[str]:
    names = bundle.router.names
    unknown = sorted(keys.adapters - set(names))
    warnings = [
        f"api_key_file: {unknown_name('adapter', name, names)} The key gets it once it is added." for name in unknown
    ]
    if keys.is_open and not is_loopback(params.host):
        warnings.append(f"listening on {params.host} without an API key: everybody who can reach it may use it")
    return warnings
