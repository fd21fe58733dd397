"""Routes whatever calls a transformers model: `model.generate`, pipelines, lm-eval's HFLM, plain forward passes.

Two hooks see each forward pass from outside. The one before it follows the text of every row and sets the blend's
gates; the one after it notes which cache holds which rows. Nothing is patched, and on exit nothing is left.
"""

import inspect
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from treadle.bundle.base_model import load_tokenizer
from treadle.bundle.bundle import Bundle, read_bundle
from treadle.common.errors import ModelError, OptionError
from treadle.common.params import RoutingParams
from treadle.common.transformers_names import find_cache
from treadle.engine.cached_rows import LOST_ROWS, CachedRow, Source, marks, places_of
from treadle.engine.rendered_chats import RenderedChats
from treadle.engine.runners.blocks import blocks_of, outputs_of
from treadle.engine.runners.rope import LengthRope
from treadle.engine.state_fitting import check_states_fit
from treadle.engine.state_reading import read_states
from treadle.lora.blend import Blend, attach
from treadle.routing.centroids import Floats
from treadle.routing.schedule import Seen
from treadle.routing.states import StateClasses, is_far, uses_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

JUMPS = (
    "position_ids jump inside a row, so it holds several texts; routed() follows one text a row: leave position_ids "
    "out, or give each text a row of its own."
)
CROSSED = (
    "this model (longrope) reads texts of more than {limit} tokens with other factors; routed() follows passes whose "
    "texts are all on one side of that from their beginning. Let treadle's Engine generate, or keep texts shorter."
)
ONE_BY_ONE = (
    "where the base model's states decide, routed() reads the prompt in one pass and then one token of each row at a "
    "time, in a cache that grows: no chunks of a prompt, no candidates of assisted decoding, no cropped cache. Give "
    "routing with states=False to route by the text alone."
)


