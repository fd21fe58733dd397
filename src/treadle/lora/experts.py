"""Fused experts of a mixture-of-experts base: one parameter holds a weight of all experts, (E, out, in).

Adapters change these parameters by a pair of factors for each expert. The change lies inside the expert, so a layer of
experts that an adapter changes is computed here, expert by expert: W x + B_e (gates of the token * A_e x). Without
weights the base's own module runs.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from treadle.common.errors import AdapterError, problem_list
from treadle.common.transformers_names import expert_fuser
from treadle.lora.adapter import Adapter
from treadle.lora.layer import BlendedLinear
from treadle.lora.pair import LoraPair

EXPERT_FIELDS = ("has_gate", "has_bias", "is_transposed")
"""Said by transformers of each module of experts whose computation is the common one."""
FUSED_AXES = 3
INTO_EXPERTS = re.compile(r"(.*\bexperts)(?:\.|$)")


class ExpertWeight(nn.Module):
    """One parameter of fused experts, as a place that adapters may target. It computes nothing itself."""

    def __init__(self, experts: nn.Module, name: str) -> None:
        super().__init__()
        outer: Any = experts
        self.weight: nn.Parameter = getattr(experts, name)
        self.num_experts, *sizes = self.weight.shape
        self.size_in, self.size_out = sizes if outer.is_transposed else sizes[::-1]


class ExpertFactors(BlendedLinear):
    """The factors of all adapters for one parameter of fused experts; `BlendedExperts` computes with them.

    An adapter's rows of A, and columns of B, are those of its first expert, then of the second, and so on.
    """

    def put_ranks(self, ranks: Sequence[int]) -> None:
        """Take the number of rows that each stacked pair has, of all experts together; then `activate`."""
        num_experts: int = self.base.num_experts  # type: ignore[assignment]
        owners = [torch.arange(num_experts).repeat_interleave(rank // num_experts) for rank in ranks]
        self._owners = torch.cat(owners)  # (R,), the expert of each row

    def activate(self, rows: Sequence[Tensor | None]) -> None:
        """Activate some rows of A, which are listed by slot; None = all of them."""
        super().activate(rows)
        some = rows[self.slot]
        owners = self._owners if some is None else self._owners[some]
        num_experts: int = self.base.num_experts  # type: ignore[assignment]
        self._rows = owners.argsort(stable=True).view(num_experts, -1).to(self.device)  # (E, R / E)

    def token_gates(self, num_tokens: int) -> Tensor | None:
        """Return the gates (B * T, R / E) of tokens for any one expert; None if all are zero."""
        gates = self.gates.get(self.slot)
        if gates is None or not self._rows.numel():
            return None
        ones = torch.ones(num_tokens, gates.shape[-1], device=self.device, dtype=self.dtype)
        own = self.role.apply(gates, ones)[:, self._rows[0]]
        return own if own.any() else None

    def update(self, x: Tensor, expert: int, gates: Tensor) -> Tensor:
        """Return the update (n, out) of one expert's product, for tokens x (n, in) with gates (n, R / E)."""
        rows = self._rows[expert]
        h = functional.linear(x.to(self.dtype), self.stacked_a.a_active[rows]) * gates
        return functional.linear(h, self.b_active[:, rows])


class BlendedExperts(nn.Module):
    """The module of a base's fused experts, and the factors for its parameters as children of the same names."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def factors(self) -> dict[str, ExpertFactors]:
        """The factors by the name of the parameter."""
        return {name: child for name, child in self.named_children() if isinstance(child, ExpertFactors)}

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Return the sum of the chosen experts' outputs, (B * T, H).

        Args:
            x: (B * T, H).
            chosen: (B * T, K) experts of each token.
            shares: (B * T, K) what each output is multiplied by.
        """
        factors = self.factors
        gates = {name: made for name, each in factors.items() if (made := each.token_gates(len(x))) is not None}
        if not gates:
            return self.base(x, chosen, shares)
        base: Any = self.base
        first, last = _weight_names(base)
        y = torch.zeros_like(x, dtype=torch.float32)
        for expert in chosen.unique().tolist():
            if expert >= base.num_experts:
                continue  # on another device
            token, place = torch.where(chosen == expert)

            def product(name: str, x: Tensor, expert: int = expert, token: Tensor = token) -> Tensor:
                weight = getattr(base, name)[expert]
                bias = getattr(base, f"{name}_bias")[expert] if base.has_bias else None
                y = functional.linear(x, weight.t() if base.is_transposed else weight, bias)
                return (y + factors[name].update(x, expert, gates[name][token])).to(y.dtype) if name in gates else y

            h = product(first, x[token])
            out = product(last, base._apply_gate(h) if base.has_gate else base.act_fn(h))
            if getattr(base, "has_post_expert_norm", False):  # said since transformers 5.20
                out = base.post_expert_norm(out)
            y.index_add_(0, token, (out * shares[token, place, None]).float())
        return y.to(x.dtype)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by path, and an `ExpertWeight` for each parameter of fused experts."""
    modules = dict(model.named_modules())
    weights: dict[str, nn.Module] = {
        f"{path}.{name}": ExpertWeight(experts, name)
        for path, module in modules.items()
        if not isinstance(modules.get(path.rpartition(".")[0]), BlendedExperts)
        for experts in [module.base if isinstance(module, BlendedExperts) else module]
        for name in _weight_names(experts)
    }
    return weights | modules


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path; factors of fused experts go beside these.

    An `ExpertWeight` takes the factors away again.
    """
    parent, _, child = path.rpartition(".")
    holder = model.get_submodule(parent)
    if not isinstance(module, ExpertFactors | ExpertWeight):
        setattr(holder, child, module)
        return
    if not isinstance(holder, BlendedExperts):
        holder = BlendedExperts(holder)
        put_module(model, parent, holder)
    if isinstance(module, ExpertFactors):
        setattr(holder, child, module)
    else:
        delattr(holder, child)
        if not holder.factors:
            put_module(model, parent, holder.base)


