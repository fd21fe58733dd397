"""Measures other libraries with the same adapters: calls, or single tokens where they keep no cache."""

from dataclasses import replace
from functools import partial

from treadle.experiments.decode import GENERATE_ARM, call_title
from treadle.experiments.timing import Table, TableLine, Unit, interleave, lines
from treadle.experiments.workbench import SPARE_TOKENS, Lab, Steps, not_run, routings, run_call, start_batch

from .peers import (
    BASE_STEP_ARM,
    MERGE_ARM,
    PAPER_ARM,
    XLORA_ARM,
    Missing,
    PeerOptions,
    Peers,
    cached_peers,
    tried,
    uncached_peers,
)
from .vllm_peer import VLLM_ARMS, VllmWorker, vllm_peers

UNCACHED_NOTE = "keeps no cache: reads the whole text for each token"
ARM_NOTES = {
    XLORA_ARM: f"{UNCACHED_NOTE}; measured at batch 1 only, its classifier as initialised",
    PAPER_ARM: f"{UNCACHED_NOTE}; merges by today's PEFT `linear`; the paper's 0.4.0 left B unweighted: as much work",
}


def peers(lab: Lab, options: PeerOptions) -> list[Table]:
    """Run other libraries with the same adapters: whole calls, or single tokens where they keep no cache."""
    with VllmWorker.start(lab, options) as worker:
        made = [line for batch in lab.params.batch for line in _calls(lab, batch, worker)]
    return [Table("peers", call_title(lab), tuple(made)), _tokens(lab, options)]


def _calls(lab: Lab, batch: int, worker: VllmWorker) -> list[TableLine]:
    tokens = lab.params.tokens
    prompts = lab.prompts(batch, lab.params.prompt)
    own: Peers = {
        name: partial(run_call, lab.engine, prompts, tokens, each) for name, each in routings(lab.routing).items()
    }
    notes = {MERGE_ARM: "the first row's mixture serves all rows"} if batch > 1 else {}
    others = cached_peers(lab, prompts, tokens)
    arms = {GENERATE_ARM: others.pop(GENERATE_ARM), **own, **others, **vllm_peers(worker, prompts, tokens)}
    made = _lines(arms, lab, batch, tokens, notes)
    return [replace(line, note=worker.about) if line.arm in VLLM_ARMS and line.seconds else line for line in made]


def _tokens(lab: Lab, options: PeerOptions) -> Table:
    """Time one token at a text, beside the base with and without its cache."""
    [text] = lab.prompts(1, options.paper_text)
    name, routing = list(routings(lab.routing).items())[-1]
    batch = start_batch(lab.engine, [text], lab.params.rounds + SPARE_TOKENS, routing)
    others = uncached_peers(lab, text, options.sentence)
    arms: Peers = {BASE_STEP_ARM: others.pop(BASE_STEP_ARM), name: Steps(lab.engine, batch), **others}
    title = f"One token at a text of {len(text)} tokens"
    return Table("peers", title, tuple(_lines(arms, lab, 1, 1, ARM_NOTES)))


def _lines(arms: Peers, lab: Lab, batch: int, tokens: int, notes: dict[str, str]) -> list[TableLine]:
    """Time the arms that run, each call making `tokens` tokens a row; say why the others do not run."""
    arms = tried(arms)
    able: dict[str, Unit] = {name: unit for name, unit in arms.items() if not isinstance(unit, Missing)}
    seconds = interleave(able, lab.params.rounds, warm_up=0)  # each has had its trial
    each = {name: [value / tokens for value in values] for name, values in seconds.items()}
    missing = {name: unit.reason for name, unit in arms.items() if isinstance(unit, Missing)}
    read = {name: unit.read for name, unit in able.items() if isinstance(unit, Steps)}
    setting = lab.setting(batch)
    timed = lines(each, setting, tokens=batch, read=read, peak=lab.peak, notes=notes)
    return [*timed, *not_run(missing, setting)]
