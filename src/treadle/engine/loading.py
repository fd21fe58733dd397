"""Loads an engine: a bundle, or a base with adapters where they lie."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from treadle.bundle.adapter_places import adapters_below
from treadle.bundle.base_model import load_model, load_tokenizer
from treadle.bundle.bundle import Bundle, read_bundle
from treadle.common.errors import AdapterError, AdapterWarning, OptionError
from treadle.engine.engine import Engine
from treadle.engine.preparing import prepare
from treadle.engine.router_cache import logger
from treadle.engine.runners.runner import is_plain_decoder
from treadle.engine.supported import check_supported, rereading_layers
from treadle.lora.adapter import Adapter
from treadle.lora.blend import Blend
from treadle.lora.compatibility import check_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load(  # noqa: PLR0913 either the first, or base and adapters with their options
    bundle: Bundle | str | Path | None = None,
    *,
    base: str | None = None,
    adapters: str | Path | Mapping[str, str | Path] | None = None,
    embedder: str | None = None,
    strict: bool = False,
    device: "str | torch.device | None" = None,
    dtype: "str | torch.dtype | None" = None,
    pack: bool | None = None,
) -> Engine:
    """Load a base model and attach adapters: those of a bundle, or those in a folder.

    Args:
        bundle: its folder, or the bundle that was read from it (`treadle.read_bundle`).
        base: instead of a bundle, the folder or hub id of a base model.
        adapters: with `base`, a folder whose sub-folders are adapters, or name -> folder or hub id. Those with
            `samples.txt` or `samples.jsonl` beside them are routed; the others act by name or fixed weights.
        embedder: with `base`, the name of the embedder of samples, as `treadle fit` takes it; None = `tokens`.
        strict: with `base`, raise where a bad adapter would be left out; the log says which and why.
        device: a torch device or its name; None takes CUDA where there is one, else the CPU.
        dtype: `float32`, `bfloat16` or `float16`, or torch's dtype; None takes float32 on a CPU and the checkpoint's
            own elsewhere.
        pack: as `Engine` takes it.

    Raises:
        OptionError: a bundle and a base are given, or neither.
        TreadleError: the bundle is damaged, its base model cannot be loaded, or no adapter can be used.
    """
    if (bundle is None) == (base is None) or (base is None) != (adapters is None):
        raise OptionError("load takes a bundle, or base= and adapters= (a folder, or name -> folder or hub id).")
    if base is not None and adapters is not None:
        is_folder = not isinstance(adapters, Mapping)
        folder = Path(adapters) if is_folder else None
        places = adapters_below(Path(adapters))[0] if is_folder else adapters
        read = prepare(base, places, embedder=embedder, strict=strict, folder=folder)
    elif embedder is not None or strict:
        raise OptionError("embedder and strict go with base= and adapters=; a bundle has its own embedder.")
    else:
        read = bundle if isinstance(bundle, Bundle) else read_bundle(bundle or "")
    tokenizer = load_tokenizer(read.base_model)
    model = load_model(read.base_model, device=device, dtype=dtype)
    if not read.is_strict:
        read = _without_misfits(model, read)
    return Engine(model, tokenizer, read.adapters, read.router, pack=pack)


def _without_misfits(model: "PreTrainedModel", bundle: Bundle) -> Bundle:
    """Leave out adapters that this model's weights or dtype refuse; the log says which and why."""
    check_supported(model)
    rereading = frozenset[str]() if is_plain_decoder(model) else rereading_layers(model)

    def check(adapters: Sequence[Adapter]) -> None:
        check_tokens(adapters, rereading)
        Blend(model, []).plan(adapters)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdapterWarning)  # the engine gives them again
            check(bundle.adapters)
        return bundle
    except AdapterError:
        fitting: list[Adapter] = []
    for adapter in bundle.adapters:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AdapterWarning)
                check([adapter])
            fitting.append(adapter)
        except AdapterError as error:
            logger.warning("adapter %s: LEFT OUT: %s", adapter.name, error)
    if not fitting:
        raise AdapterError("no adapter fits the model; the log says why.")
    names = [adapter.name for adapter in fitting]
    return replace(bundle, adapters=tuple(fitting), router=bundle.router.among(names))
