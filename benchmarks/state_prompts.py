"""Prints how the base's states decide on prompts, under the text's weights and without adapters: a Markdown table.

    python benchmarks/state_prompts.py --data ../shared/data [--samples 60] [--limit 30]

- read again: the share of prompts whose states move a weight further than the bound (`treadle.routing.states`);
- right: the share whose largest weight is that of their own adapter, or the base's where they have no adapter: by the
  text alone; as the engine reads the prompt; by the states of the plain base.

The adapters are the demo's four; the rows are of validation.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from router import EMBEDDER, FORMS, print_table, texts_of
from router_rows import FOUR, MORE, load_rows

from treadle.bundle.base_model import load_model, load_tokenizer
from treadle.common.files import locate
from treadle.engine.engine import Engine
from treadle.engine.state_fitting import fit_base_states
from treadle.engine.state_reading import read_states
from treadle.engine.tokenization import prompt_ids
from treadle.experiments.tasks import Example
from treadle.lora.adapter import read_adapter
from treadle.routing.centroids import Floats
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.fitting import fit
from treadle.routing.schedule import Seen
from treadle.routing.states import StateTrail, is_far

ADAPTERS = EMBEDDER.parent / "adapters"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data files")
    parser.add_argument("--samples", type=int, default=60, help="of each adapter")
    parser.add_argument("--limit", type=int, default=30, help="prompts of each domain")
    options = parser.parse_args()
    rows = load_rows(options.data)
    engine = new_engine({name: rows["samples"][name][: options.samples] for name in FOUR})
    print_table(
        f"{options.limit} prompts of each of eight domains.",
        ["prompts", "form", "read again", "right, text alone", "right, as read", "right, plain base's states"],
        ([kind, form, *measure(engine, {name: rows["validation"][name][: options.limit] for name in names}, form)]
         for kind, names in (("own", FOUR), ("foreign", MORE)) for form in FORMS),
    )  # fmt: skip


def new_engine(samples: dict[str, list[Example]]) -> Engine:
    """Return the demo's adapters on their base, with a router of texts and states."""
    adapters = [read_adapter(ADAPTERS / name, name) for name in FOUR]
    states = fit_base_states(BASE, samples, adapters)[0]
    router = replace(fit(samples, StaticEmbedder.load(EMBEDDER)), states=states)
    return Engine(load_model(BASE), load_tokenizer(locate(BASE)), adapters, router)


def measure(engine: Engine, examples: dict[str, list[Example]], form: str) -> list[float]:
    """Return the share of prompts that are read again, and the shares that are right in each way."""
    found: list[list[bool]] = []
    for name, own in examples.items():
        right = FOUR.index(name) if name in FOUR else len(FOUR)
        for text in texts_of(own, form):
            by_text = engine.router.weights([text])[0]  # (N,)
            ids = prompt_ids(engine.tokenizer, text)
            by_states, plain = (decide(engine, ids, weights) for weights in (by_text, None))
            is_again = is_far(by_states, by_text)
            as_read = by_states if is_again else by_text
            found.append([is_again, *(largest(each) == right for each in (by_text, as_read, plain))])
    return np.mean(found, 0).tolist()


@torch.inference_mode()
def decide(engine: Engine, ids: Sequence[int], weights: Floats | None) -> Floats:
    """Return the weights (N,) that states give, of a prompt that is read under weights (N,)."""
    classes = engine.router.states
    assert classes is not None
    with engine.blend.using(weights):
        states = read_states(engine.model, [classes.layer], input_ids=torch.tensor([list(ids)]))[0, 0]
    trail = StateTrail(classes.spans)
    trail.put(0, states.numpy())
    return engine.router.weigh_states(Seen(trail.views()[None], np.array([False])), engine.router.params)[0]


def largest(weights: Floats) -> int:
    """Return the index of the largest weight (N,); N = the base's share."""
    return int(np.append(weights, 1 - weights.sum()).argmax())


if __name__ == "__main__":
    main()
