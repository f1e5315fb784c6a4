"""Drill down to the module that makes an error: from the model to a block to a leaf.

On each level the parts of one module are run on the reference's inputs (`isolation`), with a floor
measured on the trusted model under the same replacement; the first part that is wrong is opened
next. Parts may be built in another way inside, as long as what they return is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from truestep.comparison.matching import compare_tensors
from truestep.divergence import kind_of, locate, parent
from truestep.noise import NoiseFloor, pair_of
from truestep.recording.raised import HIGHER
from truestep.tracing.isolation import Forward, Rename, benign_flows, flow
from truestep.tracing.naming import ROOT, callable_module, named_modules
from truestep.verdict import Divergence, Row

MAX_LEVELS = 12


@dataclass(frozen=True)
class Subject:
    """A model and a forward of it on recorded inputs."""

    model: torch.nn.Module
    forward: Forward


@dataclass(frozen=True)
class Drilled:
    """Where an error is made.

    Attributes:
        divergence: Module, step, branch and likely kind; None where no part is wrong.
        rows: Every module that was looked at, level by level, in order of execution.
        path: Modules that were opened, from the root on.
    """

    divergence: Divergence | None
    rows: tuple[Row, ...]
    path: tuple[str, ...]


def drill(
    candidate: Subject,
    trusted: Subject,
    *,
    step: int,
    branch: str,
    rename: Rename | None = None,
) -> Drilled:
    """Find the module in which a candidate departs from a trusted model.

    Args:
        candidate, trusted: The two sides, in one precision.
        step, branch: Where the forwards belong.
        rename: Candidate's fqn to the trusted one; None of a module without a partner.

    Returns:
        The deepest module that is wrong on right inputs.
    """
    modules = named_modules(trusted.model).modules
    names = [name for name, m in modules.items() if name != ROOT and callable_module(m)]
    here, path, rows = ROOT, [ROOT], list[Row]()
    found: Divergence | None = None
    for _ in range(MAX_LEVELS):
        parts = {name for name in names if parent(name) == here}
        if not parts and found is not None:
            break  # a leaf
        level = _level(candidate, trusted, parts | {here}, step=step, branch=branch, rename=rename)
        rows += [row for row in level.rows if row.fqn != here or here == ROOT]
        if level.divergence is None:
            break
        if found is not None and not level.called & parts:
            found = found.model_copy(update={"kind": "none of its parts is called"})
            break
        found = level.divergence
        at = found.fqn or ROOT
        if at == here or at not in parts or found.kind in ("not called", "called once more"):
            break
        here = at
        path.append(at)
    return Drilled(found, tuple(rows), tuple(path))


@dataclass(frozen=True)
class _Level:
    divergence: Divergence | None
    rows: Sequence[Row]
    called: frozenset[str]


def _level(
    candidate: Subject,
    trusted: Subject,
    select: set[str],
    *,
    step: int,
    branch: str,
    rename: Rename | None,
) -> _Level:
    reference = flow(trusted.model, trusted.forward, step=step, branch=branch, select=select)
    dtype = next((p.dtype for p in trusted.model.parameters()), torch.float32)
    working = str(dtype).removeprefix("torch.")
    runs = benign_flows(
        trusted.model,
        trusted.forward,
        reference.tensors,
        step=step,
        branch=branch,
        select=select,
        higher=HIGHER.get(working),
        pair=pair_of(working, working),
    )
    floor = NoiseFloor(runs=tuple(runs))
    actual = flow(
        candidate.model,
        candidate.forward,
        step=step,
        branch=branch,
        given=reference.tensors,
        select=select,
        rename=rename,
    )
    rows = compare_tensors(
        actual.tensors, reference.tensors, floor=floor, pair=pair_of(working, working)
    )
    divergence, called = locate(rows), frozenset(actual.calls)
    if divergence is None:
        return _Level(None, rows, called)
    a, r = actual.tensors.get(divergence.name), reference.tensors.get(divergence.name)
    if a is not None and r is not None:
        kind = "; ".join(part for part in (divergence.kind, kind_of(a, r)) if part)
        divergence = divergence.model_copy(update={"kind": kind or None})
    return _Level(divergence, rows, called)
