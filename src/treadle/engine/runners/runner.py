"""The seam to the forward pass: the one place that chooses who runs it.

There are four passes: the model's own `forward`, our step on a CPU, our step on a GPU, and a chunk of a long prompt on
a CPU. `ModelForward` takes everything; each of the others says what it takes, and tests compare it with `ModelForward`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from treadle.common.errors import OptionError
from treadle.common.transformers_names import cache_argument
from treadle.engine.runners import decoder
from treadle.engine.runners.cpu.chunk import ChunkPass
from treadle.engine.runners.cpu.packing import can_pack
from treadle.engine.runners.cpu.step import FastStep
from treadle.engine.runners.cuda import step as cuda_step
from treadle.engine.runners.cuda.step import GraphStep
from treadle.engine.runners.passes import ForwardPass, PassInput, PassOutput
from treadle.engine.runners.rope import LengthRope
from treadle.lora.blend import Blend

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelForward:
    """The model's own `forward`: it takes everything, and is the reference of the others."""

    def __init__(self, model: "PreTrainedModel", blend: Blend, rope: LengthRope | None) -> None:
        self._model = model
        self._blend = blend
        self._rope = rope
        self._cache_argument = cache_argument(model)

    def takes(self, given: PassInput) -> bool:
        """Whether it can run this: always."""
        return True

    def run(self, given: PassInput) -> PassOutput:
        """Read the tokens by transformers; see `ForwardPass`."""
        device, mask = self._model.device, given.mask()
        rope = self._rope.using(given.lengths) if self._rope else nullcontext()
        asked = {} if given.layer is None else {"output_hidden_states": True}
        with self._blend.using(given.weights, given.combines, given.among), rope:
            output = self._model(
                input_ids=given.ids.to(device),
                attention_mask=None if mask is None else mask.to(device),
                position_ids=given.positions().to(device),
                use_cache=True,
                logits_to_keep=given.num_logits,
                **{self._cache_argument: given.cache},
                **asked,
            )
        hidden = None if given.layer is None else output.hidden_states[given.layer]
        return PassOutput(output.logits[:, -given.num_logits :], hidden)


class Runner:
    """Runs each pass by the first of our own that takes it, else by the model's own `forward`."""

    def __init__(self, model: "PreTrainedModel", blend: Blend, own: Sequence[ForwardPass] = ()) -> None:
        """Take a model, its blend, and the passes to try first."""
        self.rope = LengthRope.of(model)
        self.own = tuple(own)
        self._model = model
        self._blend = blend
        self._forward = ModelForward(model, blend, self.rope)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    @property
    def has_packs(self) -> bool:
        """Whether steps may read weights that oneDNN has packed."""
        return any(isinstance(each, FastStep) and each.has_packs for each in self.own)

    def run(self, given: PassInput) -> PassOutput:
        """Read the tokens, and append their keys and values to the cache."""
        return next((each for each in self.own if each.takes(given)), self._forward).run(given)

    def unhooked(self) -> "Runner":
        """Return the runner to use now: without passes of our own while somebody listens to a module."""
        return Runner(self._model, self._blend) if self.own and decoder.is_hooked(self._model) else self


def is_plain_decoder(model: "PreTrainedModel") -> bool:
    """Whether a pass of our own on a CPU knows all layers of the model: none reads the past again, say."""
    return decoder.fits(model)


def check_pack(model: "PreTrainedModel", pack: bool | None, *, is_fast: bool) -> None:
    """Raise an OptionError if packed weights are asked for and nothing reads them."""
    if pack and not (is_fast and decoder.fits(model) and can_pack(model.dtype)):
        raise OptionError(
            "pack: nothing reads packed weights here. Steps of our own do, on a CPU whose oneDNN packs "
            f"{model.dtype}, of {', '.join(decoder.ARCHITECTURES)}."
        )


def new_runner(model: "PreTrainedModel", blend: Blend, *, pack: bool | None = None, is_fast: bool = True) -> Runner:
    """Return the runner of a model, with the passes of our own that know it and its device.

    Args:
        model: the base.
        blend: of its adapters.
        pack: as `treadle.engine.engine.Engine` takes it.
        is_fast: False = the model's own `forward` alone.
    """
    own: list[ForwardPass] = []
    if is_fast and decoder.fits(model):
        own = [FastStep(model, blend, pack=pack), ChunkPass(model, blend)]
    elif is_fast and cuda_step.fits(model):
        own = [GraphStep(model, blend)]
    return Runner(model, blend, own)
