"""Whether the end of a free run was moved by a stage, or by rounding that grew on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from truestep.errors import FOREIGN
from truestep.judge.floor import Limits
from truestep.judge.shift import Ends, explained, is_moved, with_shift
from truestep.keys import FINALS
from truestep.verdict import Comparison, Row, Shift

if TYPE_CHECKING:
    from truestep.recording.format import Recording
    from truestep.runtime.pipeline import Pipeline

Stages = Callable[..., Comparison]
"""Checks a candidate's stages at some `steps`."""


def with_stages(
    ended: Comparison, pipe: Pipeline, recording: Recording, limits: Limits, stages: Stages
) -> Comparison:
    """The comparison of a free run's end, with what its stages show where the end differs.

    Args:
        ended: What the distance of the end alone says.
        pipe, recording, limits, stages: As of `moved_by`.
    """
    found = moved_by(list(ended.rows), pipe, recording, limits, stages)
    return with_shift(ended, *found) if found is not None else ended


def moved_by(
    rows: Sequence[Row], pipe: Pipeline, recording: Recording, limits: Limits, stages: Stages
) -> tuple[Comparison, Shift] | None:
    """What moved the ends of a free run, if anything did, and what its stages show.

    Every stage is replayed at every step that the reference keeps, and one more generation has
    another seed: where the end agrees, neither is run.

    Args:
        rows: The ends, judged.
        pipe: The candidate.
        recording: The reference.
        limits: What the ends were judged by.
        stages: Checks the candidate's stages at some steps.
    """
    from truestep.replay.steps import kept_steps, steps_recorded

    if not is_moved(rows):
        return None
    total, kept = steps_recorded(recording), kept_steps(recording)
    found = stages(steps=tuple(range(total)) if kept is None else tuple(sorted(kept)))
    left = 0 if kept is None else total - len(kept)
    unseen = f"the recording keeps no models at {left} steps (record it with --keep all)"
    ends = Ends(rows, limits.floor, other_seed(pipe, recording), limits.pair or "")
    return found, explained(ends, found, unseen=unseen if left else "")


def other_seed(pipe: Pipeline, recording: Recording) -> dict[str, float]:
    """How far the ends of another seed are from the recorded ones, by name; empty where that cannot
    be run."""
    from truestep.joint import parts
    from truestep.measure.distance import distance
    from truestep.runtime.pipeline import generate

    settings = pipe.settings.model_copy(update={"seed": pipe.settings.seed + 1})
    try:
        made = dict(parts(FINALS[0], generate(replace(pipe, settings=settings))))
    except FOREIGN:  # a candidate that fails has been judged already
        return {}
    found = {
        name: distance(latent.to("cpu"), recording[name])
        for name, latent in made.items()
        if name in recording and latent.shape == recording[name].shape
    }
    return {name: each.rel_l2 for name, each in found.items() if not each.nonfinite_actual}
