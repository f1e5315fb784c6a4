"""Judge two files of finished media, and place their difference among other runs.

Media are the lowest level of evidence. That two runs give other pictures shows neither a fault nor
that there is none: one bfloat16 ulp a layer changes a video for all to see. So nothing here is
called `equivalent`, and nothing here names a stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from truestep.environment import library_version
from truestep.errors import UsageError
from truestep.judge.media import frame_media, sound_media
from truestep.judge.media_findings import Frames, facts, frames_of
from truestep.judge.media_runs import placed, runs_of
from truestep.judge.media_sounds import sound_of
from truestep.judge.modality import modalities
from truestep.measure.perceptual import perceptual_jod, require_perceptual
from truestep.measure.sound import waveform_metrics
from truestep.progress import Progress, silent
from truestep.recording.clips import Clip, is_media, is_sequence, read_clip
from truestep.records import Media, MediaEvidence, MediaFacts, MediaFinding
from truestep.verdict import Comparison, Row, Rows, Rule, Side, TensorInfo, Verdict

LIMITS = "media cannot tell a harmless change from a fault, nor where it was made"
RULE = Rule(
    name="media/1",
    text="identical where all that is decoded agrees bit for bit, never equivalent; a change is "
    "told where the same done to the reference explains the difference (docs/media.md)",
)

_SHOWN = 512
"""Pixels of the larger side of frames to look at; larger ones are reduced by a whole factor."""


@dataclass(frozen=True)
class MediaOptions:
    """What a difference of media is placed among, and measured by.

    Attributes:
        same_seed: Runs of the trusted side with the seed of both; a folder is all media in it.
        other_seeds: Runs of the trusted side with other seeds.
        perceptual: Measure ColorVideoVDP, too.
        frames: Whether folders of pictures are the frames of one clip (True) or runs (False);
            None: by their names, see `is_sequence`.
        progress: Told of frames and runs that are measured.
    """

    same_seed: Sequence[Path] = ()
    other_seeds: Sequence[Path] = ()
    perceptual: bool = False
    frames: bool | None = None
    progress: Progress = silent

    def is_clip(self, folder: Path) -> bool:
        """Whether a folder is the frames of one clip."""
        return is_sequence(folder) if self.frames is None else self.frames

    def refuse(self) -> None:
        """Raise where tensors are compared, which have a noise floor instead.

        Raises:
            UsageError: Something is asked for.
        """
        if self.same_seed or self.other_seeds or self.perceptual or self.frames is not None:
            raise UsageError(
                "--same-seed-of, --other-seeds, --perceptual, --frames and --runs are for "
                "pictures, videos and sounds"
            )

    def of(self, name: str) -> MediaOptions:
        """The options of one run of two folders of runs: other folders hold one of that name."""
        same, others = (
            [path / name if path.is_dir() and not self.is_clip(path) else path for path in paths]
            for paths in (self.same_seed, self.other_seeds)
        )
        return replace(self, same_seed=same, other_seeds=others)


NONE = MediaOptions()


def compare_media(actual: Path, reference: Path, *, options: MediaOptions = NONE) -> Comparison:
    """Judge two files of media, or folders of the frames of one clip.

    Args:
        actual, reference: Pictures, animations, videos, sounds, folders of numbered pictures.
        options: Other runs, and further metrics.

    Raises:
        FileFormatError: One cannot be decoded.
        UsageError: Runs are of another size, the package of ColorVideoVDP is not there, or a side
            is no media.
    """
    _require_media(actual, reference)
    if options.perceptual:
        require_perceptual()
    folders = [p for p in (actual, reference) if p.is_dir() and not options.is_clip(p)]
    if len(folders) == 2:
        raise UsageError(
            "two folders of runs are several comparisons: truestep compare lists them",
            where=str(actual),
        )
    if folders:
        raise UsageError(
            "a folder of runs is compared with another folder of runs",
            where=str(folders[0]),
            measured="the other side is one run",
        )
    return judge_clips(read_clip(actual), read_clip(reference), options=options)


def _require_media(actual: Path, reference: Path) -> None:
    for side, other in ((actual, reference), (reference, actual)):
        if side.exists() and not is_media(side):
            raise UsageError(
                "media are compared with media",
                where=str(side),
                measured=f"{other} is a picture, video, sound or a folder of them; this is none",
            )


def judge_clips(a: Clip, r: Clip, *, options: MediaOptions = NONE) -> Comparison:
    """Judge two decoded clips; see `compare_media`."""
    same_seed, other_seeds = runs_of(options.same_seed), runs_of(options.other_seeds)
    known, frames = list(facts(a, r)), frames_of(a, r, options.progress)
    findings = (*known, *frames.findings, *sound_of(a, r))
    rows = _rows(a, r, frames, findings)
    same = all(row.verdict is Verdict.IDENTICAL for row in rows) and not known
    evidence = _evidence(a, r, frames, findings)
    verdict = Verdict.IDENTICAL if same else Verdict.INCONCLUSIVE
    if not same:
        verdict = Verdict.worst(Verdict(f.effect) for f in findings) if findings else verdict
        if (same_seed or other_seeds) and verdict in (Verdict.INCONCLUSIVE, Verdict.DRIFTED):
            told, alone = placed(a, r, same_seed, other_seeds, options.progress)
            evidence = evidence.model_copy(update={"ladder": told})
            verdict = Verdict.worst((verdict, alone))
        if options.perceptual and a.frames is not None and r.frames is not None and frames.scores:
            count = len(frames.scores)
            jod = perceptual_jod(a.frames[:count], r.frames[:count], fps=r.fps)
            evidence = evidence.model_copy(update={"perceptual_jod": jod})
    result = _comparison(a, r, rows, verdict, evidence)
    if (same_seed or other_seeds) and evidence.ladder is None:
        unseen = "other runs, which change nothing here"
        return result.model_copy(update={"not_looked_at": (*result.not_looked_at, unseen)})
    return result


def _rows(a: Clip, r: Clip, frames: Frames, findings: Sequence[MediaFinding]) -> Rows:
    """One row of each stream that a side has."""
    both = (a.frames is not None or r.frames is not None) and (
        a.sound is not None or r.sound is not None
    )
    streams: tuple[tuple[str, str, Any, Any, bool], ...] = (
        ("video/frames", "video", a.frames, r.frames, a.same_frames(r)),
        ("audio/waveform", "audio", a.sound, r.sound, a.sound_digest == r.sound_digest),
    )
    rows = []
    for name, modality, own, other, same in streams:
        if own is None and other is None:
            continue
        effects = [Verdict(f.effect) for f in findings if f.modality in (modality, None)]
        verdict = Verdict.worst([*effects, Verdict.INCONCLUSIVE])
        if same and own is not None and own.numel() and not effects:
            verdict = Verdict.IDENTICAL
        note = _video_note(a, r, frames) if modality == "video" else _audio_note(a, r)
        rows.append(
            Row(
                name=name,
                verdict=verdict,
                modality=modality if both else None,
                actual=_info(own),
                reference=_info(other),
                note="" if verdict is Verdict.IDENTICAL else note,
            )
        )
    return Rows.of(rows)


def _info(tensor: torch.Tensor | None) -> TensorInfo | None:
    if tensor is None:
        return None
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorInfo(dtype=dtype, shape=tuple(int(n) for n in tensor.shape))


def _video_note(a: Clip, r: Clip, frames: Frames) -> str:
    scores = frames.scores
    if not scores:
        return "no pair of frames of one size"
    differing = [score for score in scores if score.rms]
    if not differing:
        more = "" if a.same_frames(r) else ", and differ in what that does not hold"
        return f"{len(scores)} pairs of frames agree in RGB at 8 bits{more}"
    worst = min(differing, key=lambda score: score.psnr_db)
    one = len(scores) == 1
    text = "the picture differs" if one else f"{len(differing)} of {len(scores)} frames differ"
    text += f": PSNR {_psnr(frames):.1f} dB"
    text += "" if one else f" (worst frame {worst.actual}: {worst.psnr_db:.1f})"
    ssims = [score for score in scores if not math.isnan(score.ssim)]
    if ssims:
        least = min(ssims, key=lambda score: score.ssim)
        text += f", SSIM {_ssim(frames):.3f}"
        text += "" if one else f" (worst frame {least.actual}: {least.ssim:.3f})"
    return text


def _psnr(frames: Frames) -> float:
    square = math.fsum(score.rms**2 for score in frames.scores) / max(len(frames.scores), 1)
    return 10 * math.log10(255**2 / square) if square else math.inf


def _ssim(frames: Frames) -> float:
    values = [score.ssim for score in frames.scores]
    return math.fsum(values) / len(values) if values else math.nan


def _audio_note(a: Clip, r: Clip) -> str:
    if a.sound is None or r.sound is None or a.sample_rate != r.sample_rate:
        return "no pair of sounds of one rate"
    if torch.equal(a.sound, r.sound):
        return "the sounds agree in float32"
    if not min(a.sound.shape[1], r.sound.shape[1]):
        return "a side holds no samples"
    length = min(a.sound.shape[1], r.sound.shape[1])
    sides = (sound[None, :, :length] for sound in (a.sound, r.sound))
    metrics = waveform_metrics(*sides, sample_rate=a.sample_rate or 1)
    parts = [f"level {metrics.level_db:+.3g} dB"]
    if metrics.correlation is not None and metrics.spectrum_db is not None:
        parts = [f"correlation {metrics.correlation:.4g}", *parts]
        parts.append(f"spectrum {metrics.spectrum_db:.3g} dB")
    return ", ".join(parts)


def _evidence(a: Clip, r: Clip, frames: Frames, findings: Sequence[MediaFinding]) -> MediaEvidence:
    return MediaEvidence(
        limits=LIMITS,
        actual=_facts(a),
        reference=_facts(r),
        findings=tuple(sorted(findings, key=_urgency)),
        scores=frames.scores,
        psnr_db=_psnr(frames) if frames.scores else None,
        ssim=_ssim(frames) if frames.scores else None,
    )


_URGENCY = ("invalid", "drifted", "incomparable", "inconclusive")


def _urgency(finding: MediaFinding) -> tuple[int, bool]:
    return _URGENCY.index(finding.effect), finding.kind == "colour marks"


def _facts(clip: Clip) -> MediaFacts:
    shape = (0, 0, 0) if clip.frames is None else tuple(int(n) for n in clip.frames.shape[:3])
    sound = (0, 0) if clip.sound is None else tuple(int(n) for n in clip.sound.shape)
    return MediaFacts(
        what=clip.what,
        form=clip.form,
        colours=", ".join(filter(None, (clip.colour_range, clip.colour_matrix))),
        frames=shape[0],
        height=shape[1],
        width=shape[2],
        fps=clip.fps,
        seconds=clip.seconds,
        sample_rate=clip.sample_rate,
        channels=sound[0],
        samples=sound[1],
    )


# --- the result ----------------------------------------------------------------------------------


def _comparison(
    a: Clip, r: Clip, rows: Rows, verdict: Verdict, evidence: MediaEvidence
) -> Comparison:
    own, other = _parts(a), _parts(r)
    return Comparison(
        tool_version=library_version("truestep") or "",
        verdict=verdict,
        sentence=_sentence(a, r, rows, verdict, evidence),
        rows=rows,
        rule=RULE,
        modalities=modalities(rows),
        actual=Side(label=str(a.path), path=str(a.path), sha256=a.sha256),
        reference=Side(label=str(r.path), path=str(r.path), sha256=r.sha256),
        missing=tuple(other[len(own) :]),
        unexpected=tuple(own[len(other) :]),
        looked_at=_looked_at(a, r),
        not_looked_at=_not_looked_at(a, r, evidence),
        media=_to_look_at(a, r, evidence) if verdict is not Verdict.IDENTICAL else (),
        evidence=evidence,
        notes=_notes(a, r),
        hint=_hint(verdict, evidence),
    )


def _hint(verdict: Verdict, evidence: MediaEvidence) -> str:
    """What can decide, where media did not."""
    if verdict is not Verdict.INCONCLUSIVE:
        return ""
    if evidence.ladder is not None:
        return "save the final latents of both sides, and compare those"
    return (
        "give other runs of the trusted side (--same-seed-of, --other-seeds), or save the final "
        "latents of both sides, and compare those"
    )


def _parts(clip: Clip) -> list[str]:
    """Names of its frames."""
    return list(clip.names) or [f"frame {at}" for at in range(clip.count)]


def _sentence(a: Clip, r: Clip, rows: Rows, verdict: Verdict, evidence: MediaEvidence) -> str:
    if verdict is Verdict.IDENTICAL:
        parts = ["the picture"] if a.count == 1 else [f"{a.count} frames"] * bool(a.count)
        parts += [f"{a.sound.shape[1]:,} samples"] if a.sound is not None else []
        verb = "agrees" if parts == ["the picture"] else "agree"
        once = "" if a.sha256 == r.sha256 else " once decoded"
        once += "" if a.layouts == r.layouts else " to RGB at 8 bits"
        return f"identical: {' and '.join(parts)} {verb} bit for bit{once}"
    findings = evidence.findings
    told = [f.text for f in findings[:2]]
    if len(findings) > 2:
        told.append(f"{len(findings) - 2} more finding{'s' * (len(findings) > 3)}")
    if evidence.ladder is not None:
        told.append(evidence.ladder.text)
    elif not told or (evidence.scores and all(f.before is None for f in findings)):
        told += [row.note for row in rows if row.verdict is not Verdict.IDENTICAL][:1]
    tail = LIMITS if verdict in (Verdict.INCONCLUSIVE, Verdict.DRIFTED) else ""
    if verdict is Verdict.DRIFTED:
        tail = "media do not show whether the model or what wrote the file did it"
    return f"{verdict.value}: {'; '.join([*told, *[tail] * bool(tail)])}"


def _looked_at(a: Clip, r: Clip) -> tuple[str, ...]:
    parts = []
    if a.count and r.count:
        parts.append(f"{min(a.count, r.count)} pairs of decoded frames")
    if a.sound is not None and r.sound is not None:
        parts.append(f"{min(a.sound.shape[1], r.sound.shape[1]):,} pairs of samples")
    return tuple(parts)


def _not_looked_at(a: Clip, r: Clip, evidence: MediaEvidence) -> tuple[str, ...]:
    parts = ["latents, stages and modules, which media do not hold"]
    parts += dict.fromkeys((*a.unseen, *r.unseen))
    if evidence.scores and evidence.perceptual_jod is None and any(s.rms for s in evidence.scores):
        parts.append("how visible it is (--perceptual)")
    if evidence.ladder is not None and a.frames is not None and evidence.ladder.unit == "levels":
        parts += ["the sound of the other runs"] * (a.sound is not None)
    return tuple(parts)


def _notes(a: Clip, r: Clip) -> tuple[str, ...]:
    notes = []
    if a.sha256 == r.sha256:
        notes.append("the two files are the same, byte for byte: is one a copy?")
    if a.names and r.names:
        notes.append(
            "the pictures of each folder are the frames of one clip, in the order of their numbers "
            "(--runs compares those of one name)"
        )
        alone = (sorted({*x.names} - {*y.names}) for x, y in ((a, r), (r, a)))
        for side, names in zip(("actual", "reference"), alone, strict=True):
            if names:
                shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                notes.append(f"names on the {side} side only: {shown}")
    if a.frames is not None and r.frames is not None and _blank(a.frames) and _blank(r.frames):
        notes.append("every frame of both sides holds one colour: there is nothing to compare")
    return tuple(notes)


def _blank(frames: torch.Tensor) -> bool:
    return all(bool((f.amax((0, 1)) - f.amin((0, 1)) <= 2).all()) for f in frames)


def _to_look_at(a: Clip, r: Clip, evidence: MediaEvidence) -> tuple[Media, ...]:
    """The worst frame, the first and the last, and both sounds."""
    media = []
    if evidence.scores and a.frames is not None and r.frames is not None:
        worst = min(evidence.scores, key=lambda score: score.psnr_db).actual
        chosen = sorted({0, worst, len(evidence.scores) - 1})
        factor = -(-max(a.frames.shape[1:3]) // _SHOWN)
        own, other = (_levels(frames[chosen], factor) for frames in (a.frames, r.frames))
        name = "video/frames" if factor == 1 else f"Decoded frames at 1/{factor} of their size"
        shown = frame_media(own, other, name=name, limit=len(chosen))
        frames = tuple(
            triple.model_copy(update={"index": chosen[triple.index]}) for triple in shown.frames
        )
        media.append(shown.model_copy(update={"frames": frames}))
    if a.sound is not None and r.sound is not None and a.sample_rate == r.sample_rate:
        sides = a.sound[None], r.sound[None]
        media.append(sound_media(*sides, name="audio/waveform", sample_rate=a.sample_rate or 1))
    return tuple(media)


def _levels(frames: torch.Tensor, factor: int) -> torch.Tensor:
    """Frames `f h w c` as `1 c f h w` in [-1, 1], each side `factor` times smaller."""
    pixels = frames.permute(0, 3, 1, 2).float()
    if factor > 1:
        pixels = torch.nn.functional.avg_pool2d(pixels, factor, ceil_mode=True)
    return (pixels / 127.5 - 1).transpose(0, 1)[None]
