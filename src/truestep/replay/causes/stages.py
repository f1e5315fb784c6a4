"""Why a stage without a model is wrong: guidance, schedule, initial noise, the scheduler's update.

Its inputs are recorded, so that a hypothesis is tried by computing the stage anew: it is accepted
where every failing tensor of the stage then comes out as the candidate's, within the noise floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from truestep.keys import key_of
from truestep.replay.causes.guesses import LEAST, Failing, Guess, Scene, cause_of, explains
from truestep.replay.causes.guided import guidance
from truestep.replay.causes.scheduled import latent, schedule, update
from truestep.verdict import Cause, Row, Verdict

if TYPE_CHECKING:
    from truestep.runtime.pipeline import Pipeline

STAGES = ("schedule", "latent", "guidance", "update")
"""Stages whose causes are looked for here."""


def raised_precision_of(stage: str, rows: Sequence[Row]) -> str:
    """The precision that a stage fails in when it is raised; empty where it does not: 16 bits are
    too coarse to tell hypotheses apart."""
    failing = (row for row in rows if row.stage == stage and row.verdict is Verdict.DRIFTED)
    return next((found for row in failing if (found := key_of(row.name).precision)), "")


def stage_cause(
    stage: str,
    rows: Sequence[Row],
    outputs: Mapping[str, torch.Tensor],
    recording: Mapping[str, torch.Tensor],
    trusted: Pipeline,
) -> tuple[Cause | None, int]:
    """Why a stage is wrong, and how much was tried.

    Args:
        stage: One of `STAGES`.
        rows: The candidate's check.
        outputs: What the candidate gave for the recorded inputs.
        recording: The reference.
        trusted: The reference's pipeline.
    """
    precision = raised_precision_of(stage, rows)
    failing = [
        Failing(
            row.name,
            outputs[row.name].double().cpu(),
            recording[row.name].double(),
            max(LEAST, row.floor.rel_l2 if row.floor else 0.0),
        )
        for row in rows
        if row.stage == stage
        and row.verdict is Verdict.DRIFTED
        and key_of(row.name).precision == precision
        and row.name in outputs
        and outputs[row.name].shape == recording[row.name].shape
    ]
    if stage == "schedule":
        failing = [one for one in failing if one.name == "schedule/sigmas"] or failing[:1]
    if not failing:
        return None, 0
    scene, tried = Scene(failing, recording, trusted), 0
    for guess in _GUESSES[stage](scene):
        tried += 1
        if explains(guess, failing):
            return cause_of(guess, failing, tried), tried
    return None, tried


_GUESSES: Mapping[str, Callable[[Scene], Iterator[Guess]]] = {
    "guidance": guidance,
    "schedule": schedule,
    "latent": latent,
    "update": update,
}
