"""Hypotheses about one operator of a module's own code: left out, exchanged, in another precision.

The operators are those that the module calls itself, not those of the modules in it. Each is
replaced by what a port could have in its place, one at a time.
"""

from __future__ import annotations

import itertools
import linecache
import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from truestep.replay.causes.scene import Hypothesis, Scene, outcome

Tensor = torch.Tensor
Instead = Callable[..., Any]
"""Function, arguments and keywords of a call to what is given in its place."""

_MOST = 400
"""Operators of a module beyond which only the first are looked at."""


@dataclass(frozen=True)
class Called:
    """One operator, as it was called.

    Attributes:
        at: Its number among those of the module.
        name: Without underscores: `add`.
        shapes: Of tensor arguments; None for others.
        scalars: Arguments that are numbers, by place.
        outputs: Shapes of what it gave. floating: whether that is floating.
        keywords: By name, of those that are no tensors.
        file, line: Of the code that called it.
    """

    at: int
    name: str
    shapes: tuple[tuple[int, ...] | None, ...]
    scalars: tuple[tuple[int, float], ...]
    outputs: tuple[tuple[int, ...], ...]
    floating: bool
    keywords: dict[str, Any]
    file: str
    line: int

    @property
    def where(self) -> str:
        """File and line, and its code."""
        code = " ".join(linecache.getline(self.file, self.line).split())
        return f"`{code}` ({Path(self.file).name}:{self.line})" if code else self.name


@dataclass(frozen=True)
class Variant:
    """What could stand in the place of an operator."""

    kind: str
    text: str
    instead: Instead


class _Own(TorchFunctionMode):
    """Sees the operators of a module's own code, and replaces one."""

    def __init__(self, at: Collection[int], instead: Instead | None, *, deep: bool) -> None:
        super().__init__()
        self.at, self.instead, self.deep = at, instead, deep
        self.inside = 0
        self.seen: list[Called] = []
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        outside = self.inside < 1 if self.deep else self.inside != 1
        if outside or not callable(func):
            return func(*args, **kwargs)
        number, self.count = self.count, self.count + 1
        if "query" in kwargs:  # attention is called by keywords, too
            named = {k: kwargs[k] for k in ("query", "key", "value") if k in kwargs}
            kwargs = {k: v for k, v in kwargs.items() if k not in named}
            args = (*args, *named.values())
        if len(args) > 3 and getattr(func, "__name__", "") == _ATTENTION:
            kwargs = {**dict(zip(_OPTIONS, args[3:], strict=False)), **kwargs}
            args = args[:3]
        if number in self.at and self.instead is not None:
            return self.instead(func, args, kwargs)
        made = func(*args, **kwargs)
        if not self.at and number < _MOST:
            called = _called(number, func, args, kwargs, made)
            self.seen += [called] if called is not None else []
        return made


_TORCH = str(Path(torch.__file__).parent)


