"""Runs the same adapters on the same model in other ways: transformers, PEFT, the paper's loop.

Each peer is the library's own code, called as its documentation says. One that cannot run says why.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from treadle.common.errors import reason_of
from treadle.common.transformers_names import cache_argument, find_cache
from treadle.experiments.decode import GENERATE_ARM, transformers_generate
from treadle.experiments.timing import Unit
from treadle.routing.embedder import Embedder, load_embedder
from treadle.routing.router import Router
from treadle.routing.rules import boosted

if TYPE_CHECKING:
    from treadle.experiments.workbench import Lab

BLEND_NAME = "blend"
"""What the peers that merge call the merged adapter."""
ONE_ARM, MERGED_ARM = "PEFT, one adapter", "PEFT, one adapter merged"
MERGE_ARM, ARROW_ARM = "PEFT, add_weighted_adapter every 2 tokens", "PEFT Arrow, top 2"
XLORA_ARM, PAPER_ARM = "PEFT X-LoRA, untrained", "the paper's loop"
BASE_STEP_ARM, BASE_TEXT_ARM = "transformers, base, one step with its cache", "transformers, base, the whole text"


@dataclass(frozen=True)
class PeerOptions:
    """Options of the peers alone.

    Attributes:
        paper_text: tokens of the text that peers without a cache read for each token.
        sentence: embedder of the paper's loop.
        vllm: Python of an environment that has vLLM.
        vllm_compile: vLLM's compiled mode, which takes minutes to start.
    """

    paper_text: int = 256
    sentence: str = "sentence-transformers/all-MiniLM-L6-v2"
    vllm: str = ".venv-vllm/bin/python"
    vllm_compile: bool = False


@dataclass(frozen=True)
class Missing:
    """A peer that cannot run here."""

    reason: str


Peers = dict[str, Unit | Missing]


def cached_peers(lab: "Lab", prompts: Sequence[Sequence[int]], tokens: int) -> Peers:
    """Return the peers that keep keys and values: each unit is a call that makes `tokens` tokens a row of `prompts`."""
    folders = {adapter.name: adapter.source for adapter in lab.bundle.adapters}
    generate = partial(_generating, prompts, tokens)
    make: dict[str, Callable[[Any], Unit]] = {
        GENERATE_ARM: generate,
        ONE_ARM: lambda model: generate(one_adapter(model, folders)),
        MERGED_ARM: lambda model: generate(one_adapter(model, folders).merge_and_unload()),
        MERGE_ARM: lambda model: partial(merge_each_decision, Merging(lab, model, folders), prompts, tokens),
        ARROW_ARM: lambda model: generate(arrow(model, folders)),
    }
    return {name: _made(lab, each) for name, each in make.items()}


def _generating(prompts: Sequence[Sequence[int]], tokens: int, model: Any) -> Unit:
    return partial(transformers_generate, model, prompts, tokens)


def uncached_peers(lab: "Lab", text: Sequence[int], sentence: str) -> Peers:
    """Return peers that read the whole text for each token, after the base: each unit gives `text` its next token."""
    folders = {adapter.name: adapter.source for adapter in lab.bundle.adapters}
    make: dict[str, Callable[[Any], Unit]] = {
        BASE_STEP_ARM: lambda model: cached_step(model, [text]),
        BASE_TEXT_ARM: lambda model: partial(next_token, model, text, only_last=True),
        XLORA_ARM: lambda model: partial(next_token, xlora(model, folders), text, only_last=True),
        PAPER_ARM: lambda model: PaperLoop(Merging(lab, model, folders), load_embedder(sentence), text),
    }
    return {name: _made(lab, each) for name, each in make.items()}


def _made(lab: "Lab", make: Callable[[Any], Unit]) -> Unit | Missing:
    """Return a peer on a base model of its own."""
    return _or_missing(lambda: make(lab.base()))


def tried(arms: Peers) -> Peers:
    """Run each arm once; those that fail are missing."""

    def trial(unit: Unit) -> Unit:
        unit()
        return unit

    return {
        name: unit if isinstance(unit, Missing) else _or_missing(partial(trial, unit)) for name, unit in arms.items()
    }


def _or_missing(make: Callable[[], Unit]) -> Unit | Missing:
    try:
        return make()
    except Exception as error:  # the errors of other people's libraries have no narrower base in common
        return Missing(reason_of(error))


def one_adapter(model: Any, folders: Mapping[str, Path]) -> Any:
    """Return PEFT's model with the first adapter."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(next(iter(folders.values())))).eval()


def arrow(model: Any, folders: Mapping[str, Path]) -> Any:
    """Return PEFT's Arrow over the adapters: each token and module chooses two by itself."""
    from peft import ArrowConfig, create_arrow_model

    paths = [str(folder) for folder in folders.values()]
    return create_arrow_model(model, paths, ArrowConfig(top_k=min(2, len(paths)), rng_seed=0)).eval()


