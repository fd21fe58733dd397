"""Whether adapters fit a model and each other; every way in which they do not is in one error."""

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from treadle.adapters import Adapter
from treadle.errors import AdapterError, OptionError, OptionProblem, problem_list, unknown_name
from treadle.layers import BlendedLinear
from treadle.magnitudes import range_problems
from treadle.params import COMBINES

ROUTED_EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")
"""In the path of a layer that belongs to one of several experts."""


def is_routed(path: str) -> bool:
    """Return whether the layer at `path` reads only the tokens that a router sends to it."""
    return ROUTED_EXPERT.search(path) is not None


def check_adapters(model: nn.Module, adapters: Sequence[Adapter]) -> None:
    """Raise an AdapterError that lists every way in which the adapters do not fit the model or each other."""
    check_fit(linear_shapes(model), adapters)


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
        missing = [path for path in adapter.declared(list(shapes)) if path not in adapter.pairs]
        problems += [f"{adapter.name}: its config targets {path}, but it has no factors for it" for path in missing]
    if problems:
        raise AdapterError(problem_list("the adapters do not fit the model:", problems))


def check_range(adapters: Sequence[Adapter], dtype: torch.dtype) -> None:
    """Raise an AdapterError that lists every update that may overflow in the dtype that it is computed in.

    Adapters that were read are right in float32, and so in bfloat16, which has the same range.
    """
    if dtype == torch.float16:
        problems = [f"{each.name}: {problem}" for each in adapters for problem in range_problems(each.pairs, dtype)]
        if problems:
            raise AdapterError(problem_list("the adapters do not fit the model's dtype:", problems))


def check_tokens(adapters: Sequence[Adapter], rereading: Collection[str]) -> None:
    """Raise an AdapterError that names adapters of layers where a token's weights cannot follow it.

    Args:
        adapters: to be blended by row and token.
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


def check_combine(combine: str, adapters: Sequence[Adapter]) -> None:
    """Raise an OptionError if `adapters` cannot be combined in this way, naming those that differ."""
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
    """Return the path of each linear layer of the base and its (in, out); a blended one is one layer, not two."""
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
