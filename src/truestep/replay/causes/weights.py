"""Hypotheses about weights: how a tensor of the candidate follows from the reference's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from truestep.measure.distance import same_bits
from truestep.measure.quantisers import QUANTISERS, Quantiser
from truestep.pairing.partners import Part
from truestep.replay.causes.scene import Hypothesis, Scene, parameters

Tensor = torch.Tensor

_EXACT = 1e-5
"""Relative distance below which two tensors are one, computed in two ways."""

LARGEST = 2 << 30
"""Bytes of a module whose weights are compared with all that is in it."""

_RELATED = 0.9
"""Correlation from which on a tensor is another state of the same one."""


@dataclass(frozen=True)
class Relation:
    """How one tensor follows from another."""

    kind: str
    text: str


def hypotheses(scene: Scene) -> Iterator[Hypothesis]:
    """The candidate's weights where they are not the reference's, all of them, then one by one."""
    pairs = paired(scene)
    differing = {name: own for name, (own, theirs) in pairs.items() if not same_bits(own, theirs)}
    if not differing:
        return
    for name, own in differing.items():
        yield _loaded(scene, {name: own})
    if len(differing) > 1:
        yield _loaded(scene, differing)


def _loaded(scene: Scene, values: Mapping[str, Tensor]) -> Hypothesis:
    names = [scene.within(name) for name in values]
    shown = ", ".join(f"`{name}`" for name in names[:3])

    def said() -> tuple[str, str]:
        pairs, computed = paired(scene), {name for name, _ in scene.theirs.named_buffers()}
        told = [
            _computed(own, pairs[name][1])
            if name in computed
            else relation(name, own, pairs[name][1], scene.state)
            for name, own in values.items()
        ]
        kinds = list(dict.fromkeys(each.kind for each in told))
        texts = [f"`{full}` {each.text}" for full, each in zip(names, told, strict=True)]
        more = f"; {len(texts) - 3} more" if len(texts) > 3 else ""
        return kinds[0] if len(kinds) == 1 else "weights", "; ".join(texts[:3]) + more

    return Hypothesis(
        kind="weights",
        text=f"{shown} of the candidate",
        change=lambda module: parameters(module, values),
        patch=f"load {shown} of the reference as it is",
        said=said,
    )


def paired(scene: Scene) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameters and buffers of the trusted module, with the candidate's in the same sizes.

    By name; where names differ, by the only tensor of that size.
    """
    if scene.own is None:
        return {}
    ours, theirs = (_named(module) for module in (scene.own, scene.theirs))
    if scene.part is not None:  # rows of a fused layer's weights are those of its outputs
        ours |= {name: _cut(scene.part, ours[name], theirs.get(name)) for name in ours}
    found = {
        name: (ours[name], tensor)
        for name, tensor in theirs.items()
        if name in ours and ours[name].shape == tensor.shape
    }
    taken = set(found)
    for name, tensor in theirs.items():
        fitting = [n for n, t in ours.items() if t.numel() == tensor.numel() and n not in theirs]
        rivals = [n for n, t in theirs.items() if t.numel() == tensor.numel() and n not in taken]
        if name not in found and len(fitting) == 1 and len(rivals) == 1:
            own = ours[fitting[0]]
            shaped = own if own.shape == tensor.shape else own.reshape(tensor.shape)
            found[name] = (shaped, tensor)
    return found


def _cut(part: Part, own: Tensor, reference: Tensor | None) -> Tensor:
    if reference is None or own.shape == reference.shape or own.ndim != reference.ndim:
        return own
    cut = part.of(own.movedim(0, -1)).movedim(-1, 0)
    return cut if cut.shape == reference.shape else own


def _named(module: torch.nn.Module) -> dict[str, Tensor]:
    size = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    deep = size <= LARGEST  # of a whole model, what it has itself: modules in it are named apart
    named = [*module.named_parameters(recurse=deep), *module.named_buffers(recurse=deep)]
    return {name: tensor.detach().cpu() for name, tensor in named if not tensor.is_meta}


