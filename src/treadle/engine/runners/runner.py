"""Chooses the forward pass. No other module does.

There are four passes: the model's own `forward`, our step on a CPU, our step on a GPU, and the chunk of a long prompt
on a CPU. `ModelForward` takes every input. Each other pass says which inputs it takes; `tests/test_runner.py` compares
all of them with `ModelForward`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from treadle.common.errors import OptionError
from treadle.common.transformers_names import cache_argument
from treadle.engine.kv_cache import RowCache, RowLayer
from treadle.engine.recurrent_cache import is_recurrent, new_cache
from treadle.engine.runners import decoder
from treadle.engine.runners.blocks import blocks_of, outputs_of
from treadle.engine.runners.cpu.chunk import ChunkPass
from treadle.engine.runners.cpu.packing import can_pack
from treadle.engine.runners.cpu.step import FastStep
from treadle.engine.runners.cuda import step as cuda_step
from treadle.engine.runners.cuda.step import GraphStep
from treadle.engine.runners.passes import ForwardPass, PassInput, PassOutput
from treadle.engine.runners.rope import LengthRope
from treadle.engine.supported import reads_in_parts
from treadle.lora.blend import Blend

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelForward:
    """The model's own `forward`. It takes every input, and the other passes are compared with it."""

    def __init__(self, model: "PreTrainedModel", blend: Blend, rope: LengthRope | None) -> None:
        self._model = model
        self._blend = blend
        self._rope = rope
        self._cache_argument = cache_argument(model)

    def takes(self, given: PassInput) -> bool:
        """Return True."""
        return True

    def run(self, given: PassInput) -> PassOutput:
        """Read the tokens through transformers; see `ForwardPass`."""
        layer, blocks = given.layer, blocks_of(self._model)
        if layer is None:
            return PassOutput(self._forward(given).logits[:, -given.num_logits :])
        if blocks is None or not 0 < layer < len(blocks):  # the last is asked for behind the last norm
            output = self._forward(given, output_hidden_states=True)
            return PassOutput(output.logits[:, -given.num_logits :], output.hidden_states[layer])
        with outputs_of(blocks, [layer]) as found:
            output = self._forward(given)
        return PassOutput(output.logits[:, -given.num_logits :], found[layer])

    def _forward(self, given: PassInput, **asked: bool) -> Any:
        """Call the model."""
        device, mask, positions = self._model.device, given.mask(), given.positions()
        given.cache.begin_pass(given.ids.shape[1])
        rope = self._rope.using(given.lengths) if self._rope else nullcontext()
        with self._blend.using(given.weights, given.combines, given.among), rope:
            return self._model(
                input_ids=given.ids.to(device),
                attention_mask=None if mask is None else mask.to(device),
                position_ids=positions.to(device),
                use_cache=True,
                logits_to_keep=given.num_logits,
                **{self._cache_argument: given.cache},
                **asked,
            )


class Runner:
    """Runs each input through the first of our own passes that takes it, otherwise through the model's `forward`.

    Attributes:
        layer_type: class of the layers of new caches.
    """

    def __init__(self, model: "PreTrainedModel", blend: Blend, own: Sequence[ForwardPass] = ()) -> None:
        """Take a model, its blend, and our own passes in the order to try them."""
        self.rope = LengthRope.of(model)
        self.own = tuple(own)
        self.layer_type: type[RowLayer] = RowLayer
        self._model = model
        self._blend = blend
        self._forward = ModelForward(model, blend, self.rope)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self._model.device

    @property
    def has_packs(self) -> bool:
        """True if steps may read weights packed by oneDNN."""
        return any(isinstance(each, FastStep) and each.has_packs for each in self.own)

    @cached_property
    def is_recurrent(self) -> bool:
        """True if layers keep a state that each pass replaces."""
        return is_recurrent(self._model)

    @cached_property
    def reads_in_parts(self) -> bool:
        """Whether a text may be read in several passes of more than one token."""
        return reads_in_parts(self._model)

    def new_cache(self) -> RowCache:
        """Return an empty cache for the model."""
        return new_cache(self._model, self.layer_type)

    def run(self, given: PassInput) -> PassOutput:
        """Read the tokens, and append their keys and values to the cache."""
        own = () if self._blend.has_vectors else self.own  # our own passes add factors, and know no scales or biases
        return next((each for each in own if each.takes(given)), self._forward).run(given)

    def unhooked(self) -> "Runner":
        """Return the runner to use now: without our own passes while a module has hooks."""
        if not self.own or not decoder.is_hooked(self._model):
            return self
        plain = Runner(self._model, self._blend)
        plain.layer_type = self.layer_type
        return plain


def is_plain_decoder(model: "PreTrainedModel") -> bool:
    """Return whether our own CPU passes know all layers of the model, so that none reads earlier tokens again."""
    return decoder.fits(model)


def check_pack(model: "PreTrainedModel", pack: bool | None, *, is_fast: bool) -> None:
    """Raise an OptionError if packed weights are requested and nothing reads them."""
    if pack and not (is_fast and decoder.fits(model) and can_pack(model.dtype)):
        raise OptionError(
            "pack: nothing reads packed weights here. Treadle's own steps do, on a CPU whose oneDNN packs "
            f"{model.dtype}, for {', '.join(decoder.ARCHITECTURES)}."
        )


def new_runner(model: "PreTrainedModel", blend: Blend, *, pack: bool | None = None, is_fast: bool = True) -> Runner:
    """Return the runner of a model, with those of our own passes that fit it and its device.

    Args:
        model: the base.
        blend: of its adapters.
        pack: as in `treadle.engine.engine.Engine`.
        is_fast: False = only the model's own `forward`.
    """
    own: list[ForwardPass] = []
    if is_fast and decoder.fits(model):
        own = [FastStep(model, blend, pack=pack), ChunkPass(model, blend)]
    elif is_fast and cuda_step.fits(model):
        own = [GraphStep(model, blend)]
    return Runner(model, blend, own)
