"""Hypotheses about guidance in a pipeline's own code: what its scheduler is given of the passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from truestep.replay.causes.guesses import LEAST, VALUES, Failing, Guess, apart, number
from truestep.replay.causes.guided import unguided
from truestep.replay.causes.material import Handed

PASSES = 4
"""More passes than that no pipeline combines."""


@dataclass(frozen=True)
class Step:
    """One step's passes and what both sides made of them.

    Attributes:
        number: Of the step.
        passes: What the model gave, in the order of its rows and calls.
        one: The failing tensor.
        weights, trusted: Of the passes, by least squares, on both sides.
    """

    number: int
    passes: Sequence[torch.Tensor]
    one: Failing
    weights: Sequence[float]
    trusted: Sequence[float]


def combination(scene: Handed) -> Iterator[Guess]:
    """What a scheduler's step is given, of the predictions of its step."""
    first = scene.keys[0]
    if first.side != "in" or first.method != "step" or not scene.same_sizes:
        return
    if scene.what not in ("model_output", "noise_pred", "sample", "args"):
        return
    if any(one.reference.dim() < 2 or one.reference[0].numel() < VALUES for one in scene.failing):
        return
    steps: list[Step] = []
    for at, one in enumerate(scene.failing):
        found = [way for way in _WAYS if _passes(scene, at, one.reference, way)]
        if not found:
            return
        step = next((s for way in found if (s := _step(scene, at, way)) is not None), None)
        if step is None:
            yield from _rescaled_alone(scene, one)
            return
        steps.append(step)
    yield from _of_variance(scene, steps)
    if len(steps[0].passes) == 2:
        yield from _of_two(steps)
    yield from _rescaled(steps)
    if len(steps[0].passes) > 1:
        yield from _channels(steps)
        yield _weighed(steps)


Way = Callable[[torch.Tensor, torch.Size], torch.Tensor | None]
"""Brings a prediction's rows to the form of what a scheduler is given; None where it cannot."""


def _step(scene: Handed, at: int, way: Way) -> Step | None:
    """A step whose trusted guidance is a sum of its passes."""
    one = scene.failing[at]
    passes = _passes(scene, at, one.reference, way)
    trusted = _weights(passes, one.reference)
    if apart(_sum(passes, trusted), one.reference) > 10 * LEAST:
        return None
    return Step(scene.keys[at].step or 0, passes, one, _weights(passes, one.actual), trusted)


def _passes(scene: Handed, at: int, like: torch.Tensor, way: Way) -> list[torch.Tensor]:
    """Predictions of the failing tensor's step, a tensor for each pass."""
    step = scene.keys[at].step
    found: list[torch.Tensor] = []
    for piece in reversed(scene.pieces(at)):
        key = piece.key
        if key.step != step or key.side != "out" or piece.kind != "model":
            continue
        tensor = scene.material.read(piece)
        if tensor is None or key.stage != "prediction" or tensor.shape[0] % like.shape[0]:
            continue
        made = way(tensor, like.shape)
        found += [] if made is None else list(made.split(like.shape[0]))
    return found if 0 < len(found) <= PASSES else []


