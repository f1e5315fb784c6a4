"""`truestep run`: generate a case."""

from __future__ import annotations

from pathlib import Path

import click

from truestep.cli.common import (
    case_options,
    choose_cases,
    load_change,
    parse_changes,
    progress_bar,
    set_option,
)


@click.command("run")
@case_options
@set_option
@click.option("--apply", "change", metavar="FILE.py:FUNCTION", help="Change the pipeline first.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("truestep-output"),
    show_default=True,
    help="Folder for latent (safetensors) and video (mp4).",
)
@click.option("--latent-only", is_flag=True, help="Do not decode.")
@click.option("--fps", type=click.IntRange(min=1), default=16, show_default=True)
def command(
    names: tuple[str, ...],
    case_file: Path,
    prompt: str | None,
    tier: str,
    changes: tuple[str, ...],
    change: str | None,
    output: Path,
    latent_only: bool,
    fps: int,
) -> None:
    """Generate cases; save the final latent and a video of each."""
    cases = choose_cases(names, case_file=case_file, prompt=prompt, tier=tier)
    cases = {name: case.replace(**parse_changes(changes)) for name, case in cases.items()}
    apply = load_change(change)
    from truestep.recording.record import record
    from truestep.report.video import write_video
    from truestep.runtime.ranks import rank

    for name, case in cases.items():
        with progress_bar() as progress:
            recording = record(case, floor="none", apply=apply, progress=progress)
        if rank():
            continue  # of two processes, the first one writes
        path = output / f"{case.id}.safetensors"
        output.mkdir(parents=True, exist_ok=True)
        recording.save(path)
        click.echo(f"latent: {path}")
        if not latent_only:
            video = output / f"{case.id}.mp4"
            write_video(video, recording["video/frames"], fps=fps)
            click.echo(f"video: {video}")
        seconds = sum(sum(times) for times in recording.manifest.timings_s.values())
        click.echo(f"{name}: {case.steps} steps in {seconds:.1f} s")
