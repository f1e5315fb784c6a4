"""`truestep bundle`: one small file of a recording, for an issue thread."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from truestep.cli.common import print_screen, verbose, verbose_option
from truestep.screen import facts
from truestep.text import pasteable

if TYPE_CHECKING:
    from truestep.recording.format import Recording
    from truestep.recording.keyframes import Frames


@click.command("bundle")
@click.argument("recording", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="Default: RECORDING with .bundle before it."
)
@click.option(
    "--frames",
    "made",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A video, picture or folder of frames that the run made. Default: what it decoded.",
)
@verbose_option
def command(recording: Path, output: Path | None, made: Path | None) -> None:
    """Make a file under 1 MB of a RECORDING: of as many steps as fit, 1,024 floats and the moments
    of each tensor, from which distances are told within 5 %; with environment and command, and the
    first, middle and last frame of what it made, lossless, as large as there is room for.

    `truestep show` and `truestep compare` read it, beside another bundle or a whole recording.
    """
    from truestep.errors import UsageError
    from truestep.files import require_room
    from truestep.recording.bundling import write_bundle
    from truestep.recording.format import Recording
    from truestep.recording.keyframes import read_key_frames

    path = output or recording.with_name(f"{recording.stem}.bundle.safetensors")
    if path.exists() and path.samefile(recording):
        raise UsageError("the bundle would replace the recording", where=str(path))
    require_room(path, "the bundle")
    whole = Recording.open(recording)
    bundle = write_bundle(whole, path, frames=_frames(whole, made))
    settings = bundle.manifest.settings
    told = [str(word) for word in settings.get("engine", {}).get("program", [])]
    pictures = read_key_frames(settings, where=str(path))
    none = "none: no decoded output is in the recording (--frames FILE gives them)"
    shown = pictures.text() if pictures is not None else none if made is None else ""
    notes = [("note", note) for note in bundle.manifest.notes]
    size = path.stat().st_size / 1e6
    print_screen(
        f"BUNDLED {path}: {len(bundle.manifest.tensors)} tensors, {size:.2f} MB",
        facts(
            [
                ("key frames", shown),
                ("command", pasteable(told)),
                ("holds", "prompts, paths and the environment too: `truestep show` prints them"),
                *notes,
            ],
            most=None if verbose() else 2,
        ),
    )


def _frames(recording: Recording, made: Path | None) -> Frames | None:
    """Key frames at their full size: of a file, or of what the run decoded."""
    from truestep.calls.pictures import decoded
    from truestep.errors import UsageError
    from truestep.recording.clips import read_clip
    from truestep.recording.keyframes import Frames, key_numbers

    if made is None:
        return decoded(recording)
    clip = read_clip(made)
    if clip.frames is None or not clip.count:
        raise UsageError("no frames are in the file", where=str(made))
    numbers = key_numbers(clip.count)
    return Frames(made.name, clip.frames[list(numbers)], numbers, clip.count)
