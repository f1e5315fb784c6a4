"""Hypotheses about a module as a whole: its attributes, its precision, whether it runs at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional

from truestep.replay.causes.scene import (
    Hypothesis,
    Scene,
    attribute,
    hooked,
    mapped,
    parameters,
)
from truestep.replay.causes.weights import CASTS, NARROWER

Tensor = torch.Tensor

_SIMPLE = (bool, int, float, str, torch.dtype, type(None))
MOST_PARTS = 16
"""A longer tuple or list is data, and no setting."""

_SILENT = ("training", "_is_full_backward_hook", "call_super_init")

EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-3, 0.0)


def attributes(scene: Scene) -> Iterator[Hypothesis]:
    """Attributes that the candidate's module has otherwise, in it and in what is in it."""
    if scene.own is None:
        return
    ours = dict(scene.own.named_modules())
    for name, theirs in scene.theirs.named_modules():
        own = ours.get(name)
        if own is None:
            continue
        for key, (value, reference) in _differing(own, theirs).items():
            where = scene.within(f"{name}.{key}" if name else key)
            yield Hypothesis(
                kind=_kind_of(key),
                text=f"`{where}` is {value!r}, the reference's {reference!r}",
                change=_set(name, key, value),
                patch=f"set `{where}` to {reference!r}",
            )


def _kind_of(key: str) -> str:
    if "eps" in key:
        return "epsilon"
    return "activation" if key in ("approximate", "act_fn") else "attribute"


def _differing(own: torch.nn.Module, theirs: torch.nn.Module) -> dict[str, tuple[Any, Any]]:
    mine, reference = vars(own), vars(theirs)
    return {
        key: (mine[key], value)
        for key, value in reference.items()
        if key in mine
        and key not in _SILENT
        and _is_simple(value)
        and _is_simple(mine[key])
        and repr(mine[key]) != repr(value)
    }


def _is_simple(value: object) -> bool:
    """Whether it is a plain value, or a few of them in a row: sizes of the axes of a rotation."""
    if isinstance(value, tuple | list):
        return len(value) <= MOST_PARTS and all(isinstance(part, _SIMPLE) for part in value)
    return isinstance(value, _SIMPLE)


def _set(name: str, key: str, value: Any) -> Callable[[torch.nn.Module], Any]:
    return lambda module: attribute(module.get_submodule(name), key, value)


def usual(scene: Scene) -> Iterator[Hypothesis]:
    """What ports of such modules have otherwise: epsilons, activations, norms without weights."""
    for name, module in scene.theirs.named_modules():
        where = scene.within(name) or scene.fqn
        now = vars(module).get("eps", vars(module).get("variance_epsilon"))
        key = "eps" if "eps" in vars(module) else "variance_epsilon"
        for value in EPSILONS if isinstance(now, float) else ():
            if value != now:
                text = f"epsilon of `{where}` is {value:g}, the reference's {now:g}"
                yield Hypothesis("epsilon", text, _set(name, key, value), f"{where}: {now:g}")
        form = vars(module).get("approximate")
        if form in ("none", "tanh"):
            other = "tanh" if form == "none" else "none"
            says = {"none": "exact", "tanh": "the tanh form"}
            text = f"GELU of `{where}` is {says[other]}, the reference's {says[form]}"
            yield Hypothesis("activation", text, _set(name, "approximate", other))
        yield from _without_weights(name, module, where)


def activations(scene: Scene) -> Iterator[Hypothesis]:
    """Another function in the place of a module that has no weights and keeps sizes."""
    sizes = [tuple(a.shape) for a in scene.args if isinstance(a, Tensor)]
    given = [tuple(t.shape) for t in scene.expected.values()]
    if any(True for _ in scene.theirs.parameters()) or len(sizes) != 1 or given != sizes:
        return
    name = type(scene.theirs).__name__
    for other, function in FUNCTIONS.items():

        def after(_: Any, args: Any, kwargs: Any, output: Any, function: Any = function) -> Any:
            return function(args[0])

        yield Hypothesis(
            "activation",
            f"`{scene.fqn}` is {other}, the reference's {name}",
            lambda module, after=after: hooked(module, after=after),  # type: ignore[misc]
        )


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "GELU": functional.gelu,
    "GELU in the tanh form": lambda x: functional.gelu(x, approximate="tanh"),
    "quick GELU": lambda x: x * torch.sigmoid(1.702 * x),
    "SiLU": functional.silu,
    "ReLU": functional.relu,
    "tanh": torch.tanh,
}
"""Activations by the names of papers."""


