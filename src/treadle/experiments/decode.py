"""Decoding for `treadle bench`: calls beside transformers' `generate`, steps beside routing off; and prompts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn

from treadle.common.errors import OptionError, TreadleError, reason_of
from treadle.common.params import COMBINES, RoutingParams
from treadle.engine.engine import Engine
from treadle.experiments.timing import Table, TableLine, Unit, interleave, lines
from treadle.experiments.workbench import (
    OFF_ARM,
    SPARE_TOKENS,
    Lab,
    Steps,
    blended,
    not_run,
    pooled,
    routings,
    run_call,
    start_batch,
    time_steps,
)
from treadle.routing.states import uses_states

GENERATE_ARM = "transformers generate, base"
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIDE_ARM = "every 1, rank 8 on all linear layers"
BY_TEXT_ARM = "treadle, every 2, states off"
PROMPT_QUARTERS = (4, 3, 2, 1)
"""Quarters of the prompt that the rows of a batch keep in turn, where their lengths differ."""


def decode(lab: Lab) -> Iterator[Table]:
    """Compare whole calls with transformers' `generate` of the bare base, then single steps with routing off."""
    yield calls(lab)
    yield steps(lab)


def calls(lab: Lab) -> Table:
    """Compare whole calls with transformers' own `generate` of the bare base."""
    plain = lab.base()
    made = [line for batch in lab.params.batch for line in _calls(lab, plain, batch)]
    return Table("decode", call_title(lab), tuple(made))


def call_title(lab: Lab) -> str:
    """Return the title of a table of calls, which says what a unit is."""
    return f"A call that reads {lab.params.prompt} tokens and makes {lab.params.tokens} a row, per made token"


def _calls(lab: Lab, plain: nn.Module, batch: int) -> list[TableLine]:
    prompts, tokens = lab.prompts(batch, lab.params.prompt), lab.params.tokens
    own = routings(lab.routing) | by_text(lab) | late(lab)
    arms: dict[str, Unit] = {GENERATE_ARM: partial(transformers_generate, plain, prompts, tokens)}
    arms |= {name: partial(run_call, lab.engine, prompts, tokens, each) for name, each in own.items()}
    seconds = interleave(arms, lab.params.rounds)
    each = {name: [value / tokens for value in values] for name, values in seconds.items()}
    return lines(each, lab.setting(batch), tokens=batch)


