"""Hypotheses about latents on their way to a VAE: its factor, its offset, its statistics."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from truestep.replay.causes.guesses import LEAST, Guess, apart
from truestep.replay.causes.material import Handed

Tensor = torch.Tensor


@dataclass(frozen=True)
class Numbers:
    """What a VAE says of its latents.

    Attributes:
        factor, offset: `scaling_factor` and `shift_factor`; 1 and 0 where there is none.
        mean, deviation: By channel, in the shape of the latents.
    """

    factor: float
    offset: float
    mean: Tensor | None
    deviation: Tensor | None


Form = tuple[str, Callable[[Tensor, Numbers], Tensor]]
"""How a call's argument is made of latents: in words, and as a function."""

_SCALES: Mapping[str, Callable[[Tensor, Numbers], Tensor]] = {
    "latents / scaling_factor": lambda x, n: x / n.factor,
    "latents * scaling_factor": lambda x, n: x * n.factor,
    "latents": lambda x, n: x,
    "latents / scaling_factor ** 2": lambda x, n: x / n.factor**2,
}

_OFFSETS: Mapping[str, Callable[[Tensor, Numbers], Tensor]] = {
    "{}": lambda x, n: x,
    "{} + shift_factor": lambda x, n: x + n.offset,
    "{} - shift_factor": lambda x, n: x - n.offset,
}

_FIRST: Mapping[str, Callable[[Tensor, Numbers], Tensor]] = {
    "(latents + shift_factor)": lambda x, n: x + n.offset,
    "(latents - shift_factor)": lambda x, n: x - n.offset,
}

_DEVIATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "latents_std": lambda s: s,
    "latents_std ** 2": lambda s: s**2,
    "sqrt(latents_std)": lambda s: s.sqrt(),
    "1 / latents_std": lambda s: 1 / s,
    "1": torch.ones_like,
    "latents_std of the next channel": lambda s: s.roll(-1, 1),
    "latents_std of the channel before": lambda s: s.roll(1, 1),
}

_MEANS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "+ latents_mean": lambda m: m,
    "- latents_mean": lambda m: -m,
    "": torch.zeros_like,
    "+ 2 * latents_mean": lambda m: 2 * m,
    "+ latents_mean of the next channel": lambda m: m.roll(-1, 1),
    "+ latents_mean of the channel before": lambda m: m.roll(1, 1),
}


def statistics(scene: Handed) -> Iterator[Guess]:
    """Latents before a VAE by other factors, offsets and statistics than its own."""
    first = scene.keys[0]
    if first.side != "in" or first.method != "decode" or not scene.same_sizes:
        return
    (one, *others) = scene.failing
    numbers = _numbers(scene, one.reference, first.component)
    if others or numbers is None:
        return
    owner = f"{first.component}.config"
    trusted = list(_trusted_forms(numbers))
    seen = [way for way in trusted if _is_recorded(scene, _undone(one.reference, way[1], numbers))]
    if numbers.mean is not None:  # what has statistics is given latents with them, or as seen
        trusted = [way for way in trusted if "latents_mean" in way[0]]
    for known, form in seen or trusted:  # of unknown latents each form says what else is made
        latents = _undone(one.reference, form, numbers)
        for text, other in _forms(numbers):
            if text != known:
                said = f"{first.component} is given {text}, the reference's {known}"
                made = [other(latents, numbers)]
                yield Guess(_kind(known, text), f"{said} ({owner})", made, known)
        yield from _refitted(scene, latents, known, form, numbers)


def normalised(scene: Handed) -> Iterator[Guess]:
    """Latents of a picture, as a VAE gave them, that are normalised otherwise for a model.

    Tokens or a grid, of the VAE's channels: those of patches are of no one channel.
    """
    first = scene.keys[0]
    if first.side != "in" or first.stage != "prediction" or not scene.same_sizes:
        return
    for name in scene.material.components:
        config = scene.material.config(name)
        for axis in _axes(tuple(scene.failing[0].reference.shape), _channels(config)):
            yield from _normalised(scene, name, axis)


def _channels(config: Mapping[str, Any]) -> int:
    return int(config.get("latent_channels") or 0)


