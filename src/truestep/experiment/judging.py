"""Compare what the arms of an experiment left behind: final latents and frames. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from truestep.experiment.records import Sameness
from truestep.floors import NoiseFloor
from truestep.judge.floor import Limits, free_running
from truestep.judge.rows import compare_tensors
from truestep.keys import FINALS
from truestep.measure.frames import frame_scores
from truestep.verdict import Comparison, Row, Verdict

FRAMES = "video/frames"
DECODED = (FRAMES, "audio/waveform")


def sameness(
    case: str,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    steps: Comparison | None = None,
    floor: NoiseFloor | None = None,
    pairs: tuple[str, str] | None = None,
) -> Sameness:
    """Compare what the arms left behind for one case.

    Args:
        case: Its id.
        tensors: Arm to final latents and `video/frames`; an arm may be absent.
        steps: The comparison of the stages, if there is one.
        floor: Of the final latent of a free run.
        pairs: Working precisions of candidate and control against the baseline's.
    """
    reference = tensors.get("baseline", {})
    values: dict[str, object] = {"case": case, "steps": steps}
    for arm, prefix, pair in zip(
        ("candidate", "control"), ("", "control_"), pairs or (None, None), strict=True
    ):
        actual = tensors.get(arm, {})
        row = final_row(actual, reference, floor=floor, pair=pair)
        values[f"{prefix}final"] = row
        a, r = actual.get(FRAMES), reference.get(FRAMES)
        if a is None or r is None or a.shape != r.shape:
            continue
        scores = frame_scores(a, r)
        values[f"{prefix}psnr_db"] = scores.psnr_db
        values[f"{prefix}ssim_worst"] = scores.ssim_worst
        if arm == "candidate":
            values["ssim_mean"] = scores.ssim_mean
    return Sameness.model_validate(values)


def final_row(
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    *,
    floor: NoiseFloor | None,
    pair: str | None,
) -> Row | None:
    """The final latent against the baseline's, video's or sound's, whichever is worse; None where
    an arm is absent."""
    rows = final_rows(actual, reference, floor=floor, pair=pair)
    return _worst(rows) if rows else None


def final_rows(
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    *,
    floor: NoiseFloor | None,
    pair: str | None,
) -> list[Row]:
    """The final latents, of video and of sound, against the baseline's; none where an arm is
    absent."""
    if FINALS[0] not in actual or FINALS[0] not in reference:
        return []
    return _rows(actual, reference, FINALS, limits=Limits(floor, pair))


def repeat_row(
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    *,
    decoded: Mapping[str, torch.Tensor] | None = None,
    floor: NoiseFloor | None,
    pair: str,
) -> Row | None:
    """A generation that left other bits than the one that was checked, judged as that one was.

    Args:
        actual: Its final latents and what they were decoded to.
        reference: The baseline's.
        decoded: What the same arm decoded the same latent to when it was checked; None where the
            latent is another.
        floor: What the recording measured, of a free run and of decoding.
        pair: Working precisions, candidate first.

    Returns:
        The worst row; None where the baseline kept nothing.
    """
    final = final_row(actual, reference, floor=free_running(floor), pair=pair)
    if final is None or decoded is None:
        return final
    return _worst([final, *_rows(actual, decoded, DECODED, limits=Limits(floor, pair))])


def _rows(
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    names: Sequence[str],
    *,
    limits: Limits,
) -> list[Row]:
    sides = ({name: side[name] for name in names if name in side} for side in (actual, reference))
    return compare_tensors(*sides, limits=limits)


def _worst(rows: Sequence[Row]) -> Row:
    worst = Verdict.worst(row.verdict for row in rows)
    return max((row for row in rows if row.verdict is worst), key=lambda row: row.ratio or 0.0)
