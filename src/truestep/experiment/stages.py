"""Replay a candidate's stages on what the baseline was recorded as, and say what moved its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from truestep.case import Case
from truestep.experiment.judging import final_rows
from truestep.floors import NoiseFloor
from truestep.judge.floor import Limits
from truestep.recording.format import Recording
from truestep.replay.check import check_pipeline
from truestep.replay.shifting import moved_by
from truestep.runtime.pipeline import Pipeline
from truestep.verdict import Comparison, Shift

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Compared:
    """What a candidate is compared with.

    Attributes:
        recording: The baseline's.
        base, candidate: Cases of the two arms.
        floor: Of the ends of free runs.
        pair: Working precisions, candidate first.
    """

    recording: Recording
    base: Case
    candidate: Case
    floor: NoiseFloor | None
    pair: str


def stages(
    pipe: Pipeline, label: str, made: Mapping[str, torch.Tensor], compared: Compared
) -> tuple[Comparison, Shift | None]:
    """Check the stages of a candidate, at every step where the end that it made differs.

    Returns:
        The comparison, without media, and what moved the end; None where it was not moved.
    """
    check = partial(
        check_pipeline,
        pipe,
        compared.recording,
        case=compared.base,
        candidate=compared.candidate,
        label=label,
    )
    rows = final_rows(made, compared.recording, floor=compared.floor, pair=compared.pair)
    limits = Limits(compared.floor, compared.pair)
    moved = moved_by(rows, pipe, compared.recording, limits, check)
    found, shift = moved if moved is not None else (check(), None)
    return found.model_copy(update={"media": ()}), shift