def _normalised(scene: Handed, name: str, axis: int) -> Iterator[Guess]:
    turned = [one.reference.movedim(axis, 1) for one in scene.failing]
    numbers = _numbers(scene, turned[0], name)
    if numbers is None or numbers.mean is None or numbers.deviation is None:
        return
    mean, deviation, factor = numbers.mean, numbers.deviation, numbers.factor
    ways: Mapping[str, Callable[[Tensor], Tensor]] = {
        "latents": lambda x: x,
        "latents - latents_mean": lambda x: x - mean,
        "latents / latents_std": lambda x: x * factor / deviation,
        "latents * latents_std + latents_mean": lambda x: x * deviation / factor + mean,
        "(latents + latents_mean) / latents_std": lambda x: (x + mean) * factor / deviation,
        "(latents - latents_mean) * latents_std": lambda x: (x - mean) * deviation * factor,
        "(latents - latents_mean) / latents_std ** 2": lambda x: (x - mean) / deviation**2,
    }
    for text, change in ways.items():
        made = []
        for each in turned:
            latents = each * deviation / factor + mean
            made.append(change(latents).movedim(1, axis))
        said = f"{scene.argument} is {text}, the reference's (latents - latents_mean) / latents_std"
        yield Guess("latent statistics", f"{said} ({name}.config)", made)


def _kind(known: str, text: str) -> str:
    """What two forms differ in."""
    if "latents_" in known:
        return "latent statistics"
    alike = len({_SHIFTING.sub("", form) for form in (known, text)}) == 1
    return "shift factor" if alike else "scaling factor"


_SHIFTING = re.compile(r"[()]| [+-] shift_factor")


def _trusted_forms(numbers: Numbers) -> Iterator[Form]:
    """What diffusers' pipelines do."""
    every = dict(_forms(numbers))
    names = (
        "latents * latents_std / scaling_factor + latents_mean",
        "latents * latents_std + latents_mean",
        "latents / scaling_factor + shift_factor",
        "latents / scaling_factor" if numbers.factor != 1 else "latents",
    )
    yield from ((name, every[name]) for name in names if name in every)


def _forms(numbers: Numbers) -> Iterator[Form]:
    if numbers.mean is not None:
        yield from _statistical(numbers)
    for name, scale in _SCALES.items():
        if numbers.factor == 1 and name != "latents":
            continue
        for offset, shift in _OFFSETS.items():
            if offset == "{}" or numbers.offset:
                yield offset.format(name), _then(scale, shift)
    if numbers.offset:
        for name, shift in _FIRST.items():
            yield f"{name} / scaling_factor", _then(shift, _SCALES["latents / scaling_factor"])
            yield f"{name} * scaling_factor", _then(shift, _SCALES["latents * scaling_factor"])


def _then(
    one: Callable[[Tensor, Numbers], Tensor], other: Callable[[Tensor, Numbers], Tensor]
) -> Callable[[Tensor, Numbers], Tensor]:
    return lambda x, n: other(one(x, n), n)


def _statistical(numbers: Numbers) -> Iterator[Form]:
    """With mean and deviation by channel."""
    scaled = ("", " / scaling_factor", " * scaling_factor")
    for (std, of_std), (mean, of_mean), scale in itertools.product(
        _DEVIATIONS.items(), _MEANS.items(), scaled if numbers.factor != 1 else ("",)
    ):
        power = {"": 0, " / scaling_factor": -1, " * scaling_factor": 1}[scale]

        def after(
            x: Tensor, n: Numbers, of_std: _One = of_std, of_mean: _One = of_mean, p: int = power
        ) -> Tensor:
            return x * of_std(_there(n.deviation)) * n.factor**p + of_mean(_there(n.mean))

        def before(
            x: Tensor, n: Numbers, of_std: _One = of_std, of_mean: _One = of_mean, p: int = power
        ) -> Tensor:
            return (x + of_mean(_there(n.mean))) * of_std(_there(n.deviation)) * n.factor**p

        yield f"latents * {std}{scale} {mean}".rstrip(), after
        if mean:
            yield f"(latents {mean}) * {std}{scale}", before


