"""Rows of audio and of video told apart, where a comparison has both. Pure: no I/O, no torch."""

from __future__ import annotations

from collections.abc import Sequence

from truestep.keys import SAMPLES
from truestep.verdict import Modality, Row, Rows, Verdict

AUDIO, VIDEO = "audio", "video"


def with_modalities(rows: Sequence[Row]) -> Rows:
    """Name the modality of the rows of video, where rows of audio are beside them.

    Rows of audio know it by their names. Others are of video if their stage has rows of audio, or
    is decoding; what both share (text, its mask, schedule) has no modality.
    """
    rows = Rows.of(rows)
    joint = {stage for stage, name in rows.each("stage", "modality") if name == AUDIO}
    if not joint:
        return rows
    joint.add("decoding")
    return rows.replaced(
        modality=(
            VIDEO if known is None and stage in joint and not _shared(name) else known
            for known, stage, name in rows.each("modality", "stage", "name")
        )
    )


def _shared(name: str) -> bool:
    return name == SAMPLES or "/mask/" in name


def modalities(rows: Sequence[Row]) -> tuple[Modality, ...]:
    """Sum up each modality; nothing where rows are not of two.

    Args:
        rows: As `with_modalities` gives them.
    """
    rows = Rows.of(rows)
    apart = {name: _of(rows, name) for name in (VIDEO, AUDIO)}
    return tuple(_summed(name, own) for name, own in apart.items()) if all(apart.values()) else ()


def _of(rows: Rows, modality: str) -> Rows:
    return rows.take(at for at, own in enumerate(rows.each("modality")) if own == modality)


def _summed(name: str, rows: Sequence[Row]) -> Modality:
    failing = [row for row in rows if not row.verdict.passed]
    measured = [row for row in failing or rows if row.ratio is not None]
    worst = max(measured, key=lambda row: row.ratio or 0.0, default=None)
    place = worst or next(iter(failing), None)
    return Modality(
        name=name,
        verdict=Verdict.worst(row.verdict for row in rows),
        tensors=len(rows),
        failing=len(failing),
        worst_ratio=worst.ratio if worst else None,
        worst=place.name if place else "",
    )


def told_apart(rows: Sequence[Row]) -> str:
    """Which modality failed, in words: what the sentence of a failing comparison ends with.

    Args:
        rows: As `with_modalities` gives them.
    """
    found = modalities(rows)
    failing = [item for item in found if not item.verdict.passed]
    said = [f"{item.name} is {item.verdict.value}" for item in found]
    if not found:
        return ""
    if len(failing) == 1:
        other = next(text for item, text in zip(found, said, strict=True) if item not in failing)
        return f"; {failing[0].name} only: {other}"
    return f"; {'both: ' if failing else ''}{', '.join(said)}"


def in_seconds(row: Row, sample_rate: int | None) -> Row:
    """Say in seconds how the lengths of two decoded sounds `b c n` differ.

    Args:
        row: Of any tensor; only decoded sound of two lengths is changed.
        sample_rate: Hz; None leaves the row as it is.
    """
    if not sample_rate or row.modality != AUDIO or row.stage != "decoding":
        return row
    if row.verdict is not Verdict.INCOMPARABLE or not row.actual or not row.reference:
        return row
    own, theirs = row.actual.shape, row.reference.shape
    if len(own) != 3 or own[:2] != theirs[:2]:
        return row
    note = (
        f"{own[-1] / sample_rate:.6g} s of sound against {theirs[-1] / sample_rate:.6g} s "
        f"({own[-1] - theirs[-1]:+,} samples at {sample_rate:,} Hz)"
    )
    return row.model_copy(update={"note": note})
