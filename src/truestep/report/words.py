"""Words for parts of a result that terminal, comment and page share."""

from __future__ import annotations

from truestep.records import MediaFacts


def stage_label(stage: str, modality: str | None) -> str:
    """A stage as it is printed: `tensors` where files have none, with its modality if of one."""
    stage = stage or "tensors"
    return f"{stage} ({modality})" if modality else stage


def said(facts: MediaFacts) -> str:
    """What a file of media is, in words."""
    parts = []
    if facts.frames:
        count = f"{facts.frames} frames of " if facts.frames > 1 else ""
        parts.append(f"{count}{facts.width}x{facts.height}")
        parts += [f"{facts.fps:.5g} a second"] if facts.fps else []
    if facts.samples:
        parts.append(f"{facts.samples:,} samples at {facts.sample_rate} Hz")
    parts += [facts.form] * bool(facts.form)
    return ", ".join([*parts, *[facts.colours] * bool(facts.colours)])
