"""`truestep training`: where is the trainer, or its backward, not the model that inference runs?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from truestep.cli.common import (
    end,
    finish,
    give,
    json_option,
    output_options,
    print_screen,
    progress_bar,
    verbose_option,
)
from truestep.screen import aligned, facts, rows
from truestep.text import pasteable

if TYPE_CHECKING:
    import torch

    from truestep.training.gap import LogProbabilityGap, StepGap
    from truestep.training.step import Build

_TOLERANCE = click.option(
    "--tolerance", type=click.FloatRange(min=0), help="Judge rel_l2 by this, not by the floor."
)
_PLACE = "training.safetensors"


@click.group("training")
def command() -> None:
    """Record a training step of the trusted side, and check a trainer against it.

    FILE.py:FUNCTION takes no arguments and returns a truestep.TrainingStep: docs/training.md.
    """


@command.command("record")
@click.argument("spec", metavar="FILE.py:FUNCTION")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path(_PLACE),
    show_default=True,
    help="The recording.",
)
@click.option(
    "--select",
    default="*",
    show_default=True,
    metavar="GLOBS",
    help="Modules to look into, several by commas, !GLOB to leave out: 'blocks.*,!*.norm*'.",
)
@click.option("--floor/--no-floor", default=True, show_default=True, help="Measure the floor.")
@verbose_option
def record(spec: str, output: Path, select: str, floor: bool) -> None:
    """Record a training step: forward, loss, gradients module by module, optimiser, merge."""
    from truestep.files import require_room
    from truestep.training.recording import KIND, record_training

    require_room(output, "the recording")
    build = _build(spec)
    with progress_bar() as progress:
        recording = record_training(
            build, path=output, select=select, floor=floor, progress=progress
        )
    manifest = recording.manifest
    runs = len(manifest.noise_floor.runs) if manifest.noise_floor else 0
    settings = manifest.settings[KIND]
    optimizer = ", ".join(dict.fromkeys(group["optimizer"] for group in settings["optimizer"]))
    print_screen(
        f"RECORDED {len(settings['wants'])} calls of modules, {len(manifest.tensors)} tensors, "
        f"noise floor from {runs} benign runs",
        facts(
            [
                ("optimizer", optimizer or "none: gradients alone are judged"),
                ("anchored", _anchored(len(settings["anchors"]))),
            ]
        ),
        facts([("note", note) for note in manifest.notes], most=2),
        ending=[
            f"recording: {output}",
            f"check: truestep training check {pasteable([spec, str(output)])}",
        ],
    )


def _anchored(count: int) -> str:
    return f"{count} gradients that are nothing but rounding" if count else ""


@command.command("check")
@click.argument("spec", metavar="FILE.py:FUNCTION")
@click.argument("reference", type=click.Path(path_type=Path), default=Path(_PLACE))
@_TOLERANCE
@output_options
def check(
    spec: str,
    reference: Path,
    tolerance: float | None,
    json_path: str | None,
    report: Path | None,
) -> None:
    """Check a trainer's step against a recorded one, every part of it by itself."""
    from truestep.recording.format import Recording
    from truestep.training.checking import check_training, settings_of

    recording = Recording.open(reference)
    settings_of(recording)
    build = _build(spec)
    with progress_bar() as progress:
        result = check_training(
            build, recording, tolerance=tolerance, label=spec, progress=progress
        )
    end(finish([result], json_path=json_path, report=report))


def _build(spec: str) -> Build:
    from truestep.functions import function_of, parts_of

    file, name = parts_of(spec, "the training step")
    function: Any = function_of(Path(file), name, "the training step")
    return function  # type: ignore[no-any-return]


@command.command("gap")
@click.argument("trainer", type=click.Path(path_type=Path))
@click.argument("engine", type=click.Path(path_type=Path))
@click.option(
    "--benign",
    multiple=True,
    type=click.Path(path_type=Path),
    help="The engine's again under a harmless change: measures the floor. Several times.",
)
@click.option(
    "--clip",
    type=float,
    default=1e-4,
    show_default=True,
    help="Half-width of the range of the ratio.",
)
@click.option(
    "--tolerance", type=click.FloatRange(min=0), help="Largest rms of a step's gap, in nats."
)
@verbose_option
@json_option
def gap(
    trainer: Path,
    engine: Path,
    benign: tuple[Path, ...],
    clip: float,
    tolerance: float | None,
    json_path: str | None,
) -> None:
    """Log-probabilities of the TRAINER against those of the ENGINE that sampled, by timestep.

    Files of tensors with log_probability of `t b`, and timesteps if they have them.
    """
    from truestep.training.gap import log_probability_gap

    own, _ = _probabilities(trainer)
    theirs, timesteps = _probabilities(engine)
    result = log_probability_gap(
        own,
        theirs,
        benign=[_probabilities(path)[0] for path in benign],
        timesteps=timesteps,
        clip=clip,
        tolerance=tolerance,
    )
    give(result, json_path=json_path, show=lambda: _print_gap(result))
    end(result.exit_code)


def _probabilities(path: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of a file, and its timesteps."""
    from truestep.errors import FileFormatError
    from truestep.recording.readers import load

    tensors = load(path, label="the file").tensors
    if "log_probability" not in tensors:
        raise FileFormatError(
            "the file holds no log-probabilities",
            where=str(path),
            measured=f"it has {', '.join(list(tensors)[:5]) or 'nothing'}",
            hint="save_file({'log_probability': values, 'timesteps': timesteps}, path)",
        )
    return tensors["log_probability"], tensors.get("timesteps")


def _print_gap(result: LogProbabilityGap) -> None:
    from truestep.report.answer import word_of

    word = word_of(result.verdict.value, passed=result.exit_code == 0)
    head = ("step", "timestep", "mean", "rms", "ratio", "outside", "x floor")
    ordered = sorted(result.steps, key=lambda step: (step.verdict.passed, -step.rms))
    lines = aligned([head, *map(_cells, ordered)])
    said = (
        "" if result.measured else "no benign run was given: the rounding of the dtype is assumed"
    )
    print_screen(
        f"{word} {result.sentence}",
        facts([("floor", said)], most=2),
        rows(lines, "steps"),
        exit_code=result.exit_code,
    )


def _cells(step: StepGap) -> tuple[str, ...]:
    timestep = "-" if step.timestep is None else f"{step.timestep:g}"
    ratio = f"{step.ratio_least:.4g} to {step.ratio_most:.4g}"
    over = "-" if step.ratio is None else f"{step.ratio:.3g}"
    return (
        str(step.step),
        timestep,
        f"{step.mean:+.1e}",
        f"{step.rms:.1e}",
        ratio,
        f"{step.outside:.0%}",
        over,
    )
