"""What the routes of one server share."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request

from treadle.bundle import Bundle
from treadle.embed import StaticEmbedder
from treadle.generate import Engine
from treadle.server.jobs import Mail
from treadle.server.loop import Loop, deliver
from treadle.server.metrics import Metrics
from treadle.server.params import ServeParams
from treadle.server.requests import Reader
from treadle.server.routers import Routers
from treadle.server.scheduler import Scheduler
from treadle.server.start import model_name
from treadle.server.targets import AUTO, Targets
from treadle.server.tokens import TokenTexts

Result = TypeVar("Result")


@dataclass(frozen=True)
class State:
    """The engine, what runs it, and what reads requests for it."""

    bundle: Bundle
    engine: Engine
    params: ServeParams
    metrics: Metrics
    routers: Routers
    scheduler: Scheduler
    targets: Targets
    reader: Reader
    tokens: TokenTexts
    # one thread: tokenizers are not made for several at once
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "treadle-prepare"))
    # and one for whole texts, so that nobody's prompt waits for them
    weighers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "treadle-weigh"))

    @classmethod
    def make(cls, bundle: Bundle, engine: Engine, params: ServeParams) -> "State":
        """Return the state of a new server; its scheduler has not been started."""
        metrics, routers = Metrics(), Routers(engine)
        metrics.set_adapters(engine.adapter_names)
        targets = Targets(engine, routers, tuple(dict.fromkeys((AUTO, model_name(bundle, params)))))
        return cls(
            bundle=bundle,
            engine=engine,
            params=params,
            metrics=metrics,
            routers=routers,
            scheduler=Scheduler(Loop(engine, routers, params, metrics), params),
            targets=targets,
            reader=Reader(engine, targets, params),
            tokens=TokenTexts(engine.tokenizer),
        )

    @classmethod
    def of(cls, request: Request) -> "State":
        """Return the state of the server that a request reached."""
        return request.app.state.treadle

    async def prepare(self, function: Callable[[], Result]) -> Result:
        """Run a function that takes a while in a thread that prepares requests, one after the other."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function)

    async def between_steps(self, function: Callable[[], Result]) -> Result:
        """Run a function in the engine's thread, between two steps."""
        return await asyncio.wrap_future(self.scheduler.call(function))

    async def weigh(self, function: Callable[[], Result]) -> Result:
        """Run a function that embeds whole texts beside the steps.

        Between two steps where the embedder is a neural network: that reads few words, and OpenMP would keep workers
        for one more thread (`treadle.server.serve`).
        """
        if not isinstance(self.engine.router.embedder, StaticEmbedder):
            return await self.between_steps(function)
        return await asyncio.get_running_loop().run_in_executor(self.weighers, function)

    def shut_down(self) -> None:
        """End the threads that prepare and weigh."""
        self.pool.shutdown()
        self.weighers.shutdown(cancel_futures=True)

    def start(self) -> None:
        """Start the engine's thread; its news arrive in the event loop that runs now."""
        loop = asyncio.get_running_loop()

        def post(mail: Mail) -> None:
            loop.call_soon_threadsafe(deliver, mail)

        self.scheduler.start(post)
