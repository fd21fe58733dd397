"""The objects that all endpoints of one server share."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from starlette.requests import Request

from treadle.bundle.bundle import Bundle
from treadle.engine.engine import Engine
from treadle.routing.embedder import StaticEmbedder
from treadle.serving.openai.failures import Failure
from treadle.serving.openai.jobs import Mail
from treadle.serving.openai.loop import Loop, deliver
from treadle.serving.openai.metrics import Metrics
from treadle.serving.openai.params import ServeParams
from treadle.serving.openai.queues import Budget, Check, Client, WorkQueue
from treadle.serving.openai.requests import RequestReader
from treadle.serving.openai.scheduler import Scheduler, ShuttingDown
from treadle.serving.openai.targets import AUTO, Routers, Targets, model_name
from treadle.serving.openai.tokens import TokenTexts

logger = logging.getLogger("treadle.serving.openai")
Result = TypeVar("Result")

END_SECONDS = 5.0
"""The time that the threads of the engine and the queues get to end."""
POLL_SECONDS = 0.02
MAX_LARGEST_ANSWERS = 8
"""The log-probabilities and weights of all unfinished answers are at most those of this many largest answers."""


@dataclass(frozen=True)
class ServerState:
    """The engine, its scheduler, the reader of requests, and the queues of work beside the event loop.

    Attributes:
        preparing: prompts and sample texts are prepared here.
        weighing: whole texts are embedded here, so that no prompt waits for them.
        reading: folders of adapters are read here.
        writing: long answers are written here.
    """

    bundle: Bundle
    engine: Engine
    params: ServeParams
    metrics: Metrics
    routers: Routers
    scheduler: Scheduler
    targets: Targets
    reader: RequestReader
    tokens: TokenTexts
    values: Budget
    preparing: WorkQueue = field(default_factory=lambda: WorkQueue("treadle-prepare"))
    weighing: WorkQueue = field(default_factory=lambda: WorkQueue("treadle-weigh"))
    reading: WorkQueue = field(default_factory=lambda: WorkQueue("treadle-read", num_threads=1))
    writing: WorkQueue = field(default_factory=lambda: WorkQueue("treadle-write"))

    @classmethod
    def make(cls, bundle: Bundle, engine: Engine, params: ServeParams) -> "ServerState":
        """Return the state of a new server; `start` starts its threads."""
        metrics, routers = Metrics(), Routers(engine)
        metrics.set_adapters(engine.adapter_names)
        targets = Targets(engine, routers, tuple(dict.fromkeys((AUTO, model_name(bundle, params)))))
        return cls(
            bundle=bundle,
            engine=engine,
            params=params,
            metrics=metrics,
            routers=routers,
            scheduler=Scheduler(Loop(engine, routers.among, params, metrics), params),
            targets=targets,
            reader=RequestReader(engine, targets, params),
            tokens=TokenTexts(engine.tokenizer),
            values=Budget(MAX_LARGEST_ANSWERS * params.max_values),
        )

    @classmethod
    def of(cls, request: Request) -> "ServerState":
        """Return the state of the server that a request reached."""
        return request.app.state.treadle

    def drop_removed(self) -> None:
        """Free the factors of removed adapters that no sequence uses; their stacks are built beside the steps."""
        with suppress(Failure):  # the server ends
            self.reading.queue(self.drop_now, Client())

    def drop_now(self, _: Check) -> None:
        """Do the same in the calling thread; if it fails, the factors stay and requests go on."""
        try:
            stacks = self.scheduler.call(self.engine.adapters.plan_drop).result()
            if stacks is not None:
                stacks.build()
                self.scheduler.call(partial(self.engine.adapters.drop_retired, stacks)).result()
        except ShuttingDown:
            pass
        except Exception:  # out of memory
            logger.exception("the factors of a removed adapter stay in memory")

    async def between_steps(self, function: Callable[[], Result]) -> Result:
        """Run a function in the engine's thread, between two steps."""
        return await asyncio.wrap_future(self.scheduler.call(function))

    async def weigh(self, function: Callable[[Check], Result], client: Client, num_bytes: int) -> Result:
        """Run a function that embeds whole texts, beside the steps if possible; see `WorkQueue.run`.

        A neural embedder runs between two steps: it reads few words, and OpenMP would keep workers
        for one more thread (`treadle.serving.openai.serve`).
        """

        def between_steps(check: Check) -> Result:
            return self.scheduler.call(lambda: function(check)).result()

        is_neural = not isinstance(self.engine.router.embedder, StaticEmbedder)
        return await self.weighing.run(between_steps if is_neural else function, client, num_bytes)

    def take_no_more(self) -> None:
        """Prepare no more requests; waiting ones are told that the server ends."""
        self.scheduler.drain()
        for line in (self.preparing, self.weighing, self.reading):
            line.close()

    @property
    def has_ended(self) -> bool:
        """Whether all threads have ended."""
        lines = (self.preparing, self.weighing, self.reading, self.writing)
        return self.scheduler.has_ended and all(line.has_ended(0) for line in lines)

    async def shut_down(self) -> None:
        """End the threads of the engine and the queues; one that does not end in time is left running."""
        self.take_no_more()
        self.writing.close()
        threading.Thread(target=self.scheduler.stop, name="treadle-stop", daemon=True).start()
        until = time.monotonic() + END_SECONDS
        while not self.has_ended:
            if time.monotonic() > until:
                logger.warning("some threads do not end within %g s; they are left running", END_SECONDS)
                return
            await asyncio.sleep(POLL_SECONDS)

    def start(self) -> None:
        """Start the engine's thread; its news go to the event loop that runs now."""
        loop = asyncio.get_running_loop()

        def post(mail: Mail) -> None:
            loop.call_soon_threadsafe(deliver, mail)

        self.scheduler.start(post, self.drop_removed)
