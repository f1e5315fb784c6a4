"""The weights of a candidate that is meant to differ, beside the trusted ones; and those put back.

Weights are read, or found out by what a layer makes of unit vectors. What is put back is numbers:
a class, a forward, a hook of the candidate's stay where they are, and are checked with all else. A
linear layer of another class, whose numbers cannot be exchanged, is replaced as a whole; what it
makes of the tokens that it is given is then set against what its own weights make of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from truestep.errors import FOREIGN
from truestep.judge.meant import Pair
from truestep.measure.distance import same_bits
from truestep.measure.plain import is_wrapped
from truestep.pairing.naming import ROOT, named_modules
from truestep.runtime.precision import is_packed

Tensor = torch.Tensor
Models = Mapping[str, torch.nn.Module]
"""What a pipeline runs, by component."""

_AT_ONCE = 256
"""Unit vectors that a layer is given at once."""


@dataclass(frozen=True)
class Changed:
    """A parameter that is not what it was.

    Attributes:
        module, key: Where it is; the module with its model before it.
        pair: Both sides.
        eps: Of the precision that the candidate keeps it in.
        slack: How far off each of its numbers was found out, where it could not be read.
    """

    module: str
    key: str
    pair: Pair
    eps: float
    slack: float = 0.0

    @property
    def name(self) -> str:
        """Of the parameter."""
        return f"{self.module}.{self.key}"


@dataclass
class Weights:
    """What became of the parameters of a pipeline's models.

    Attributes:
        changed: Those that are not what they were.
        same: How many weights of two axes and more are.
        unjudged: Parameters that cannot be read. missing: those that are not there. added: those
            that the trusted side does not have.
        numbers: Modules whose own parameters are put back, by model and fqn.
        exchanged: Linear layers of another class, to be replaced as a whole, with the weight and
            bias that they work with.
    """

    changed: list[Changed] = field(default_factory=list)
    same: int = 0
    unjudged: list[str] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    added: list[tuple[str, str]] = field(default_factory=list)
    numbers: list[tuple[str, str]] = field(default_factory=list)
    exchanged: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict)


def compared(models: Models, trusted: Models) -> Weights:
    """Every parameter of the trusted models beside the candidate's."""
    found = Weights()
    for name, theirs in trusted.items():
        if name not in models:
            continue
        own = named_modules(models[name]).modules
        for fqn, module in named_modules(theirs).modules.items():
            _compare(found, name, fqn, own.get(fqn), module)
    return found


def _compare(
    found: Weights,
    model: str,
    fqn: str,
    own: torch.nn.Module | None,
    theirs: torch.nn.Module,
) -> None:
    """Add what became of one module's own parameters."""
    parameters = {k: p for k, p in theirs._parameters.items() if p is not None}
    name = model if fqn == ROOT else f"{model}.{fqn}"
    other = own is not None and type(own) is not type(theirs) and not theirs._modules
    read = _probed(own, theirs) if other and own is not None else {}
    if read:
        found.exchanged[model, fqn] = read
    if "bias" in read and "bias" not in parameters:
        found.added.append((name, "bias"))
    differing = False
    for key, parameter in parameters.items():
        reference = parameter.detach()
        if own is not None and not read and _is_gone(own, key, other=other):
            found.missing.append((name, key))
            differing = True
            continue
        actual = read.get(key) if read else _readable(own, key)
        if actual is None or actual.shape != reference.shape:
            found.unjudged.append(f"{name}.{key}")
            continue
        if same_bits(actual, reference):
            found.same += reference.ndim > 1
            continue
        differing = True
        dtypes = (actual.dtype, reference.dtype, *_held_in(actual))
        eps = max(torch.finfo(dtype).eps for dtype in dtypes) / 2
        pair = Pair(reference.float().cpu(), actual.float().cpu())
        slack = 8 * eps * float(read["weight"].abs().max()) if read else 0.0
        found.changed.append(Changed(name, key, pair, eps, slack))
    if differing and not read:
        found.numbers.append((model, fqn))


def _held_in(actual: Tensor) -> list[torch.dtype]:
    """16-bit precisions that hold all values of a weight as they are: it was kept in one."""
    return [
        dtype
        for dtype in (torch.bfloat16, torch.float16)
        if actual.ndim > 1 and torch.equal(actual.to(dtype).to(actual.dtype), actual)
    ]


def _is_gone(own: torch.nn.Module, key: str, *, other: bool) -> bool:
    """Whether a module holds nothing of a name: not as a buffer either; of another class, whether
    it holds nothing at all."""
    if other:
        return not own.state_dict()
    return own._parameters.get(key) is None and own._buffers.get(key) is None


def _readable(module: torch.nn.Module | None, key: str) -> Tensor | None:
    """A parameter as plain numbers; None where there is none of that name, or of numbers."""
    if module is None:
        return None
    tensor: Tensor | None = module._parameters.get(key)
    if tensor is None:
        tensor = module._buffers.get(key)
    if tensor is None or tensor.is_meta:
        return None
    if is_packed(tensor):
        plain: Tensor = tensor.dequantize()
        return plain.detach()
    return tensor.detach() if tensor.is_floating_point() and not is_wrapped(tensor) else None