@torch.inference_mode()
def transformers_generate(model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    """Make `tokens` tokens a row with transformers' own greedy `generate`."""
    from transformers import GenerationConfig

    ids = torch.tensor(prompts, device=model.device)  # (B, T)
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    if output.shape != (len(prompts), len(prompts[0]) + tokens):
        raise TreadleError(f"generate gave {tuple(output.shape)} tokens")


def by_text(lab: Lab) -> dict[str, RoutingParams]:
    """Return the arm whose text alone decides, for a bundle whose base model's states decide otherwise."""
    own = lab.routing
    has_states = uses_states(lab.engine.router.states, own)
    return {BY_TEXT_ARM: replace(own, every=2, states=False)} if has_states else {}


def late(lab: Lab) -> dict[str, RoutingParams]:
    """Return arms of weights that come a decision late, for an embedder that takes long."""
    own = lab.routing
    can = lab.is_slow and own.rule != "fixed" and own.prefill == "prompt"
    return {"treadle, every 2, lag 1": replace(own, every=2, lag=1, states=False)} if can else {}


def steps(lab: Lab) -> Table:
    """Compare single steps with those of routing off."""
    wide = _wide(lab)
    made = [line for batch in lab.params.batch for line in _steps(lab, wide, batch)]
    start, end = lab.params.prompt, lab.params.prompt + lab.params.tokens
    return Table("decode", f"One step, a token a row, at texts of {start} to {end} tokens", tuple(made))


def _steps(lab: Lab, wide: Engine | str, batch: int) -> list[TableLine]:
    tokens = lab.params.tokens
    prompts = lab.prompts(batch, lab.params.prompt)

    def ready(routing: RoutingParams, engine: Engine = lab.engine, rows: Sequence[Sequence[int]] = prompts) -> Steps:
        return Steps(engine, start_batch(engine, rows, tokens + SPARE_TOKENS, routing))

    arms = {name: ready(each) for name, each in (routings(lab.routing) | by_text(lab)).items()}
    combined, missing = _combines(lab)
    arms |= {name: ready(each) for name, each in combined.items()}
    if isinstance(wide, Engine):
        arms[WIDE_ARM] = ready(pooled(lab.routing), wide)
    else:
        missing[WIDE_ARM] = wide
    if batch > 1:
        arms |= _uneven(lab, prompts)
    setting = lab.setting(batch)
    return [*time_steps(lab, arms, tokens, setting), *not_run(missing, setting)]


def _combines(lab: Lab) -> tuple[dict[str, RoutingParams], dict[str, str]]:
    """Return the routing of each other combine, and why these adapters cannot be combined so."""
    able: dict[str, RoutingParams] = {}
    missing: dict[str, str] = {}
    for combine in COMBINES:
        params = replace(blended(lab.routing), combine=combine)
        name = f"every 1, combine {combine}"
        try:
            lab.engine.check_routing([params])
        except OptionError as error:  # unequal ranks
            missing[name] = reason_of(error)
        else:
            able[name] = params
    own = f"every 1, combine {lab.routing.combine}"
    return {name: each for name, each in able.items() if name != own}, missing


def _uneven(lab: Lab, prompts: Sequence[Sequence[int]]) -> dict[str, Steps]:
    """Return the arms of batches whose rows differ: in their routing, or in the length of their texts."""
    total, own = lab.params.tokens + SPARE_TOKENS, blended(lab.routing)
    mixed = islice(cycle([own, RoutingParams.one(lab.engine.adapter_names[0]), RoutingParams.base()]), len(prompts))
    cut = [ids[: max(1, len(ids) * PROMPT_QUARTERS[row % 4] // 4)] for row, ids in enumerate(prompts)]
    batches = {
        "mixed rows: every 1, one adapter, base": start_batch(lab.engine, prompts, total, mixed),
        "prompts of different lengths, routing off": start_batch(lab.engine, cut, total, RoutingParams.base()),
        "prompts of different lengths, every 1": start_batch(lab.engine, cut, total, own),
    }
    return {name: Steps(lab.engine, batch) for name, batch in batches.items()}


def _wide(lab: Lab) -> Engine | str:
    """Return an engine with adapters of rank 8 on all linear layers, or why there is none."""
    try:
        return lab.pool(len(lab.bundle.adapters), rank=8, targets=ALL_LINEAR)
    except OptionError as error:  # the base names them otherwise
        return reason_of(error)


def prefill(lab: Lab) -> list[Table]:
    """Time the reading of a prompt, with routing off and blended."""
    length = lab.params.long_prompt
    made: list[TableLine] = []
    for batch in lab.params.batch:
        prompts = lab.prompts(batch, length)
        units = {name: partial(run_call, lab.engine, prompts, 1, each) for name, each in _readings(lab).items()}
        made += lines(interleave(units, max(lab.params.rounds, 5)), lab.setting(batch), tokens=batch * length)
    return [Table("prefill", f"Reading a prompt of {length} tokens a row, its first token included", tuple(made))]


def _readings(lab: Lab) -> Mapping[str, RoutingParams]:
    """Return the ways to read a prompt."""
    own = lab.routing
    arms = {OFF_ARM: RoutingParams.base(), "blended": replace(own, prefill="prompt")}
    if own.rule == "fixed":
        return arms
    if by_text(lab):
        arms["blended, states off"] = replace(own, prefill="prompt", states=False)
    causal = replace(own, prefill="causal", every=own.every or 2, lag=0, past="keep", states=False)
    return arms | {"blended, prefill causal": causal}
