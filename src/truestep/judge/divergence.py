"""First divergence: which module made the error, where it was only inherited, and what kind it is.

Works on rows of modules that were each run on the reference's inputs (`replay.isolation`), in the
order in which things happened. Pure: no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from truestep.judge.seen import with_profile
from truestep.keys import key_of
from truestep.verdict import GIVEN, Divergence, Row, Verdict

_SOURCES = ("text", "schedule", "latent")
"""Stages that take nothing from one another; every other one of a run takes from all before it."""

_FAILED = (Verdict.DRIFTED, Verdict.INVALID)
ROOT = "(root)"


def locate(rows: Sequence[Row]) -> Divergence | None:
    """The module in which the first error is made.

    Args:
        rows: Module rows in order of execution: a module's inputs as it starts, its outputs as it
            ends, so that the parts of a module come before its own outputs.

    Returns:
        The module whose output is wrong on right inputs; or, where a module was about to be given a
        wrong input although everything before it was right, the module around it, whose own code
        lies between; or the module that was not called, where what follows is wrong for it, or
        once more than it should be.
    """
    called = {row.fqn for row in rows if row.actual is not None}
    extra = next((row for row in rows if row.reference is None), None)
    skipped: Row | None = None
    for row in rows:
        inward = _inward(row)
        if row.verdict is Verdict.MISSING and row.fqn not in called:
            skipped = skipped or row
            continue
        found = _wrong(row, inward, extra)
        if found is None:
            continue
        holder = skipped is not None and row.fqn == parent(skipped.fqn or "")
        if skipped is not None and (inward or holder):
            break  # what follows lacks what the skipped module makes
        return found
    if skipped is not None:
        return _divergence(skipped, skipped.fqn or "", kind="not called")
    if extra is not None:
        return _divergence(extra, extra.fqn or "", kind="called once more")
    return None


def _wrong(row: Row, inward: bool, extra: Row | None) -> Divergence | None:
    """What one row alone says, if it is not right."""
    fqn, slot = row.fqn or "", key_of(row.name).name
    if failed(row) and not inward:
        return _divergence(row, fqn, kind=None)
    if failed(row) and fqn == ROOT:
        return _divergence(row, ROOT, kind=GIVEN)
    if failed(row):
        return _divergence(row, parent(fqn), kind=f"before {fqn}")
    if row.verdict is Verdict.MISSING:
        if extra is not None and extra.fqn == row.fqn:
            return None  # under another name
        what = f"{fqn} is not given {slot}" if inward else f"does not return {slot}"
        return _divergence(row, parent(fqn) if inward else fqn, kind=what)
    if row.verdict is Verdict.INCOMPARABLE and row.reference is not None:
        return _divergence(row, parent(fqn) if inward else fqn, kind=row.note)
    return None


def with_origins(rows: Sequence[Row], place: Divergence | None) -> list[Row]:
    """Say of rows that failed on right inputs whether their module made the error.

    Args:
        rows: As for `locate`.
        place: What was located in them.

    Returns:
        The rows. What a module was about to be given is another's error, but for that of the place
        itself; so is what it returns where a module inside of it is wrong.
    """
    wrong = {row.fqn or ROOT for row in rows if failed(row) and not _inward(row)}
    holders = {holder for fqn in wrong for holder in around(fqn)}
    found = []
    for row in rows:
        if failed(row):
            own = not _inward(row) and (row.fqn or ROOT) not in holders
            own = own or (place is not None and row.name == place.name)
            row = row.model_copy(update={"origin": "introduced" if own else "inherited"})
        found.append(row)
    return found


def _inward(row: Row) -> bool:
    return not key_of(row.name).outward


def failed(row: Row) -> bool:
    """Whether a tensor of both sides is wrong."""
    return row.verdict in _FAILED


def _divergence(row: Row, fqn: str, *, kind: str | None) -> Divergence:
    return Divergence(
        name=row.name, stage="module", step=row.step, branch=row.branch, fqn=fqn, kind=kind
    )


def parent(fqn: str) -> str:
    """The module around a module: `blocks.3` for `blocks.3.attn1`, `(root)` for `blocks.3`.

    What only holds others by number (`blocks`, `to_out`) runs no code of its own and is passed by.
    """
    head, _, last = fqn.rpartition(".")
    if last.isdecimal():
        head = head.rpartition(".")[0]
    return head or ROOT


def around(fqn: str) -> list[str]:
    """Modules around a module, the nearest first, to the root."""
    found = list[str]()
    while fqn != ROOT:
        fqn = parent(fqn)
        found.append(fqn)
    return found


def with_kind(
    place: Divergence, actual: torch.Tensor | None, reference: torch.Tensor | None
) -> Divergence:
    """A place with what its residual looks like added, and where along an axis it lies; as it is
    where a side lacks the tensor."""
    if actual is None or reference is None:
        return place
    kind = "; ".join(part for part in (place.kind, kind_of(actual, reference)) if part)
    return with_profile(place.model_copy(update={"kind": kind or None}), actual, reference)


def kind_of(actual: torch.Tensor, reference: torch.Tensor) -> str | None:
    """What a residual looks like, where that is plain.

    Args:
        actual, reference: Outputs of one module, same shape, real; the last axis holds channels.

    Returns:
        `sign flipped`, `scaled by ...`, `constant offset`, `a bias`, `transposed`, `values
        permuted`, `rounded to ...`, `a few positions only`, or None.
    """
    if actual.shape != reference.shape or not actual.numel() or not actual.is_floating_point():
        return None
    a, r = actual.double(), reference.double()
    if not bool(torch.isfinite(a).all()) or not bool(torch.isfinite(r).all()):
        return None
    residual = a - r
    total = float(residual.square().sum())
    if not total:
        return None
    gain = float((a * r).sum() / r.square().sum()) if bool(r.any()) else 0.0
    rest = float((a - gain * r).square().sum())
    if rest < 1e-4 * total:
        return "sign flipped" if abs(gain + 1) < 1e-3 else f"scaled by {gain:.6g}"
    return (
        _offset(residual, total)
        or _transposed(a, r)
        or _permuted(a, r)
        or _rounded(actual, reference)
        or _few_positions(residual, total)
    )


def _offset(residual: torch.Tensor, total: float) -> str | None:
    """A residual that is one number, or one number a channel (last axis, or axis 1)."""
    mean = float(residual.mean())
    if float((residual - mean).square().sum()) < 1e-4 * total:
        return f"constant offset {mean:.3g}"
    for axis in {residual.ndim - 1, min(1, residual.ndim - 1)}:
        others = [other for other in range(residual.ndim) if other != axis]
        if not others or residual.numel() == residual.shape[axis]:
            continue
        bias = residual.mean(others, keepdim=True)
        if float((residual - bias).square().sum()) < 1e-4 * total:
            return "a bias: the same offset everywhere in a channel"
    return None


def _transposed(a: torch.Tensor, r: torch.Tensor) -> str | None:
    for first in range(a.ndim):
        for second in range(first + 1, a.ndim):
            if a.shape[first] != a.shape[second] or a.shape[first] == 1:
                continue
            if torch.allclose(a, r.transpose(first, second), rtol=1e-4, atol=1e-6):
                return f"transposed: axes {first} and {second} exchanged"
    return None


def _permuted(a: torch.Tensor, r: torch.Tensor) -> str | None:
    """The same slices in another order along one axis, or the same values in another order."""
    for axis in range(a.ndim):
        size = a.shape[axis]
        if not 1 < size <= 4096:
            continue
        own = a.movedim(axis, 0).reshape(size, -1).sum(1)
        theirs = r.movedim(axis, 0).reshape(size, -1).sum(1)
        limit = 1e-5 * (float(theirs.abs().max()) or 1.0)
        if float((own - theirs).abs().max()) < limit:
            continue  # in their places: if anything is permuted, then along another axis
        if float((own.sort().values - theirs.sort().values).abs().max()) < limit:
            return f"values permuted along axis {axis}"
    if a.numel() <= 1 << 22:
        gap = (a.flatten().sort().values - r.flatten().sort().values).abs().max()
        if float(gap) < 1e-5 * (float(r.abs().max()) or 1.0):
            return "values permuted"
    return None


def _rounded(actual: torch.Tensor, reference: torch.Tensor) -> str | None:
    """Values of a wider dtype that all fit into a narrower one, which the reference's do not."""
    for name in ("float8_e4m3fn", "bfloat16", "float16"):
        dtype: torch.dtype = getattr(torch, name)
        if dtype.itemsize >= actual.itemsize:
            continue
        rounded = [  # compared in float64: float8 has no comparison
            torch.equal(side.to(dtype).double(), side.double()) for side in (actual, reference)
        ]
        if rounded == [True, False]:
            return f"rounded to {name}: a cast in or after it"
    return None


