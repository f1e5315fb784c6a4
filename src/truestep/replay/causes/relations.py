"""Relations of one tensor to the recorded one, and to others that were recorded before it.

Each is a function of a scene that yields hypotheses; those that leave no number open come first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from truestep.replay.causes.guesses import LEAST, PRECISIONS, Guess, apart, least_squares, number
from truestep.replay.causes.material import Handed

Tensor = torch.Tensor

LEAST_VALUES = 16
"""Tensors of fewer different values have an order or a part of another one by chance."""


def casts(scene: Handed) -> Iterator[Guess]:
    """Rounded, cut off, or in another range."""
    if not scene.same_sizes:
        return
    for dtype in PRECISIONS:
        name = str(dtype).removeprefix("torch.")
        yield _each("precision", f"{scene.argument} went through {name}", scene, _through(dtype))
    ranges: Sequence[tuple[str, str, Callable[[Tensor], Tensor]]] = (
        ("precision", "rounded to 256 values from 0 to 1", lambda x: _rounded(x, 0.0, 1.0)),
        ("precision", "rounded to 256 values from -1 to 1", lambda x: _rounded(x, -1.0, 1.0)),
        ("image range", "from 0 to 1, the reference's from -1 to 1", lambda x: (x + 1) / 2),
        ("image range", "from -1 to 1, the reference's from 0 to 1", lambda x: x * 2 - 1),
        ("image range", "from 0 to 255, the reference's from -1 to 1", lambda x: (x + 1) * 127.5),
        ("image range", "from 0 to 255, the reference's from 0 to 1", lambda x: x * 255),
        ("image range", "from 0 to 1, the reference's from 0 to 255", lambda x: x / 255),
        ("image range", "brought to -1 to 1 once more", lambda x: x * 2 - 1),
        ("clamped", "clamped to -1 to 1", lambda x: x.clamp(-1, 1)),
        ("clamped", "clamped to 0 to 1", lambda x: x.clamp(0, 1)),
        ("constant", "0 everywhere", torch.zeros_like),
        ("constant", "1 everywhere", torch.ones_like),
        ("sign", "the reference's with the other sign", torch.neg),
    )
    for kind, text, change in ranges:
        yield _each(kind, f"{scene.argument} is {text}", scene, change)


def _rounded(x: Tensor, low: float, high: float) -> Tensor:
    return ((x - low) / (high - low) * 255).round().clamp(0, 255) / 255 * (high - low) + low


def _through(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).double()


def _each(kind: str, text: str, scene: Handed, change: Callable[[Tensor], Tensor]) -> Guess:
    return Guess(kind, text, [change(one.reference) for one in scene.failing])


def orders(scene: Handed) -> Iterator[Guess]:
    """The same values in another order along an axis, or with two axes exchanged."""
    first = scene.failing[0]
    if first.actual.numel() != first.reference.numel() or not _many(first.reference):
        return
    if apart(*(side.flatten().sort().values for side in (first.reference, first.actual))) > (
        first.limit
    ):
        return
    shape = first.reference.shape
    for axis, size in enumerate(shape):
        if size < 2:
            continue
        what = _axis(scene, axis)
        yield _each("order", f"{scene.argument} is turned round along {what}", scene, _flip(axis))
        for places in _places(scene, axis):
            said = f"rolled by {places} along {what}"
            yield _each("order", f"{scene.argument} is {said}", scene, _roll(places, axis))
        for parts in (2, 4):
            if size % parts == 0 and size > parts:
                text = f"{scene.argument} has groups of {parts} along {what} in another order: "
                text += f"{size // parts} by {parts}, the reference's {parts} by {size // parts}"
                yield _each("packing order", text, scene, _grouped(axis, parts, size // parts))
                yield _each("packing order", text, scene, _grouped(axis, size // parts, parts))
        if 2 < size <= 4:
            for order in itertools.permutations(range(size)):
                listed = ", ".join(map(str, order))
                text = f"{scene.argument} has {what} in the order {listed}"
                yield _each("order", text, scene, _picked(axis, order))
    for one, other in itertools.combinations(range(len(shape)), 2):
        if shape[one] < 2 or shape[other] < 2:
            continue
        text = f"{scene.argument} has axes {one} and {other} exchanged"
        for like in (True, False):
            yield _each("axes exchanged", text, scene, _exchanged(one, other, like=like))
    yield from _patches(scene)


def _patches(scene: Handed) -> Iterator[Guess]:
    """Patches of 2 by 2, put together in another order."""
    shape = scene.failing[0].reference.shape
    if len(shape) < 4 or shape[-1] % 2 or shape[-2] % 2:
        return
    names = ("rows of patches", "rows in one", "columns of patches", "columns in one")
    for order in itertools.permutations(range(4)):
        if order != (0, 1, 2, 3):
            listed = ", ".join(names[place] for place in order)
            text = f"{scene.argument} has as its rows and columns {listed}; "
            text += f"the reference's {', '.join(names)}"
            yield _each("packing order", text, scene, _repacked(order))


def _places(scene: Handed, axis: int) -> list[int]:
    """By how much the candidate's is rolled, where its first part is one of the reference's."""
    one = scene.failing[0]
    if one.actual.shape != one.reference.shape:
        return []
    sides = [side.movedim(axis, 0).flatten(1) for side in (one.actual, one.reference)]
    apart_ = (sides[1] - sides[0][:1]).abs().amax(1)
    at = int(apart_.argmin())
    size = len(apart_)
    return [min(-at, size - at, key=abs)] if at and float(apart_[at]) <= 1e-5 else []


def _axis(scene: Handed, axis: int) -> str:
    shape = scene.failing[0].reference.shape
    if len(shape) > 3 and axis == 1 and shape[axis] == 3:
        return "its channels, red, green and blue"
    return f"axis {axis}"


def _flip(axis: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.flip(axis)


def _roll(places: int, axis: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.roll(places, axis)


def _picked(axis: int, order: Sequence[int]) -> Callable[[Tensor], Tensor]:
    return lambda x: x.index_select(axis, torch.tensor(order))


def _grouped(axis: int, one: int, other: int) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        split = x.reshape(*x.shape[:axis], one, other, *x.shape[axis + 1 :])
        return split.transpose(axis, axis + 1).reshape(x.shape)

    return change


def _repacked(order: Sequence[int]) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        lead = x.dim() - 2
        split = x.reshape(*x.shape[:-2], height // 2, 2, width // 2, 2)
        return split.permute(*range(lead), *(lead + place for place in order)).reshape(x.shape)

    return change


def _exchanged(one: int, other: int, *, like: bool) -> Callable[[Tensor], Tensor]:
    """Transposed; with the sizes of the reference where they were laid over it."""

    def change(x: Tensor) -> Tensor:
        turned = x.transpose(one, other)
        return turned.reshape(x.shape) if like else turned

    return change


def _many(tensor: Tensor) -> bool:
    return len(tensor.unique()) >= LEAST_VALUES


def fits(scene: Handed) -> Iterator[Guess]:
    """By one factor, one offset, both, or both for each channel; a constant."""
    if not scene.same_sizes:
        return
    one, what = scene.failing[0], scene.argument
    factor = least_squares(one.reference, one.actual)
    text = f"{what} is {number(factor)} times the reference's"
    yield _fitted("scaled", text, scene, lambda x: factor * x, 1)
    moved = float((one.actual - one.reference).mean())
    text = f"{what} is the reference's plus {number(moved)}"
    yield _fitted("offset", text, scene, lambda x: x + moved, 1)
    slope, base = _line(one.reference.flatten()[None], one.actual.flatten()[None])
    text = f"{what} is {number(float(slope))} times the reference's plus {number(float(base))}"
    yield _fitted("scaled", text, scene, lambda x: float(slope) * x + float(base), 2)
    dims = one.reference.dim()
    for axis in {2: (1,), 3: (1, 2)}.get(dims, (1,) if dims > 3 else ()):
        if 1 < one.reference.shape[axis] <= 512:
            yield from _by_channel(scene, axis)


_NUMBERS = ("scaling_factor", "shift_factor", "init_noise_sigma", "sigma_data", "sigma_max")
"""Numbers of components that code between calls multiplies by, or adds."""


def named_fits(scene: Handed) -> Iterator[Guess]:
    """By a number of a component, its inverse or square; plus one, or what two of them make."""
    if not scene.same_sizes:
        return
    known = dict(_numbers(scene))
    for name, value in known.items():
        for text, factor in (
            (f"multiplied by {name} once more, or not divided by it", value),
            (f"divided by {name} once more, or not multiplied by it", 1 / value),
            (f"multiplied by {name} where the reference's is divided", value**2),
            (f"divided by {name} where the reference's is multiplied", value**-2),
        ):
            said = f"{scene.argument} is {text}: {number(factor)} times the reference's"
            yield _fitted("scaling factor", said, scene, _times(factor), 0)
    offsets = {name: value for name, value in known.items() if name.endswith("shift_factor")}
    for name, value in offsets.items():
        scale = known.get(name.replace("shift_factor", "scaling_factor"), 1.0)
        for of, size in ((name, value), (f"{name} times the scaling factor", value * scale)):
            for text, moved in (
                (f"is without {of}, which the reference adds", -size),
                (f"is without {of}, which the reference takes off", size),
                (f"takes {of} off, which the reference adds", -2 * size),
                (f"adds {of}, which the reference takes off", 2 * size),
            ):
                said = f"{scene.argument} {text}"
                yield _fitted("shift factor", said, scene, _plus(moved), 0)


def _times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: factor * x


def _plus(moved: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x + moved


def _numbers(scene: Handed) -> Iterator[tuple[str, float]]:
    for name, part in scene.material.components.items():
        config, held = scene.material.config(name), getattr(part, "__dict__", {})
        for field in _NUMBERS:
            value = config.get(field, held.get(field))
            if value is None and isinstance(getattr(type(part), field, None), property):
                value = getattr(part, field)
            if isinstance(value, torch.Tensor) and value.numel() == 1:
                value = float(value)
            if isinstance(value, int | float) and float(value) not in (0.0, 1.0):
                yield f"{name}.{field}", float(value)


def _by_channel(scene: Handed, axis: int) -> Iterator[Guess]:
    one = scene.failing[0]
    sides = [side.movedim(axis, 0).flatten(1) for side in (one.reference, one.actual)]
    slopes, bases = _line(*sides)
    shape = [1] * one.reference.dim()
    shape[axis] = -1

    def change(x: Tensor) -> Tensor:
        return x * slopes.view(shape) + bases.view(shape)

    gone = (slopes.abs() < 1e-9) & (bases.abs() < 1e-9)
    kept = ((slopes - 1).abs() < 1e-9) & (bases.abs() < 1e-9)
    if bool(gone.any()) and bool((gone | kept).all()):
        places = gone.nonzero().flatten().tolist()
        listed = ", ".join(map(str, places[:6])) + (", ..." if len(places) > 6 else "")
        text = f"{scene.argument} is 0 in {listed} of axis {axis}"
        yield _fitted("zeroed", text, scene, lambda x: x * kept.view(shape), len(places))
    count = len(slopes)
    along = "token" if one.reference.dim() == 3 and axis == 1 else "channel"
    moves = torch.where(bases.abs() < LEAST * one.reference.std(), 0.0, bases)
    others = (((slopes - 1).abs() >= LEAST) | (moves != 0)).nonzero().flatten().tolist()
    told = [f"{at}: {number(float(slopes[at]))} and {number(float(moves[at]))}" for at in others]
    more = f", and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    text = f"{scene.argument} is scaled and moved from the reference's in {len(told)} of {count} "
    text += f"{along}s ({', '.join(told[:_SHOWN])}{more})"
    yield _fitted(f"scaled by {along}", text, scene, change, 2 * count)


_SHOWN = 4
"""Channels that are listed of many."""


def _line(reference: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset of each row."""
    means = [side.mean(1, keepdim=True) for side in (reference, actual)]
    x, y = reference - means[0], actual - means[1]
    slope = (x * y).sum(1) / x.square().sum(1).clamp_min(1e-30)
    return slope, (means[1][:, 0] - slope * means[0][:, 0])


def _fitted(
    kind: str, text: str, scene: Handed, change: Callable[[Tensor], Tensor], numbers: int
) -> Guess:
    made = [change(one.reference) for one in scene.failing]
    return Guess(kind, text, made, numbers=numbers)
