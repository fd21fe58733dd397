"""Lets the attention of a model see the virtual tokens of adapters beside the text, each adapter's under its weight.

A virtual token's score gets log w added, w being the adapter's weight for the reading token. So each counts w times in
the sum of the softmax: weight 1 is the adapter as PEFT computes it, weight 0 is as if it were not there. The virtual
tokens lie at positions before 0, and texts begin at 0 whatever number of virtual tokens stands before them.
"""

import inspect
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from treadle.common.errors import AdapterError, OptionError, reason_of
from treadle.common.transformers_names import cache_argument
from treadle.lora.gates import Gates
from treadle.lora.virtual_tokens import VirtualTokens

IMPLEMENTATION, CHILD = "treadle_virtual_tokens", "virtual_tokens"
"""The name of our attention in transformers' registry, and of the module that each attention layer gets."""
OWN_IMPLEMENTATIONS = ("eager", "sdpa")
"""Implementations that take a bias for each score."""
LENGTH_ROPES = ("dynamic", "longrope")
"""Kinds of rotary positions that depend on the length of the text."""
PROBE_TOKENS = 4


class VirtualStates(nn.Module):
    """The keys and values (1, heads, M, head) of all adapters' virtual tokens for one attention layer."""

    keys: Tensor
    values: Tensor
    owners: Tensor
    positions: Tensor

    def __init__(
        self, own: Callable[..., Any], states: Sequence[Tensor], gates: Mapping[int, Gates], slot: int
    ) -> None:
        """Take the layer's own attention function, and the keys and values (2, heads, M, head) of K adapters.

        The gates' `slot` holds the weights of these adapters.
        """
        super().__init__()
        keys, values = torch.cat(list(states), 2)[:, None]
        sizes = [each.shape[2] for each in states]
        owners = torch.arange(len(states)).repeat_interleave(torch.tensor(sizes))
        self.register_buffer("keys", keys, persistent=False)
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("owners", owners.to(keys.device), persistent=False)  # (M,)
        positions = torch.cat([torch.arange(-size, 0) for size in sizes])
        self.register_buffer("positions", positions.to(keys.device), persistent=False)  # (M,)
        self.own, self._gates, self._slot = own, gates, slot

    def bias(self, num_rows: int, num_tokens: int, window: int | None, positions: Tensor | None) -> Tensor:
        """Return the bias (B, 1, T, M) of the scores: log w, and -inf beyond a sliding window.

        `positions` (B|1, T) are those of the tokens that read; `window` is a number of tokens.
        """
        gates = self._gates[self._slot]
        if gates.shape[0] not in (1, num_rows) or gates.shape[1] not in (1, num_tokens):
            raise OptionError(
                f"weights of {gates.shape[0]} rows and {gates.shape[1]} tokens; {num_rows} and {num_tokens} are read."
            )
        w = gates.apply(torch.ones(num_rows, num_tokens, gates.shape[-1], device=self.owners.device))  # (B, T, K)
        bias = w.log()[..., self.owners]  # (B, T, M)
        if window is not None:
            if positions is None:
                raise AdapterError("the base's layers with a sliding window do not know the positions of tokens")
            bias = bias.masked_fill(positions[..., None] - self.positions >= window, -torch.inf)
        return bias[:, None]

    def beside(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, heads, M + L, head) of the virtual tokens and of the text."""
        keys, values = (own.expand(len(key), -1, -1, -1).to(key) for own in (self.keys, self.values))
        return torch.cat([keys, key], 2), torch.cat([values, value], 2)


class AttachedTokens:
    """Virtual tokens in the attention layers of a model; without weights the model's own attention runs."""

    def __init__(self, model: Any, tokens: Sequence[VirtualTokens], gates: Mapping[int, Gates], slot: int) -> None:
        """Attach placed tokens; `gates` and `slot` as `VirtualStates` takes them."""
        self._layers = attention_layers(model)
        self._before = [getattr(layer, CHILD, None) for layer in self._layers]
        self._configs = {id(layer.config): layer.config for layer in self._layers}
        self._names = {key: config._attn_implementation for key, config in self._configs.items()}
        for index, layer in enumerate(self._layers):
            states = [each.states[index].to(_device(layer)) for each in tokens if each.states is not None]
            setattr(layer, CHILD, VirtualStates(_own_attention(layer), states, gates, slot))

    def switch(self, *, on: bool) -> None:
        """Let the passes that follow see the virtual tokens, or not."""
        for key, config in self._configs.items():
            config._attn_implementation = IMPLEMENTATION if on else self._names[key]

    def remove(self) -> None:
        """Leave the attention layers as they were."""
        self.switch(on=False)
        for layer, before in zip(self._layers, self._before, strict=True):
            delattr(layer, CHILD) if before is None else setattr(layer, CHILD, before)


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Run an attention layer's own function on the text's and the virtual tokens' keys and values."""
    states = getattr(module, CHILD, None)
    if not isinstance(states, VirtualStates) or attention_mask is None:
        raise AdapterError(f"{type(module).__name__}: its attention cannot see virtual tokens.")
    num_rows, _, num_tokens, _ = query.shape
    bias = states.bias(num_rows, num_tokens, kwargs.get("sliding_window"), kwargs.get("position_ids"))
    mask = attention_mask.expand(num_rows, -1, -1, -1)  # (B, 1, T, L)
    whole = torch.cat([bias.expand(-1, mask.shape[1], -1, -1).to(mask), mask], -1)
    return states.own(module, query, *states.beside(key, value), whole, **kwargs)