class Routed:
    """The weights of the newest forward pass; `routed` yields it."""

    def __init__(
        self, model: "PreTrainedModel", blend: Blend, source: Source, states: dict[int, Tensor] | None = None
    ) -> None:
        """Follow the passes of a model.

        Args:
            model: with the blend attached.
            blend: gets the weights.
            source: of all rows.
            states: by layer, the states (B, T, H) that the newest pass has left; None = the text decides.
        """
        self._model = model
        self._states = states
        self._blend = blend
        self._source = source
        self._router, self._params, tokenizer, _ = source
        pad_id: Any = tokenizer.pad_token_id
        self._pads = {0, pad_id}  # what stands for padding where no mask tells
        self._rope = LengthRope.of(model)
        self._layer = self._router.states.layer if self._router.states is not None else 0
        self._signature = inspect.signature(model.forward)
        self._rows: list[CachedRow] = []
        self._is_real: list[list[bool]] = []  # of each row, which columns of the newest pass are tokens
        self._cached: WeakKeyDictionary[Cache, tuple[list[CachedRow], Tensor | None]] = WeakKeyDictionary()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order of every N axis."""
        return self._router.names

    @property
    def weights(self) -> Floats:
        """(B, N) under which the newest forward pass read the last token of each row; (0, N) before the first."""
        return np.array([row.weights for row in self._rows], np.float32).reshape(-1, len(self.names))

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the gates of the forward pass that is about to run: torch's forward pre-hook."""
        call = {**kwargs, **self._signature.bind_partial(*args, **kwargs).arguments}
        ids, mask, cache = call.get("input_ids"), call.get("attention_mask"), find_cache(call)
        if ids is None:
            raise OptionError("routed() needs input_ids: from inputs_embeds alone the text cannot be read.")
        if getattr(cache, "is_compileable", False) or not (mask is None or (torch.is_tensor(mask) and mask.dim() == 2)):
            raise OptionError(
                "routed() follows dynamic caches and attention masks of shape (B, T): leave out a static "
                "cache_implementation and masks of other shapes."
            )
        is_real = self._real(ids, mask, cache)  # (B, T)
        if _jumps(call.get("position_ids"), is_real):
            raise OptionError(JUMPS)
        past = int(cache.get_seq_length()) if cache is not None else 0
        # Assisted decoding reads its first candidates with the prompt; logits_to_keep says how many they are.
        kept = call.get("logits_to_keep") if cache is not None else None
        ahead = kept - 1 if isinstance(kept, int) and 1 < kept <= ids.shape[1] else 0
        if cache is not None and past:
            rows = self._continued(cache, past, len(ids))
        else:
            rows = [CachedRow(self._source) for _ in is_real]
        if self._states is not None and (ahead or (past and any(sum(real) > 1 for real in is_real))):
            raise OptionError(ONE_BY_ONE)
        prompts = [sum(real[: len(real) - ahead]) for real in is_real]
        starts = [
            row.read(own, real, prompt)
            for row, own, real, prompt in zip(rows, ids.tolist(), is_real, prompts, strict=True)
        ]
        if self._rope and self._crosses(
            self._rope, rows, starts, is_again=not past and call.get("use_cache") is not False
        ):
            raise OptionError(CROSSED.format(limit=self._rope.limit))
        self._decide_by_states([row for row in rows if row.is_due_by_states()])
        weights = self._weigh(rows, starts, is_real)  # (B, 1|T, N)
        if self._states is not None and not past:
            weights = self._look_ahead(rows, is_real, call, weights)
        self._rows, self._is_real = rows, is_real
        self._blend.set_weights(weights if weights.any() else None, self._params.combine)

    def after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Clear the gates and remember the rows of the cache that was filled: torch's forward hook."""
        self._blend.set_weights(None)
        if output is None:  # the pass has failed
            return
        values = output if isinstance(output, tuple) else tuple(output.values())
        if self._states is not None:
            for row, real, own in zip(self._rows, self._is_real, self._states.pop(self._layer), strict=True):
                row.put_states(real, own)
        for cache in {value for value in (*args, *kwargs.values(), *values) if isinstance(value, Cache)}:
            self._cached[cache] = self._rows, marks(cache)

    def _decide_by_states(self, rows: Sequence[CachedRow]) -> list[Floats]:
        """Give rows the weights of their states; return those that they had."""
        before = [row.weights for row in rows]
        if rows:
            each = [row.state_views() for row in rows]
            seen = Seen(np.concatenate([one.views for one in each]), np.concatenate([one.is_running for one in each]))
            for row, weights in zip(rows, self._router.weigh_states(seen, self._params), strict=True):
                row.weights = weights
        return before

    def _look_ahead(
        self, rows: Sequence[CachedRow], is_real: list[list[bool]], call: dict[str, Any], weights: Floats
    ) -> Floats:
        """Read prompts as far as their states need it, under the weights (B, 1, N) that their text gave.

        Returns:
            the weights (B, 1, N) under which they are read to their end: those of their states where these are far
            from the others.
        """
        inputs: dict[str, Any] = {name: call.get(name) for name in ("input_ids", "attention_mask", "position_ids")}
        with torch.no_grad(), self._blend.using(weights if weights.any() else None, self._params.combine):
            states = read_states(self._model, [self._layer], **inputs)[:, 0]  # (B, T, H)
        for row, real, own in zip(rows, is_real, states, strict=True):
            row.put_states(real, own)
        some = [row for row in rows if row.has_states]
        for row, before in zip(some, self._decide_by_states(some), strict=True):
            row.weights = row.weights if is_far(row.weights, before) else before
        return np.stack([row.weights for row in rows])[:, None]

    def _crosses(self, rope: LengthRope, rows: list[CachedRow], starts: list[int], *, is_again: bool) -> bool:
        """Return whether texts have grown beyond the limit of short factors, or are beside others that have.

        Where they grow, `generate` drops the cache and reads them again: such a pass begins with the text of the last.
        """
        sides = {rope.is_long(len(row.ids)) for row in rows}
        sides |= {rope.is_long(start) for start in starts if start}
        texts = [row.ids[:-1] for row in rows]
        return len(sides) > 1 or (is_again and any(sides) and texts == [row.ids for row in self._rows])

    def _real(self, ids: Tensor, mask: Tensor | None, cache: Cache | None) -> list[list[bool]]:
        """Return which of ids (B, T) are tokens, and not padding."""
        if mask is not None:
            return mask[:, -ids.shape[1] :].bool().tolist()
        rows: list[list[bool]] = []
        for row in ids.tolist():
            count = len(row)
            while cache is None and len(ids) > 1 and count > 1 and row[count - 1] in self._pads:
                count -= 1
            rows.append([True] * count + [False] * (len(row) - count))
        return rows

    def _continued(self, cache: Cache, past: int, num_rows: int) -> list[CachedRow]:
        """Return the row that each of `num_rows` rows of a cache of `past` columns continues, in the cache's order."""
        rows, old = self._cached.get(cache, ([], None))
        columns = len(rows[0].is_real) if rows else 0
        new = marks(cache)
        if past > columns or not rows:
            raise OptionError(LOST_ROWS)
        if past < columns and self._states is not None:
            raise OptionError(ONE_BY_ONE)
        if len(rows) == 1 and (past < columns or new is None):
            places = [0] * num_rows
        elif past < columns or old is None or new is None or len(new) != num_rows:
            raise OptionError(LOST_ROWS)
        else:
            places = places_of(old.to(new.device), new)
        moved: list[CachedRow] = []
        for index, place in enumerate(places):
            is_free = past == columns and place not in places[:index]
            moved.append(rows[place] if is_free else rows[place].copy(past))
        return moved

    def _weigh(self, rows: list[CachedRow], starts: list[int], is_real: list[list[bool]]) -> Floats:
        """Return the weights (B, 1, N), or (B, T, N) if they differ inside a row."""
        due = [row.decide() for row in rows]
        views = [views for found in due for _, views in found]
        decided = np.zeros((0, len(self.names)), np.float32)
        if views:
            decided = self._router.weigh(self._router.finish(views), self._params)  # (decisions, N)
        weights = np.zeros((*np.shape(is_real), len(self.names)), np.float32)  # (B, T, N)
        made = iter(decided)
        for index, (row, found, start) in enumerate(zip(rows, due, starts, strict=True)):
            runs = np.stack([row.weights, *(next(made) for _ in found)])  # (runs, N), the first as it was
            edges = [start, *(max(first, start) for first, _ in found), len(row.ids)]
            row.weights = runs[-1]
            weights[index] = row.weights  # padding too, so that a row with one decision has one weight
            weights[index, is_real[index]] = np.repeat(runs, np.diff(edges), 0)
        return weights[:, :1] if (weights == weights[:, :1]).all() else weights