_LEARNED = re.compile(r"weight|kernel|proj|lora")
"""Names of what an adapter may change: no table of positions."""


def relation(name: str, own: Tensor, reference: Tensor, state: Mapping[str, Tensor]) -> Relation:
    """How a tensor of the candidate follows from the reference's; the first that is exact.

    Args:
        name: Of the tensor.
        own, reference: Of the same sizes, and not equal.
        state: All tensors of the reference, in whose place it could be.
    """
    actual, wanted = own.double(), reference.double()
    for test in _EXACTLY:
        found = test(actual, wanted)
        if found is not None:
            return found
    other = _elsewhere(own, state) or _blended(actual, wanted, state)
    if other is not None:
        return other
    of_weights = own.ndim > 1 and _LEARNED.search(name)
    return (_low_rank(actual, wanted) if of_weights else None) or _related(actual, wanted)


def _close(actual: Tensor, wanted: Tensor, tolerance: float = _EXACT) -> bool:
    size = wanted.norm().item()
    return (actual - wanted).norm().item() <= tolerance * size if size else not actual.any()


def _computed(own: Tensor, reference: Tensor) -> Relation:
    """Of a buffer, which is computed and not learned."""
    actual, wanted = own.double(), reference.double()
    found = _multiple(actual, wanted) or _offset(actual, wanted) or _rounded(actual, wanted)
    if found is not None:
        return found
    apart = ((actual - wanted).norm() / wanted.norm()).item()
    text = f"is {apart:.2%} from the reference's: it is computed in another way"
    return Relation("computed table", text)


def _constant(actual: Tensor, wanted: Tensor) -> Relation | None:
    first = actual.flatten()[0]
    if not bool((actual == first).all()):
        return None
    value = first.item()
    kind = "bias missing" if actual.ndim == 1 and value == 0 else "not loaded"
    return Relation(kind, f"is {value:g} everywhere: it was not loaded, or is left out")


def _multiple(actual: Tensor, wanted: Tensor) -> Relation | None:
    size = (wanted * wanted).sum()
    factor = ((actual * wanted).sum() / size).item() if size else 0.0
    plain = f"{factor:.6g}" in ("1", "0")  # an element, or less than can be said
    if not plain and _close(actual, wanted * factor):
        return Relation("scaled", f"is {factor:.6g} times the reference's")
    return None


def _offset(actual: Tensor, wanted: Tensor) -> Relation | None:
    apart = actual - wanted
    if apart.numel() > 1 and _close(apart, torch.full_like(apart, apart.mean().item()), 1e-4):
        return Relation("offset", f"is the reference's plus {apart.mean().item():.6g}")
    return None


def _offset_slices(actual: Tensor, wanted: Tensor) -> Relation | None:
    """A constant added to some rows, or columns, of a table and not to others."""
    for axis in range(actual.ndim if actual.ndim > 1 else 0):
        apart = (actual - wanted).movedim(axis, 0).flatten(1)
        means = apart.mean(1, keepdim=True)
        moved = (means.abs() > _EXACT * wanted.abs().max()).flatten()
        if not moved.any() or len(moved) < 2:
            continue
        if not _close(apart, means.expand_as(apart), 1e-4):
            continue
        values = means[moved].flatten()
        if not torch.allclose(values, values[:1].expand_as(values), rtol=1e-3):
            continue
        places = ", ".join(str(i) for i in moved.nonzero().flatten().tolist()[:8])
        value = values.mean().item()
        kind = "one plus" if abs(abs(value) - 1.0) < 1e-3 else "offset"
        return Relation(kind, f"has {value:+.6g} in {places} of axis {axis}")
    return None


def _turned(actual: Tensor, wanted: Tensor) -> Relation | None:
    for i in range(actual.ndim):
        for j in range(i + 1, actual.ndim):
            if actual.shape[i] != actual.shape[j]:
                continue
            turned = wanted.transpose(i, j)
            if torch.equal(actual, turned):
                return Relation("transposed", f"has its axes {i} and {j} exchanged")
            if any(torch.equal(actual, turned.flip(axis)) for axis in (i, j)):
                return Relation("turned", f"is turned by a quarter in its axes {i} and {j}")
    return None


