"""Runs the web application until it is asked to end."""

import gc
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import uvicorn

from treadle.bundle.bundle import Bundle
from treadle.engine.engine import Engine
from treadle.engine.loading import load
from treadle.engine.preparing import open_bundle
from treadle.routing.router import Router
from treadle.serving.openai.app import make_app
from treadle.serving.openai.keys import Keyring
from treadle.serving.openai.params import ServeParams
from treadle.serving.openai.protocol import HttpProtocol
from treadle.serving.openai.start import bound, check_start, listen
from treadle.serving.openai.state import END_SECONDS, ServerState

logger = logging.getLogger("treadle.serving.openai")

SWITCH_SECONDS = 0.001
"""Python lets one thread run so long while another waits; its default, 5 ms, would delay every token."""
POLL_SECONDS = 0.05


class Server(uvicorn.Server):
    """Ends in order: takes no more requests, finishes the running ones within a timeout, and exits with 0."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        params: ServeParams,
        keys: Keyring,
        http: type[HttpProtocol] = HttpProtocol,
    ) -> None:
        self.app = make_app(bundle, engine, params, keys)
        self._state: ServerState = self.app.state.treadle
        self._shutdown_timeout = params.shutdown_timeout
        self._drain: threading.Thread | None = None
        self._is_urgent = threading.Event()
        config = uvicorn.Config(
            self.app,
            host=params.host,
            port=params.port,
            http=http,
            lifespan="on",  # an application that cannot start is an error
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=params.keep_alive,
            timeout_graceful_shutdown=1,  # for requests that `_drain` has ended
            ssl_certfile=params.tls_cert,
            ssl_keyfile=params.tls_key,
        )
        super().__init__(config)

    @property
    def port(self) -> int:
        """The port on which the server listens; 0 before it does."""
        sockets = [each for server in self.servers for each in server.sockets] if self.started else []
        return int(sockets[0].getsockname()[1]) if sockets else 0

    def announce(self, params: ServeParams) -> None:
        """Log the address, the page, the models and what routes them, once the server listens."""
        while not self.started:
            time.sleep(POLL_SECONDS)
        host = f"[{params.host}]" if ":" in params.host else params.host
        address = f"{'https' if params.tls_cert else 'http'}://{host}:{self.port}"
        logger.info("serving on %s (OpenAI's API is below /v1)", address)
        if params.page:
            logger.info("page: %s/", address)
        router, routed = self._state.engine.router, " and ".join(self._state.targets.names)
        adapters = ", ".join(router.names) or "none yet"
        logger.info("models: %s (routed); alone: %s; base (no adapter)", routed, adapters)
        logger.info("routing: %s", _routing_of(router))

    @property
    def has_ended(self) -> bool:
        """Whether all threads have ended."""
        return self._state.has_ended

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; a second signal ends running requests, too."""
        del sig, frame
        if self._drain is not None:
            self._is_urgent.set()
            return
        self._drain = threading.Thread(target=self._finish, name="treadle-drain", daemon=True)
        self._drain.start()

    def _finish(self) -> None:
        """Take no more requests, wait for the running ones, then end."""
        scheduler = self._state.scheduler
        self._state.take_no_more()
        logger.info("shutting down: %d sequences are left", scheduler.num_unfinished)
        until = time.monotonic() + self._shutdown_timeout
        while scheduler.num_unfinished and time.monotonic() < until and not self._is_urgent.wait(POLL_SECONDS):
            pass
        if scheduler.num_unfinished:
            why = "a second signal came" if self._is_urgent.is_set() else f"{self._shutdown_timeout:g} s are over"
            logger.warning("%s: %d sequences do not finish", why, scheduler.num_unfinished)
            stopping = threading.Thread(target=scheduler.stop, name="treadle-stop", daemon=True)
            stopping.start()
            stopping.join(END_SECONDS)  # a step that hangs must not keep the process alive
        time.sleep(POLL_SECONDS)  # the last answers are on their way
        self.should_exit = True


class JsonLines(logging.Formatter):
    """Writes one JSON object per line; `Middleware` logs requests as JSON already."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        message = record.getMessage()
        if message.startswith("{"):
            return message
        line = {"time": self.formatTime(record), "level": record.levelname, "message": message}
        return json.dumps(line if record.exc_info is None else {**line, "error": self.formatException(record.exc_info)})


def serve(folder: str | None, params: ServeParams, load: Callable[..., Engine] = load, *, strict: bool = False) -> None:
    """Load a bundle by `load` and serve it until SIGTERM or SIGINT; a TreadleError says why that cannot be.

    Where `folder` is None, the bundle is made of the base and the adapters that `params` name, and `strict` refuses bad
    ones.
    """
    _set_up_log(params)
    bundle = open_bundle(folder, params, strict=strict)
    keys = check_start(bundle, params)
    with bound(params.host, params.port) as sockets:
        # in a thread that ends: OpenMP keeps workers for every living thread that computed. If these are more than
        # the cores, all of them sleep between operations, and a step takes a third longer
        with ThreadPoolExecutor(1) as pool:
            pack = {"auto": None, "always": True, "never": False}[params.pack]
            engine = pool.submit(load, bundle, device=params.device, dtype=params.dtype, pack=pack).result()
        sys.setswitchinterval(SWITCH_SECONDS)
        server = Server(bundle, engine, params, keys)
        # all objects so far stay: to search them for garbage would take several steps' time
        gc.collect()
        gc.freeze()
        listen(sockets, params)
        announce = threading.Thread(target=server.announce, args=(params,), daemon=True)
        announce.start()
        server.run(sockets)
        if not server.has_ended:  # Python would wait for the threads, or break off inside a library
            logging.shutdown()
            os._exit(0)


def _routing_of(router: Router) -> str:
    """Return in words what makes the weights of a router."""
    params = router.params
    if router.lacks_samples:
        return "none, no adapter has samples: a request names an adapter or gives fixed weights"
    if params.rule == "fixed":
        return "none, the weights are fixed"
    when = f"every {params.every} tokens" if params.every else "once, by the prompt"
    return f"{router.embedder.id} embeds, score {params.score}, rule {params.rule}; weights are made {when}"


def _set_up_log(params: ServeParams) -> None:
    """Write the server's log to standard error."""
    handler = logging.StreamHandler()
    is_json = params.log_format == "json"
    handler.setFormatter(JsonLines() if is_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("treadle", "uvicorn.error"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.INFO if name == "treadle" else logging.WARNING)
