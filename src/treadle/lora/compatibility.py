"""Checks that adapters fit a model and each other; one error lists every problem."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from treadle.common.errors import AdapterError, OptionError, OptionProblem, problem_list, unknown_name
from treadle.common.params import COMBINES
from treadle.common.transformers_names import checkpoint_renamer
from treadle.lora.adapter import Adapter
from treadle.lora.layer import BlendedLinear
from treadle.lora.pair import range_problems

LAYER_STACK = re.compile(r"(.*?)\.\d+\.")
"""In a layer's path: the name of its stack of numbered layers."""
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""In a layer's path: the number of its layer or expert."""
ROUTED_EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")
"""In the path of a layer of an expert."""


def is_routed(path: str) -> bool:
    """Return whether the layer at `path` reads only the tokens that a model's own router sends to it."""
    return ROUTED_EXPERT.search(path) is not None


def check_adapters(model: nn.Module, adapters: Sequence[Adapter]) -> None:
    """Raise an AdapterError that lists every way in which the adapters do not fit the model or each other."""
    check_fit(linear_shapes(model), [replace(adapter, weights={}) for adapter in adapters])
    modules = dict(model.named_modules())
    problems = [
        f"{adapter.name}: it replaces {path}.weight {problem}"
        for adapter in adapters
        for path, weight in adapter.weights.items()
        if (problem := weight_problem(modules.get(path), weight))
    ]
    if problems:
        head = "adapters that change whole weights of the base cannot be blended; save them without these weights:"
        raise AdapterError(problem_list(head, _by_pattern(problems)))


def weight_problem(module: nn.Module | None, weight: Tensor) -> str | None:
    """Return how a saved weight (out, in) differs from the base's; None if it is equal.

    They are compared in the coarser of both dtypes, because training and running may use different ones.
    """
    own = getattr(module, "weight", None)
    if not isinstance(own, Tensor):
        return "which the model does not have"
    if own.shape != weight.shape:
        return f"of shape {tuple(own.shape)} by one of {tuple(weight.shape)} (was the vocabulary resized?)"
    if not own.is_floating_point() or own.element_size() < 2:
        return "which is quantised, so that nothing tells whether it is the base's own"
    dtypes = sorted({own.dtype, weight.dtype}, key=lambda dtype: (dtype.itemsize, dtype == torch.float16))
    saved, held = (each.to(own.device, dtypes[0]) for each in (weight, own.detach()))
    return None if torch.equal(saved, held) else "by another one (was it trained too?)"


def check_fit(shapes: Mapping[str, tuple[int, int]], adapters: Sequence[Adapter]) -> None:
    """Raise an AdapterError as `check_adapters` does, for a model whose linear layers have these (in, out)."""
    names = [adapter.name for adapter in adapters]
    problems = [f"two adapters are called {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    for adapter in adapters:
        for path, pair in adapter.pairs.items():
            wanted = (pair.a.shape[1], pair.b.shape[0])
            if path not in shapes:
                problems.append(f"{adapter.name}: the model has no linear layer {path}")
            elif shapes[path] != wanted:
                problems.append(f"{adapter.name}: {path} is {shapes[path]} (in, out), its factors are {wanted}")
        problems += [f"{adapter.name}: it holds {path}.weight, which is not compared here" for path in adapter.weights]
        trained = {_tower(path) for path in adapter.pairs}
        missing = [path for path in adapter.declared(list(shapes)) if path not in adapter.pairs]
        missing = [path for path in missing if _tower(path) in {None, *trained}]
        problems += [f"{adapter.name}: its config targets {path}, but it has no factors for it" for path in missing]
    if problems:
        raise AdapterError(problem_list("the adapters do not fit the model:", _by_pattern(problems)))


def _by_pattern(problems: Sequence[str]) -> list[str]:
    """Merge problems that differ only in numbers of layers or experts: the first one, and their count."""
    alike: dict[str, list[str]] = {}
    for problem in problems:
        alike.setdefault(NUMBER.sub("*", problem), []).append(problem)
    return [f"{first} (and {len(more)} more like it)" if more else first for first, *more in alike.values()]


def _tower(path: str) -> str | None:
    """Return the stack of numbered layers of a layer; names such as q_proj also match a vision tower's layers.

    An adapter without factors in a tower was trained without it, and PEFT does not change that tower.
    """
    found = LAYER_STACK.match(path)
    return found and found[1]


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
        routed = sum(map(is_routed, adapter.pairs))
        again = [path for path in adapter.pairs if path in rereading]
        problems += [f"{adapter.name}: {routed} layers of routed experts"] if routed else []
        problems += [f"{adapter.name}: {len(again)} layers that read the past again ({again[0]})"] if again else []
    if problems:
        head = "these layers cannot be blended by row and token; train adapters without them:"
        raise AdapterError(problem_list(head, problems))


def with_model_names(model: nn.Module, adapter: Adapter) -> Adapter:
    """Return the adapter with today's module paths, by transformers' own table of renamings.

    A path stays if the model has it, or if the model does not have its new name either.
    """
    known = {path for path, _ in model.named_modules()}
    if all(path in known for path in (*adapter.pairs, *adapter.weights)):
        return adapter
    renamed = checkpoint_renamer(model)

    def name(path: str) -> str:
        return path if path in known or (new := renamed(path)) not in known else new

    pairs = {name(path): pair for path, pair in adapter.pairs.items()}
    if len(pairs) < len(adapter.pairs):
        raise AdapterError(f"{adapter.name}: two of its modules are one in this model: old and new names are mixed.")
    weights = {name(path): weight for path, weight in adapter.weights.items()}
    return replace(adapter, pairs=pairs, weights=weights)


def check_combine(combine: str, adapters: Sequence[Adapter]) -> None:
    """Raise an OptionError if `adapters` cannot be combined so, naming those that differ."""
    if combine not in COMBINES:
        raise OptionError(unknown_name("combine", combine, COMBINES))
    if combine == "sum" or len(adapters) < 2:
        return
    first, *rest = adapters
    ranks = {module: pair.rank for module, pair in first.pairs.items()}
    different = [other.name for other in rest if {m: p.rank for m, p in other.pairs.items()} != ranks]
    if different:
        differ = f"{', '.join(different)} differ from {first.name}"
        needed = "adapters of equal ranks and target modules"
        text = f"combine={combine!r} needs {needed}; {differ}. Use combine='sum', which takes any."
        problem = OptionProblem(("combine",), text, combine, f"'sum'; {combine!r} with {needed} ({differ})")
        raise OptionError(text, [problem])


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the path and (in, out) of each linear layer of the base; a blended layer counts once."""
    shapes = {path: shape for path, module in model.named_modules() if (shape := linear_shape(module))}
    for path in [path for path, module in model.named_modules() if isinstance(module, BlendedLinear)]:
        del shapes[f"{path}.base"]
    return shapes


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a linear layer (Linear, its quantised kinds, GPT-2's Conv1D), None for other modules."""
    if isinstance(module, BlendedLinear):
        return linear_shape(module.base)
    for names in (("in_features", "out_features"), ("nx", "nf")):
        if all(isinstance(getattr(module, name, None), int) for name in names):
            return getattr(module, names[0]), getattr(module, names[1])
    return None
