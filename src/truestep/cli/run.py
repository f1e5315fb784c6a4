"""`truestep run`: generate a case."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from truestep.cli.cases import changed_cases, choose_cases
from truestep.cli.common import (
    case_options,
    load_change,
    print_screen,
    progress_bar,
    set_option,
    verbose_option,
)
from truestep.screen import Entries

if TYPE_CHECKING:
    from truestep.case import Case
    from truestep.recording.format import Recording
    from truestep.runtime.applying import Apply

_FPS = 16
"""Frames a second of a video that is told none."""


@click.command("run")
@case_options
@set_option
@click.option("--apply", "change", metavar="FILE.py:FUNCTION", help="Change the pipeline first.")
@click.option(
    "--refine",
    "upsampler",
    type=click.Path(path_type=Path),
    metavar="UPSAMPLER",
    help="Then make a second stage with this latent upsampler: twice the size.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("truestep-output"),
    show_default=True,
    help="Folder for latent (safetensors) and video (mp4).",
)
@click.option("--latent-only", is_flag=True, help="Do not write a video.")
@click.option(
    "--fps",
    type=click.FloatRange(min=0, min_open=True),
    help="Frames a second of the video; default: what the model is told, else 16.",
)
@verbose_option
def command(  # 10 parameters: the options of the verb
    names: tuple[str, ...],
    case_file: Path,
    prompt: str | None,
    tier: str,
    changes: tuple[str, ...],
    change: str | None,
    upsampler: Path | None,
    output: Path,
    latent_only: bool,
    fps: float | None,
) -> None:
    """Generate cases; save the final latent and a video of each, with its sound if it has any."""
    from truestep.files import require_room

    cases = choose_cases(names, case_file=case_file, prompt=prompt, tier=tier)
    cases = changed_cases(cases, changes)
    apply = load_change(change)
    require_room(output / "latent", "the latent")  # before any compute is spent
    done: list[tuple[str, list[str]]] = []
    stages = [
        (name, _stages(case, output=output, upsampler=upsampler)) for name, case in cases.items()
    ]
    for name, wanted in stages:
        for number, case in enumerate(wanted):
            told = name if not number else f"{name}, second stage"
            done.append(_run(case, told, apply, output, latent_only=latent_only, fps=fps))
    _print([each for each in done if each[1]])


def _print(done: list[tuple[str, list[str]]]) -> None:
    """What was generated, and where it is."""
    if not done:
        return  # of two processes, the first one speaks
    if len(done) == 1:
        (head, files), *_ = done
        print_screen(head, ending=files)
        return
    entries = [[f"  {head}", *(f"    {file}" for file in files)] for head, files in done]
    print_screen(f"{len(done)} generations", Entries(entries))


def _stages(case: Case, *, output: Path, upsampler: Path | None) -> list[Case]:
    if upsampler is None:
        return [case]
    from truestep.runtime.audio_video import second_stage

    return [case, second_stage(case, _latent(case, output), upsampler=upsampler)]


def _latent(case: Case, output: Path) -> Path:
    return output / f"{case.id}.safetensors"


def _run(
    case: Case,
    name: str,
    apply: Apply | None,
    output: Path,
    *,
    latent_only: bool,
    fps: float | None,
) -> tuple[str, list[str]]:
    """Generate; in words what was done, and the files of it."""
    from truestep.replay.record import record
    from truestep.runtime.ranks import rank

    with progress_bar() as progress:
        recording = record(case, floor="none", apply=apply, progress=progress)
    if rank():
        return "", []  # of two processes, the first one writes
    output.mkdir(parents=True, exist_ok=True)
    recording.save(_latent(case, output))
    files = [f"latent: {_latent(case, output)}"]
    if not latent_only:
        video = output / f"{case.id}.mp4"
        _write(video, recording, case, fps=fps)
        files.append(f"video: {video}")
    seconds = sum(sum(times) for times in recording.manifest.timings_s.values())
    return f"{name}: {case.steps} steps in {seconds:.1f} s", files


def _write(path: Path, recording: Recording, case: Case, *, fps: float | None) -> None:
    from truestep.report.video import write_clip

    waveform = recording.get("audio/waveform")
    default: float = _FPS
    if waveform is not None:
        from truestep.runtime.audio_video import FPS

        default = FPS
    write_clip(
        path,
        recording["video/frames"],
        fps=fps or case.settings.fps or default,
        waveform=waveform,
        sample_rate=None if waveform is None else recording.manifest.settings["sample_rate"],
    )
