"""Models of two experts: which of them made a prediction that is not the right one's."""

from __future__ import annotations

from truestep.engines.expected import Predicted, Seams
from truestep.engines.run import Run
from truestep.engines.trusted import Trusted
from truestep.errors import FOREIGN
from truestep.judge.sentence import with_divergence
from truestep.measure.distance import distance
from truestep.verdict import Comparison, Verdict

NEARER = 0.01
"""So many times nearer to the other expert a prediction has to be to be that one's."""

FAILED = (Verdict.DRIFTED, Verdict.INVALID)


def with_experts(
    comparison: Comparison, run: Run, found: Seams, trusted: Trusted
) -> tuple[Comparison, frozenset[str]]:
    """Say of red predictions that they are the other expert's, and where the engine switches.

    Returns:
        The comparison, and the names of these predictions.
    """
    if trusted.boundary is None:
        return comparison, frozenset()
    kinds: dict[str, str] = {}
    steps: list[int] = []
    for row in comparison.rows:
        predicted = found.predictions.get(row.name)
        if predicted is None or row.verdict not in FAILED:
            continue
        told = _other(predicted, trusted)
        if told:
            kinds[row.name] = told
            steps += [row.step] if row.step is not None and row.step not in steps else []
    if not kinds:
        return comparison, frozenset()
    note = _switched(run, steps, trusted)
    comparison = comparison.model_copy(update={"notes": (*comparison.notes, note)})
    first = comparison.first_divergence
    if first is not None and first.name in kinds:
        place = first.model_copy(update={"kind": kinds[first.name]})
        comparison = with_divergence(comparison, place, ())
    return comparison, frozenset(kinds)


def _other(predicted: Predicted, trusted: Trusted) -> str:
    """What is to be said of a prediction that is the other expert's; nothing where it is not."""
    time = predicted.time
    other = None if time is None else trusted.other_expert(time)
    if other is None or predicted.actual is None:
        return ""
    right, wrong, model = other
    try:
        made = predicted.denoiser.by(model)(**predicted.given)
    except FOREIGN:  # the other expert may take other arguments
        return ""
    own = predicted.actual
    if made.numel() != own.numel():
        return ""
    sizes = [distance(own.reshape(each.shape), each).rel_l2 for each in (made, predicted.expected)]
    if not sizes[0] < NEARER * sizes[1]:
        return ""
    side = "below" if right.endswith("_2") else "not below"
    place = f"timestep {time:g} is {side} the boundary {trusted.boundary:g}"
    return f"predicted by `{wrong}` in the place of `{right}`: {place}"


def _switched(run: Run, steps: list[int], trusted: Trusted) -> str:
    """By how many steps an engine goes on to the other expert too early or too late."""
    count = f"{len(steps)} step{'s' if len(steps) > 1 else ''}"
    times = [max((one.timestep or 0.0 for one in step.passes), default=0.0) for step in run.steps]
    scale = 1000.0 if max(times, default=0.0) <= 1.0 else 1.0
    late = trusted.boundary is not None and all(
        times[index] * scale < trusted.boundary for index in steps if index < len(times)
    )
    numbers = ", ".join(map(str, steps))
    if len(steps) == len(run.steps):
        return "every step is predicted by the other expert: the two are exchanged"
    return (
        f"step {numbers}: the engine goes on to the expert of low noise {count} "
        f"too {'late' if late else 'early'} (boundary {trusted.boundary:g})"
    )
