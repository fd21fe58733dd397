"""Prints how well the base's own states know domains, as Markdown tables: validation rows, or test rows with `--test`.

    python benchmarks/base_states.py --data ../shared/data [--only nearest streams languages] [--test] [--counts 60 120]
        [--layers 20]

- nearest: the share of prompts whose nearest adapter is their own, eight domains;
- streams: how soon the right adapter leads after a text has changed its domain, eight domains;
- languages: weights of prompts in other languages under the first four domains.

All texts are read by the plain base. The first four adapters are the demo's; they are attached while the classes are
fitted, which measures how they move states. The four others have factors of zero: nobody has trained them. `treadle
eval` measures routing under the weights in force (`benchmarks/answers.py`).
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from router import FORMS, LANGUAGES, Samples, Stream, chosen, print_table, quantiles, streams, texts_of
from router_rows import EIGHT, FOUR, load_rows

from treadle.bundle.base_model import load_model, load_tokenizer
from treadle.common.files import locate
from treadle.common.params import RoutingParams
from treadle.engine.runners.blocks import blocks_of, outputs_of
from treadle.engine.state_fitting import fit_states
from treadle.engine.tokenization import completion_ids, prompt_ids
from treadle.experiments.tasks import SEPARATOR
from treadle.lora.adapter import Adapter, read_adapter
from treadle.routing.centroids import Centroids
from treadle.routing.rules import apply_rule_beside_base
from treadle.routing.schedule import Seen
from treadle.routing.states import StateClasses, StateTrail

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTERS = Path(__file__).parents[1] / "demo" / "bundle" / "adapters"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PARTS = ("nearest", "streams", "languages")
PASS_TOKENS = 2048
MAX_TOKENS = 384
"""The tokens of a text that are read, its last."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data files")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--counts", nargs="+", type=int, default=[60, 120], help="samples of each adapter; 120 at most")
    parser.add_argument("--layers", nargs="+", type=int, help="that are tried; all takes long")
    parser.add_argument("--limit", type=int, default=300, help="held-out prompts of each domain")
    parser.add_argument("--test", action="store_true", help="test rows; choices are made on validation rows only")
    options = parser.parse_args()
    rows = load_rows(options.data)
    held_out = {name: each[: options.limit] for name, each in rows["test" if options.test else "validation"].items()}
    base = Base(options.layers)
    if "languages" in options.only:
        print_languages(base, base.fit(chosen(rows["samples"], FOUR, options.counts[0])))
    if "nearest" in options.only or "streams" in options.only:
        fitted = {count: base.fit(chosen(rows["samples"], EIGHT, count)) for count in options.counts}
        if "nearest" in options.only:
            print_nearest(base, fitted, held_out)
        if "streams" in options.only:
            print_streams(base, fitted, held_out)


