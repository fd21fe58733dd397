"""The adapters of one engine, which come and go while sequences run with those they started with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from treadle.common.errors import AdapterError, OptionError, OptionProblem, TreadleError, one_or_list
from treadle.common.params import RoutingParams
from treadle.engine.sequence import TokenSequence
from treadle.lora.adapter import Adapter
from treadle.lora.blend import attach
from treadle.lora.compatibility import check_combine, check_tokens
from treadle.lora.stacking import Stacks
from treadle.routing.centroids import Centroids
from treadle.routing.router import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AdapterSet:
    """Adapters attached to a model, the router over them, and the running rows that use them.

    An adapter that is retired is hidden from new rows. Its factors stay until the last row that uses it has ended.
    """

    def __init__(
        self, model: "PreTrainedModel", adapters: Sequence[Adapter], router: Router, rereading: frozenset[str]
    ) -> None:
        """Attach the adapters.

        Args:
            model: the base.
            adapters: those that the router knows.
            router: weighs them.
            rereading: layers that read past tokens again (`treadle.engine.supported`); no adapter may target them.

        Raises:
            AdapterError: router and adapters differ, or an adapter targets layers that cannot be blended by token.
            OptionError: the adapters cannot be combined as the router's params ask.
        """
        check_tokens(adapters, rereading)
        if sorted(adapter.name for adapter in adapters) != sorted(router.names):
            raise AdapterError(
                f"the router knows {', '.join(router.names)}; the adapters are {', '.join(a.name for a in adapters)}."
            )
        self._rereading = rereading
        self.router = router
        self.blend = attach(model, sorted(adapters, key=lambda adapter: router.names.index(adapter.name)))
        self._running: list[TokenSequence] = []
        self._retired: set[str] = set()  # adapters out of the router whose factors are still attached
        self._joining: set[str] = set()  # adapters that are attached before the router knows them

    @property
    def running(self) -> tuple[TokenSequence, ...]:
        """The rows that count as running."""
        return tuple(self._running)

    def check_new(self, name: str) -> None:
        """Raise an AdapterError if an adapter of this name is attached already."""
        if name in self.blend.names and name not in self._unused():
            why = "is still used by running rows" if name in self._retired else "exists already"
            raise AdapterError(f"adapter {name!r} {why}.")

    def plan_join(self, adapter: Adapter) -> Stacks:
        """Check whether an adapter fits, and return stacks with it: to build beside the steps, for `join`."""
        self.check_new(adapter.name)
        check_tokens([adapter], self._rereading)
        return self.blend.plan([*self._used(), adapter])

    def join(
        self,
        adapter: Adapter,
        centroids: Centroids,
        stacks: Stacks | None = None,
        *,
        states: Centroids | None = None,
    ) -> None:
        """Attach an adapter that has been read, with its centroid; running rows go on without it.

        On an error nothing has changed. `stacks` are used unless other adapters have come or gone since their plan.
        `states` is the centroid of the base model's states; without it no states can decide from then on.
        """
        if adapter.name not in self._joining:
            self.check_new(adapter.name)
        joined = self.router.join(centroids, states)
        if joined.centroids.names != (*self.router.centroids.names, adapter.name):
            raise AdapterError(f"the centroid is of {', '.join(centroids.names)}; the adapter is {adapter.name}.")
        others = [each for each in self._used() if each.name != adapter.name]
        router = self._able(joined, [*others, adapter])
        if adapter.name not in self._joining:
            self.attach(adapter, stacks)
        self._joining.discard(adapter.name)
        self.router = router

    def attach(self, adapter: Adapter, stacks: Stacks | None = None) -> None:
        """Attach an adapter that no row uses yet: until it joins, or is given up. `stacks` as in `join`."""
        self.check_new(adapter.name)
        if stacks is None or not self.blend.is_current(stacks):
            stacks = self.plan_join(adapter)
        self._take(stacks)
        self._retired.discard(adapter.name)
        self._joining.add(adapter.name)

    def give_up(self, name: str) -> None:
        """Let an adapter that has not joined go with the next `drop_retired`; nothing happens to any other."""
        if name in self._joining:
            self._joining.discard(name)
            self._retired.add(name)

    def retire(self, name: str) -> None:
        """Hide an adapter from new rows; its factors stay until `drop_retired`."""
        left = self.router.remove(name)
        if name in (self.router.params.fixed or {}):
            raise AdapterError(f"adapter {name!r} has a weight in the default routing's `fixed`; change that first.")
        self.router = self._able(left, self.blend.adapters)
        self._retired.add(name)

    def plan_drop(self) -> Stacks | None:
        """Return stacks without the unused retired adapters, to build beside the steps; None = no adapter is unused."""
        return self.blend.plan(self._used()) if self._unused() else None

    def drop_retired(self, stacks: Stacks | None = None) -> None:
        """Detach the retired adapters that no running row uses.

        `stacks` of `plan_drop` are used unless other adapters have come or gone since.
        """
        if stacks is None or not self.blend.is_current(stacks):
            stacks = self.plan_drop()
        if stacks is not None:
            self._take(stacks)

    def hold(self, rows: Sequence[TokenSequence]) -> None:
        """Count rows as running, so that the adapters they started with stay; `release` them when they have ended."""
        self._running += rows

    def release(self, rows: Sequence[TokenSequence]) -> bool:
        """Stop counting rows as running; return whether a retired adapter lost its last row, for `drop_retired`."""
        unused = self._unused()
        self._running = [row for row in self._running if row not in rows]
        return self._unused() > unused

    def check_routing(self, routing: Sequence[RoutingParams], router: Router | None = None) -> None:
        """Raise a TreadleError that lists every option that these adapters, or those of `router`, do not allow."""
        router = router or self.router
        problems: dict[str, OptionProblem] = {}  # by text: many rows may have the same
        for params in routing:
            try:
                self.blend.check_combine(params.combine, router.names)
                router.check(params)
            except OptionError as error:
                problems |= {problem.text: problem for problem in error.problems}
            except TreadleError as error:
                problems[str(error)] = OptionProblem((), str(error))
        if problems:
            texts = list(problems)
            message = one_or_list("routing options:", texts)
            raise OptionError(message, list(problems.values()))

    def _able(self, router: Router, adapters: Sequence[Adapter]) -> Router:
        """Return a changed router if its default routing can decide; an AdapterError where all requests would fail."""
        try:
            check_combine(router.params.combine, [each for each in adapters if each.name in router.names])
            if not router.lacks_samples:  # then each request says who acts
                self.check_routing([router.params], router)
        except OptionError as error:
            names = ", ".join(router.names)
            raise AdapterError(f"the default routing is not possible with the adapters {names}: {error}") from error
        return router

    def _unused(self) -> frozenset[str]:
        """Return the retired adapters that no running row uses."""
        if not self._retired:
            return frozenset()
        return frozenset(self._retired).difference(*(row.router.names for row in self._running))

    def _used(self) -> list[Adapter]:
        unused = self._unused()
        return [adapter for adapter in self.blend.adapters if adapter.name not in unused]

    def _take(self, stacks: Stacks) -> None:
        self.blend.take(stacks)
        self._retired.intersection_update(self.blend.names)
