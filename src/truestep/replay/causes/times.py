"""Hypotheses about numbers that models are given: the time, the embedded guidance."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import torch

from truestep.replay.causes.guesses import Guess, number
from truestep.replay.causes.material import Handed

Tensor = torch.Tensor

_CHANGES: Sequence[tuple[str, str, Callable[[Tensor], Tensor]]] = (
    ("time convention", "1 minus the reference's: it runs the other way", lambda t: 1 - t),
    ("time convention", "1000 minus the reference's: it runs the other way", lambda t: 1000 - t),
    ("time convention", "999 minus the reference's: it runs the other way", lambda t: 999 - t),
    ("time convention", "1000 times the reference's", lambda t: t * 1000),
    ("time convention", "a thousandth of the reference's", lambda t: t / 1000),
    ("time convention", "the reference's with the other sign", torch.neg),
    ("off by one", "one more than the reference's", lambda t: t + 1),
    ("off by one", "one less than the reference's", lambda t: t - 1),
    ("truncated", "cut off to a whole number", torch.floor),
    ("truncated", "rounded to a whole number", torch.round),
    ("truncated", "cut off to a whole thousandth", lambda t: (t * 1000 + 1e-4).floor() / 1000),
    ("truncated", "rounded to a whole thousandth", lambda t: (t * 1000).round() / 1000),
    ("truncated", "rounded up to a whole number", torch.ceil),
)


def times(scene: Handed) -> Iterator[Guess]:
    """The time in another convention, or of another step; all of them leave no number open."""
    if scene.keys[0].side != "in" or not scene.same_sizes or not _is_time(scene):
        return
    for kind, text, change in _CHANGES:
        made = [change(one.reference) for one in scene.failing]
        yield Guess(kind, f"{scene.argument} is {text}", made)
    for offset, word in ((1, "after"), (-1, "before")):
        others = [scene.material.of_step(key, offset) for key in scene.keys]
        made = [
            other.expand(one.reference.shape)
            for other, one in zip(others, scene.failing, strict=True)
            if other is not None and other.numel() in (1, one.reference.numel())
        ]
        if len(made) == len(scene.failing):
            yield Guess("off by one", f"{scene.argument} is that of the step {word}", made)


def setting(scene: Handed) -> Iterator[Guess]:
    """One number everywhere, where the reference has a setting of the call or of a component.

    It is read off: it has to be a number that one writes, and to be there more than once.
    """
    if scene.keys[0].side != "in" or not scene.same_sizes:
        return
    values = [torch.cat([side.flatten() for side in sides]).unique() for sides in _sides(scene)]
    count = sum(one.actual.numel() for one in scene.failing)
    if any(len(value) != 1 for value in values) or count < 2:
        return
    mine, theirs = (float(value) for value in values)
    if float(f"{mine:.3g}") != mine and abs(float(f"{mine:.3g}") - mine) > 1e-6 * abs(mine):
        return
    name = _named(scene, theirs)
    if name:
        text = f"{scene.argument} is {number(mine)}, the reference's {name} = {number(theirs)}"
        made = [torch.full_like(one.actual, float(f"{mine:.3g}")) for one in scene.failing]
        kind = "guidance scale" if "guidance" in f"{scene.what} {name}" else "setting"
        yield Guess(kind, text, made, f"{scene.what} = {number(theirs)}")


def _sides(scene: Handed) -> tuple[list[Tensor], list[Tensor]]:
    return [one.actual for one in scene.failing], [one.reference for one in scene.failing]


def _named(scene: Handed, value: float) -> str:
    """The call's argument of that value, the one with the likest name."""
    words = set(re.split("[_ ]", scene.what))
    for name, given in scene.material.arguments.items():
        is_number = isinstance(given, int | float) and not isinstance(given, bool)
        same = is_number and abs(float(given) - value) <= 1e-6 * abs(value)
        if same and words & set(name.split("_")):
            return str(name)
    return ""


def _is_time(scene: Handed) -> bool:
    names = " ".join(scene.keys[0].path).lower()
    return "time" in names or "sigma" in names or names == "t"
