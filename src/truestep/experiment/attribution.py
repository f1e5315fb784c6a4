"""Sharing out the distance between two profiles among their controls. Pure: no I/O, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from truestep.controls import Cell, value_text
from truestep.experiment.ablation_records import (
    MODALITIES,
    Attribution,
    Choice,
    EndDistance,
    EndRun,
    Kept,
    MatrixCell,
    Share,
    StageDistance,
    Switch,
)
from truestep.keys import SAMPLES, key_of
from truestep.verdict import Row, Verdict

ACTS_ON: Mapping[str, str] = {
    "connector": "connector",
    "mu": "schedule",
    "terminal_sigma": "schedule",
    "sigma_schedule": "schedule",
    "generator_device": "latent",
    "image_crf": "latent",
    "pass_gating": "prediction",
    "pass_batching": "prediction",
    "stg_blocks": "prediction",
    "audio_stg_blocks": "prediction",
    "skip_step": "prediction",
    "av_adaln": "prediction",
    "conditioned_sigma": "prediction",
    "skip_v2a_cross_attn": "prediction",
    "skip_a2v_cross_attn": "prediction",
    "disable_autocast": "prediction",
    "audio_guidance_scale": "guidance",
    "stg_scale": "guidance",
    "audio_stg_scale": "guidance",
    "modality_scale": "guidance",
    "audio_modality_scale": "guidance",
    "guidance_dtype": "guidance",
    "guidance_rescale": "guidance",
    "audio_guidance_rescale": "guidance",
    "std_scope": "guidance",
    "sampler": "update",
}
"""Control to the stage that it decides, in the order in which controls are switched together: that
in which a run goes through its stages."""

ORDER_TEXT = "in the order in which a run meets them: text connector, schedule, latent, passes, "
ORDER_TEXT += "guidance, update"

NOT_ADDITIVE = (
    "effects are not additive: every step feeds the next, so distances of single switches overlap, "
    "cancel or amplify each other, and an increment depends on what was switched before it"
)


def choices(
    differences: Mapping[str, tuple[Cell, Cell]], own: Mapping[str, object]
) -> tuple[tuple[Choice, ...], tuple[Kept, ...]]:
    """Controls to switch in order, and those that stay because the case sets them.

    Args:
        differences: Control to the cells of both profiles; see `truestep.controls.differences`.
        own: The case's own value of every control; None where it has none.
    """
    switched, kept = [], []
    for name in ACTS_ON:
        if name not in differences:
            continue
        a, b = differences[name]
        values = {"from_value": value_text(a.value), "to_value": value_text(b.value)}
        if own.get(name) is not None:
            kept.append(Kept(control=name, value=value_text(own[name]), **values))
            continue
        switched.append(
            Choice(
                control=name,
                stage=ACTS_ON[name],
                from_source=a.source,
                to_source=b.source,
                **values,
            )
        )
    return tuple(switched), tuple(kept)


def end_run(controls: Iterable[str], rows: Sequence[Row], verdict: Verdict) -> EndRun:
    """A free run from the rows of its final latents."""
    return EndRun(controls=tuple(controls), verdict=verdict, ends=tuple(map(_end, rows)))


def _end(row: Row) -> EndDistance:
    rel_l2 = row.metrics.rel_l2 if row.metrics else None
    floor = row.floor.rel_l2 if row.floor else None
    structured = row.ratio_metric not in (None, "rel_l2") and not row.verdict.passed
    told = f"{row.ratio_metric} {row.ratio:.3g} x floor" if structured and row.ratio else ""
    return EndDistance(
        modality=key_of(row.name).modality or "video",
        verdict=row.verdict,
        rel_l2=rel_l2,
        floor=floor,
        multiple=_ratio(rel_l2, floor),
        note="; ".join(part for part in (told, row.note) if part),
    )


def stage_distances(rows: Iterable[Row]) -> tuple[StageDistance, ...]:
    """The worst row of each stage and modality that has one which is not bit-equal."""
    worst: dict[tuple[str, str | None], Row] = {}
    for row in rows:
        key = (row.stage, row.modality)
        if row.verdict is Verdict.IDENTICAL or (row.name == SAMPLES and row.verdict.passed):
            continue
        if key not in worst or _badness(row) > _badness(worst[key]):
            worst[key] = row
    return tuple(
        StageDistance(
            stage=stage or "-",
            modality=modality,
            name=row.name,
            verdict=row.verdict,
            rel_l2=row.metrics.rel_l2 if row.metrics else None,
            multiple=row.ratio,
        )
        for (stage, modality), row in worst.items()
    )


def _badness(row: Row) -> tuple[bool, float]:
    missing = math.inf if row.ratio is None or math.isnan(row.ratio) else row.ratio
    return not row.verdict.passed, missing


def attribute(switches: Sequence[Switch], whole: EndRun) -> tuple[Attribution, ...]:
    """Share out the distance of two profiles, modality by modality.

    Args:
        switches: In the order in which they were switched together.
        whole: Profile B, which the last of them equals.
    """
    found = []
    for modality in MODALITIES:
        end = whole.end(modality)
        if end is None or end.rel_l2 is None:
            continue
        found.append(_attribution(switches, end))
    return tuple(found)


def _attribution(switches: Sequence[Switch], end: EndDistance) -> Attribution:
    modality, total = end.modality, end.rel_l2 or 0.0
    alone = [switch.alone.rel_l2(modality) or 0.0 for switch in switches]
    together = [switch.together.rel_l2(modality) or 0.0 for switch in switches]
    summed = math.fsum(alone)
    shares = []
    for switch, own, before, after in zip(
        switches, alone, [0.0, *together], together, strict=False
    ):
        at = switch.alone.end(modality)
        shares.append(
            Share(
                control=switch.choice.control,
                modality=modality,
                verdict=at.verdict if at else switch.alone.verdict,
                alone=own,
                alone_multiple=at.multiple if at else None,
                alone_share=_ratio(own, summed),
                increment=after - before,
                increment_share=_ratio(after - before, total),
            )
        )
    return Attribution(
        modality=modality,
        total=total,
        total_multiple=end.multiple,
        sum_alone=summed,
        remainder=total - summed,
        shares=tuple(sorted(shares, key=lambda share: -share.alone)),
    )


def _ratio(value: float | None, over: float | None) -> float | None:
    return value / over if value is not None and over else None


def sentence(
    reference: str,
    candidate: str,
    switches: Sequence[Switch],
    whole: EndRun,
    attributions: Sequence[Attribution],
    *,
    mismatch: str,
) -> str:
    """What a person would repeat: which of the differences matters."""
    if mismatch:
        return (
            f"the controls do not explain the difference: {reference} with every control of "
            f"{candidate} is not {candidate} (first tensor that differs: `{mismatch}`)"
        )
    drifting = [s for s in switches if not s.alone.verdict.passed]
    equal = sum(s.alone.verdict is Verdict.IDENTICAL for s in switches)
    counts = f"{len(drifting)} of {len(switches)} differences move the end beyond the noise floor"
    if not switches:
        return f"{reference} and {candidate} do the same in this case: no control differs"
    hidden = [s.choice.control for s in switches if s.hidden]
    below = f"; {', '.join(hidden)} drifts in its stage, hidden by the floor of the end"
    if not drifting:
        return (
            f"{candidate} is {whole.verdict.value} to {reference} in this case: none of "
            f"{len(switches)} differences moves the end beyond the noise floor"
        ) + below * bool(hidden)
    leading = []
    for found in attributions:
        first = found.shares[0]
        if first.alone_multiple is None or first.verdict.passed:
            continue
        leading.append(
            f"{found.modality}: {first.control} ({short(first.alone_multiple)} x floor alone, "
            f"all together {short(found.total_multiple)})"
        )
    return f"{counts}, {equal} change nothing; {'; '.join(leading)}" + below * bool(hidden)


def matrix_sentence(cells: Sequence[MatrixCell], profiles: Sequence[str]) -> str:
    """What a person would repeat of a matrix: who is the same, and how far the others are."""
    same = [c for c in cells if c.run.verdict.passed]
    measured = [(e.multiple, c, e) for c in cells for e in c.run.ends if e.multiple is not None]
    counts = f"{len(profiles)} profiles: {len(same)} of {len(cells)} ordered pairs are the same"
    counts += " within the noise floor"
    if not measured:
        return counts
    multiple, cell, end = max(measured, key=lambda item: item[0])
    return (
        f"{counts}; furthest is {cell.candidate} from {cell.reference}, "
        f"{end.modality} {short(multiple)} x floor"
    )


def short(value: float | None) -> str:
    """Three digits; `-` for None."""
    if value is None:
        return "-"
    return f"{value:.3g}" if 1e-2 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"


def leading_controls(alone: Mapping[str, EndRun]) -> dict[str, str]:
    """By modality, the control whose single switch moves the end furthest, in floors."""
    found = {}
    for modality in MODALITIES:
        measured = [
            (end.multiple, control)
            for control, run in alone.items()
            if (end := run.end(modality)) is not None and end.multiple
        ]
        if measured:
            multiple, control = max(measured)
            found[modality] = f"{control} {short(multiple)}"
    return found


def reason(control: str, facts: Mapping[str, Any]) -> str:
    """Why a control changes nothing but rounding in a run, where that is known; else empty.

    Args:
        control: Its name.
        facts: `image`, `dtype`, `clips`, `device`, and whether both values run the `same_passes`.
    """
    without_image = not facts["image"]
    known = {
        "av_adaln": (without_image, "without an image, sound and video have one sigma"),
        "conditioned_sigma": (without_image, "without an image, no token is given"),
        "image_crf": (without_image, "there is no image"),
        "std_scope": (
            facts["clips"] == 1,
            "one clip: the whole tensor is the sample; only the order of operations differs",
        ),
        "guidance_dtype": (facts["dtype"] == "float32", "the model's own precision is float32"),
        "disable_autocast": (facts["dtype"] == "float32", "in float32 autocast changes nothing"),
        "generator_device": (facts["device"] == "cpu", "the run's device is the cpu"),
        "pass_gating": (facts["same_passes"], "the same passes run and perturb the same blocks"),
        "pass_batching": (True, "the same passes, in other batches: rounding only"),
        "connector": (True, "the same prompts, in other batches: rounding only"),
    }
    holds, text = known.get(control, (False, ""))
    return text if holds else ""
