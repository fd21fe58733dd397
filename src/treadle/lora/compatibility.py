"""Checks that adapters fit a model and each other; one error lists every problem."""

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from treadle.common.errors import AdapterError, AdapterWarning, OptionError, OptionProblem, problem_list, unknown_name
from treadle.common.params import COMBINES
from treadle.lora.adapter import Adapter
from treadle.lora.experts import ExpertWeight, modules_of, unknown_experts
from treadle.lora.initial import without_initial
from treadle.lora.layer import BlendedLinear
from treadle.lora.names import with_paths
from treadle.lora.pair import LoraPair, range_problems
from treadle.lora.saved_weights import resized, weight_problem, with_differences
from treadle.lora.vectors import LayerVectors, resolve
from treadle.lora.virtual_attention import place

MISFIT = "the adapters do not fit the model; name the base that they were trained on, or leave them out:"
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""In a layer's path: the number of its layer or expert."""
ROUTED_EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")
"""In the path of a layer of an expert."""


def is_routed(path: str) -> bool:
    """Return whether the layer at `path` reads only the tokens that a model's own router sends to it."""
    return ROUTED_EXPERT.search(path) is not None


def fit_adapters(model: nn.Module, adapters: Sequence[Adapter]) -> tuple[Adapter, ...]:
    """Return the adapters with what the model has a place for; a warning names everything else.

    An adapter of a model that reads images fits its text model so, without the part for images.

    Raises:
        AdapterError: lists every way in which the adapters do not fit the model or each other.
    """
    modules = modules_of(model)
    fitting, missing, problems = find_places(model, adapters)
    problems += [
        f"{adapter.name}: it replaces {path}.weight {problem}"
        for adapter in fitting
        for path, weight in adapter.weights.items()
        if (problem := weight_problem(modules[path], weight, is_alone=_is_alone(adapter, path)))
    ]
    if problems:
        raise AdapterError(problem_list(MISFIT, alike(problems)))
    if any(missing.values()):
        lines = alike([f"{name}: {path}" for name, paths in missing.items() for path in paths])
        head = "the model lacks some modules of adapters, which act without them:"
        warnings.warn(problem_list(head, lines), AdapterWarning, stacklevel=3)
    if lines := [f"{each.name}: {path}.weight" for each in fitting for path in resized(modules, each)]:
        head = "adapters come from another size of vocabulary; rows that both have are equal, and others do not act:"
        warnings.warn(problem_list(head, alike(lines)), AdapterWarning, stacklevel=3)
    placed = _placed(model, fitting)
    return tuple(with_differences(modules, _resolve(modules, adapter)) for adapter in placed)


def find_places(model: nn.Module, adapters: Sequence[Adapter]) -> tuple[list[Adapter], dict[str, list[str]], list[str]]:
    """Compare adapters with a model's modules by path and shape; its weights are not looked at.

    Returns:
        the adapters with what the model has modules for, the other paths by adapter, and a problem for each misfit.
    """
    modules = modules_of(model)
    missing = {
        adapter.name: [path for path in dict.fromkeys((*adapter.modules, *adapter.weights)) if path not in modules]
        for adapter in adapters
    }
    fitting = [with_paths(adapter, lambda path: path if path in modules else None) for adapter in adapters]
    embeddings = {path: base for path, each in modules.items() if isinstance(base := _base(each), nn.Embedding)}
    shapes = {path: (each.num_embeddings, each.embedding_dim) for path, each in embeddings.items()}
    problems = _misfits(layer_shapes(model) | shapes, fitting, _norm_sizes(modules))
    problems += [
        f"{whole.name}: the model has no module {path}"
        for whole, part in zip(adapters, fitting, strict=True)
        for path in ([] if part.modules else whole.modules)
        if not unknown_experts(modules, path)
    ]
    problems += [
        f"{name}: {path}: {kind} does not compute as transformers' other experts do, and cannot be blended"
        for name, paths in missing.items()
        for path in paths
        if (kind := unknown_experts(modules, path))
    ]
    problems += [
        f"{each.name}: {path} has {experts} experts, its factors are of {pair.num_experts}"
        for each in fitting
        for path, pair in each.pairs.items()
        if (experts := _num_experts(modules[path])) != pair.num_experts
    ]
    return fitting, missing, problems


