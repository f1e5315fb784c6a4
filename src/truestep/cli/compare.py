"""`truestep compare`: judge two files of tensors, or of finished media."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from truestep.cli.common import Command, end, finish, output_options, progress_bar

if TYPE_CHECKING:
    from truestep.verdict import Comparison


def media_options(function: Command) -> Command:
    """Options of finished media."""
    several: Callable[..., Any] = click.Path(path_type=Path)
    for option in (
        click.option(
            "--perceptual", is_flag=True, help="Of media: measure ColorVideoVDP, too (slow)."
        ),
        click.option(
            "--frames/--runs",
            default=None,
            help="Whether two folders of pictures are the frames of one clip, or runs matched by "
            "name; default: frames where names differ in one number alone.",
        ),
        click.option(
            "--other-seeds",
            multiple=True,
            type=several,
            metavar="PATH",
            help="Of media: a run of the trusted side with another seed, or a folder of them.",
        ),
        click.option(
            "--same-seed-of",
            "same_seed",
            multiple=True,
            type=several,
            metavar="PATH",
            help="Of media: another run of the trusted side with this seed, or a folder of them.",
        ),
    ):
        function = option(function)
    return function


@click.command("compare")
@click.argument("actual", type=click.Path(path_type=Path))
@click.argument("reference", type=click.Path(path_type=Path))
@click.option(
    "--tolerance", type=click.FloatRange(min=0), help="Judge rel_l2 by this, not by the floor."
)
@click.option(
    "--weights/--activations",
    default=None,
    help="Judge as parameters (bits, exact rounding) or by a noise floor; default: by the names.",
)
@media_options
@output_options
def command(  # 10 parameters: one an option
    actual: Path,
    reference: Path,
    tolerance: float | None,
    weights: bool | None,
    same_seed: Sequence[Path],
    other_seeds: Sequence[Path],
    frames: bool | None,
    perceptual: bool,
    json_path: str | None,
    report: Path | None,
) -> None:
    """Compare ACTUAL with REFERENCE: recordings, weights, safetensors, npy, npz, pt, latents;
    pictures, videos, sounds, and folders of them.

    A folder of weights, or the index in it, is one side, however many files it has. Of two folders
    of media every run is compared with the one of its name. Media alone never show that two runs
    are the same model: docs/media.md.
    """
    from truestep.judge.compare import compare
    from truestep.judge.media_files import MediaOptions
    from truestep.judge.media_folders import are_runs, compare_folders

    results: Sequence[Comparison]
    with progress_bar() as progress:
        media = MediaOptions(same_seed, other_seeds, perceptual, frames, progress)
        if are_runs(actual, reference, media):
            results = compare_folders(actual, reference, options=media)
        else:
            results = [
                compare(actual, reference, tolerance=tolerance, weights=weights, media=media)
            ]
    end(finish(results, json_path=json_path, report=report))
