"""The engine: a base model, a tokenizer, attached adapters and a router; generates, streams and scores."""

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from treadle.common.errors import OptionError, problem_list
from treadle.common.params import RoutingParams, SamplingParams
from treadle.engine.adapter_set import AdapterSet
from treadle.engine.batch import Batch
from treadle.engine.chat import TokenPrompt, read_prompt, token_prompt
from treadle.engine.completion import Completion, GenerationError
from treadle.engine.prefix_cache import PrefixCache
from treadle.engine.runners.runner import check_pack, is_plain_decoder, new_runner
from treadle.engine.sequence import OutputOptions, SequenceError, TokenEvent, TokenSequence
from treadle.engine.state_fitting import check_states_fit, state_centroid
from treadle.engine.state_reading import read_views
from treadle.engine.state_texts import ReadText, texts_of_samples, texts_read_twice
from treadle.engine.supported import check_supported, rereading_layers
from treadle.engine.tokenization import Prompt, check_known, is_one_prompt
from treadle.lora.adapter import Adapter, read_adapter
from treadle.lora.blend import Blend
from treadle.routing.centroids import Floats
from treadle.routing.fitting import centroid_of
from treadle.routing.router import Router
from treadle.routing.samples import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_BATCH, GPU_BATCH = 32, 128
"""Sequences of one call to `generate` that share a forward pass, on a CPU and on a GPU. More wait."""
Options = TypeVar("Options")
Prompts = list[str] | tuple[str, ...] | Sequence[Sequence[Mapping[str, Any]]]
"""Texts, or chats."""
Samplings = SamplingParams | Sequence[SamplingParams]
Routings = RoutingParams | Sequence[RoutingParams]