def attention_layers(model: Any) -> list[Any]:
    """Return the attention layers of a model, in their order.

    Raises:
        AdapterError: virtual tokens cannot be put beside a text in some layer.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    found: dict[int, Any] = {}
    for module in decoder.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "num_key_value_groups") and hasattr(module, "config"):
            found[module.layer_idx] = module
    layers = [found[index] for index in sorted(found)]
    kind = type(model).__name__
    is_whole = bool(layers) and len(layers) == layers[0].config.num_hidden_layers
    if not is_whole or _keeps_states(layers[0].config) or not all(hasattr(layer, "head_dim") for layer in layers):
        raise AdapterError(f"virtual tokens need rotary attention, and nothing else, in each layer; {kind} has others")
    ropes = [getattr(module, "rope_type", None) for module in decoder.modules()]
    if any(each in LENGTH_ROPES for rope in ropes for each in (rope.values() if isinstance(rope, dict) else [rope])):
        raise AdapterError(f"virtual tokens need positions that do not depend on the length of the text; {kind}'s do")
    if layers[0].config._attn_implementation not in (*OWN_IMPLEMENTATIONS, IMPLEMENTATION):
        allowed = " or ".join(OWN_IMPLEMENTATIONS)
        raise AdapterError(
            f"virtual tokens need attn_implementation {allowed}, not {layers[0].config._attn_implementation}"
        )
    return layers


@torch.no_grad()
def place(model: Any, tokens: VirtualTokens) -> VirtualTokens:
    """Return virtual tokens as keys and values at the positions -M to -1; those that are placed as they are.

    A short text is read as PEFT reads it, and with the placed tokens beside it: both must agree. No weights may be set.
    Of a model without weights the sizes alone are compared.

    Raises:
        AdapterError: they do not fit the model, or it computes something else with them beside the text.
    """
    if tokens.is_placed:
        return tokens
    layers = attention_layers(model)
    _check_sizes(layers, tokens, model.get_input_embeddings().embedding_dim)
    if model.device.type == "meta":
        return tokens
    ids = torch.arange(1, 1 + PROBE_TOKENS, device=model.device)[None]  # (1, T)
    try:
        expected, bare = _as_peft_does(model, tokens, ids), model(input_ids=ids, use_cache=False).logits
        placed = VirtualTokens(states=_states_before_text(model, tokens), is_placed=True)
        with _alone(model, placed):
            found = model(input_ids=ids, use_cache=False).logits
    except (
        AttributeError,
        IndexError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # of a model with ways of its own
        raise AdapterError(f"{type(model).__name__} cannot read virtual tokens: {reason_of(error)}") from error
    if not _distance(found, expected) <= _rounding(model.dtype, expected, bare):
        raise AdapterError(
            f"{type(model).__name__} computes something else with virtual tokens beside a text than before it"
        )
    return placed


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the root of the mean square of the differences of logits."""
    return float((one.float() - other.float()).square().mean().sqrt())


def _rounding(dtype: torch.dtype, expected: Tensor, bare: Tensor) -> float:
    """Return how far rounding may move logits that virtual tokens make of the bare base's.

    Text at other positions rounds other numbers. In half precision and many layers that is a part of what the virtual
    tokens change; tokens at wrong positions are off by about as much as they change.
    """
    of_change, of_logits = (0.01, 0.001) if dtype == torch.float32 else (0.3, 0.1)
    return max(of_change * _distance(expected, bare), of_logits * float(expected.float().std()))


@contextmanager
def _alone(model: Any, tokens: VirtualTokens) -> Generator[None]:
    """Let passes see these tokens with weight 1, and nothing else of any adapter."""
    attached = AttachedTokens(model, [tokens], {0: Gates(torch.ones(1, 1, 1, device=model.device))}, 0)
    try:
        attached.switch(on=True)
        yield
    finally:
        attached.remove()


def _check_sizes(layers: Sequence[Any], tokens: VirtualTokens, hidden: int) -> None:
    """Raise an AdapterError if tokens have other sizes than the layers."""
    config = layers[0].config
    if tokens.embeddings is not None and tokens.embeddings.shape[1] != hidden:
        raise AdapterError(f"its virtual tokens are vectors of {tokens.embeddings.shape[1]}, the base's of {hidden}")
    if tokens.states is not None:
        num_layers, _, heads, _, head = tokens.states.shape
        wanted = len(layers), config.num_key_value_heads, layers[0].head_dim
        if (num_layers, heads, head) != wanted:
            raise AdapterError(
                f"its prefix has (layers, heads, head) = {(num_layers, heads, head)}, the base has {wanted}"
            )


