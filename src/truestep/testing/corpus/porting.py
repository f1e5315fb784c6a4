"""Correct ports of any model: the same numbers under other names, in other modules, by other code.

Each function changes a model in place, and what it computes only by rounding. Its modules keep
their code: a subclass of each says which of the new names stands for which of the old ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from truestep.testing.corpus.editing import derive

Tensor = torch.Tensor

NAMES = {
    "transformer_blocks": "layers",
    "single_transformer_blocks": "single_layers",
    "blocks": "layers",
    "attn": "attention",
    "attn1": "self_attention",
    "attn2": "cross_attention",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out": "o",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "norm1": "norm_in",
    "norm2": "norm_out",
    "ff": "mlp",
    "ffn": "mlp",
    "net": "stack",
    "proj_out": "head",
    "scale_shift_table": "modulation",
}
"""Usual names of other implementations; all that are not here get a prefix."""


def renamed(model: nn.Module) -> None:
    """Give every module, and every parameter that is no layer's own, another name."""
    for module in _composed(model):
        held = [*module._modules, *module._parameters]
        links = {name: NAMES.get(name, f"p_{name}") for name in held if not name.isdecimal()}
        _rename(module, links)


def exchanged(model: nn.Module) -> None:
    """Let two modules of one class and one size in every block have each other's name."""
    for module in _composed(model):
        links: dict[str, str] = {}
        free = [(n, m) for n, m in module._modules.items() if m is not None and not n.isdecimal()]
        for at, (name, part) in enumerate(free):
            for other, twin in free[at + 1 :]:
                same = type(part) is type(twin) and _shapes(part) == _shapes(twin)
                if same and _shapes(part) and not {name, other} & links.keys():
                    links |= {name: other, other: name}
        _rename(module, links)


def fused(model: nn.Module) -> None:
    """Make keys and values of every attention by one product."""
    for module in _composed(model):
        for first, second in (("to_k", "to_v"), ("add_k_proj", "add_v_proj")):
            parts = [module._modules.get(name) for name in (first, second)]
            if all(type(part) is nn.Linear for part in parts):
                _fuse(module, first, second)


def split(model: nn.Module) -> None:
    """Make the widest layers of every block of two halves."""
    for module in _composed(model):
        for name, part in [*module._modules.items()]:
            if type(part) is not nn.Linear or part.out_features % 2:
                continue
            if part.out_features >= 2 * part.in_features:
                module._modules[name] = Halves(part)


def by_hand(model: nn.Module) -> None:
    """Compute norms and activations by their formulas, in modules of other classes."""
    for module in _composed(model):
        for name, part in [*module._modules.items()]:
            if (made := _by_formula(part)) is not None:
                module._modules[name] = made


def everything(model: nn.Module) -> None:
    """All of these, but for the exchange of names that are other ones then."""
    for change in (by_hand, split, fused, renamed):
        change(model)


PORTS: Mapping[str, Callable[[nn.Module], None]] = {
    "renamed": renamed,
    "exchanged names": exchanged,
    "fused keys and values": fused,
    "split layers": split,
    "norms by hand": by_hand,
    "everything": everything,
}
"""By what a port has otherwise."""


class Halves(nn.Module):
    """A linear layer `... i` to `... o` of two that make half of its channels each."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        half = layer.out_features // 2
        self.low, self.high = (_part(layer, rows) for rows in (slice(0, half), slice(half, None)))

    @property
    def weight(self) -> Tensor:
        """Of one half, for code that asks for its dtype."""
        return self.low.weight

    def forward(self, x: Tensor) -> Tensor:
        """Both halves, one after the other."""
        return torch.cat([self.low(x), self.high(x)], dim=-1)


def _part(layer: nn.Linear, rows: slice) -> nn.Linear:
    weight = layer.weight[rows].detach().clone()
    part = nn.Linear(layer.in_features, len(weight), bias=layer.bias is not None)
    part.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        part.bias = nn.Parameter(layer.bias[rows].detach().clone(), requires_grad=False)
    return part


class Standardised(nn.Module):
    """A layer norm by its formula."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.gain, self.shift, self.epsilon = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Mean 0 and variance 1 over the channels of x `... c`, then gain and shift."""
        wide = x.float()
        centred = wide - wide.mean(-1, keepdim=True)
        made = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.epsilon)
        made = made if self.gain is None else made * self.gain
        return (made if self.shift is None else made + self.shift).to(x.dtype)


class Tanh(nn.Module):
    """The approximate GELU by its formula."""

    def forward(self, x: Tensor) -> Tensor:
        """x `...`."""
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Swish(nn.Module):
    """SiLU by its formula."""

    def forward(self, x: Tensor) -> Tensor:
        """x `...`."""
        return x * torch.sigmoid(x)


class RootMeanSquare(nn.Module):
    """An RMS norm by its formula."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.gain, self.epsilon = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Mean square 1 over the channels of x `... c`, then gain."""
        wide = x.float()
        epsilon = torch.finfo(x.dtype).eps if self.epsilon is None else self.epsilon
        made = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return (made if self.gain is None else made * self.gain).to(x.dtype)


def _by_formula(part: nn.Module | None) -> nn.Module | None:
    """A module of another class that computes the same; None where there is none."""
    if isinstance(part, nn.LayerNorm) and len(part.normalized_shape) == 1:
        return Standardised(part)
    if type(part) is nn.RMSNorm and len(part.normalized_shape) == 1:
        return RootMeanSquare(part)
    if type(part) is nn.SiLU:
        return Swish()
    if type(part) is nn.GELU and part.approximate == "tanh":
        return Tanh()
    return None


def _composed(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that hold others."""
    held = [m for m in model.modules() if m._modules]
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential, Halves)
    yield from (module for module in held if not isinstance(module, containers))


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in module.parameters()]


def _rename(module: nn.Module, links: Mapping[str, str]) -> None:
    """Hold modules and parameters under other names; its code finds them by the old ones."""
    if not links:
        return
    for table in (module._modules, module._parameters):
        held: dict[str, Any] = {links.get(name, name): value for name, value in table.items()}
        table.clear()
        table.update(held)
    found = type(module).__getattr__

    def get(self: Any, name: str) -> Any:
        return found(self, links.get(name, name))

    derive(module, {"__getattr__": get})


def _fuse(module: Any, *names: str) -> None:
    """One layer in the place of several that are given the same; it runs once a call."""
    layers = [module._modules.pop(name) for name in names]
    whole = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers))
    whole.weight = _joined([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers]
    whole.bias = None if biases[0] is None else _joined(biases)  # type: ignore[assignment]
    label = "_".join(names)
    module._modules[label] = whole
    sizes = [layer.out_features for layer in layers]
    last: list[Any] = [None, None]

    def part(owner: Any, at: int) -> Callable[[Tensor], Tensor]:
        def make(x: Tensor) -> Tensor:
            if at == 0 or last[0] is not x:
                last[:] = [x, getattr(owner, label)(x)]
            made: Tensor = last[1].split(sizes, dim=-1)[at]
            return made

        return make

    found = type(module).__getattr__

    def get(self: Any, name: str) -> Any:
        return part(self, names.index(name)) if name in names else found(self, name)

    derive(module, {"__getattr__": get})


def _joined(tensors: list[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat([tensor.detach() for tensor in tensors]), requires_grad=False)