class Engine:
    """One base model with its adapters. Use it from one thread at a time; several engines may live in one process."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        adapters: Sequence[Adapter],
        router: Router,
        *,
        is_fast: bool = True,
        pack: bool | None = None,
    ) -> None:
        """Attach the adapters.

        Args:
            model: the base.
            tokenizer: the base's.
            adapters: those that the router knows.
            router: says who acts.
            is_fast: False keeps our own steps out and always calls the model's `forward`.
            pack: keep a second copy of the weights as oneDNN packs them (`treadle.engine.runners.cpu.packing`), which
                makes steps on AMD's CPUs up to twice as fast; None = there, where it takes at most a GiB.

        Raises:
            ModelError: the engine cannot run the model (`treadle.engine.supported`), or the router's states are of
                another one.
            AdapterError: router and adapters differ, or an adapter targets layers that cannot be blended by token.
            OptionError: `pack` is true and nothing reads packed weights, or the adapters cannot be combined so.
        """
        check_supported(model)
        check_pack(model, pack, is_fast=is_fast)
        if router.states is not None:
            check_states_fit(model, router.states)
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch = MAX_BATCH if model.device.type == "cpu" else GPU_BATCH  # sequences of a call in one pass
        rereading = frozenset[str]() if is_plain_decoder(model) else rereading_layers(model)
        self.adapters = AdapterSet(model, adapters, router, rereading)
        self.runner = new_runner(model, self.blend, pack=pack, is_fast=is_fast)
        if not router.lacks_samples:  # then each call says who acts
            self.check_routing([router.params])

    @property
    def blend(self) -> Blend:
        """The adapters attached to the model."""
        return self.adapters.blend

    @property
    def router(self) -> Router:
        """The router over the adapters that new rows may use."""
        return self.adapters.router

    @router.setter
    def router(self, router: Router) -> None:
        self.adapters.router = router

    @property
    def is_fast(self) -> bool:
        """Whether steps run through passes of our own rather than the model's own `forward`."""
        return bool(self.runner.own)

    @property
    def running(self) -> tuple[TokenSequence, ...]:
        """The rows that run, or wait for a batch."""
        return self.adapters.running

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The adapters' names, in the order of every N axis."""
        return self.router.names

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows; a tokenizer may have more, where tokens were added to it."""
        return int(cast(Any, self.model.get_input_embeddings()).weight.shape[0])

    @property
    def context(self) -> int | None:
        """The most tokens that a row may have, prompt and answer together; None = the model does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @overload
    def generate(
        self, prompt: Prompt, *, sampling: Samplings | None = None, routing: Routings | None = None
    ) -> Completion: ...

    @overload
    def generate(
        self, prompt: Prompts, *, sampling: Samplings | None = None, routing: Routings | None = None
    ) -> list[Completion]: ...

    def generate(
        self, prompt: Prompt | Prompts, *, sampling: Samplings | None = None, routing: Routings | None = None
    ) -> Completion | list[Completion]:
        """Generate from one prompt, a list of prompts, or chat messages.

        Args:
            prompt: a text; a list of texts; messages `[{"role": ..., "content": ...}, ...]`; or a list of these.
                A chat is routed on the contents of its messages alone, joined by blank lines.
            sampling: for all rows, or one a row.
            routing: for all rows, or one a row; None takes the bundle's.

        Returns:
            a Completion; for a list of prompts a list of them, in its order.

        Raises:
            GenerationError: some prompts cannot be continued, such as where the model overflows; it has the others'
                completions.
            TreadleError: an option or prompt is not possible; nothing has been generated.
        """
        is_one = is_one_prompt(prompt)
        started = time.perf_counter()
        rows = self._rows(cast(Sequence[Prompt], [prompt] if is_one else prompt), sampling, routing)
        completions = self._complete(rows, started)
        return completions[0] if is_one else completions

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int] | TokenPrompt],
        *,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        routing: RoutingParams | Sequence[RoutingParams] | None = None,
    ) -> list[Completion]:
        """Generate from prompts that are token ids already, each (T); see `generate`."""
        started = time.perf_counter()
        return self._complete(self._rows(prompts, sampling, routing, read=token_prompt), started)

    def stream(
        self, prompt: Prompt, *, sampling: SamplingParams | None = None, routing: RoutingParams | None = None
    ) -> Generator[TokenEvent]:
        """Generate from one prompt and yield each token as it comes; the texts join to the completion's text.

        Options are checked by the call itself, before the first token is asked for. A GenerationError ends a text that
        cannot be continued.
        """
        rows = self._rows([prompt], sampling, routing)
        return self._stream(rows)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], *, routing: RoutingParams | None = None
    ) -> list[Floats]:
        """Return the log-probabilities (nats) of each completion's tokens after its prompt, one array a row.

        The weights are those that generation would have used had it chosen these tokens.
        """
        from treadle.engine.scoring import score

        params = routing or self.router.params
        self.check_routing([params])
        return score(self, prompts, completions, params)

    def add_adapter(self, name: str, path: str | Path, samples: Sequence[str | Sample]) -> None:
        """Attach one more adapter and fit its centroid to sample texts; running rows go on without it.

        On an error nothing has changed.
        """
        self.adapters.check_new(name)
        adapter = read_adapter(path, name)
        own = centroid_of(name, samples, self.router.embedder, tails=self.router.tails)
        if self.router.states is None:
            self.adapters.join(adapter, own)
            return
        texts = texts_of_samples(self.tokenizer, samples)
        plain = self.read_states(texts)
        try:
            self.adapters.attach(adapter)
            under = self.read_states(texts_read_twice(texts), name)
            self.adapters.join(adapter, own, states=state_centroid(name, texts, plain, under, self.router.states))
        except BaseException:
            self.adapters.give_up(name)
            self.adapters.drop_retired()
            raise

    def read_states(self, texts: Sequence[ReadText], under: str | None = None) -> Floats:
        """Return the views (places, K, H) of texts' states, by the plain base or under an adapter.

        Args:
            texts: at whose places states are taken.
            under: name of an attached adapter, which acts alone; None = the base.
        """
        classes = self.router.states
        if classes is None:
            raise OptionError("this router reads no states: fit one with base+EMBEDDER.")
        weights = None if under is None else [float(name == under) for name in self.blend.names]
        with self.blend.using(weights):
            return read_views(self.model, texts, [classes.layer], classes.spans)[:, 0]

    def remove_adapter(self, name: str) -> None:
        """Take an adapter out: new rows no longer see it, running rows finish with it."""
        self.adapters.retire(name)
        self.adapters.drop_retired()

    def check_routing(self, routing: Sequence[RoutingParams], router: Router | None = None) -> None:
        """Raise a TreadleError that lists every option that these adapters, or those of `router`, do not allow."""
        self.adapters.check_routing(routing, router)

    def new_batch(self, end_ids: frozenset[int] | None = None, prefixes: PrefixCache | None = None) -> Batch:
        """Return an empty batch whose rows end at `end_ids`, by default the model's; hooks rule out passes of our own.

        Batches that are given the same `prefixes` read a beginning that their rows share only once.
        """
        end_ids = self._end_ids() if end_ids is None else end_ids
        return Batch(self.runner.unhooked(), self.blend, end_ids, prefixes)

    def new_rows(
        self,
        prompts: Sequence[Sequence[int] | TokenPrompt],
        *,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        routing: RoutingParams | Sequence[RoutingParams] | None = None,
        report: OutputOptions | None = None,
        router: Router | None = None,
    ) -> list[TokenSequence]:
        """Return rows of prompts that are tokens, each (T), to `adapters.hold` and then run in a batch of `new_batch`.

        Args:
            prompts: token ids of each row; of a chat with what it says (`treadle.engine.chat.read_prompt`).
            sampling: for all rows, or one a row.
            routing: for all rows, or one a row; None takes the router's.
            report: what the rows tell beyond their tokens.
            router: of some of the engine's adapters; None takes all.
        """
        rows = self._rows(prompts, sampling, routing, read=token_prompt, router=router)
        for row in rows:
            row.report = report or row.report
        return rows

    def detach(self) -> None:
        """Give the base model back as it was; the engine is of no use afterwards."""
        self.blend.detach()

    def _stream(self, rows: Sequence[TokenSequence]) -> Generator[TokenEvent]:
        for _, event in self._run(rows):
            if isinstance(event, SequenceError):
                raise GenerationError([None], {0: event}) from event
            yield event

    def _complete(self, rows: Sequence[TokenSequence], started: float) -> list[Completion]:
        done: dict[TokenSequence, Completion] = {}
        for row, event in self._run(rows):
            if isinstance(event, TokenEvent) and event.finish_reason:
                done[row] = Completion.of(row, event.finish_reason, time.perf_counter() - started)
        if failures := {place: row.failure for place, row in enumerate(rows) if row.failure}:
            raise GenerationError([done.get(row) for row in rows], failures) from next(iter(failures.values()))
        return [done[row] for row in rows]

    def _rows(
        self,
        prompts: Sequence[Any],
        sampling: Any,
        routing: Any,
        *,
        read: Callable[[Any], TokenPrompt] | None = None,
        router: Router | None = None,
    ) -> list[TokenSequence]:
        """Make rows, or raise one error that lists what is wrong with any of them."""
        router = router or self.router
        samplings = _each(sampling or SamplingParams(), len(prompts), SamplingParams, "sampling")
        routings = _each(routing or router.params, len(prompts), RoutingParams, "routing")
        self.check_routing(routings, router)
        context, vocabulary = self.context, self.vocabulary
        rows: list[TokenSequence] = []
        problems: list[str] = []
        for index, (prompt, each, params) in enumerate(zip(prompts, samplings, routings, strict=True)):
            try:
                given = read(prompt) if read else read_prompt(self.tokenizer, prompt)
                check_known(self.tokenizer, given.ids, vocabulary)
            except OptionError as error:
                problems.append(f"prompt {index}: {error}")
                continue
            length = len(given.ids)
            room = context - length if context else each.max_tokens
            if room < 1:
                problems.append(f"prompt {index} has {length} tokens; the model reads at most {context}")
                continue
            limited = replace(each, max_tokens=min(each.max_tokens, room))
            rows.append(TokenSequence(given, router, params, limited, self.tokenizer))
        if problems:
            raise OptionError(problem_list("prompts:", problems))
        return rows

    def _run(self, rows: Sequence[TokenSequence]) -> Generator[tuple[TokenSequence, TokenEvent | SequenceError]]:
        """Run rows to their end, a limited number at a time, the longest-waiting first."""
        batch = self.new_batch()
        waiting = list(rows)
        self.adapters.hold(rows)
        try:
            while waiting or batch.rows:
                free = self.max_batch - len(batch.rows)
                joining, waiting = waiting[:free], waiting[free:]
                if batch.rows:
                    yield from batch.step()
                if joining:
                    yield from batch.join(joining)
        finally:
            self.adapters.release(rows)
            self.adapters.drop_retired()

    def _end_ids(self) -> frozenset[int]:
        generation = getattr(self.model, "generation_config", None)
        given: list[Any] = [getattr(generation, "eos_token_id", None), self.tokenizer.eos_token_id]
        ids: list[Any] = [each for entry in given for each in (entry if isinstance(entry, list) else [entry])]
        return frozenset(int(each) for each in ids if each is not None)


def _each(given: Any, count: int, kind: type[Options], name: str) -> list[Options]:
    """Return `count` options: the given one for all, or the given list."""
    each = [given] * count if isinstance(given, kind) else list(cast(Iterable[Any], given))
    if len(each) != count or not all(isinstance(entry, kind) for entry in each):
        raise OptionError(f"{name}: expected one {kind.__name__}, or a list of {count}, one a prompt.")
    return each