def _called(at: int, func: Any, args: Any, kwargs: dict[str, Any], made: Any) -> Called | None:
    outputs = [made] if isinstance(made, Tensor) else made
    if not isinstance(outputs, tuple | list) or not outputs:
        return None
    tensors = [each for each in outputs if isinstance(each, Tensor)]
    if len(tensors) != len(outputs):
        return None
    frame = sys._getframe(2)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_TORCH) or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    listed = args[0] if args and isinstance(args[0], tuple | list) else args
    return Called(
        at=at,
        name=str(getattr(func, "__name__", "")).strip("_"),
        shapes=tuple(tuple(a.shape) if isinstance(a, Tensor) else None for a in listed),
        scalars=tuple((i, float(a)) for i, a in enumerate(args) if _is_number(a)),
        outputs=tuple(tuple(t.shape) for t in tensors),
        floating=all(t.is_floating_point() for t in tensors),
        keywords={k: v for k, v in kwargs.items() if not isinstance(v, Tensor)},
        file=frame.f_code.co_filename,
        line=frame.f_lineno,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@contextmanager
def _watched(
    module: torch.nn.Module,
    at: Collection[int] = (),
    instead: Instead | None = None,
    *,
    deep: bool = False,
) -> Iterator[_Own]:
    """Watch a module's own operators while it runs, or all in it; replace some."""
    mode = _Own(at, instead, deep=deep)

    def enter(*_: object) -> None:
        mode.inside += 1

    def leave(*_: object) -> None:
        mode.inside -= 1

    with ExitStack() as stack:
        for each in module.modules():
            stack.callback(each.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(each.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(mode)
        yield mode


def hypotheses(scene: Scene) -> Iterator[Hypothesis]:
    """One for every operator of the module's own code and what could stand in its place.

    Those about what is computed come first, those about its precision last.
    """
    with _watched(scene.theirs) as watched:
        scene.run()
    yield from _of(scene, watched.seen, deep=False)


def inside(scene: Scene) -> Iterator[Hypothesis]:
    """Likewise of the modules in it: a port may have their code in its own."""
    if not any(True for _ in scene.theirs.children()):
        return
    with _watched(scene.theirs, deep=True) as watched:
        scene.run()
    yield from _of(scene, watched.seen, deep=True)


def _of(scene: Scene, seen: Sequence[Called], *, deep: bool) -> Iterator[Hypothesis]:
    alike: dict[object, list[Called]] = {}
    for called in seen:
        alike.setdefault((called.name, called.shapes, called.scalars), []).append(called)
    for about in (_computed, _narrowed):
        for called in seen:
            for variant in about(called):
                yield _hypothesis([called], variant, deep=deep)
        for several in alike.values():
            if 1 < len(several) <= _TOGETHER:
                for variant in about(several[0]):
                    yield _hypothesis(several, variant, deep=deep)
    for called in seen:
        if called.name == _ATTENTION:
            yield from _solved(scene, called, deep=deep)


def _hypothesis(several: Sequence[Called], variant: Variant, *, deep: bool) -> Hypothesis:
    called, at = several[0], frozenset(each.at for each in several)
    more = f" and {len(several) - 1} more like it" if len(several) > 1 else ""
    return Hypothesis(
        kind=variant.kind,
        text=f"{variant.text}: {called.where}{more}",
        change=lambda module: _watched(module, at, variant.instead, deep=deep),
        line=f"{called.file}:{called.line}",
    )


_TOGETHER = 4
"""Operators that are alike and changed at once: of queries and keys, of sines and cosines."""

_ATTENTION = "scaled_dot_product_attention"
_OPTIONS = ("attn_mask", "dropout_p", "is_causal")
"""Its arguments after queries, keys and values."""


def _solved(scene: Scene, called: Called, *, deep: bool) -> Iterator[Hypothesis]:
    """The scale of attention under which the error is least, by golden section."""
    size = called.shapes[0][-1] if called.shapes and called.shapes[0] else 1
    usual = called.keywords.get("scale") or 1.0 / math.sqrt(size)

    def tried(logarithm: float) -> tuple[float, Hypothesis]:
        factor = math.exp(logarithm)
        text = f"scores are {factor:.5g} times the reference's"
        variant = Variant("attention scale", text, _with(scale=usual * factor))
        hypothesis = _hypothesis([called], variant, deep=deep)
        made = outcome(scene, hypothesis)
        return (math.inf if made is None else scene.error(made)), hypothesis

    low, high = -math.log(_FACTOR), math.log(_FACTOR)
    share = (math.sqrt(5.0) - 1.0) / 2.0
    for _ in range(_ROUNDS):
        left, right = high - share * (high - low), low + share * (high - low)
        if tried(left)[0] < tried(right)[0]:
            high = right
        else:
            low = left
    yield tried((low + high) / 2)[1]


_FACTOR, _ROUNDS = 4.0, 34
"""How far a scale may be off, and rounds that narrow it to a ten-millionth."""


def _computed(called: Called) -> Iterator[Variant]:
    for names, variants in _BY_NAME.items():
        if called.name in names:
            yield from variants(called)


# What an operator could be: each takes the function, its arguments and keywords.


def _operand(index: int) -> Instead:
    """One of two operands in the place of the result, in its size and dtype."""

    def instead(func: Any, args: Any, kwargs: Any) -> Any:
        made = func(*args, **kwargs)
        operand = args[index]
        if not isinstance(operand, Tensor):
            operand = torch.as_tensor(operand, device=made.device)
        return operand.to(made.dtype).expand(made.shape)

    return instead


def _sums(called: Called) -> Iterator[Variant]:
    for place, number in called.scalars:
        if number == 1.0:
            yield Variant("one plus missing", "one is not added", _operand(1 - place))
    tensors = [i for i, shape in enumerate(called.shapes[:2]) if shape is not None]
    if len(tensors) == 2:
        yield Variant("addend missing", "the first addend is left out", _operand(1))
        yield Variant("addend missing", "the second addend is left out", _operand(0))
        yield Variant("sign", "the second addend is subtracted", lambda f, a, k: a[0] - a[1])


def _products(called: Called) -> Iterator[Variant]:
    tensors = [i for i, shape in enumerate(called.shapes[:2]) if shape is not None]
    for place, number in called.scalars:
        yield Variant("factor missing", f"the factor {number:g} is left out", _operand(1 - place))
    if len(tensors) == 2:
        yield Variant("factor missing", "the second factor is left out", _operand(0))
        yield Variant("factor missing", "the first factor is left out", _operand(1))


def _parts(called: Called) -> Iterator[Variant]:
    """Parts of a split: two exchanged, one in the place of another, one half for the other."""
    count = len(called.outputs)
    alike = [
        (i, j)
        for i, j in itertools.combinations(range(count), 2)
        if called.outputs[i] == called.outputs[j]
    ]
    if count > 12:
        return
    for i, j in alike:
        order = [*range(count)]
        order[i], order[j] = j, i
        yield Variant(
            "order", f"parts {i} and {j} of the split are exchanged", _ordered(tuple(order))
        )
    half = count // 2
    if count % 2 == 0 and count > 2:
        order = [*range(half), *range(half)]
        yield Variant("order", "the first half of the split is used twice", _ordered(tuple(order)))
        order = [*range(half, count), *range(half)]
        yield Variant("order", "the halves of the split are exchanged", _ordered(tuple(order)))
    for i, j in alike:
        for source, place in ((i, j), (j, i)):
            order = [*range(count)]
            order[place] = source
            text = f"part {source} of the split is used in the place of part {place}, too"
            yield Variant("order", text, _ordered(tuple(order)))


def _ordered(order: Sequence[int]) -> Instead:
    def instead(func: Any, args: Any, kwargs: Any) -> Any:
        made = func(*args, **kwargs)
        return tuple(made[i] for i in order)

    return instead


def _joined(called: Called) -> Iterator[Variant]:
    count = len(called.shapes)
    for i, j in itertools.combinations(range(count), 2) if count <= 6 else ():
        if called.shapes[i] != called.shapes[j]:
            continue

        def instead(func: Any, args: Any, kwargs: Any, i: int = i, j: int = j) -> Any:
            parts = [*args[0]]
            parts[i], parts[j] = parts[j], parts[i]
            return func(parts, *args[1:], **kwargs)

        yield Variant("order", f"parts {i} and {j} are joined in each other's place", instead)


def _with(**changes: Any) -> Instead:
    return lambda func, args, kwargs: func(*args, **{**kwargs, **changes})


def _gelu(called: Called) -> Iterator[Variant]:
    now = called.keywords.get("approximate", "none")
    other = "none" if now == "tanh" else "tanh"
    says = {"none": "exact", "tanh": "the tanh form"}
    yield Variant(
        "activation",
        f"GELU is {says[other]}, the reference's {says[now]}",
        _with(approximate=other),
    )
    yield from _activations(called)


def _activations(called: Called) -> Iterator[Variant]:
    others: dict[str, Callable[[Tensor], Tensor]] = {
        "SiLU": functional.silu,
        "ReLU": functional.relu,
        "quick GELU": lambda x: x * torch.sigmoid(1.702 * x),
        "GELU": functional.gelu,
        "nothing": lambda x: x,
    }
    for name, function in others.items():
        if name.lower() != called.name:
            text = f"the activation is {name}, the reference's {called.name}"
            yield Variant("activation", text, lambda f, a, k, function=function: function(a[0]))


def _attention(called: Called) -> Iterator[Variant]:
    size = called.shapes[0][-1] if called.shapes and called.shapes[0] else 1
    for scale, text in (
        (1.0, "are not divided by the root of the head size"),
        (1.0 / size, "are divided by the head size, not its root"),
        (1.0 / math.sqrt(size + 1), "are divided by the root of one more than the head size"),
    ):
        yield Variant("attention scale", f"scores {text}", _with(scale=scale))
    yield Variant("causal", "attention is causal", _masked(causal=True))
    yield Variant("mask missing", "attention has no mask", _masked(causal=False))
    yield Variant("mask", "attention masks keys that are all alike at the end", _padding_masked)
    for i, j, text in ((1, 2, "keys and values"), (0, 1, "queries and keys")):
        if len(called.shapes) > j and called.shapes[i] == called.shapes[j]:
            yield Variant("order", f"{text} are exchanged", _exchanged(i, j))
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield Variant("precision", f"attention weights are in {name}", _weights_in(dtype))
        yield Variant("precision", f"attention is computed in {name}", _computed_in(dtype))
    yield Variant("quantised", "queries and keys are in int8, one scale a head", _int8)


def _masked(*, causal: bool) -> Instead:
    def instead(func: Any, args: Any, kwargs: Any) -> Any:
        kept = {k: v for k, v in kwargs.items() if k not in ("attn_mask", "is_causal")}
        return func(*args[:3], **kept, is_causal=causal)

    return instead


def _padding_masked(func: Any, args: Any, kwargs: Any) -> Any:
    """Keys that are bit for bit one row up to the end are of padding."""
    key = args[1]
    alike = (key == key[..., -1:, :]).all(-1).flatten(0, -2).all(0)
    padding = alike.flip(0).cumprod(0).flip(0).bool()
    if int(padding.sum()) < 2:
        raise ValueError("no two keys at the end are alike")
    return func(*args[:3], **{**kwargs, "attn_mask": ~padding})


def _exchanged(i: int, j: int) -> Instead:
    def instead(func: Any, args: Any, kwargs: Any) -> Any:
        order = [*args]
        order[i], order[j] = order[j], order[i]
        return func(*order, **kwargs)

    return instead


def _weights_in(dtype: torch.dtype) -> Instead:
    def instead(func: Any, args: Any, kwargs: Any) -> Any:
        query, key, value = args[:3]
        scale = kwargs.get("scale") or 1.0 / math.sqrt(query.shape[-1])
        scores = query @ key.transpose(-1, -2) * scale
        mask = kwargs.get("attn_mask")
        if kwargs.get("is_causal"):
            mask = torch.ones_like(scores, dtype=torch.bool).tril()
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            )
        return (scores.to(dtype).softmax(-1).to(value.dtype)) @ value

    return instead


def _computed_in(dtype: torch.dtype) -> Instead:
    def instead(func: Any, args: Any, kwargs: Any) -> Any:
        made = func(*(a.to(dtype) if isinstance(a, Tensor) else a for a in args), **kwargs)
        return made.to(args[0].dtype)

    return instead


def _int8(func: Any, args: Any, kwargs: Any) -> Any:
    def rounded(tensor: Tensor) -> Tensor:
        step = tensor.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(1e-12) / 127
        return (tensor / step).round() * step

    return func(rounded(args[0]), rounded(args[1]), *args[2:], **kwargs)


def _norm(called: Called) -> Iterator[Variant]:
    """Norms by function; those with an epsilon as an attribute are tried by that."""
    yield Variant("norm missing", "the norm is left out", lambda f, a, k: a[0])


_BY_NAME: dict[tuple[str, ...], Callable[[Called], Iterator[Variant]]] = {
    ("add", "radd", "iadd"): _sums,
    ("mul", "rmul", "imul", "multiply"): _products,
    ("chunk", "split", "unbind", "tensor_split"): _parts,
    ("cat", "concat", "stack"): _joined,
    ("gelu",): _gelu,
    ("silu", "relu"): _activations,
    (_ATTENTION,): _attention,
    ("layer_norm", "rms_norm", "group_norm"): _norm,
}

_CASTS = ("float", "to", "type_as", "double", "half", "bfloat16")


def _narrowed(called: Called) -> Iterator[Variant]:
    if not called.floating:
        return
    if called.name == "type_as":
        text = "a step is left out: what gives the type stands in its place"
        yield Variant("left out", text, _operand(1))
    if called.name in _CASTS:
        yield Variant("precision", "a cast is left out", lambda f, a, k: a[0])
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield Variant("precision", f"a result is rounded to {name}", _rounded(dtype))


def _rounded(dtype: torch.dtype) -> Instead:
    def instead(func: Any, args: Any, kwargs: Any) -> Any:
        made = func(*args, **kwargs)
        if isinstance(made, Tensor):
            return made.to(dtype).to(made.dtype)
        return type(made)(part.to(dtype).to(part.dtype) for part in made)

    return instead