def _probed(own: torch.nn.Module, theirs: torch.nn.Module) -> dict[str, Tensor]:
    """Weight and bias that a layer of another class works with, by what it makes of unit vectors.

    Of layers that quantise what they are given, too: one number of a vector is a whole step. Those
    that clip it to a range that was calibrated are given smaller ones, too: the size counts that
    brings the weights nearest to the trusted ones, for what is wrong with weights is so at any.
    """
    if not isinstance(theirs, torch.nn.Linear):
        return {}
    units = torch.eye(theirs.in_features).to(theirs.weight)
    found: list[tuple[float, Tensor]] = []
    try:
        with torch.no_grad():
            nothing = own(torch.zeros_like(units[:1])).to(units.dtype)
            for size in _SIZES:
                with _unbiased(own):
                    least = own(torch.zeros_like(units[:1])).to(units.dtype)
                    columns = [
                        (own(size * units[at : at + _AT_ONCE]).to(units.dtype) - least) / size
                        for at in range(0, len(units), _AT_ONCE)
                    ]
                weight = torch.cat(columns).T.contiguous()
                apart = float((weight - theirs.weight).float().norm())
                found.append((apart if apart == apart else float("inf"), weight))
    except FOREIGN:  # it takes something else: what it holds may still be read
        return {}
    weight = min(found, key=lambda each: each[0])[1]
    keyed = theirs.bias is not None or float(nothing.abs().max()) > _NONE * float(
        weight.abs().max()
    )
    return {"weight": weight, "bias": nothing[0]} if keyed else {"weight": weight}


@contextmanager
def _unbiased(own: torch.nn.Module) -> Iterator[None]:
    """A layer whose bias is 0 meanwhile: beside a large one, small weights are rounded away."""
    bias = getattr(own, "bias", None)
    if not isinstance(bias, Tensor) or is_wrapped(bias) or not bias.is_floating_point():
        yield
        return
    before = bias.detach().clone()
    try:
        bias.data.zero_()
        yield
    finally:
        bias.data.copy_(before)


_SIZES = (1.0, 0.5, 0.25, 0.125, 4.0)
"""Of the unit vectors, the plainest first."""

_NONE = 1e-3
"""Share of the largest weight that a layer without a bias may give for nothing."""


@dataclass
class Acted:
    """What a layer of another class made of its tokens.

    Attributes:
        error, size: Sums of squares: of its distance from what its own weights make of them, and of
            that itself.
        raised: What it raised; empty where it ran.
        calls: How many it was given.
    """

    error: float = 0.0
    size: float = 0.0
    raised: str = ""
    calls: int = 0

    @property
    def apart(self) -> float:
        """Relative distance; infinite where it raised or gave what is no number."""
        if self.raised or self.error != self.error:
            return float("inf")
        return (self.error / self.size) ** 0.5 if self.size else float(self.error > 0)


@contextmanager
def put_back(
    models: Models, trusted: Models, found: Weights
) -> Iterator[dict[tuple[str, str], Acted]]:
    """The candidate with the trusted weights in the place of its own.

    Yields:
        Of the layers that were exchanged as a whole, what they made of the tokens that came.
    """
    acted: dict[tuple[str, str], Acted] = {}
    with ExitStack() as stack:
        for model, fqn in found.numbers:
            own, theirs = _both(models, trusted, model, fqn)
            for key, parameter in theirs._parameters.items():
                stack.callback(_set, own._parameters, key, own._parameters.get(key))
                stack.callback(_set, own._buffers, key, own._buffers.pop(key, None))
                own._parameters[key] = parameter
        for (model, fqn), weights in found.exchanged.items():
            own, theirs = _both(models, trusted, model, fqn)
            acted[model, fqn] = Acted()
            hook = _beside(own, weights, acted[model, fqn])
            stack.callback(theirs.register_forward_hook(hook).remove)
            for holder in models[model].modules():
                for key, child in holder._modules.items():
                    if child is own:
                        stack.callback(holder._modules.__setitem__, key, own)
                        holder._modules[key] = theirs
        yield acted


def _both(
    models: Models, trusted: Models, model: str, fqn: str
) -> tuple[torch.nn.Module, torch.nn.Module]:
    own, theirs = (named_modules(side[model]).modules[fqn] for side in (models, trusted))
    return own, theirs


def _set(holder: dict[str, Any], key: str, value: Any) -> None:
    if value is None and key in holder:
        del holder[key]
    elif value is not None:
        holder[key] = value


def _beside(own: torch.nn.Module, weights: dict[str, Tensor], acted: Acted) -> Any:
    """A hook of the trusted layer that runs the candidate's on the same tokens."""

    def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
        if len(args) != 1 or args[0].dtype != weights["weight"].dtype:
            return  # raised to another precision: the layer keeps its own
        acted.calls += 1
        bias = weights.get("bias")
        wanted = torch.nn.functional.linear(args[0], weights["weight"], bias).float()
        try:
            made = own(args[0].clone())
        except FOREIGN as error:
            acted.raised = acted.raised or f"{type(error).__name__}: {error}"
            return
        if made.shape != wanted.shape:
            acted.raised = acted.raised or f"it returns {tuple(made.shape)}"
            return
        acted.error += float((made.float() - wanted).square().sum())
        acted.size += float(wanted.square().sum())

    return hook