def _states_before_text(model: Any, tokens: VirtualTokens) -> Tensor:
    """Return keys and values (L, 2, heads, M, head) of virtual tokens at positions that end before 0."""
    if tokens.embeddings is None:
        return _rotated(model, tokens)
    return _read(model, tokens.embeddings, -len(tokens.embeddings))


def _read(model: Any, embeddings: Tensor, first: int) -> Tensor:
    """Return keys and values (L, 2, heads, M, head) of vectors (M, H), read from a position on."""
    cache, given = _new_cache(), _as_input(model, embeddings)
    positions = torch.arange(first, first + len(embeddings), device=given.device)[None]
    model(inputs_embeds=given, position_ids=positions, use_cache=True, **{cache_argument(model): cache})
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])


def _rotated(model: Any, tokens: VirtualTokens) -> Tensor:
    """Return the states of a prefix, the keys rotated back by M positions: PEFT lets the text begin at M."""
    states = tokens.states
    assert states is not None
    layer: Any = attention_layers(model)[0]
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    rotate = getattr(sys.modules[type(layer).__module__], "apply_rotary_pos_emb", None)
    if rotary is None or rotate is None:
        raise AdapterError(f"the rotary positions of {type(model).__name__} are not found, so a prefix has no place")
    # one token alone sees itself alone, so its keys differ only where a layer rotates them
    vector = model.get_input_embeddings().weight[1:2]
    at_0, at_1 = (_read(model, vector, position)[:, 0].flatten(1) for position in (0, 1))  # (L, heads * head)
    is_rotated = (at_0 - at_1).abs().amax(1) > 0.01 * at_0.abs().amax(1)
    by_type = "layer_type" in inspect.signature(rotary.forward).parameters
    back = torch.tensor([[-states.shape[3]]], device=model.device)
    made: list[Tensor] = []
    for index, (keys, values) in enumerate(states.to(model.device).float()[:, :, None]):  # (1, heads, M, head)
        kind = [layer.config.layer_types[index]] if by_type else []
        cos, sin = rotary(keys, back, *kind)  # (1, 1, rotated)
        scale = getattr(rotary, "_".join([*kind, "attention_scaling"]))
        params: dict[str, Any] = layer.config.rope_parameters
        params = params[kind[0]] if by_type else params
        size = int(keys.shape[-1] * params.get("partial_rotary_factor", 1.0))
        turned = rotate(keys[..., :size], keys[..., :size], cos / scale, sin / scale)[1]
        whole = torch.cat([turned, keys[..., size:]], -1) if is_rotated[index] else keys
        made.append(torch.cat([whole, values]))  # (2, heads, M, head)
    return torch.stack(made)


def _as_peft_does(model: Any, tokens: VirtualTokens, ids: Tensor) -> Tensor:
    """Return the logits (1, T, V) of a text whose positions begin behind the virtual tokens, without our attention."""
    if tokens.embeddings is not None:
        given = _as_input(model, tokens.embeddings)
        whole = torch.cat([given, model.get_input_embeddings()(ids)], 1)
        return model(inputs_embeds=whole, use_cache=False).logits[:, given.shape[1] :]
    cache = _new_cache()
    assert tokens.states is not None
    for index, (keys, values) in enumerate(tokens.states.to(model.device, model.dtype)):
        cache.update(keys[None], values[None], index)
    return model(input_ids=ids, use_cache=True, **{cache_argument(model): cache}).logits


def _as_input(model: Any, embeddings: Tensor) -> Tensor:
    weight = model.get_input_embeddings().weight
    return embeddings.to(weight.device, weight.dtype)[None]  # (1, M, H)


def _keeps_states(config: Any) -> bool:
    """Return whether layers of a model keep a recurrent state."""
    from transformers import DynamicCache

    return any(hasattr(layer, "conv_states") for layer in DynamicCache(config=config).layers)


def _new_cache() -> Any:
    """Return a cache that keeps all keys and values, those of layers with a sliding window too."""
    from transformers import DynamicCache

    return DynamicCache()


def _own_attention(layer: Any) -> Callable[..., Any]:
    """Return the function by which a layer computes its attention now, and register ours beside it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)  # a bias (B, 1, T, L) of the scores
    eager = getattr(sys.modules[type(layer).__module__], "eager_attention_forward", None)
    if eager is None:
        raise AdapterError(f"{type(layer).__name__}: its attention cannot see virtual tokens")
    return ALL_ATTENTION_FUNCTIONS.get_interface(layer.config._attn_implementation, eager)


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device