def _flipped(actual: Tensor, wanted: Tensor) -> Relation | None:
    """Turned round along one axis or several: a kernel that correlates for one that convolves."""
    axes = [axis for axis in range(actual.ndim) if actual.shape[axis] > 1]
    for count in range(1, len(axes) + 1):
        for some in combinations(axes, count):
            if torch.equal(actual, wanted.flip(some)):
                return Relation("flipped", f"runs backwards along {_axes(some)}")
    return None


def _axes(axes: Sequence[int]) -> str:
    listed = ", ".join(map(str, axes))
    return f"axis {listed}" if len(axes) == 1 else f"axes {listed}"


def _zeroed(actual: Tensor, wanted: Tensor) -> Relation | None:
    """Some values are 0, and the others those of the reference."""
    gone = (actual == 0) & (wanted != 0)
    if not gone.any() or not torch.equal(actual[~gone], wanted[~gone]):
        return None
    share, kept = gone.double().mean().item(), wanted[~gone].abs().min()
    small = " (the smallest)" if wanted[gone].abs().max() <= kept else ""
    return Relation(
        "zeroed", f"is 0 in {share:.1%} of its values{small}, the reference's elsewhere"
    )


def _reordered(actual: Tensor, wanted: Tensor) -> Relation | None:
    for axis in range(min(actual.ndim, 2)):
        rows = [
            side.movedim(axis, 0).flatten(1) if side.ndim > 1 else side[:, None]
            for side in (actual, wanted)
        ]
        order = [_row_order(side) for side in rows]
        if torch.equal(rows[0][order[0]], rows[1][order[1]]):
            return Relation("permuted", f"has {_moved(*rows)} along axis {axis}")
    return None


def _moved(rows: Tensor, reference: Tensor) -> str:
    """Which rows are in other places: two runs of them exchanged, or how many."""
    moved = (rows != reference).any(1).nonzero().flatten().tolist()
    half = len(moved) // 2
    first, second = moved[:half], moved[half:]
    runs = len(first) == len(second) and all(
        run == list(range(run[0], run[0] + len(run))) for run in (first, second)
    )
    if runs and torch.equal(rows[first], reference[second]):
        said = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in (first, second)]
        return f"{said[0]} and {said[1]} exchanged"
    return f"{len(moved)} of {len(rows)} in other places"


def _row_order(rows: Tensor) -> Tensor:
    """An order of rows that depends on what they hold alone."""
    weights = torch.linspace(1.0, 2.0, rows.shape[1], dtype=rows.dtype).pow(3)
    return (rows * weights).sum(1).argsort(stable=True)


def _rounded(actual: Tensor, wanted: Tensor) -> Relation | None:
    for name, function in NARROWER.items():
        if _close(actual, function(wanted), 1e-6):
            kind = "precision" if name in CASTS else "quantised"
            return Relation(kind, f"is the reference's in {name}")
    return None


def _cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.float().to(dtype).double()


def _as_quantised(quantiser: Quantiser) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        made = quantiser(tensor)
        return tensor if made is None else made.values.double()

    return change


CASTS = ("bfloat16", "float16")
"""Precisions of floating point that weights are computed in."""

NARROWER: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": _cast(torch.bfloat16),
    "float16": _cast(torch.float16),
    "float8 e4m3 without a scale": _cast(torch.float8_e4m3fn),
    "float8 e5m2 without a scale": _cast(torch.float8_e5m2),
    **{f"{each.name} ({each.text})": _as_quantised(each) for each in QUANTISERS.values()},
}
"""Precisions that weights go through, with a tensor as it comes out of them."""