def _few_positions(residual: torch.Tensor, total: float) -> str | None:
    """Nearly all of the error in few rows of tokens: a mask, a padding, a range that is off."""
    if residual.ndim < 2 or residual.shape[-2] < 8:
        return None
    energy = (
        residual.square().sum(-1).flatten(0, -2).sum(0)
        if residual.ndim > 2
        else (residual.square().sum(-1))
    )
    top = energy.topk(max(1, energy.numel() // 10))
    share = top.values.cumsum(0) / total
    if float(share[-1]) > 0.99:
        places = top.indices[: int((share < 0.99).sum()) + 1]
        low, high = int(places.min()), int(places.max())
        return f"only positions {low} to {high} of axis -2: a mask, a padding or a range"
    return None


def with_growth(rows: Sequence[Row], given: Mapping[str, float] | None = None) -> list[Row]:
    """Leave undecided, of two whole runs, what rounding before it may have grown to.

    A floor is measured on recorded inputs. In two runs that were made freely, every place was given
    what the places before it made, with their rounding, and guidance, a model, or pixels of 8 bits
    may amplify that: up to 47 times was measured between two harmless runs of a random Flux. What
    is given bit for bit the same, and what begins a run, is judged as it is. Only what passes is
    rounding: what is undecided itself explains nothing that comes after it.

    Args:
        rows: In the order in which the tensors were made; those raised to another precision last.
        given: Of some rows, by name: how far off the furthest of what that place was given is.
            Of all others it is the furthest of everything before.
    """
    places: dict[tuple[str, int | None], float] = {}
    result: list[Row] = []
    before, drifted = 0.0, False
    for row in rows:
        place = (row.stage, row.step)
        largest = places.setdefault(place, before)
        if given is not None and row.name in given:
            largest = given[row.name]
        error = row.metrics.rel_l2 if row.metrics else 0.0
        if row.verdict.passed and not key_of(row.name).precision:
            before = max(before, error)
        if row.verdict is Verdict.DRIFTED and not drifted:
            if _may_have_grown(row, error, largest):
                update = {"verdict": Verdict.INCONCLUSIVE, "note": f"{GREW} ({largest:.1e})"}
                row = row.model_copy(update=update)
            else:
                drifted = True  # what follows inherits it
        drifted |= row.verdict is Verdict.INVALID
        result.append(row)
    return result


def _may_have_grown(row: Row, error: float, given: float) -> bool:
    """Whether an error is of numbers that round, of a place that takes from others, and no more
    than rounding that it was given may have become."""
    dtype = row.reference.dtype if row.reference else ""
    rounds = "float" in dtype or dtype == "uint8"  # pixels
    return rounds and row.stage not in ("", *_SOURCES) and error <= min(GROWN * given, UNRELATED)


GROWN = 100.0
"""So many times further off than everything before it, a place has an error of its own."""

UNRELATED = 0.5
"""Two tensors that are further apart are of other things: one with its sign turned is 2 off."""

GREW = "rounding before it may have grown to this"


def traced_back(rows: Sequence[Row]) -> list[Row]:
    """Say of two whole runs which failing rows began it, and which only follow.

    Args:
        rows: In the order in which the tensors were made. A text, a schedule, an initial latent
            that fails began it; else the first place that fails. What comes later is inherited.
    """
    failing = [row for row in rows if row.verdict in (Verdict.DRIFTED, Verdict.INVALID)]
    begun = [row for row in failing if row.stage in _SOURCES]
    if not begun:
        begun = [r for r in failing if (r.stage, r.step) == (failing[0].stage, failing[0].step)]
    if len(begun) == len(failing):  # nothing follows: there is nothing to tell apart
        return list(rows)
    names = {row.name for row in begun}
    origin = {r.name: "introduced" if r.name in names else "inherited" for r in failing}
    return [
        row.model_copy(update={"origin": origin[row.name]})
        if row.stage and row.name in origin
        else row
        for row in rows
    ]