_One = Callable[[Tensor], Tensor]


def _there(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _numbers(scene: Handed, like: Tensor, name: str) -> Numbers | None:
    owner, config = scene.material.components.get(name), scene.material.config(name)
    factor, offset = config.get("scaling_factor"), config.get("shift_factor")
    count = like.shape[1] if like.dim() > 2 else 0

    def by_channel(field: str) -> Tensor | None:
        value = config.get(field)
        if value is None and isinstance(owner, torch.nn.Module):
            value = dict(owner.named_buffers(recurse=False)).get(field)
        if value is None or not count:
            return None
        flat = torch.as_tensor(value).detach().double().cpu().flatten()
        if len(flat) == count:
            return flat.view(1, -1, *[1] * (like.dim() - 2))
        if like.dim() != 5 or len(flat) % count or len(flat) < count * like.shape[2]:
            return None
        return flat.view(1, count, -1, 1, 1)[:, :, : like.shape[2]]  # by latent frame, too

    mean, deviation = by_channel("latents_mean"), by_channel("latents_std")
    both = mean is not None and deviation is not None
    if not both and not factor:
        return None
    return Numbers(
        float(factor or 1.0),
        float(offset or 0.0),
        mean if both else None,
        deviation if both else None,
    )


def _undone(
    reference: Tensor, form: Callable[[Tensor, Numbers], Tensor], numbers: Numbers
) -> Tensor:
    """The latents that a form makes the reference's argument of."""
    zero = form(torch.zeros_like(reference), numbers)
    return (reference - zero) / (form(torch.ones_like(reference), numbers) - zero)


def _is_recorded(scene: Handed, latents: Tensor) -> bool:
    """Whether latents were recorded before, in whatever order of tokens."""
    by_channel = scene.failing[0].reference.dim() > 2
    for piece in scene.pieces(0):
        shape = scene.material.shape(piece)
        if torch.Size(shape).numel() != latents.numel():
            continue
        tensor = scene.material.read(piece)
        if tensor is None:
            continue
        axes = [None, *_axes(shape, latents.shape[1])] if by_channel else [None]
        for channels in axes:
            wanted = _sorted(latents, None if channels is None else 1)
            found = _sorted(tensor, channels)
            if found.shape == wanted.shape and apart(found, wanted) <= 10 * LEAST:
                return True
    return False


def _number(value: float) -> str:
    """As factors of VAEs are written: with five digits."""
    return f"{value:.5g}"


def _axes(shape: tuple[int, ...], count: int) -> Iterator[int]:
    return (axis for axis in (1, len(shape) - 1) if axis < len(shape) and shape[axis] == count)


def _sorted(tensor: Tensor, channels: int | None) -> Tensor:
    if channels is None:
        return tensor.flatten().sort().values
    return tensor.movedim(channels, 0).flatten(1).sort(1).values


def _refitted(
    scene: Handed,
    latents: Tensor,
    known: str,
    form: Callable[[Tensor, Numbers], Tensor],
    numbers: Numbers,
) -> Iterator[Guess]:
    """The same form with another scaling factor or offset."""
    one, owner = scene.failing[0], scene.keys[0].component
    if numbers.mean is not None:
        return
    base, offset = one.actual, numbers.offset if "shift_factor" in known else 0.0
    size = float((base - offset).square().sum())
    factor = float((latents * (base - offset)).sum()) / size if size else 0.0
    theirs = _number(numbers.factor)
    if factor:
        text = f"latents are divided by {_number(factor)}, the reference's by {owner}.config."
        made = [latents / factor + offset]
        text += f"scaling_factor = {theirs}"
        yield Guess("scaling factor", text, made, f"scaling_factor = {theirs}", numbers=1)
    if "shift_factor" in known:
        moved = float((one.actual - latents / numbers.factor).mean())
        made = [latents / numbers.factor + moved]
        text = f"{_number(moved)} is added to latents, the reference adds {owner}.config."
        text += f"shift_factor = {_number(offset)}"
        yield Guess("shift factor", text, made, f"shift_factor = {_number(offset)}", numbers=1)
