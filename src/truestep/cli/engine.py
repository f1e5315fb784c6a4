"""`truestep engine`: record what an engine does, and judge it seam by seam."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from truestep.cli.common import end, finish, output_options, progress_bar
from truestep.text import pasteable, quoted, say

if TYPE_CHECKING:
    from truestep.calls.recording import CallRecording

_ENGINE = click.option(
    "--engine", "name", default="", metavar="NAME", help="Default: whichever the program imports."
)
_OUTPUT = click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("run.safetensors"),
    show_default=True,
    help="The recording of the first generation; of the second run.2, of a rank run.rank1.",
)
_LARGEST = click.option(
    "--largest",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    metavar="MB",
    help="Of tensors above, keep only the shape.",
)
_MODULES = click.option(
    "--modules",
    is_flag=True,
    help="Record the modules inside of models, and what ranks exchange there.",
)
_PROGRAM = click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED)


@click.group("engine")
def command() -> None:
    """Say in which stage another engine parts from the trusted model.

    Record a run of any program, unchanged; then judge it by a folder of diffusers with the same
    weights: schedule, noise, text, each prediction, guidance, update, decoding.
    """


@command.command("run", context_settings={"ignore_unknown_options": True})
@_ENGINE
@_OUTPUT
@_LARGEST
@_MODULES
@_PROGRAM
@click.pass_context
def run(
    context: click.Context,
    name: str,
    output: Path,
    largest: int,
    modules: bool,
    program: tuple[str, ...],
) -> None:
    """Record what a program's engine does: truestep engine run -- python generate.py ARGUMENTS

    The program is not changed, and its exit code is passed on.
    """
    _run(context, name, output, largest, program, reference=None, modules=modules)


@command.command("inject", context_settings={"ignore_unknown_options": True})
@click.argument("reference", type=click.Path(path_type=Path))
@_ENGINE
@_OUTPUT
@_LARGEST
@_PROGRAM
@click.pass_context
def inject(
    context: click.Context,
    reference: Path,
    name: str,
    output: Path,
    largest: int,
    program: tuple[str, ...],
) -> None:
    """Record a program that is given noise, text and schedule of REFERENCE, a recording.

    What it makes otherwise then is its own.
    """
    _run(context, name, output, largest, program, reference=reference)


def _run(
    context: click.Context,
    name: str,
    output: Path,
    largest: int,
    program: tuple[str, ...],
    *,
    reference: Path | None,
    modules: bool = False,
) -> None:
    from truestep.calls.recording import read
    from truestep.engines.engine import engine
    from truestep.engines.running import injected, run_engine

    if name:
        engine(name)
    given = read(reference) if reference is not None else None
    ran = run_engine(
        program,
        output,
        engine=name,
        inject=given,
        largest=largest << 20,
        modules=modules,
        told=_summary,
    )
    for error in ran.failures:
        say(str(error), err=True, lines=True)
    if not ran.recordings:
        say(
            "NOT RECORDED: no denoiser, scheduler or known function ran, or the program runs a "
            "Python that ignores PYTHONPATH (-I, -E)"
        )
        context.exit(ran.code or 4)
    if given is not None:
        used = injected(ran.recordings[0][1])
        say(f"injected: {', '.join(f'{k} {v} x' for k, v in used.items()) or 'nothing'}")
    check = ["truestep", "engine", "check", str(ran.recordings[0][0]), "--model", "MODEL_FOLDER"]
    if reference is not None:
        check += ["--reference", str(reference)]
    say(f"check: {pasteable(check)}")
    context.exit(ran.code)


def _summary(path: Path, recording: CallRecording) -> None:
    from truestep.engines.seams import seams

    run = seams(recording, label=str(path))
    predictions = sum(len(step.passes) for step in run.steps)
    for note in recording.recording.manifest.notes:
        say(f"note: {note}")
    say(
        f"RECORDED {path}: {recording.recording.manifest.settings['label']}, "
        f"{len(recording.calls)} calls, {len(run.steps)} steps, {predictions} predictions"
    )


@command.command("check")
@click.argument("paths", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--model",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of diffusers with the same weights: the trusted side.",
)
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="The trusted pipeline's recording of the same case, for noise, text and guidance scale.",
)
@output_options
def check(
    paths: tuple[Path, ...],
    model: Path,
    reference: Path | None,
    json_path: str | None,
    report: Path | None,
) -> None:
    """Judge the RUN of an engine: the first seam that fails is the cause.

    Each prediction is the trusted model's on the engine's own inputs, each update the trusted
    scheduler's on the engine's own latent, so nothing is inherited. Of a run on several ranks any
    one recording names all: they are gathered into one run.
    """
    from truestep.engines.named import run_of
    from truestep.engines.ranks.checking import check_paths

    known = run_of(reference) if reference is not None else None
    with progress_bar() as progress:
        result = check_paths(paths, model, reference=known, progress=progress)
    end(finish([result], json_path=json_path, report=report))


@command.command("compare")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@output_options
def compare(runs: tuple[Path, ...], json_path: str | None, report: Path | None) -> None:
    """Compare RUNS seam by seam: two, or three and more, of which the odd one out is named.

    Runs of engines, recordings of the trusted pipeline, and files with tensors of seams by name.
    """
    from truestep.engines.comparing import compare_runs, odd_one_out
    from truestep.engines.named import run_of
    from truestep.errors import UsageError

    if len(runs) < 2:
        raise UsageError("two runs at least are compared", measured=f"given: {len(runs)}")
    read = [run_of(path) for path in runs]
    if len(read) == 2:
        end(finish([compare_runs(*read)], json_path=json_path, report=report))
    text, results = odd_one_out(read)
    code = finish(results, json_path=json_path, report=report)
    if json_path is None:
        say(text)
    end(code)


@command.command("recover")
@click.argument("output", type=click.Path(path_type=Path))
def recover(output: Path) -> None:
    """Make recordings of what was left of OUTPUT when truestep was killed with the program."""
    from truestep.engines.running import recover as recovered

    for path, recording in recovered(output):
        _summary(path, recording)


@command.command("node")
@click.option(
    "--write", "path", required=True, type=click.Path(path_type=Path), help="custom_nodes/NAME.py"
)
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    metavar="REFERENCE",
    help="Also write inputs.safetensors beside it: noise, sigmas and text of this recording.",
)
@click.option("--force", is_flag=True, help="Replace files that are there.")
def node(path: Path, inputs: Path | None, force: bool) -> None:
    """Write nodes for ComfyUI that record a sampling, and are given a reference's inputs."""
    from importlib import resources

    from truestep.engines.named import run_of
    from truestep.engines.running import inputs_of
    from truestep.errors import UsageError
    from truestep.files import replacing, write_text

    given = path.with_name("inputs.safetensors")
    for place in (path, given if inputs is not None else path):
        if place.exists() and not force:
            raise UsageError(
                "the node was not written: there is a file of this name",
                where=str(place),
                hint=f"truestep engine node --write {quoted(str(path))} --force",
            )
    text = resources.files("truestep.engines.nodes").joinpath("comfyui.py").read_text("utf-8")
    write_text(path, text, "the node")
    say(f"{path}: nodes `Truestep: record` and `Truestep: inputs`, after a restart")
    if inputs is not None:
        from safetensors.torch import save_file

        with replacing(given, "the inputs") as temporary:
            save_file(inputs_of(run_of(inputs)), temporary)
        say(f"inputs: {given}")


@command.command("list")
def names() -> None:
    """Name the engines that are known, and what is watched in each."""
    from truestep.engines.engine import engines

    for one in engines():
        say(f"{one.name}: {len(one.boundaries)} functions, its modules and schedulers")
        for note in one.notes:
            say(f"  {note}")
    say("generic: modules and schedulers of any program")
