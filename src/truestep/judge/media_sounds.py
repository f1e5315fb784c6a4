"""What two decoded sounds show beside a distance; see `truestep.judge.media_findings`. No I/O."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from truestep.judge.media_findings import counted, proof
from truestep.measure.listening import HEARD, SILENT, hearing
from truestep.recording.clips import Clip
from truestep.records import MediaFinding


def sound_of(actual: Clip, reference: Clip) -> Iterator[MediaFinding]:
    """What two sounds show beside a distance."""
    a, r = actual.sound, reference.sound
    if a is None or r is None:
        return
    finite = [bool(torch.isfinite(side).all()) for side in (a, r)]
    for side, tensor, whole in zip(("actual", "reference"), (a, r), finite, strict=True):
        if not whole:
            count = int((~torch.isfinite(tensor)).sum())
            yield MediaFinding(
                kind="not finite",
                modality="audio",
                text=f"{counted(count, 'sample')} of the {side} side "
                f"{'is' if count == 1 else 'are'} not finite",
                effect="invalid",
                value=count,
                unit="samples",
            )
    if not all(finite):
        return
    peaks = [float(side.abs().max()) if side.numel() else 0.0 for side in (a, r)]
    silent = [peak < SILENT for peak in peaks]
    if silent[0] is not silent[1] and max(peaks) >= HEARD:
        side = "actual" if silent[0] else "reference"
        text = f"the {side} side is silent and the other is not"
        yield MediaFinding(kind="silence", modality="audio", text=text, effect="invalid")
    elif not any(silent) and len(a) == len(r) and actual.sample_rate == reference.sample_rate:
        yield from _heard(a, r, actual.sample_rate or 1)


def _heard(a: torch.Tensor, r: torch.Tensor, sample_rate: int) -> Iterator[MediaFinding]:
    change = hearing(a, r, sample_rate=sample_rate)
    if change is None:
        return
    sizes = {
        "sound gain": (abs(change.gain), "x"),
        "sound offset": (float(change.offset), "samples"),
    }
    words = change.words(sample_rate)
    verb = "all together explain" if len(words) > 1 else "explains"
    explained = proof(change.before**2, change.after**2, verb=verb)
    for kind, text in words.items():
        value, unit = sizes.get(kind, (None, ""))
        yield MediaFinding(
            kind=kind,
            modality="audio",
            text=text + explained,
            effect="drifted" if kind in ("polarity", "channels swapped") else "inconclusive",
            value=value,
            unit=unit,
            before=change.before,
            after=change.after,
        )
