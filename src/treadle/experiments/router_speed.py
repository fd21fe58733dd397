"""Times the router's decisions for `treadle bench`: one and 64 at once, by text length."""

from dataclasses import replace
from itertools import cycle, islice

from treadle.common.params import RoutingParams
from treadle.engine.tokenization import Detokenizer
from treadle.experiments.timing import Table, Unit, interleave, lines
from treadle.experiments.workbench import SPARE_TOKENS, WARM_UP_STEPS, Lab, Steps, not_run, pooled, start_batch
from treadle.routing.schedule import DecisionCursor, Views

STREAM_COUNTS = (1, 64)
"""Texts that are decided at once."""
STEP_ARM = "a step of the base"


def router(lab: Lab) -> list[Table]:
    """Decide weights after one more token, by the length of the text, against a step of the base.

    A step of the base runs before each unit, without a clock: a decision falls due between two steps, when the model
    has emptied the caches.
    """
    rounds = lab.params.rounds if lab.is_slow else lab.params.tokens
    lengths, most = lab.sizes.text_tokens, lab.sizes.max_slow_tokens
    step, *steps = (_base_steps(lab, rounds) for _ in range(1 + len(lengths) * len(STREAM_COUNTS)))
    arms: dict[str, Unit] = {STEP_ARM: step}
    missing: dict[str, str] = {}
    for length in lengths:
        for streams in STREAM_COUNTS:
            name = f"{streams} x one decision, text of {length} tokens"
            if lab.is_slow and streams * length > most:
                missing[name] = f"this embedder reads every text anew; at most {most} tokens a time"
            else:
                arms[name] = Decisions(lab, streams, length)
    read = step.read
    before: dict[str, Unit] = dict(zip(arms, [step, *steps], strict=False))
    del before[STEP_ARM]
    seconds = interleave(arms, rounds, WARM_UP_STEPS, before=before)
    setting = lab.setting(1)
    made = lines(seconds, setting, read={STEP_ARM: (read + step.read) // 2}, peak=lab.peak)
    name = lab.engine.router.embedder.id.partition(":")[0]
    title = f"Decisions of the router, {name} embedder, each after a step of the base"
    return [Table("router", title, (*made, *not_run(missing, setting)))]


def _base_steps(lab: Lab, rounds: int) -> Steps:
    batch = start_batch(lab.engine, lab.prompts(1, lab.params.prompt), rounds + SPARE_TOKENS, RoutingParams.base())
    return Steps(lab.engine, batch)


class Decisions:
    """Texts of the bundle's samples that grow by a token a call, and whose weights are decided each time."""

    def __init__(self, lab: Lab, streams: int, length: int) -> None:
        self._router = lab.engine.router
        own = lab.routing
        self._params = replace(own, every=1, lag=0) if own.rule != "fixed" else pooled(own)
        pieces = sample_pieces(lab)
        self._coming = [islice(cycle(pieces), stream * 7 % len(pieces), None) for stream in range(streams)]
        self._texts = [DecisionCursor(self._router, self._params, list(islice(each, 1)), 1) for each in self._coming]
        for text, coming in zip(self._texts, self._coming, strict=True):
            text.add(list(islice(coming, length - 1)))
        self()

    @property
    def pieces(self) -> list[list[str]]:
        """The text that each token of each stream adds."""
        return [text.pieces for text in self._texts]

    def __call__(self) -> None:
        """Read one more token of each text, and decide its weights."""
        views: list[Views] = []
        for text, coming in zip(self._texts, self._coming, strict=True):
            text.add([next(coming)])
            view = text.decide_last(text.num_tokens)
            views += [view] if view is not None else []
        self._router.weigh(self._router.finish(views), self._params)


def sample_pieces(lab: Lab) -> list[str]:
    """Return the text that each token of the bundle's samples adds, one sample after the other."""
    text = Detokenizer(lab.engine.tokenizer)
    return [text.push(token_id) for ids in lab.sample_ids() for token_id in ids]
