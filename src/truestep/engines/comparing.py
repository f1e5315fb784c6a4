"""Runs of several engines, seam by seam, without a trusted model: where they part, and which does.

Their latents drift apart by rounding alone, so what a seam *introduces* counts: how much further
its outputs are apart than what it was given explains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from truestep.engines.branches import named_by_text
from truestep.engines.conventions import (
    PREDICTIONS,
    TIME_SCALES,
    Conversion,
    as_shape,
    with_closing_zero,
)
from truestep.engines.expected import (
    ENTERING,
    FINAL,
    FRAMES,
    NOISE,
    SIGMAS,
    TIMESTEPS,
    fitted,
    place_of,
    time_scale,
)
from truestep.engines.run import Pass, Run
from truestep.errors import UsageError
from truestep.judge.floor import Limits
from truestep.judge.rows import build_comparison, compare_tensors
from truestep.judge.seen import with_seen
from truestep.keys import step_name
from truestep.measure.distance import distance
from truestep.verdict import Comparison, Row, Side, Verdict

PREDICTED, ARITHMETIC = 100.0, 4.0
"""How much a difference may grow in one prediction, and in one update (guidance: by its weights)
before the seam is said to have made it: from one rounding to the bound of the analytic floor a
prediction takes 20 at most on the models that were measured, an Euler update 1."""

FAR, ROUNDED = 10.0, 5e-4
"""Two of three that the analytic floor calls different still agree where the third is so many times
further, and they are no further apart than rounding has brought implementations."""


@dataclass(frozen=True)
class Seam:
    """One seam of two runs.

    Attributes:
        name: Of the tensor.
        actual, reference: Of the two runs, in one convention.
        given: Names of the seams that it is made of.
        growth: How much a difference in these may grow in it.
    """

    name: str
    actual: torch.Tensor
    reference: torch.Tensor
    given: tuple[str, ...] = ()
    growth: float = 1.0


def compare_runs(actual: Run, reference: Run) -> Comparison:
    """Compare two runs seam by seam.

    Args:
        actual, reference: See `run_of`.

    Returns:
        Rows in the order of the run. A row that fails only because what it was given is apart is
        `inherited`; where that is all, and nothing introduced it, the result is `inconclusive`.

    Raises:
        UsageError: They have no seam in common.
    """
    notes: dict[str, None] = {}
    actual = named_by_text(actual, reference)
    if actual.in_vae is not reference.in_vae:
        notes["one end is in the space of a VAE: not compared, engine check converts it"] = None
        actual, reference = _without_end(actual), _without_end(reference)
    seams = list(_seams(actual, reference, notes))
    if not seams:
        raise UsageError(
            "the runs have no seam in common",
            where=f"{actual.label}, {reference.label}",
            measured="neither schedule, noise, text, predictions nor latents are in both",
            hint="truestep engine run -- python run.py",
        )
    rows = compare_tensors(
        {seam.name: seam.actual for seam in seams},
        {seam.name: seam.reference for seam in seams},
        limits=Limits(),
        describe=place_of,
    )
    judged = _introduced(seams, rows)
    undecided = [row for row in judged if row.origin == "inherited"]
    failing = [row for row in judged if row.verdict in _WRONG and row.origin != "inherited"]
    judged = [_between(row) for row in judged]
    if undecided and not failing:
        notes["differences grow from rounding, and no seam is seen to make one"] = None
        judged = [_undecided(row) if row.origin == "inherited" else row for row in judged]
    result = build_comparison(
        judged,
        actual=Side(label=actual.label, environment=dict(actual.environment)),
        reference=Side(label=reference.label, environment=dict(reference.environment)),
        looked_at=(f"{len(actual.steps)} and {len(reference.steps)} steps",),
        notes=tuple(notes),
    )
    return with_seen(
        result,
        {seam.name: seam.actual for seam in seams},
        {seam.name: seam.reference for seam in seams},
    )


def _without_end(run: Run) -> Run:
    steps = (*run.steps[:-1], run.steps[-1].but(after=None)) if run.steps else ()
    return replace(run, steps=steps, alone=None)


_WRONG = (Verdict.DRIFTED, Verdict.INVALID)


def _between(row: Row) -> Row:
    """Say of what is left undecided what two right engines are apart by, and what decides."""
    if row.verdict is not Verdict.INCONCLUSIVE:
        return row
    note = "two implementations may round as far apart: engine check decides, by the trusted model"
    return row.model_copy(update={"note": note})


def _undecided(row: Row) -> Row:
    note = "what it was given is apart by rounding, which may have grown: engine check decides"
    return row.model_copy(update={"verdict": Verdict.INCONCLUSIVE, "origin": "", "note": note})


def _introduced(seams: Sequence[Seam], rows: Sequence[Row]) -> list[Row]:
    """Tell seams that make a difference from those that only hand on what they were given."""
    sizes: dict[str, float] = {}
    made: set[str] = set()
    judged = []
    for seam, row in zip(seams, rows, strict=True):
        size = row.metrics.rel_l2 if row.metrics is not None else 0.0
        sizes[seam.name] = size
        given = max((sizes.get(name, 0.0) for name in seam.given), default=0.0)
        follows = any(name in made for name in seam.given)
        failed = row.verdict in _WRONG
        if failed or follows:
            made.add(seam.name)
        if failed and (follows or size <= seam.growth * given):
            row = row.model_copy(update={"origin": "inherited"})
        elif failed:
            row = row.model_copy(update={"origin": "introduced"})
        judged.append(row)
    return judged


def _seams(actual: Run, reference: Run, notes: dict[str, None]) -> Iterator[Seam]:
    yield from _beginning(actual, reference, notes)
    if len(actual.steps) != len(reference.steps):
        counts = f"{len(actual.steps)} and {len(reference.steps)} steps: compared up to there"
        notes[counts] = None
    way = _way(actual, reference)
    if way.conversion.name:
        side = "first" if way.of_actual else "second"
        notes[f"converted, of the {side}: {way.conversion.name}"] = None
    begun = [SIGMAS, TIMESTEPS, NOISE]
    latents: list[str] = [NOISE]
    for index, (ours, theirs) in enumerate(zip(actual.steps, reference.steps, strict=False)):
        if index and ours.latent is not None and theirs.latent is not None:
            entering = f"{ENTERING}/{index:04d}"
            begun_with = fitted(entering, ours.latent, theirs.latent)
            yield Seam(entering, begun_with, theirs.latent, tuple(latents), ARITHMETIC)
            latents = [entering]
        made = []
        for name, output, expected, branch in _predictions(actual, reference, index, way):
            given = (*begun, f"text/{branch}", *latents)
            yield Seam(name, fitted(name, output, expected), expected, given, PREDICTED)
            made.append(name)
        weights = sum(abs(weight) for weight in reference.weights.values())
        mine, other = ours.stepped_by, theirs.stepped_by
        if mine is not None and other is not None:
            guided = step_name(index, "guided")
            growth = ARITHMETIC * max(weights, 1.0)
            yield Seam(guided, fitted(guided, mine, other), other, tuple(made), growth)
            made = [guided]
        if ours.after is not None and theirs.after is not None:
            last = index + 1 == min(len(actual.steps), len(reference.steps))
            name = FINAL if last else step_name(index + 1, "latent")
            after, how = as_shape(ours.after, theirs.after)
            if how:
                notes[f"converted: {how}"] = None
            growth = ARITHMETIC * (
                1.0 if made == [step_name(index, "guided")] else max(weights, 1.0)
            )
            yield Seam(name, after, theirs.after, (*begun[:2], *latents, *made), growth)
            latents = [name]
    if not actual.steps or not reference.steps:
        yield from _pair(FINAL, actual.final, reference.final, ())
    yield from _pair(FRAMES, actual.decoded, reference.decoded, (FINAL,), ARITHMETIC)


def _pair(
    name: str,
    actual: torch.Tensor | None,
    reference: torch.Tensor | None,
    given: tuple[str, ...],
    growth: float = 1.0,
) -> Iterator[Seam]:
    if actual is not None and reference is not None:
        yield Seam(name, fitted(name, actual, reference), reference, given, growth)


def _beginning(actual: Run, reference: Run, notes: dict[str, None]) -> Iterator[Seam]:
    ours, theirs = (with_closing_zero(run.sigmas, run.count) for run in (actual, reference))
    yield from _pair(SIGMAS, _float(ours), _float(theirs), ())
    if actual.timesteps is not None and reference.timesteps is not None:
        scale = time_scale(float(actual.timesteps[0]), float(reference.timesteps[0]))
        if TIME_SCALES[scale]:
            notes[f"converted: {TIME_SCALES[scale]}"] = None
        times = (actual.timesteps.double() * scale).float()
        yield from _pair(TIMESTEPS, times, reference.timesteps.float(), (SIGMAS,))
    yield from _given(actual, reference)
    yield from _pair(NOISE, actual.noise, reference.noise, ())
    for branch, text in reference.text.items():
        yield from _pair(f"text/{branch}", actual.text.get(branch), text, ())


def _given(actual: Run, reference: Run) -> Iterator[Seam]:
    """Times that the models are given."""
    ours, theirs = (
        torch.tensor([one.timestep for s in run.steps for one in s.passes[:1] if one.timestep])
        for run in (actual, reference)
    )
    if len(ours) and len(ours) == len(theirs):
        scale = time_scale(float(ours[0]), float(theirs[0]))
        yield Seam("schedule/given", ours * scale, theirs, (SIGMAS, TIMESTEPS))


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()


@dataclass(frozen=True)
class _Way:
    """How predictions of two runs are brought into one convention: by changing those of one."""

    conversion: Conversion
    of_actual: bool

    def of(self, actual: bool, one: Pass, run: Run, index: int) -> torch.Tensor:
        """A prediction of one side, changed where this is the side that is.

        Raises:
            ValueError: Latent or sigma is not known.
        """
        if actual is not self.of_actual:
            return one.output
        latent = run.steps[index].latent
        return self.conversion.to_engine(one.output, latent, run.sigma(index))


_WAYS = tuple(
    _Way(conversion, of_actual) for conversion in PREDICTIONS for of_actual in (True, False)
)


def _predictions(
    actual: Run, reference: Run, index: int, way: _Way
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, str]]:
    expected = {one.branch: one for one in reference.steps[index].passes}
    for one in actual.steps[index].passes:
        other = expected.get(one.branch)
        if other is None:
            continue
        try:
            output = way.of(True, one, actual, index)
            wanted = way.of(False, other, reference, index)
        except ValueError:
            continue
        yield step_name(index, one.branch), output, wanted, one.branch


def _way(actual: Run, reference: Run) -> _Way:
    """The convention of predictions under which two runs are nearest, at the first step of both."""
    best: tuple[float, _Way] | None = None
    for index in range(min(len(actual.steps), len(reference.steps))):
        for way in _WAYS:
            for _, output, other, _ in _predictions(actual, reference, index, way):
                output, _ = as_shape(output, other)
                if output.shape == other.shape:
                    size = distance(output, other).rel_l2
                    if best is None or size < best[0] / FAR:
                        best = (size, way)
        if best is not None:
            return best[1]
    return _WAYS[0]


def odd_one_out(runs: Sequence[Run]) -> tuple[str, list[Comparison]]:
    """Of three or more runs, the one that differs from all others at the first seam that does.

    Returns:
        A sentence, and the comparisons that it is read from: every run with the first of those that
        agree (with the first run, where no two do).
    """
    pairs = {(a, b): compare_runs(runs[a], runs[b]) for a, b in combinations(range(len(runs)), 2)}
    rows = {pair: {row.name: row for row in result.rows} for pair, result in pairs.items()}
    names = {name: None for of_pair in rows.values() for name in of_pair}
    parting: dict[int, str] = {}
    for name in names:
        apart = {pair: _apart(of_pair.get(name)) for pair, of_pair in rows.items()}
        if not any(wrong for wrong, _ in apart.values()):
            continue
        odd = _odd(apart, len(runs))
        if odd is None and not parting:
            text = f"no two of the {len(runs)} runs agree at `{name}`"
            return text, _beside(pairs, 0, len(runs))
        if odd is not None:
            parting.setdefault(odd, name)
    if not parting:
        undecided = any(r.verdict is Verdict.INCONCLUSIVE for r in pairs.values())
        text = f"no run parts from the others{', as far as can be told' if undecided else ''}"
        return text, _beside(pairs, 0, len(runs))
    (odd, name), *more = parting.items()
    text = f"the odd one out is {runs[odd].label}: all others agree at `{name}`, where it parts"
    for other, place in more:
        text += f"; {runs[other].label} parts at `{place}`"
    base = next((index for index in range(len(runs)) if index not in parting), 0)
    return text, _beside(pairs, base, len(runs))


def _apart(row: Row | None) -> tuple[bool, float]:
    """Whether a seam makes a difference, and how large it is."""
    if row is None:
        return False, 0.0
    size = row.metrics.rel_l2 if row.metrics is not None else 0.0
    return row.verdict in _WRONG and row.origin != "inherited", size


def _beside(pairs: Mapping[tuple[int, int], Comparison], base: int, count: int) -> list[Comparison]:
    return [pairs[min(base, i), max(base, i)] for i in range(count) if i != base]


def _odd(apart: Mapping[tuple[int, int], tuple[bool, float]], count: int) -> int | None:
    """The only run that every failing pair has, or from which the others are far."""
    failing = [pair for pair, (wrong, _) in apart.items() if wrong]
    common = [i for i in range(count) if all(i in pair for pair in failing)]
    if len(common) == 1:
        return common[0]
    sizes = {}
    for index in range(count):
        without = [size for pair, (_, size) in apart.items() if index not in pair]
        by = [size for pair, (_, size) in apart.items() if index in pair]
        sizes[index] = (max(without, default=0.0), min(by, default=0.0))
    far = [i for i, (others, own) in sizes.items() if others <= ROUNDED and own > FAR * others]
    return far[0] if len(far) == 1 else None