def xlora(model: Any, folders: Mapping[str, Path]) -> Any:
    """Return PEFT's X-LoRA over the adapters, its classifier as it is initialised."""
    from peft import XLoraConfig, get_peft_model

    model.config.use_cache = False  # X-LoRA refuses a cache
    torch.manual_seed(0)
    adapters = {str(index): str(folder) for index, folder in enumerate(folders.values())}  # PEFT 0.21: by number
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, adapters=adapters)
    return get_peft_model(model, config).eval()


class Merging:
    """PEFT's model with all adapters; each decision makes a new weighted adapter from them."""

    def __init__(self, lab: "Lab", model: Any, folders: Mapping[str, Path]) -> None:
        from peft import PeftModel

        names = list(folders)
        self.router: Router = lab.engine.router
        self.tokenizer = lab.engine.tokenizer
        self.model = PeftModel.from_pretrained(model, str(folders[names[0]]), adapter_name=names[0]).eval()
        for name in names[1:]:
            self.model.load_adapter(str(folders[name]), adapter_name=name)
        self._names = names
        self.blend([1.0 / len(names)] * len(names))  # PEFT refuses unequal ranks: now, not in the middle of a run

    def blend(self, weights: Sequence[float]) -> None:
        """Make the weighted adapter (PEFT's `linear`) and activate it."""
        if BLEND_NAME in self.model.peft_config:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # PEFT says that the active adapter is deleted; the next line mends that
                self.model.delete_adapter(BLEND_NAME)
        self.model.add_weighted_adapter(self._names, list(weights), BLEND_NAME, combination_type="linear")
        self.model.set_adapter(BLEND_NAME)


@torch.inference_mode()
def merge_each_decision(merging: Merging, prompts: Sequence[Sequence[int]], tokens: int, every: int = 2) -> None:
    """Decode greedily with a cache; every `every` tokens the adapters are merged anew, for all rows alike.

    PEFT has one set of weights a model, so that the text of the first row decides for the batch.
    """
    ids = torch.tensor(prompts, device=merging.model.device)  # (B, T)
    cache: Any = None
    newest = ids
    for index in range(tokens):
        if index % every == 0:
            text = str(merging.tokenizer.decode(ids[0].tolist()))
            merging.blend(merging.router.weights([text])[0].tolist())
        given = {cache_argument(merging.model): cache}
        output = merging.model(input_ids=newest, use_cache=True, logits_to_keep=1, **given)
        cache, newest = find_cache(output), output.logits[:, -1:].argmax(-1)  # (B, 1)
        ids = torch.cat((ids, newest), 1)


@torch.inference_mode()
def next_token(model: Any, text: Sequence[int], *, only_last: bool = False) -> int:
    """Return the next token after a whole text that is read without a cache.

    `only_last` makes logits of the last token alone, as transformers' `generate` does.
    """
    ids = torch.tensor([list(text)], device=model.device)
    options: dict[str, Any] = {"logits_to_keep": 1} if only_last else {}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options).logits
    return int(logits[0, -1].argmax())


def cached_step(model: Any, prompts: Sequence[Sequence[int]]) -> Unit:
    """Return what makes one greedy token a row with transformers alone, after it has read the prompts."""
    from transformers import DynamicCache

    cache = {cache_argument(model): DynamicCache()}
    newest = [torch.tensor(prompts, device=model.device)]  # (B, T), then (B, 1)

    @torch.inference_mode()
    def step() -> None:
        logits = model(newest[0], use_cache=True, logits_to_keep=1, **cache).logits
        newest[0] = logits[:, -1].argmax(-1, keepdim=True)

    step()
    return step


class PaperLoop:
    """The published code's step: embed the text, merge the adapters anew, read the whole text again.

    https://github.com/jb-01/LoRA-TLE: cosines to the centroids, the largest times four, softmax. Centroids do not
    change what a step costs, so that the bundle's take the place of the sentence embedder's, cut to its length.
    """

    def __init__(self, merging: Merging, embedder: Embedder, text: Sequence[int]) -> None:
        self._merging, self._embedder, self._text = merging, embedder, list(text)
        means = merging.router.centroids.means  # (N, D)
        size = min(means.shape[1], embedder.dim)
        self._means = means[:, :size]
        self._size = size

    def __call__(self) -> None:
        """Give the text its next token."""
        text = str(self._merging.tokenizer.decode(self._text))
        embedding = self._embedder.encode([text])[0, : self._size]  # (D,)
        self._merging.blend(boosted(self._means @ embedding).tolist())
        next_token(self._merging.model, self._text)
