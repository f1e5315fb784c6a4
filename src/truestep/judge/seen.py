"""What of a failing comparison is to be seen: where along an axis the first divergence lies, and
pictures of what each step made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from truestep.explanations import Profile
from truestep.judge.media import uris
from truestep.keys import key_of
from truestep.measure.profile import profile
from truestep.verdict import Comparison, Divergence, FrameTriple, Media, Row, Rows

STEPS = 9
"""Most steps of which pictures are made."""

SIDE = 64
"""Pixels of the larger side of a picture of a step; larger ones are reduced by a whole factor."""

_LARGEST_GAIN = 2.0**24

_Kind = tuple[str, str | None, str | None, tuple[int, ...], int]


def with_seen(
    comparison: Comparison,
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
) -> Comparison:
    """A comparison with what is to be seen of it; one that passed is as it was.

    Args:
        comparison: Whose rows are named as the tensors are.
        actual, reference: Name to tensor.
    """
    if comparison.verdict.passed or comparison.first_divergence is None:
        return comparison
    found = comparison
    first = comparison.first_divergence
    if first.profile is None:
        placed = with_profile(first, actual.get(first.name), reference.get(first.name))
        found = found.model_copy(update={"first_divergence": placed})
    pictures = step_pictures(comparison.rows, actual, reference)
    return found.model_copy(update={"media": (*found.media, pictures)}) if pictures else found


def with_profile(
    place: Divergence, actual: torch.Tensor | None, reference: torch.Tensor | None
) -> Divergence:
    """A place with where along an axis its residual lies; as it is where that is not known."""
    if actual is None or reference is None:
        return place
    found = profile(actual, reference)
    if found is None:
        return place
    return place.model_copy(update={"profile": Profile(**found._asdict())})


def step_pictures(
    rows: Sequence[Row],
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
) -> Media | None:
    """Both sides of one tensor a step as pictures, and the rms of their difference over channels.

    Three channels are seen of each: the directions in which the reference's channels vary most, at
    the last step; scaled, both sides alike, by what the reference holds at that step.

    Returns:
        Of the stage in which something failed at a step, the one with most failing steps; None
        where it holds no pictures.
    """
    chosen = _chosen(rows, actual, reference)
    if len(chosen) < 2:
        return None
    total = len(chosen)
    at = sorted({round(i * (total - 1) / (STEPS - 1)) for i in range(STEPS)})
    if total <= STEPS:
        at = list(range(total))
    sides = []
    for row in (chosen[i] for i in at):
        own, theirs = (_picture(side[row.name]) for side in (actual, reference))
        if own is None or theirs is None:
            return None
        sides.append((_small(own), _small(theirs)))
    steps = [chosen[i].step or 0 for i in at]
    basis = _basis(sides[-1][1])
    shown, apart = [], []
    for own, theirs in sides:
        seen = [torch.einsum("kc,chw->khw", basis, side) for side in (own, theirs)]
        low, high = (float(seen[1].quantile(q)) for q in (0.01, 0.99))
        shown.append([((side - low) / ((high - low) or 1.0)).clamp(0, 1) for side in seen])
        rms = float(theirs.square().mean().sqrt()) or 1.0
        apart.append((own - theirs).square().mean(0).sqrt() / rms)
    finite = torch.stack(apart)
    finite = finite[finite.isfinite()]
    largest, gain = float(finite.max()) if finite.numel() else 0.0, 1.0
    if largest > 0:
        gain = min(2.0 ** math.floor(math.log2(1 / largest)), _LARGEST_GAIN)
    mine, others = (uris(torch.stack([pair[i] for pair in shown], 1)) for i in (0, 1))
    differences = uris((torch.stack(apart) * gain).expand(3, -1, -1, -1))
    height, width = shown[0][0].shape[1:]
    return Media(
        name=f"{chosen[0].stage.capitalize()} of each step, three directions of its channels",
        width=int(width),
        height=int(height),
        gain=gain,
        frames=tuple(
            FrameTriple(index=step, actual=a, reference=r, difference=d)
            for step, a, r, d in zip(steps, mine, others, differences, strict=True)
        ),
        axis="step",
    )


def _chosen(
    rows: Sequence[Row],
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
) -> list[Row]:
    """One row a step of one stage, all of one shape, that can be seen."""
    found: dict[_Kind, dict[int, Row]] = {}
    failing: Counter[_Kind] = Counter()
    seen: Counter[tuple[object, ...]] = Counter()
    told = Rows.of(rows)
    stepped = [at for at, step in enumerate(told.each("step")) if step is not None]
    for row in told.take(stepped):  # only these are made: there may be a million others
        if not _visible(row) or row.name not in actual or row.name not in reference:
            continue
        assert row.step is not None
        assert row.reference is not None
        place = (row.stage, row.branch, row.fqn, row.reference.shape)
        again = (*place, row.step)
        kind = (*place, seen[again])  # what a call is given and what it gives may be alike
        seen[again] += 1
        found.setdefault(kind, {})[row.step] = row
        failing[kind] += not row.verdict.passed
    if not failing or not max(failing.values()):
        return []
    best = max(failing, key=failing.__getitem__)
    return [row for _, row in sorted(found[best].items())]


def _visible(row: Row) -> bool:
    """Whether both sides of a row are alike in shape and dtype, and none is a sound's."""
    same = row.actual is not None and row.actual == row.reference
    return same and key_of(row.name).head != "module" and row.modality != "audio"


def _picture(tensor: torch.Tensor) -> torch.Tensor | None:
    """`c h w` of the first sample and the middle frame; tokens only where they make a square."""
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    one = tensor[0].detach().cpu().float()
    if tensor.ndim == 5:
        one = one[:, one.shape[1] // 2]
    elif tensor.ndim == 3:
        side = math.isqrt(one.shape[0])
        if side * side != one.shape[0]:
            return None
        one = one.T.reshape(-1, side, side)
    if one.ndim != 3 or one.shape[0] < 3 or min(one.shape[1:]) < 4:
        return None
    return one


def _small(picture: torch.Tensor) -> torch.Tensor:
    factor = -(-max(picture.shape[1:]) // SIDE)
    if factor == 1:
        return picture
    pooled: torch.Tensor = torch.nn.functional.avg_pool2d(picture[None], factor, ceil_mode=True)
    return pooled[0]


def _basis(picture: torch.Tensor) -> torch.Tensor:
    """Three directions `3 c` of most variation; each points to where its largest entry is."""
    flat = picture.nan_to_num(0.0, 0.0, 0.0).flatten(1).double()
    flat = flat - flat.mean(1, keepdim=True)
    vectors = torch.linalg.eigh(flat @ flat.T).eigenvectors[:, -3:].flip(1).T
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    directions: torch.Tensor = vectors * largest.sign()
    return directions.float()
