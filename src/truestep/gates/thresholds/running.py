"""Run the rule of a threshold file on what a candidate generates freely, as its own tool does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from truestep.case import Case
from truestep.errors import FOREIGN, TruestepError, one_line
from truestep.gates.thresholds.file import Limits, Thresholds, limits_of
from truestep.gates.thresholds.rule import FRAMES, WAVEFORM, Measured, judge, measure
from truestep.measure.plain import plain
from truestep.measure.sound import sample_rate_of
from truestep.replay.shared_code import changed_alone
from truestep.runtime.pipeline import Observer, Pipeline, generate
from truestep.verdict import Comparison, Verdict

if TYPE_CHECKING:
    from truestep.recording.format import Recording
    from truestep.runtime.applying import Apply

DECODED = (FRAMES, WAVEFORM)


class _Keep(Observer):
    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, value: torch.Tensor) -> None:
        if name in DECODED:
            self.tensors[name] = plain(value, name).to("cpu", copy=True)


def free_run(pipe: Pipeline) -> dict[str, torch.Tensor]:
    """What a pipeline generates from its own seed: `video/frames` and, if any, `audio/waveform`.

    Raises:
        CaseError: The settings do not fit the model.
    """
    keep = _Keep()
    generate(pipe, observer=keep, output="frames")
    return keep.tensors


def decoded(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The decoded tensors among those of a recording."""
    return {name: tensors[name] for name in DECODED if name in tensors}


def with_gate(
    comparison: Comparison,
    case: Case,
    reference: Recording | None,
    thresholds: Thresholds,
    *,
    name: str = "",
    apply: Apply | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Comparison:
    """Add the rule's result to a comparison's `gates`; the verdict stays as it is.

    SGLang-Diffusion judges what a whole generation ends in, so the candidate generates freely once
    more. Its frames are taken as they were decoded, without the lossy video file in between.

    Args:
        comparison: Of `check`.
        case: The reference's case.
        reference: Its recording; None where there is none to judge by.
        thresholds: The file.
        name: The case's name in it; default the case's id.
        apply, settings: The change under test, as `check` takes it.

    Raises:
        FileFormatError: A limit that applies is not a number.
        TruestepError: The candidate cannot be loaded.
    """
    from truestep.runtime.loading import load

    sound = reference is not None and WAVEFORM in reference
    limits, note = limits_of(thresholds, name or case.id, case, sound=sound)
    incomparable = comparison.verdict in (Verdict.MISSING, Verdict.INCOMPARABLE)
    if reference is None or incomparable:
        nothing = dict.fromkeys(limits.values, comparison.verdict.value)
        return _added(comparison, limits, Measured({}, nothing), note)
    candidate = case.replace(**dict(settings or {}))
    pipe = changed_alone(load(candidate), apply)
    try:
        with pipe.code():
            actual = free_run(pipe)
    except TruestepError:
        raise
    except FOREIGN as error:  # whatever a candidate raises is its outcome
        measured = Measured({}, {}, f"the candidate raised {one_line(error)}")
    else:
        rate = sample_rate_of(reference.manifest.settings)
        measured = measure(actual, decoded(reference), sample_rate=rate)
    cost = f"the rule of {thresholds.label} judged one more generation: {pipe.forwards} forwards"
    return _added(comparison, limits, measured, note, cost)


def _added(
    comparison: Comparison, limits: Limits, measured: Measured, note: str, *notes: str
) -> Comparison:
    gate = judge(limits, measured, note=note)
    added = {"gates": (*comparison.gates, gate), "notes": (*comparison.notes, *notes)}
    return comparison.model_copy(update=added)
