"""Place a difference of media among other runs: read them, and measure how far they lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from truestep.errors import UsageError
from truestep.judge.ladder import Distances, ladder
from truestep.measure.aligning import reduced
from truestep.measure.sound import spectrogram_db
from truestep.progress import Progress, silent
from truestep.recording.clips import Clip, is_sequence, media_files, read_clip
from truestep.records import Ladder
from truestep.verdict import Verdict

_REDUCED = 128
"""Pixels of the larger side of frames that runs of a ladder are compared by."""


def runs_of(paths: Sequence[Path]) -> list[Path]:
    """Files and folders of frames that paths stand for: a folder of runs is all of them."""
    runs: list[Path] = []
    for path in paths:
        if not path.is_dir() or is_sequence(path):
            runs.append(path)
            continue
        inside = [each for each in sorted(path.iterdir()) if each.is_dir() and is_sequence(each)]
        runs += [*(each for each in media_files(path) if each.parent not in inside), *inside]
        if not any(path in run.parents for run in runs):
            raise UsageError("the folder of runs holds no media", where=str(path))
    return runs


def placed(
    a: Clip,
    r: Clip,
    same_seed: Sequence[Path],
    other_seeds: Sequence[Path],
    progress: Progress = silent,
) -> tuple[Ladder, Verdict]:
    """Where the difference lies among other runs; by frames, or by sound where frames agree."""
    by_sound = a.frames is None or a.same_frames(r)
    names, kept = [str(a.path), str(r.path)], [_small(a, by_sound), _small(r, by_sound)]
    known = {_content(r): str(r.path)}
    copies: list[tuple[str, str]] = []
    total = len(same_seed) + len(other_seeds)
    for at, path in enumerate(same_seed):
        progress("other runs", at, total)
        run = _run(path, a, r)
        if _content(run) in known:
            copies.append((str(path), known[_content(run)]))
            continue
        known[_content(run)] = str(path)
        names.append(str(path))
        kept.append(_small(run, by_sound))
    seeds = []
    for at, path in enumerate(other_seeds, len(same_seed)):
        progress("other runs", at, total)
        seeds.append((str(path), _far(_small(_run(path, a, r), by_sound), kept[1])))
    progress("other runs", total, total)
    between = [[0.0 if x is y else _far(x, y) for y in kept] for x in kept]
    told, verdict = ladder(
        Distances(names, between, seeds, copies, unit="dB" if by_sound else "levels")
    )
    if _content(a) in known:
        text = f"{told.text}; it is bit for bit {known[_content(a)]}"
        told = told.model_copy(update={"text": text})
    return told, verdict


def _run(path: Path, a: Clip, r: Clip) -> Clip:
    if path.resolve() == a.path.resolve():
        raise UsageError("the run under test is among the trusted runs", where=str(path))
    run = read_clip(path)
    shapes = [None if c.frames is None else c.frames.shape for c in (run, r)]
    sounds = [None if c.sound is None else (len(c.sound), c.sample_rate) for c in (run, r)]
    if shapes[0] != shapes[1] or sounds[0] != sounds[1]:
        raise UsageError(
            "a run of the ladder is of another size than the reference",
            where=str(path),
            measured=f"{_said(run)}; the reference has {_said(r)}",
        )
    return run


def _said(clip: Clip) -> str:
    parts = []
    if clip.frames is not None:
        count, height, width = clip.frames.shape[:3]
        parts.append(f"{count} frames of {width}x{height}")
    if clip.sound is not None:
        parts.append(f"{len(clip.sound)} channels at {clip.sample_rate} Hz")
    return " and ".join(parts) or "nothing"


def _content(clip: Clip) -> tuple[object, ...]:
    return (clip.digests, clip.sound_digest)


def _small(clip: Clip, by_sound: bool) -> torch.Tensor:
    if by_sound:
        assert clip.sound is not None
        return spectrogram_db(clip.sound.nan_to_num(0.0, 0.0, 0.0))
    assert clip.frames is not None
    return reduced(clip.frames, _REDUCED)


def _far(x: torch.Tensor, y: torch.Tensor) -> float:
    """Rms in levels, or the mean difference of spectrograms in dB over what both have."""
    if x.ndim == 4:
        return math.sqrt(float((x - y).square().mean(dtype=torch.float64)))
    length = min(x.shape[-1], y.shape[-1])
    return float((x[..., :length] - y[..., :length]).abs().mean())
