"""Examines one adapter's folder without a bundle: what it holds, whether it can be blended, and where it would act.

No weights of a base are loaded: shapes and paths decide.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from treadle.bundle.base_model import load_outline
from treadle.common.errors import AdapterError, AdapterWarning, ModelError
from treadle.common.files import home
from treadle.lora.adapter import Adapter, read_adapter
from treadle.lora.compatibility import alike, find_places
from treadle.lora.mlx_folder import mlx_file
from treadle.lora.names import with_model_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Target:
    """The modules of one name, such as q_proj, and the (in, out) of their factors; None = it has none."""

    name: str
    modules: int
    shapes: tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True)
class Fit:
    """How an adapter fits a base.

    Attributes:
        base: its folder or hub id.
        acting: modules that the adapter would change.
        missing: modules of the adapter that the base lacks, alike ones once.
        misfits: why it cannot act on this base; () = it can.
    """

    base: str
    acting: int
    missing: tuple[str, ...]
    misfits: tuple[str, ...]


@dataclass(frozen=True)
class FolderReport:
    """Findings about an adapter's folder; it can be blended if `problem` is "".

    Attributes:
        name: the folder's name.
        kind: what it is, such as LoRA, DoRA or IA3; "" = it cannot be read.
        base_model: named in its config.
        ranks: of its factors, ascending.
        scales: multiply its updates, ascending.
        targets: its modules by their last name.
        layers: numbers of its layers, ascending.
        tensors: how many it holds.
        dtypes: of these tensors.
        num_bytes: of these tensors.
        notes: warnings.
        problem: why it cannot be blended, and what to do.
        cached: bases in treadle's cache that have a place for all of it.
        fit: on the base that was asked for.
    """

    name: str
    kind: str = ""
    base_model: str = ""
    ranks: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    targets: tuple[Target, ...] = ()
    layers: tuple[int, ...] = ()
    tensors: int = 0
    dtypes: tuple[str, ...] = ()
    num_bytes: int = 0
    notes: tuple[str, ...] = ()
    problem: str = ""
    cached: tuple[str, ...] = ()
    fit: Fit | None = None


def examine_folder(folder: Path, base: str | None = None) -> FolderReport:
    """Read one adapter's folder, and judge it against a base if one is named.

    Raises:
        ModelError: the base cannot be found.
    """
    name = folder.resolve().name
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", AdapterWarning)
            adapter = read_adapter(folder)
    except AdapterError as error:
        return FolderReport(name, problem=str(error))
    pairs = adapter.pairs.values()
    tensors = [*_tensors(adapter)]
    return FolderReport(
        name=name,
        kind=_kind(adapter) + (", of mlx-lm" if mlx_file(folder) else ""),
        base_model=adapter.base_model,
        ranks=tuple(sorted({pair.rank // pair.num_experts for pair in pairs})),
        scales=tuple(sorted({pair.scale for pair in pairs})),
        targets=_targets(adapter),
        layers=tuple(sorted({int(found[1]) for path in adapter.modules if (found := LAYER.search(path))})),
        tensors=len(tensors),
        dtypes=tuple(sorted({str(each.dtype).removeprefix("torch.") for each in tensors})),
        num_bytes=sum(each.numel() * each.element_size() for each in tensors),
        notes=tuple(str(each.message) for each in caught if issubclass(each.category, AdapterWarning)),
        cached=_cached_bases(adapter),
        fit=judge(adapter, load_outline(base), base) if base else None,
    )


def judge(adapter: Adapter, outline: "PreTrainedModel", base: str) -> Fit:
    """Compare an adapter with a base by paths and shapes; the base's weights are not needed."""
    try:
        named = with_model_names(outline, adapter)
    except AdapterError as error:
        return Fit(base, 0, (), (str(error),))
    (fitting,), missing, problems = find_places(outline, [named])
    acting = len({*fitting.modules, *fitting.weights})
    own = [problem.removeprefix(f"{adapter.name}: ") for problem in problems]
    return Fit(base, acting, tuple(alike(missing[adapter.name])), tuple(alike(own)))


def _kind(adapter: Adapter) -> str:
    """Return in a word or two what an adapter is."""
    given = set(chain.from_iterable(each.given for each in adapter.vectors.values()))
    first = {"pissa": "PiSSA", "olora": "OLoRA"}.get(adapter.initial) or (
        "virtual tokens"
        if adapter.virtual
        else "DoRA"
        if "magnitude" in given
        else "LoRA"
        if adapter.pairs
        else "IA3"
        if adapter.vectors
        else "saved weights"
    )
    more = {
        "biases": bool(given & {"bias", "whole_bias"}),
        "fused experts": any(pair.num_experts > 1 for pair in adapter.pairs.values()),
        "saved weights": bool(adapter.weights) and bool(adapter.pairs),
    }
    return " with ".join(
        [first, *([" and ".join(name for name, has in more.items() if has)] if any(more.values()) else [])]
    )


def _tensors(adapter: Adapter) -> Sequence[Tensor]:
    factors = (factor for pair in adapter.pairs.values() for factor in (pair.a, pair.b))
    vectors = (vector for each in adapter.vectors.values() for vector in each.given.values())
    virtual = adapter.virtual.given.values() if adapter.virtual else ()
    return [*factors, *vectors, *virtual, *adapter.weights.values()]


def _targets(adapter: Adapter) -> tuple[Target, ...]:
    paths: dict[str, list[str]] = {}
    for path in dict.fromkeys((*adapter.modules, *adapter.weights)):
        paths.setdefault(path.rpartition(".")[2], []).append(path)
    return tuple(Target(name, len(each), _shapes(adapter, each)) for name, each in sorted(paths.items()))


def _shapes(adapter: Adapter, paths: Sequence[str]) -> tuple[tuple[int, int] | None, ...]:
    pairs: Mapping[str, tuple[int, int]] = {
        path: (adapter.pairs[path].a.shape[1], adapter.pairs[path].b.shape[0])
        for path in paths
        if path in adapter.pairs
    }
    return tuple(dict.fromkeys(pairs.get(path) for path in paths))


def _cached_bases(adapter: Adapter) -> tuple[str, ...]:
    """Return the names of bases in treadle's cache that have a place for all of an adapter."""
    fits: list[str] = []
    for config in sorted((home() / "models").glob("*/config.json")):
        with suppress(ModelError):  # a folder of the cache that is no causal LM says nothing of the adapter
            found = judge(adapter, load_outline(str(config.parent)), config.parent.name.replace("--", "/"))
            if not found.missing and not found.misfits:
                fits.append(found.base)
    return tuple(fits)