@contextmanager
def routed(
    model: "PreTrainedModel",
    bundle: Bundle | str | Path,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    routing: RoutingParams | None = None,
) -> Generator[Routed]:
    """Route every forward pass of a plain transformers model while the context lasts; then leave it as it was.

    All tokens of a call that starts a text are its prompt. `generate` with its cache (the default) therefore gives
    what `Engine.generate` gives. Without a cache each call is a text of its own: a call over a whole text, as
    log-likelihood code makes, reads all of it under the weights of all of it, the continuation that is scored
    included; `prefill="causal"` looks at no later token, and `Engine.score` tells prompt and completion apart.

    Calls that continue a cache are running text, each position with its own weights; with `prefill_chunk_size` only
    the first chunk is the prompt. Where a call fills an empty cache that it was given and keeps k > 1 logits, as
    assisted decoding does, its last k - 1 tokens are running text already. In a batch without a mask and without a
    cache, a run of id 0 or of the padding id at a row's right end is taken for padding, which is how lm-eval pads.

    A prompt that the tokenizer's chat template has made of messages, as in pipelines, is routed on their contents
    alone, as `Engine.generate` routes messages. Of a chat that another template has made, all words count: give the
    tokenizer that has this template.

    Where the base model's states decide, each prompt is read twice as far as the layer that they come from, so that
    their decision is there before the pass: that of `Engine.generate`, whose second readings are rarer.

    Refused, because the text cannot be followed: several texts in one row (`position_ids` that jump), and, of models
    whose rotary factors depend on the length (longrope), texts on both sides of the limit. Where states decide, also
    several new tokens of a row after its prompt, and cropped caches.

    Use the model from one thread at a time.

    Args:
        model: the bundle's base model, without adapters.
        bundle: a bundle or its folder.
        tokenizer: of the base model; None loads it.
        routing: for all rows; None takes the bundle's.

    Yields:
        a `Routed`, whose `weights` (B, N) are those of the newest pass.

    Raises:
        TreadleError: the model, the adapters or an option do not fit; inside, a call whose text cannot be followed.
    """
    bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    router, params = bundle.router, routing or bundle.router.params
    _check_followed(model, params)
    tokenizer = tokenizer or load_tokenizer(bundle.base_model)
    source: Source = (router, params, tokenizer, RenderedChats(tokenizer))
    CachedRow(source)  # refuses unknown names and slow tokenizers before anything is attached
    router.check(params)
    classes = router.states if uses_states(router.states, params) else None
    with ExitStack() as left:
        found = left.enter_context(_states_of(model, classes)) if classes is not None else None
        adapters = sorted(bundle.adapters, key=lambda each: router.names.index(each.name))
        blend = attach(model, adapters, params.combine)
        left.callback(blend.detach)
        handle = Routed(model, blend, source, found)
        left.callback(model.register_forward_pre_hook(handle.before, with_kwargs=True).remove)
        left.callback(model.register_forward_hook(handle.after, with_kwargs=True, always_call=True).remove)
        yield handle


def _states_of(model: "PreTrainedModel", classes: StateClasses) -> AbstractContextManager[dict[int, Tensor]]:
    """Return the context in which each pass leaves the states that classes read."""
    check_states_fit(model, classes)
    blocks = blocks_of(model)
    if blocks is None:
        raise ModelError(f"{type(model).__name__}: its layers are not where states can be taken from them.")
    return outputs_of(blocks, [classes.layer])


def _check_followed(model: "PreTrainedModel", params: RoutingParams) -> None:
    """Raise an error if the text of the model's calls cannot be followed under these params."""
    if params.past == "recompute":
        raise OptionError("past='recompute' reads the text again, but transformers keeps the cache: use past='keep'.")
    if getattr(model, "_is_stateful", False) or model.config.is_encoder_decoder:
        raise ModelError(f"{type(model).__name__} keeps a recurrent state or has an encoder; routed() needs a decoder.")


def _jumps(positions: Any, is_real: list[list[bool]]) -> bool:
    """Return whether positions (B|1, T) do not count a row's tokens one by one."""
    if not torch.is_tensor(positions) or positions.dim() != 2 or positions.shape[1] < 2:
        return False
    steps = positions.diff().expand(len(is_real), -1)  # (B, T - 1)
    real = torch.tensor(is_real, device=steps.device)
    return bool(((steps != 1) & real[:, 1:] & real[:, :-1]).any())