def _placed(model: nn.Module, adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return the adapters with virtual tokens at their places; an AdapterError lists those that cannot have one."""
    placed, problems = list[Adapter](), list[str]()
    for adapter in adapters:
        try:
            virtual = adapter.virtual and place(model, adapter.virtual)
        except AdapterError as error:
            problems.append(f"{adapter.name}: {error}")
        else:
            placed.append(replace(adapter, virtual=virtual))
    if problems:
        raise AdapterError(problem_list(MISFIT, problems))
    return placed


def _num_experts(module: nn.Module) -> int:
    """Return how many experts a place holds; 1 if it is a layer."""
    base = _base(module)
    return base.num_experts if isinstance(base, ExpertWeight) else 1


def _resolve(modules: Mapping[str, nn.Module], adapter: Adapter) -> Adapter:
    """Return an adapter whose tensors do not depend on the base's weights any more; an AdapterError if that fails."""
    if not adapter.vectors and not adapter.initial:
        return adapter
    pairs, vectors, problems = dict[str, LoraPair](), dict[str, LayerVectors](), list[str]()
    for path in adapter.modules:
        base, pair, found = _base(modules[path]), adapter.pairs.get(path), adapter.vectors.get(path)
        try:
            if pair is not None and adapter.initial:
                pair = without_initial(base, pair, adapter.initial)
            if found is not None:
                pair, found = resolve(base, pair, found)
        except AdapterError as error:
            problems.append(f"{adapter.name}: {path}: {error}")
            continue
        if pair is not None:
            pairs[path] = pair
        if found is not None and found.has_effect:  # a saved bias may be the base's own
            vectors[path] = found
    if problems:
        raise AdapterError(problem_list(MISFIT, alike(problems)))
    return replace(adapter, pairs=pairs, vectors=vectors, initial="")


def check_fit(shapes: Mapping[str, tuple[int, int]], adapters: Sequence[Adapter]) -> None:
    """Raise an AdapterError that lists every misfit, for a model whose linear layers have these (in, out)."""
    problems = _misfits(shapes, adapters)
    problems += [
        f"{each.name}: it holds {path}.weight, which is not compared here" for each in adapters for path in each.weights
    ]
    if problems:
        raise AdapterError(problem_list(MISFIT, alike(problems)))


def _misfits(
    shapes: Mapping[str, tuple[int, int]], adapters: Sequence[Adapter], norms: Mapping[str, int] | None = None
) -> list[str]:
    """Return a problem for each name that two adapters have, and each pair or vector that fits no layer.

    Args:
        shapes: path -> (in, out) of each linear layer.
        adapters: to check.
        norms: path -> size of each norm that has a bias; an adapter may change it.
    """
    names = [adapter.name for adapter in adapters]
    problems = [f"two adapters are called {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    for adapter in adapters:
        for path, pair in adapter.pairs.items():
            wanted = (pair.a.shape[1], pair.b.shape[0])
            if path not in shapes:
                problems.append(f"{adapter.name}: the model has no linear layer {path}")
            elif shapes[path] != wanted:
                problems.append(f"{adapter.name}: {path} is {shapes[path]} (in, out), its factors are {wanted}")
        for path, vectors in adapter.vectors.items():
            size_in, size_out = shapes.get(path) or (None, (norms or {}).get(path))
            if size_out is not None:
                misfits = vectors.misfits(size_in, size_out)
                problems += [f"{adapter.name}: {path}: {misfit}" for misfit in misfits]
            elif path not in adapter.pairs:
                problems.append(f"{adapter.name}: the model has no linear layer {path}")
    return problems


def alike(problems: Sequence[str]) -> list[str]:
    """Merge problems that differ only in numbers of layers or experts: the first one, and their count."""
    groups: dict[str, list[str]] = {}
    for problem in problems:
        groups.setdefault(NUMBER.sub("*", problem), []).append(problem)
    return [f"{first} (and {len(more)} more like it)" if more else first for first, *more in groups.values()]


def check_range(adapters: Sequence[Adapter], dtype: torch.dtype) -> None:
    """Raise an AdapterError that lists every update that may overflow in the dtype it is computed in.

    Reading an adapter checked float32, and so bfloat16, which has the same range.
    """
    if dtype == torch.float16:
        problems = [f"{each.name}: {problem}" for each in adapters for problem in range_problems(each.pairs, dtype)]
        if problems:
            raise AdapterError(problem_list("the adapters do not fit the model's dtype:", problems))


def check_tokens(adapters: Sequence[Adapter], rereading: Collection[str]) -> None:
    """Raise an AdapterError that names adapters of layers that cannot be blended by row and token.

    Args:
        adapters: to check.
        rereading: paths of layers that read all tokens again in each step.
    """
    problems: list[str] = []
    for adapter in adapters:
        routed = sum(map(is_routed, adapter.modules))
        again = [path for path in adapter.modules if path in rereading]
        problems += [f"{adapter.name}: {routed} layers of routed experts"] if routed else []
        problems += [f"{adapter.name}: {len(again)} layers that read the past again ({again[0]})"] if again else []
    if problems:
        head = "these layers cannot be blended by row and token; train adapters without them:"
        raise AdapterError(problem_list(head, problems))


def check_combine(combine: str, adapters: Sequence[Adapter]) -> None:
    """Raise an OptionError if `adapters` cannot be combined so, naming those that differ."""
    if combine not in COMBINES:
        raise OptionError(unknown_name("combine", combine, COMBINES))
    if combine == "sum" or len(adapters) < 2:
        return
    if others := [each.name for each in adapters if each.vectors or each.has_experts or each.virtual]:
        holds = "holds" if len(others) == 1 else "hold"
        more = "scales or biases (DoRA, IA3, bias), factors of fused experts or virtual tokens"
        holders = f"{', '.join(others)} {holds} {more}"
        text = f"combine={combine!r} combines factors alone; {holders}. Use combine='sum', which takes any."
        problem = OptionProblem(("combine",), text, combine, f"'sum'; {combine!r} with plain LoRA ({holders})")
        raise OptionError(text, [problem])
    first, *rest = adapters
    ranks = {module: pair.rank for module, pair in first.pairs.items()}
    different = [other.name for other in rest if {m: p.rank for m, p in other.pairs.items()} != ranks]
    if different:
        differ = f"{', '.join(different)} differ from {first.name}"
        needed = "adapters of equal ranks and target modules"
        text = f"combine={combine!r} needs {needed}; {differ}. Use combine='sum', which takes any."
        problem = OptionProblem(("combine",), text, combine, f"'sum'; {combine!r} with {needed} ({differ})")
        raise OptionError(text, [problem])


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the path and (in, out) of each linear layer and of each weight of fused experts."""
    bases = {path: _base(module) for path, module in modules_of(model).items()}
    experts = {path: (each.size_in, each.size_out) for path, each in bases.items() if isinstance(each, ExpertWeight)}
    return linear_shapes(model) | experts


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the path and (in, out) of each linear layer of the base; a blended layer counts once."""
    shapes = {path: shape for path, module in model.named_modules() if (shape := linear_shape(module))}
    for path in [path for path, module in model.named_modules() if isinstance(module, BlendedLinear)]:
        shapes.pop(f"{path}.base", None)
    return shapes


def _is_alone(adapter: Adapter, path: str) -> bool:
    """Return whether nothing else of a module was trained against its saved weight."""
    return not adapter.initial and path not in adapter.vectors


def _base(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, BlendedLinear) else module


def _norm_sizes(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return the size of each norm that has a bias, by path; adapters may change it."""
    norms = {path: base for path, each in modules.items() if isinstance(base := _base(each), nn.LayerNorm)}
    return {path: len(bias) for path, each in norms.items() if (bias := getattr(each, "bias", None)) is not None}


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a linear layer (Linear, its quantised kinds, GPT-2's Conv1D), None for other modules."""
    if isinstance(module, BlendedLinear):
        return linear_shape(module.base)
    for names in (("in_features", "out_features"), ("nx", "nf")):
        if all(isinstance(getattr(module, name, None), int) for name in names):
            return getattr(module, names[0]), getattr(module, names[1])
    return None