class Base:
    """The plain base, in bfloat16, and what it makes of texts."""

    def __init__(self, layers: Sequence[int] | None = None) -> None:
        self._layers = layers
        folder = locate(BASE)
        self.model: PreTrainedModel = load_model(BASE, dtype="bfloat16")
        self.tokenizer: Any = load_tokenizer(folder)

    def fit(self, samples: Samples) -> StateClasses:
        """Return classes over the states of samples."""
        adapters = [_adapter(name) for name in samples]
        classes, report = fit_states(self.model, self.tokenizer, samples, adapters, self._layers)
        print(f"{len(samples)} domains: layer {classes.layer}, {report.accuracy:.3f} by cross-validation", flush=True)
        return classes

    def views(self, texts: Sequence[str], classes: Sequence[StateClasses]) -> dict[int, Seen]:
        """Return the views of texts, as prompts, for each of the layers of classes."""
        ids = [prompt_ids(self.tokenizer, text)[-MAX_TOKENS:] for text in texts]
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        found: dict[int, dict[int, Any]] = {each.layer: {} for each in classes}
        while order:
            size = max(1, PASS_TOKENS // len(ids[order[-1]]))
            some, order = order[-size:], order[:-size]
            states = self.states([ids[index] for index in some], list(found))
            for each in classes:
                for index, own in zip(some, states[each.layer], strict=True):
                    trail = StateTrail(each.spans)
                    trail.put(0, own[: len(ids[index])])
                    found[each.layer][index] = trail.views()
        return {
            layer: Seen(np.stack([own[index] for index in range(len(ids))]), np.zeros(len(ids), bool))
            for layer, own in found.items()
        }

    @torch.inference_mode()
    def states(self, ids: Sequence[Sequence[int]], layers: Sequence[int]) -> dict[int, np.ndarray]:
        """Return the states (B, T, H) of texts after some layers, padded on the right."""
        length = max(map(len, ids))
        padded = torch.tensor([[*row, *([0] * (length - len(row)))] for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
        blocks = blocks_of(self.model)
        assert blocks is not None
        with outputs_of(blocks, layers) as found:
            self.model.get_decoder()(input_ids=padded, attention_mask=mask, use_cache=False)
        return {layer: found[layer].float().numpy() for layer in layers}


def _adapter(name: str) -> Adapter:
    """Return the demo's adapter, or one of zeros."""
    if name in FOUR:
        return read_adapter(ADAPTERS / name, name)
    like = read_adapter(ADAPTERS / FOUR[0], name)
    pairs = {module: replace(pair, b=torch.zeros_like(pair.b)) for module, pair in like.pairs.items()}
    return replace(like, pairs=pairs)


def nearest(classes: Centroids, seen: Seen) -> np.ndarray:
    """Return the nearest adapter (B,) of texts."""
    return classes.evidence(seen.views, seen.is_running)[:, : len(classes.names)].argmax(-1)


def print_nearest(base: Base, fitted: Mapping[int, StateClasses], held_out: Samples) -> None:
    shares: dict[tuple[int, str], list[float]] = {(count, form): [] for count in fitted for form in FORMS}
    for index, name in enumerate(EIGHT):
        for form in FORMS:
            seen = base.views(texts_of(held_out[name], form), list(fitted.values()))
            for count, classes in fitted.items():
                right = nearest(classes.centroids, seen[classes.layer]) == index
                shares[count, form].append(float(right.mean()))
    title = "Share of prompts whose nearest adapter is their own, by the plain base's states, eight domains."
    lines = ([count, form, float(np.mean(own)), *own] for (count, form), own in shares.items())
    print_table(title, ["samples each", "form", "mean", *EIGHT], lines)


def print_streams(base: Base, fitted: Mapping[int, StateClasses], held_out: Samples) -> None:
    title = (
        "Two examples of different domains in one text, decided at every token. Leads: tokens of the second example "
        "before its adapter is nearest (median, 90th percentile). Stays: before it is nearest for good. Right: share "
        "of the tokens whose nearest adapter is right."
    )
    heads = ["samples each", "second prompt", "streams", "leads", "stays", "right, second prompt",
             "right, second answer"]  # fmt: skip
    print_table(title, heads, _stream_lines(base, fitted, held_out))


def _stream_lines(base: Base, fitted: Mapping[int, StateClasses], held_out: Samples) -> Iterator[Sequence[object]]:
    for form in FORMS:
        followed: dict[int, list[tuple[int, int, float, float]]] = {count: [] for count in fitted}
        for stream in streams(EIGHT, held_out):
            for count, own in follow(base, fitted, stream, form).items():
                followed[count].append(own)
        for count, found in followed.items():
            leads, stays, asked, answered = zip(*found, strict=True)
            yield [count, form, len(found), quantiles(leads), quantiles(stays), float(np.mean(asked)),
                   float(np.mean(answered))]  # fmt: skip


def follow(
    base: Base, fitted: Mapping[int, StateClasses], stream: Stream, form: str
) -> dict[int, tuple[int, int, float, float]]:
    """Decide the second example of a stream at every token: leads, stays, right in its prompt and in its answer."""
    first, second = stream.example, stream.other
    before = prompt_ids(base.tokenizer, first.prompt) + completion_ids(base.tokenizer, first.completion + SEPARATOR)
    asked = completion_ids(base.tokenizer, getattr(second, FORMS[form]))
    answer = completion_ids(base.tokenizer, second.completion)
    states = base.states([[*before, *asked, *answer]], sorted({each.layer for each in fitted.values()}))
    found: dict[int, tuple[int, int, float, float]] = {}
    for count, classes in fitted.items():
        own, trail = states[classes.layer][0], StateTrail(classes.spans)
        trail.put(0, own[: len(before)])
        views: list[np.ndarray] = []
        for place in range(len(before), len(own)):
            trail.put(place, own[place : place + 1])
            views.append(trail.views())
        is_right = nearest(classes.centroids, Seen(np.stack(views), np.ones(len(views), bool))) == stream.second
        leads = int(is_right.argmax()) if is_right.any() else len(is_right)
        stays = 0 if is_right.all() else len(is_right) - int(is_right[::-1].argmin())
        found[count] = leads, stays, float(is_right[: len(asked)].mean()), float(is_right[len(asked) :].mean())
    return found


def print_languages(base: Base, classes: StateClasses) -> None:
    heads = ["prompts", "base's share", "right adapter", "nearest"]
    title = "Mean weights of prompts, by the plain base's states, under adapters of the first four domains."
    print_table(title, heads, _language_lines(base, classes))


def _language_lines(base: Base, classes: StateClasses) -> Iterator[Sequence[object]]:
    centroids = classes.centroids
    for language, prompts in json.loads(LANGUAGES.read_text("utf-8")).items():
        right = np.array([index for index, name in enumerate(FOUR) for _ in prompts[name]])
        seen = base.views([text for name in FOUR for text in prompts[name]], [classes])[classes.layer]
        evidence = centroids.evidence(seen.views, seen.is_running)
        weights = apply_rule_beside_base(evidence, RoutingParams(), centroids.temperatures(seen.is_running))
        own = weights[np.arange(len(right)), right]
        yield [language, float(1 - weights.sum(-1).mean()), float(own.mean()),
               float((nearest(centroids, seen) == right).mean())]  # fmt: skip


if __name__ == "__main__":
    main()
