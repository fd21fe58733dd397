"""Other libraries with the same adapters beside treadle: calls, or single tokens where they keep no cache."""

from dataclasses import replace
from functools import partial

from treadle.experiments.decode import BASE, call_title
from treadle.experiments.timing import Line, Table, Unit, interleave, lines
from treadle.experiments.workbench import SPARE, Lab, Steps, not_run, routings, run, started

from .peers import (
    BASE_STEP,
    EACH_DECISION,
    PAPER,
    XLORA,
    Missing,
    PeerOptions,
    Peers,
    cached_peers,
    tried,
    uncached_peers,
)
from .vllm_peer import ARMS, VllmWorker, vllm_peers

UNCACHED = "keeps no cache: reads the whole text for each token"
NOTES = {
    XLORA: f"{UNCACHED}; measured at batch 1 only, its classifier as initialised",
    PAPER: f"{UNCACHED}; merges by today's PEFT `linear`, where the paper's 0.4.0 left B unweighted: as much work",
}


def peers(lab: Lab, options: PeerOptions) -> list[Table]:
    """Run other libraries with the same adapters: whole calls, or single tokens where they keep no cache."""
    with VllmWorker.start(lab, options) as worker:
        made = [line for batch in lab.params.batch for line in _calls(lab, batch, worker)]
    return [Table("peers", call_title(lab), tuple(made)), _tokens(lab, options)]


def _calls(lab: Lab, batch: int, worker: VllmWorker) -> list[Line]:
    tokens = lab.params.tokens
    prompts = lab.prompts(batch, lab.params.prompt)
    own: Peers = {name: partial(run, lab.engine, prompts, tokens, each) for name, each in routings(lab.routing).items()}
    notes = {EACH_DECISION: "the first row's mixture serves all rows"} if batch > 1 else {}
    others = cached_peers(lab, prompts, tokens)
    arms = {BASE: others.pop(BASE), **own, **others, **vllm_peers(worker, prompts, tokens)}
    made = _lines(arms, lab, batch, tokens, notes)
    return [replace(line, note=worker.about) if line.arm in ARMS and line.seconds else line for line in made]


def _tokens(lab: Lab, options: PeerOptions) -> Table:
    """Time one token at a text, beside the base with and without its cache."""
    [text] = lab.prompts(1, options.paper_text)
    name, routing = list(routings(lab.routing).items())[-1]
    batch = started(lab.engine, [text], lab.params.rounds + SPARE, routing)
    others = uncached_peers(lab, text, options.sentence)
    arms: Peers = {BASE_STEP: others.pop(BASE_STEP), name: Steps(lab.engine, batch), **others}
    title = f"One token at a text of {len(text)} tokens"
    return Table("peers", title, tuple(_lines(arms, lab, 1, 1, NOTES)))


def _lines(arms: Peers, lab: Lab, batch: int, tokens: int, notes: dict[str, str]) -> list[Line]:
    """Time the arms that run, of which each call makes `tokens` tokens a row; say of the others why they do not."""
    arms = tried(arms)
    able: dict[str, Unit] = {name: unit for name, unit in arms.items() if not isinstance(unit, Missing)}
    seconds = interleave(able, lab.params.rounds, warm_up=0)  # each has had its trial
    each = {name: [value / tokens for value in values] for name, values in seconds.items()}
    missing = {name: unit.reason for name, unit in arms.items() if isinstance(unit, Missing)}
    read = {name: unit.read for name, unit in able.items() if isinstance(unit, Steps)}
    setting = lab.setting(batch)
    timed = lines(each, setting, tokens=batch, read=read, peak=lab.peak, notes=notes)
    return [*timed, *not_run(missing, setting)]
