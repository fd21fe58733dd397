"""Treadle as a model of lm-evaluation-harness: `--model treadle`, or `simple_evaluate(model=TreadleLM(engine))`.

lm-eval knows the models of its own package only, so its command line starts here (pip install 'treadle[eval]'):

    python -m treadle.experiments.lm_eval_model --model treadle --model_args bundle=demo/bundle,every=2 --tasks arc_easy
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby, pairwise
from typing import Any, cast

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, warning_once
from tqdm import tqdm

from treadle.bundle.bundle import read_bundle
from treadle.common.errors import OptionError, TreadleError, told
from treadle.common.options import parse, read_options
from treadle.common.params import RoutingParams, SamplingParams, read_routing
from treadle.engine.chat import TokenPrompt
from treadle.engine.engine import Engine
from treadle.engine.loading import load
from treadle.engine.rendered_chats import RenderedChats
from treadle.engine.scoring import CPU_BATCH_ROWS, score_greedy


@register_model("treadle")  # pyright: ignore[reportUntypedClassDecorator] lm-eval leaves it untyped
class TreadleLM(TemplateLM):
    """A bundle, or an engine that is loaded already, under one routing; tokens and cuts are those of lm-eval's HFLM.

    `batch_size` is rows of a forward pass; for none and `auto` it is `max_batch_size`, or else treadle's own numbers.
    The other keywords are fields of RoutingParams over the default routing. The context decides the first weights: an
    empty one, such as the start of a text in `loglikelihood_rolling`, is the prefix token, which has no text. A context
    that the chat template has made (`--apply_chat_template`) is routed on the contents of its messages.
    """

    def __init__(
        self,
        bundle: str | Engine,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,
        **routing: Any,  # lm-eval passes --model_args as keywords
    ) -> None:
        super().__init__()
        self._rows = _count(batch_size) or _count(max_batch_size)
        if isinstance(bundle, Engine) and (device or dtype):
            raise OptionError("device and dtype belong to a bundle's folder; this engine is loaded already.")
        if str(device) == "cuda:0" and not torch.cuda.is_available():
            device = None  # what lm-eval's command line passes where nobody chose a device
        loaded = bundle if isinstance(bundle, Engine) else read_bundle(bundle)
        self._routing = _routing(loaded.router.params, routing)  # before the base model loads
        self.engine = loaded if isinstance(loaded, Engine) else load(loaded, device=device, dtype=dtype)
        self.engine.check_routing([self._routing])
        self.tokenizer: Any = self.engine.tokenizer
        self._chats = RenderedChats(self.tokenizer)
        self.max_length = resolve_max_length(self.engine.model.config, self.tokenizer)  # tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return facts that lm-eval writes beside the results."""
        return {"base_model": self.engine.model.name_or_path, "routing": asdict(self._routing)}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return messages as one text; without a generation prompt the last message is left open."""
        ends = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **ends))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids (T); None adds what begins a text, unless the text has it already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood (nats) of whole texts, each token once, in windows of the model's context."""
        windows: list[tuple[None, list[int], list[int]]] = []
        ends: list[int] = []  # of each request's windows
        for request in requests:
            ids = self.tok_encode(request.args[0])
            found = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(None, *make_disjoint_window(window)) for window in found]
            ends.append(len(windows))
        logprobs = [logprob for logprob, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        totals = [sum(logprobs[start:end]) for start, end in pairwise([0, *ends])]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate a text after each context; sampling uses torch's seed, which lm-eval sets."""
        arguments = [cast(tuple[str, dict[str, Any]], request.args) for request in requests]
        samplings = [_sampling(given) for _, given in arguments]
        prompts = [
            self._cut(self.tok_encode(context), self.max_length - sampling.max_tokens)
            for (context, _), sampling in zip(arguments, samplings, strict=True)
        ]
        texts = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda index: -len(prompts[index]))
        size = self._rows or self.engine.max_batch
        for start in tqdm(range(0, len(order), size), desc="treadle: generate", disable=disable_tqdm):
            chosen = order[start : start + size]
            options = [samplings[index] for index in chosen]
            contexts = [TokenPrompt(prompts[i], self._chats.read(prompts[i])) for i in chosen]
            done = self.engine.generate_ids(contexts, sampling=options, routing=self._routing)
            for index, completion in zip(chosen, done, strict=True):
                texts[index] = completion.text
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return (nats, is greedy) of each (key of the cache, ids of a context, ids of its continuation)."""
        if not all(ids for _, _, ids in requests):
            raise OptionError("a continuation has no token: the task has an empty choice.")
        pairs = [(self._cut(context, self.max_length + 1 - len(ids)), ids) for _, context, ids in requests]
        rows = [(len(context), *context, *ids[:-1]) for context, ids in pairs]  # one-token options share a row
        order = sorted(range(len(pairs)), key=lambda index: (-len(rows[index]), rows[index]))
        shared = [list(group) for _, group in groupby(order, key=lambda index: rows[index])]
        answers = [(0.0, False)] * len(pairs)
        size = self._rows or CPU_BATCH_ROWS
        for start in tqdm(range(0, len(shared), size), desc="treadle: score", disable=disable_tqdm):
            chosen = [index for group in shared[start : start + size] for index in group]
            some = [pairs[index] for index in chosen]
            said = {tuple(context): self._chats.read(context) for context, _ in some}
            scores = score_greedy(self.engine, some, self._routing, [said[tuple(context)] for context, _ in some])
            for index, (logprobs, is_greedy) in zip(chosen, scores, strict=True):
                answers[index] = (float(logprobs.sum()), bool(is_greedy.all()))
                if (key := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answers[index])
        return answers

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """Return the last `room` ids of a context, the prefix token for an empty one."""
        if room < 1:
            raise OptionError(f"a continuation leaves its context no room in the model's {self.max_length} tokens.")
        if len(ids) > room:
            warning_once(logging.getLogger("treadle"), f"contexts are cut from the left: {self.max_length} tokens fit.")
        return ids[-room:] or [self.prefix_token_id]


def _routing(onto: RoutingParams, given: Mapping[str, Any]) -> RoutingParams:
    """Read options as text, which lm-eval has turned into numbers; a rule and fixed weights imply each other."""
    texts = {name: str(value) if isinstance(value, int | float) else value for name, value in given.items()}
    return read_routing(texts, onto)


def _sampling(given: dict[str, Any]) -> SamplingParams:
    """Read the generation options of a task; a name that treadle does not have is an OptionError."""
    kept = normalize_gen_kwargs(given, default_max_gen_toks=256).items()
    options: dict[str, Any] = {
        key: value for key, value in kept if (key, value) != ("num_beams", 1)
    }  # some tasks say so
    options |= {"max_tokens": options.pop("max_gen_toks"), "stop": [stop for stop in options.pop("until") if stop]}
    del options["do_sample"]  # without it, the temperature is 0 by now
    return read_options(SamplingParams, {"seed": int(torch.randint(2**62, ())), **options})


def _count(given: int | str | None) -> int | None:
    """Return a batch size, None for one that lm-eval's own models find out."""
    count = None if str(given).startswith("auto") else parse(int | None, given)
    if count is None or (isinstance(count, int) and count >= 1):
        return count
    raise OptionError(f"a batch size must be a whole number of at least 1, or auto, not {told(count)}.")


def main() -> None:
    """Run lm-eval's command line, with `--model treadle`."""
    try:
        cli_evaluate()
    except TreadleError as error:
        raise SystemExit(f"treadle: {error}") from error


if __name__ == "__main__":
    main()