def _without_weights(name: str, module: torch.nn.Module, where: str) -> Iterator[Hypothesis]:
    """A module without its bias, a norm without its scale, or with one more or less."""
    own = dict(module.named_parameters(recurse=False))
    prefix = f"{name}." if name else ""
    if "bias" in own:
        values = {f"{prefix}bias": torch.zeros_like(own["bias"])}
        yield Hypothesis("bias missing", f"`{where}` has no bias", _given(values))
    weight = own.get("weight")
    if weight is not None and weight.ndim == 1:
        values = {f"{prefix}weight": torch.ones_like(weight)}
        yield Hypothesis("norm without weights", f"`{where}` has no learned scale", _given(values))
        if "bias" in own:
            both = {**values, f"{prefix}bias": torch.zeros_like(own["bias"])}
            text = f"`{where}` has no learned scale and shift"
            yield Hypothesis("norm without weights", text, _given(both))
        values = {f"{prefix}weight": weight.detach() + 1}
        yield Hypothesis("one plus", f"`{where}` adds one to its scale", _given(values))
    if weight is not None and weight.ndim > 1 and weight.shape[-1] == weight.shape[-2]:
        values = {f"{prefix}weight": weight.detach().transpose(-1, -2).clone()}
        yield Hypothesis("transposed", f"the weight of `{where}` is transposed", _given(values))


def _given(values: Mapping[str, Tensor]) -> Callable[[torch.nn.Module], Any]:
    return lambda module: parameters(module, values)


def whole(scene: Scene) -> Iterator[Hypothesis]:
    """The module left out, run twice, per head, or in another precision."""
    first = next((a for a in scene.args if isinstance(a, Tensor)), None)
    if first is None:
        first = next((a for a in scene.kwargs.values() if isinstance(a, Tensor)), None)
    text = f"`{scene.fqn}`"
    if first is not None:
        yield Hypothesis("left out", f"{text} returns what it is given", _identity)
        yield Hypothesis("repeated", f"{text} runs twice", nullcontext, again=True)
    yield from _per_head(scene)
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        returned = f"what {text} returns is rounded to {name}"
        change = _rounding(dtype, out=True)
        yield Hypothesis("precision", returned, change, grid=dtype)
        for what, change in (
            (f"what {text} is given is rounded to {name}", _rounding(dtype, into=True)),
            (
                f"what {text} is given and returns is rounded to {name}",
                _rounding(dtype, into=True, out=True),
            ),
            (f"{text} is computed in {name}", _computed_in(dtype)),
        ):
            yield Hypothesis("precision", what, change)
    for name, narrower in NARROWER.items():
        kind = "precision" if name in CASTS else "quantised"
        what = f"the weights of {text} are in {name}"
        yield Hypothesis(kind, what, _weights_in(narrower))


def _identity(module: torch.nn.Module) -> Any:
    def after(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        first = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        if isinstance(output, Tensor):
            return first.to(output.dtype)
        return (first, *output[1:])

    return hooked(module, after=after)


def _to(dtype: torch.dtype, nest: Any) -> Any:
    return mapped(lambda tensor: tensor.to(dtype).to(tensor.dtype), nest)


def _rounding(dtype: torch.dtype, *, into: bool = False, out: bool = False) -> Any:
    def before(_: Any, args: Any, kwargs: Any) -> Any:
        first = next((i for i, a in enumerate(args) if isinstance(a, Tensor)), None)
        if first is None:
            return None
        return (*args[:first], _to(dtype, args[first]), *args[first + 1 :]), kwargs

    def after(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return _to(dtype, output)

    return lambda module: hooked(
        module, before=before if into else None, after=after if out else None
    )


def _computed_in(dtype: torch.dtype) -> Callable[[torch.nn.Module], Any]:
    def cast(nest: Any, to: torch.dtype) -> Any:
        return mapped(lambda tensor: tensor.to(to), nest)

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        return cast(args, dtype), cast(kwargs, dtype)

    def after(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return cast(output, torch.float32)

    @contextmanager
    def change(module: torch.nn.Module) -> Iterator[None]:
        held = [p for p in (*module.parameters(), *module.buffers()) if p.is_floating_point()]
        kept = [(tensor, tensor.data) for tensor in held]
        try:
            for tensor, data in kept:
                tensor.data = data.to(dtype)
            with hooked(module, before=before, after=after):
                yield
        finally:
            for tensor, data in kept:
                tensor.data = data

    return change


def _weights_in(narrower: Callable[[Tensor], Tensor]) -> Callable[[torch.nn.Module], Any]:
    def change(module: torch.nn.Module) -> Any:
        values = {
            name: narrower(p.detach().cpu().double()).to(p.dtype)
            for name, p in module.named_parameters()
            if p.ndim > 1 and p.is_floating_point()
        }
        return parameters(module, values)

    return change


def _per_head(scene: Scene) -> Iterator[Hypothesis]:
    """A norm over each head in the place of one over all channels."""
    weight = getattr(scene.theirs, "weight", None)
    if "norm" not in type(scene.theirs).__name__.lower() or not isinstance(weight, Tensor):
        return
    size = weight.numel()
    for heads in (h for h in range(2, min(size, 129)) if size % h == 0 and size // h > 1):

        def after(
            module: Any, args: Any, kwargs: Any, output: Tensor, heads: int = heads
        ) -> Tensor:
            split = args[0].unflatten(-1, (heads, -1))
            normed = functional.rms_norm(split, split.shape[-1:], eps=module.eps)
            made: Tensor = normed.flatten(-2) * module.weight
            return made

        yield Hypothesis(
            "norm per head",
            f"`{scene.fqn}` is taken over each of {heads} heads, the reference's over all channels",
            lambda module, after=after: hooked(module, after=after),  # type: ignore[misc]
        )