def _as_it_is(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    return tensor if tensor.shape[1:] == shape[1:] else None


def _first_half(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """Without the channels of a learned variance."""
    return tensor[:, : shape[1]] if _has_variance(tensor, shape) else None


def _second_half(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    return tensor[:, shape[1] :] if _has_variance(tensor, shape) else None


def _has_variance(tensor: torch.Tensor, shape: torch.Size) -> bool:
    same = tensor.dim() == len(shape) > 2 and tensor.shape[2:] == shape[2:]
    return same and tensor.shape[1] == 2 * shape[1]


def _of_tokens(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """Tokens laid out as frames, rows and columns; the last of them where there are more."""
    count = shape[2:].numel()
    if tensor.dim() != 3 or len(shape) < 4 or tensor.shape[2] != shape[1]:
        return None
    if tensor.shape[1] < count:
        return None
    turned = tensor.transpose(1, 2)[:, :, tensor.shape[1] - count :]
    return turned.reshape(tensor.shape[0], *shape[1:])


_WAYS: Sequence[Way] = (_as_it_is, _first_half, _of_tokens)


def _of_variance(scene: Handed, steps: Sequence[Step]) -> Iterator[Guess]:
    """The same sum of the channels that a learned variance has."""
    made = []
    for at, each in enumerate(steps):
        others = _passes(scene, at, each.one.reference, _second_half)
        if len(others) != len(each.passes):
            return
        made.append(_sum(others, each.trusted))
    text = f"{scene.argument} is of the channels of the learned variance, not of the prediction's"
    yield Guess("another tensor", text, made)


def _weights(passes: Sequence[torch.Tensor], target: torch.Tensor) -> list[float]:
    table = torch.stack([each.flatten() for each in passes], dim=1)
    solved: torch.Tensor = torch.linalg.lstsq(table, target.flatten()[:, None]).solution
    return [float(value) for value in solved[:, 0]]


def _sum(passes: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    return torch.stack([w * each for w, each in zip(weights, passes, strict=True)]).sum(0)


def _of_two(steps: Sequence[Step]) -> Iterator[Guess]:
    """`uncond + scale (cond - uncond)`: the pass that is weighed more is the conditional one."""
    cond = max((0, 1), key=lambda at: steps[0].trusted[at])
    if any(abs(sum(each.trusted) - 1) > 1e-4 for each in steps):
        return
    own = [each.weights[cond] for each in steps]
    theirs = [each.trusted[cond] for each in steps]
    made = [_sum(each.passes, (1 - w, w) if cond else (w, 1 - w)) for each, w in _each(steps, own)]
    pairs = list(zip(own, theirs, strict=True))
    patch = "guide by `uncond + scale * (cond - uncond)`"
    scale = f"the reference's is {number(theirs[0])}"
    if all(abs(mine - 1) < 1e-4 for mine in own):
        listed = ", ".join(str(each.number) for each in steps[:5])
        text = f"the conditional pass alone, without guidance, at steps {listed}; {scale}"
        yield Guess("guidance missing", text, made, patch)
    elif all(abs(mine) < 1e-4 for mine in own):
        yield Guess("guidance missing", f"the unconditional pass alone; {scale}", made, patch)
    elif all(abs(mine - theirs - 1) < 1e-4 for mine, theirs in pairs):
        text = "guidance starts from the conditional pass: cond + scale * (cond - uncond), or "
        text += f"the guidance scale is {number(own[0])}, {scale}"
        yield Guess("guidance formula", text, made, patch)
    elif all(abs(mine - theirs + 1) < 1e-4 for mine, theirs in pairs):
        text = f"the guidance scale is taken less one: {number(own[0])}, {scale}"
        yield Guess("guidance scale", text, made, patch)
    elif all(abs(mine - 1 + theirs) < 1e-4 for mine, theirs in pairs):
        text = "the two passes are exchanged: cond + scale * (uncond - cond)"
        yield Guess("guidance formula", text, made, patch)
    else:
        at = f" at step {steps[0].number}" if len({number(value) for value in own}) > 1 else ""
        text = f"the guidance scale is {number(own[0])}{at}, {scale}"
        patch = f"set `guidance_scale` to {number(theirs[0])}"
        yield Guess("guidance scale", text, made, patch, numbers=len({*map(number, own)}))


def _each(steps: Sequence[Step], values: Sequence[float]) -> Iterator[tuple[Step, float]]:
    return zip(steps, values, strict=True)


def _rescaled(steps: Sequence[Step]) -> Iterator[Guess]:
    """Rescaled to the deviation of one pass, by a share that is the same at every step.

    Source:
        arXiv:2305.08891, equations 15 and 16.
    """
    cond = max(range(len(steps[0].passes)), key=lambda at: steps[0].trusted[at])
    order = [cond, *(at for at in range(len(steps[0].passes)) if at != cond)]
    for at in order:
        moved = [_moved(each.one, each.passes[at]) for each in steps]
        made, phi = _moved_by(steps, moved)
        one_factor = len(steps) == 1 and steps[0].one.reference.shape[0] == 1
        if not 0 < phi < 1 + 1e-5 or (one_factor and abs(phi - round(phi, 2)) > 1e-5):
            continue  # any factor of one sample is that of some share
        whose = "conditional" if at == cond else "unconditional"
        text = f"guidance is rescaled to the deviation of the {whose} pass, phi {number(phi)}; "
        text += "the reference's is not"
        yield Guess("guidance rescale", text, made, "guidance_rescale = 0", numbers=1)


def _moved(one: Failing, like: torch.Tensor) -> torch.Tensor:
    dims = tuple(range(1, like.dim()))
    deviation = one.reference.std(dims, keepdim=True).clamp_min(1e-30)
    return one.reference * (like.std(dims, keepdim=True) / deviation - 1)


def _moved_by(
    steps: Sequence[Step], moved: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], float]:
    size = float(moved[0].square().sum())
    first = steps[0].one
    phi = float(((first.actual - first.reference) * moved[0]).sum()) / size if size else 0.0
    return [e.one.reference + phi * move for e, move in zip(steps, moved, strict=True)], phi


def _rescaled_alone(scene: Handed, one: Failing) -> Iterator[Guess]:
    """The reference is rescaled and the candidate is not: a plain combination of the passes."""
    way = next((w for w in _WAYS if len(_passes(scene, 0, one.reference, w)) == 2), None)
    if way is None:
        return
    made, own = [], []
    for at, each in enumerate(scene.failing):
        parts = _passes(scene, at, each.reference, way)
        if len(parts) != 2:
            return
        own.append(_weights(parts, each.actual))
        made.append(_sum(parts, own[-1]))
    if all(abs(sum(weights) - 1) < 1e-4 for weights in own):
        text = f"guidance is not rescaled; its scale is {number(max(own[0]))}"
        yield Guess("guidance rescale", text, made, numbers=2)


def _channels(steps: Sequence[Step]) -> Iterator[Guess]:
    """Guided in some channels, one pass alone in the others."""
    first = steps[0]
    if first.one.reference.dim() < 3:
        return
    cond = max(range(len(first.passes)), key=lambda at: first.trusted[at])
    plain, text = unguided(first.passes[cond], first.one.reference, first.one.actual)
    if not plain:
        return
    made = []
    for each in steps:
        guided = each.one.reference.clone()
        guided[:, plain] = each.passes[cond][:, plain]
        made.append(guided)
    yield Guess("guidance channels", text, made)


def _weighed(steps: Sequence[Step]) -> Guess:
    """Any other sum of the passes, one and the same at every step."""
    weights, trusted = steps[0].weights, steps[0].trusted
    mine, theirs = (", ".join(map(number, each)) for each in (weights, trusted))
    made = [_sum(each.passes, weights) for each in steps]
    text = f"the passes are weighed {mine}, the reference's {theirs}"
    return Guess("guidance formula", text, made, numbers=len(weights))