def _elsewhere(own: Tensor, state: Mapping[str, Tensor]) -> Relation | None:
    for name, tensor in state.items():
        if tensor.shape == own.shape and same_bits(tensor.detach().cpu(), own):
            return Relation("exchanged", f"is the reference's `{name}`")
    return None


def _blended(actual: Tensor, wanted: Tensor, state: Mapping[str, Tensor]) -> Relation | None:
    """A sum of the reference's and of another tensor of it, each times a number."""
    if actual.numel() < _LEAST_BLENDED:
        return None
    for name, tensor in state.items():
        if tensor.shape != wanted.shape:
            continue
        other = tensor.detach().cpu().double()
        basis = torch.stack([wanted.flatten(), other.flatten()], 1)
        products = basis.T @ basis
        if torch.linalg.matrix_rank(products) < 2:
            continue
        own, foreign = torch.linalg.solve(products, basis.T @ actual.flatten()).tolist()
        if abs(foreign) > _EXACT and _close(actual, own * wanted + foreign * other):
            text = f"is {own:.4g} times the reference's plus {foreign:.4g} times its `{name}`"
            return Relation("blended", text)
    return None


_LEAST_BLENDED = 16
"""Values from which on two numbers that fit them all are no accident."""


def _some_slices(actual: Tensor, wanted: Tensor) -> Relation | None:
    """Few rows, or columns, hold something else, and all others what the reference's do."""
    for axis in range(min(actual.ndim, 2)):
        rows, were = (s.movedim(axis, 0).reshape(s.shape[axis], -1) for s in (actual, wanted))
        at = (rows != were).any(1).nonzero().flatten()
        if not 0 < len(at) <= max(1, len(rows) // 4):
            continue
        shown = ", ".join(map(str, at[:4].tolist())) + (f" and {len(at) - 4} more" * (len(at) > 4))
        what = f"{_became(rows[at], were, at)} in {shown} of axis {axis}"
        return Relation("some slices", f"{what}, the reference's elsewhere")
    return None


def _became(rows: Tensor, were: Tensor, at: Tensor) -> str:
    """What rows hold, where it is the same of all of them."""
    if not rows.any():
        return "is 0"
    factor = _multiple(rows, were[at])
    if factor is not None:
        return factor.text
    order, firsts = _row_order(were), _row_order(rows)
    known = {tuple(were[i].tolist()): int(i) for i in order} if were.numel() <= _FEW else {}
    others = [known.get(tuple(rows[i].tolist())) for i in sorted(firsts.tolist())]
    if others and all(other is not None for other in others):
        return f"holds rows {', '.join(map(str, others[:4]))}" + (" ..." * (len(others) > 4))
    return "holds other values"


_FEW = 1 << 22
"""Values of a weight whose rows are looked up by what they hold."""


def _low_rank(actual: Tensor, wanted: Tensor) -> Relation | None:
    if actual.ndim < 2 or min(actual.flatten(1).shape) < 8:
        return None
    values = torch.linalg.svdvals((actual - wanted).flatten(1))
    rank = int((values > 1e-4 * values[0]).sum())
    if rank > len(values) // 4:
        return None
    return Relation("low rank", f"is the reference's plus a matrix of rank {rank}: a LoRA")


def _related(actual: Tensor, wanted: Tensor) -> Relation:
    apart = ((actual - wanted).norm() / wanted.norm()).item()
    centred = [side - side.mean() for side in (actual, wanted)]
    size = centred[0].norm() * centred[1].norm()
    alike = ((centred[0] * centred[1]).sum() / size).item() if size else 0.0
    if alike >= _RELATED:
        text = f"is {apart:.1%} from the reference's, in no way that is known"
        return Relation("another state", text)
    text = f"is not the reference's in any way that is known (correlation {alike:.2f})"
    return Relation("another tensor", text)


_EXACTLY = (
    _constant,
    _multiple,
    _offset,
    _offset_slices,
    _turned,
    _flipped,
    _reordered,
    _some_slices,
    _zeroed,
    _rounded,
)
"""Relations of a tensor to the reference's alone, the plainest first."""