def unknown_experts(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """Return the class of the experts at the beginning of a path, if they are not known here."""
    found = INTO_EXPERTS.match(path)
    experts = modules.get(found[1]) if found else None
    return None if experts is None or isinstance(experts, nn.ModuleList) else type(experts).__name__


def with_fused_experts(model: nn.Module, adapter: Adapter) -> Adapter:
    """Return the adapter with factors of single experts joined, where the model fuses these experts' weights.

    Releases of transformers before 5 had a linear layer for each expert, and most adapters of experts come from them.

    Raises:
        AdapterError: lists factors that do not fit the fused weight.
    """
    fuse, weights = expert_fuser(model), modules_of(model)
    found: dict[str, dict[tuple[int, int], LoraPair]] = {}
    pairs, parts = dict[str, LoraPair](), dict[str, int]()
    for path, pair in adapter.pairs.items():
        place = None if path in weights else fuse(path)
        if place is None or not isinstance(weights.get(place.path), ExpertWeight | ExpertFactors):
            pairs[path] = pair
        else:
            found.setdefault(place.path, {})[place.expert, place.part] = pair
            parts[place.path] = place.num_parts
    if not found:
        return adapter
    problems: list[str] = []
    for path, each in found.items():
        place = weights[path]
        weight = place.base if isinstance(place, ExpertFactors) else place
        assert isinstance(weight, ExpertWeight)
        wrong = _misfits(each, weight, parts[path])
        problems += [f"{adapter.name}: {path}: {problem}" for problem in wrong]
        if not wrong:
            pairs[path] = _joined(each, weight, parts[path])
    if problems:
        raise AdapterError(problem_list("factors of single experts do not fit the model's fused ones:", problems))
    return replace(adapter, pairs=pairs)


def _misfits(pairs: Mapping[tuple[int, int], LoraPair], weight: ExpertWeight, num_parts: int) -> list[str]:
    wanted = weight.size_in, weight.size_out // num_parts
    sizes = {key: (pair.a.shape[1], pair.b.shape[0]) for key, pair in pairs.items()}
    return [
        f"expert {expert} is {wanted} (in, out) of {weight.num_experts} experts, its factors are {size}"
        for (expert, _), size in sizes.items()
        if size != wanted or expert >= weight.num_experts
    ]


def _joined(pairs: Mapping[tuple[int, int], LoraPair], weight: ExpertWeight, num_parts: int) -> LoraPair:
    """Return one pair of all experts.

    The parts of a weight stand below one another, each with rows of A of its own.
    """
    ranks = [max((pair.rank for (_, at), pair in pairs.items() if at == part), default=0) for part in range(num_parts)]
    height = weight.size_out // num_parts
    a = torch.zeros(weight.num_experts, sum(ranks), weight.size_in)
    b = torch.zeros(weight.size_out, weight.num_experts, sum(ranks))
    for (expert, part), pair in pairs.items():
        start = sum(ranks[:part])
        rows = slice(start, start + pair.rank)
        a[expert, rows] = pair.a.float()
        b[part * height : (part + 1) * height, expert, rows] = pair.b.float() * pair.scale
    return LoraPair(a.flatten(0, 1), b.flatten(1), 1.0, weight.num_experts)


def _weight_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the first and the last parameter of fused experts; () of other modules."""
    outer: Any = module
    if not all(hasattr(module, field) for field in EXPERT_FIELDS):
        return ()
    names = ("gate_up_proj" if outer.has_gate else "up_proj", "down_proj")
    found = [getattr(module, name, None) for name in names]
    is_known = all(
        isinstance(each, nn.Parameter) and each.dim() == FUSED_AXES and each.is_floating_point() for each in found
    )
    return names if is_known else ()
