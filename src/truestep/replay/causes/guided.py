"""Hypotheses about guidance: its scale, formula, rescale, channels, and which passes it is of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from truestep.keys import address, key_of
from truestep.replay.causes.guesses import LEAST, Guess, Scene, apart, number, rounded_to, scaled
from truestep.text import listed


@dataclass(frozen=True)
class _Passes:
    """One step's passes and what both sides made of them."""

    step: int
    cond: torch.Tensor
    uncond: torch.Tensor
    actual: torch.Tensor
    reference: torch.Tensor

    def scale(self, guided: torch.Tensor, uncond: torch.Tensor | None = None) -> float:
        """The scale of `uncond + scale (cond - uncond)` that fits best."""
        base = self.uncond if uncond is None else uncond
        apart = self.cond - base
        size = float(apart.square().sum())
        return float(((guided - base) * apart).sum()) / size if size else 0.0

    def guided(self, scale: float, uncond: torch.Tensor | None = None) -> torch.Tensor:
        base = self.uncond if uncond is None else uncond
        return base + scale * (self.cond - base)


def guidance(scene: Scene) -> Iterator[Guess]:
    """Of two passes whose trusted guidance is `uncond + scale (cond - uncond)`."""
    passes: list[_Passes] = []
    for one in scene.failing:
        cond, uncond = (
            scene.recorded(str(key_of(one.name).working).replace("/guided", f"/{branch}"))
            for branch in ("cond", "uncond")
        )
        step = address(one.name).step
        if cond is None or uncond is None or step is None or cond.shape != one.actual.shape:
            return
        passes.append(_Passes(step, cond, uncond, one.actual, one.reference))
    scales = [each.scale(each.reference) for each in passes]
    affine = [
        apart(each.guided(scale), each.reference) <= 10 * LEAST
        for each, scale in zip(passes, scales, strict=True)
    ]
    yield from _rescaled(passes)
    if not all(affine):
        return
    precision = key_of(scene.failing[0].name).precision
    names = (name for name in scene.recording if name.endswith("/guided"))
    everywhere = sum(key_of(name).precision == precision for name in names) == len(passes)
    yield from _by_scale(passes, scales, everywhere=everywhere)
    yield from _by_channels(passes, scales)
    yield from _late(scene, passes, scales)
    yield from scaled(scene, "what guidance gives is")
    yield from rounded_to(scene, "guidance is computed")


def _by_scale(
    passes: Sequence[_Passes], scales: Sequence[float], *, everywhere: bool
) -> Iterator[Guess]:
    """Another scale, or another formula: that would be wrong at every step."""
    own = [each.scale(each.actual) for each in passes]
    made = [each.guided(scale) for each, scale in zip(passes, own, strict=True)]
    pairs = list(zip(own, scales, strict=True))
    if all(abs(mine - 1) < 1e-4 for mine in own):
        steps = listed([str(each.step) for each in passes])
        if len(passes) == 1:
            text = f"step {steps} is not guided: the conditional pass alone"
        else:
            text = f"the conditional pass alone, without guidance, at steps {steps}"
        yield Guess("guidance missing", text, made)
    elif everywhere and all(abs(mine - theirs - 1) < 1e-4 for mine, theirs in pairs):
        text = "guidance starts from the conditional pass: cond + scale * (cond - uncond), or "
        text += f"the guidance scale is {number(own[0])}, the reference's {number(scales[0])}"
        patch = "guide by `uncond + scale * (cond - uncond)`"
        yield Guess("guidance formula", text, made, patch)
    elif everywhere and all(abs(mine - 1 + theirs) < 1e-4 for mine, theirs in pairs):
        text = "the two passes are exchanged: cond + scale * (uncond - cond)"
        patch = "guide by `uncond + scale * (cond - uncond)`"
        yield Guess("guidance formula", text, made, patch)
    else:
        mine, theirs = (number(value) for value in pairs[0])
        at = f" at step {passes[0].step}" if len({number(value) for value in own}) > 1 else ""
        text = f"the guidance scale is {mine}{at}, the reference's {theirs}"
        yield Guess("guidance scale", text, made, f"set `guidance_scale` to {theirs}")


def _by_channels(passes: Sequence[_Passes], scales: Sequence[float]) -> Iterator[Guess]:
    """Guided in some channels, the conditional pass alone in the others."""
    first, scale = passes[0], scales[0]
    if first.cond.dim() < 2:
        return
    plain, text = unguided(first.cond, first.guided(scale), first.actual)
    if not plain:
        return
    made = []
    for each, own in zip(passes, scales, strict=True):
        guided = each.guided(own)
        guided[:, plain] = each.cond[:, plain]
        made.append(guided)
    yield Guess("guidance channels", text, made)


def unguided(
    alone: torch.Tensor, guided: torch.Tensor, actual: torch.Tensor
) -> tuple[list[int], str]:
    """Channels that are nearer to one pass alone; none where all or none are. And that in words."""
    count = actual.shape[1]
    plain = [
        channel
        for channel in range(count)
        if apart(alone[:, channel], actual[:, channel])
        < apart(guided[:, channel], actual[:, channel])
    ]
    if not 0 < len(plain) < count:
        return [], ""
    shown = f"{plain[0]} to {plain[-1]}" if len(plain) > 2 else ", ".join(map(str, plain))
    return plain, f"channels {shown} of {count} are not guided"


def _rescaled(passes: Sequence[_Passes]) -> Iterator[Guess]:
    """Rescaled to the deviation of one pass, over the sample or by channel.

    Source:
        arXiv:2305.08891, equations 15 and 16.
    """
    for whose in ("conditional", "unconditional"):
        for what, first in (("over the sample", 1), ("by channel", 2)):
            dims = tuple(range(first, passes[0].cond.dim()))
            if not dims:
                continue
            moved = [_moved(each, dims, whose=whose) for each in passes]
            size = float(moved[0].square().sum())
            if not size:
                continue
            phi = float(((passes[0].actual - passes[0].reference) * moved[0]).sum()) / size
            made = [each.reference + phi * move for each, move in zip(passes, moved, strict=True)]
            like = "" if whose == "conditional" else " to the deviation of the unconditional pass"
            text = f"guidance is rescaled {what}{like}, phi {number(phi)}; the reference's is not"
            yield Guess("guidance rescale", text, made, "guidance_rescale = 0")


def _moved(each: _Passes, dims: tuple[int, ...], *, whose: str) -> torch.Tensor:
    """How far a rescale by a share of 1 moves what guidance gives."""
    one = each.cond if whose == "conditional" else each.uncond
    return each.reference * (one.std(dims, keepdim=True) / _deviation(each, dims) - 1)


def _deviation(each: _Passes, dims: tuple[int, ...]) -> torch.Tensor:
    return each.reference.std(dims, keepdim=True).clamp_min(1e-30)


def _late(scene: Scene, passes: Sequence[_Passes], scales: Sequence[float]) -> Iterator[Guess]:
    """Another step's unconditional pass."""
    for offset, word in ((-1, "before"), (1, "after")):
        made = []
        for one, each, scale in zip(scene.failing, passes, scales, strict=True):
            other = one.name.replace(f"{each.step:04d}", f"{each.step + offset:04d}", 1)
            working = str(key_of(other).working)
            uncond = scene.recorded(working.replace("/guided", "/uncond"))
            if uncond is None or uncond.shape != each.cond.shape:
                break
            made.append(each.guided(scale, uncond))
        if len(made) == len(passes):
            text = f"the unconditional pass is that of the step {word}"
            yield Guess("guidance pass", text, made)
