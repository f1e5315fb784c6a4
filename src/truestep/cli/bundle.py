"""`truestep bundle`: one small file of a recording, for an issue thread."""

from __future__ import annotations

from pathlib import Path

import click

from truestep.text import pasteable, say


@click.command("bundle")
@click.argument("recording", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="Default: RECORDING with .bundle before it."
)
def command(recording: Path, output: Path | None) -> None:
    """Make a file under 1 MB of a RECORDING: of as many steps as fit, 1,024 floats and the moments
    of each tensor, from which distances are told within 5 %; with environment and command.

    `truestep show` and `truestep compare` read it, beside another bundle or a whole recording.
    """
    from truestep.errors import UsageError
    from truestep.files import require_room
    from truestep.recording.bundling import bundled
    from truestep.recording.format import Recording

    path = output or recording.with_name(f"{recording.stem}.bundle.safetensors")
    if path.exists() and path.samefile(recording):
        raise UsageError("the bundle would replace the recording", where=str(path))
    require_room(path, "the bundle")
    bundle = bundled(Recording.open(recording))
    bundle.save(path)
    for note in bundle.manifest.notes:
        say(f"note: {note}")
    settings = bundle.manifest.settings
    told = [str(word) for word in settings.get("engine", {}).get("program", [])]
    if told:
        say(f"command: {pasteable(told)}")
    size = path.stat().st_size / 1e6
    say(f"BUNDLED {path}: {len(bundle.manifest.tensors)} tensors, {size:.2f} MB")
    say("it also holds prompts, paths and the environment, as `truestep show` prints them")
