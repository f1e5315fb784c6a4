"""`truestep engine`: record what an engine does, and judge it seam by seam."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from truestep.cli.common import (
    Command,
    end,
    finish,
    output_options,
    print_screen,
    progress_bar,
    verbose,
    verbose_option,
)
from truestep.screen import Entries, facts, rows
from truestep.text import pasteable, quoted, say

if TYPE_CHECKING:
    from truestep.calls.recording import CallRecording
    from truestep.engines.watch.request import Looked

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
_DEPTH = click.option(
    "--depth",
    type=click.Choice(["steps", "modules", "operators"]),
    default="steps",
    show_default=True,
    help="At modules, also record what every module of the denoiser is given and gives, and its "
    "weights: `engine check --depth modules` then names the module that is wrong; at operators "
    "each operator, too, for the line of code. Of several ranks all calls are recorded, and what "
    "they exchange.",
)
_CALLS = click.option(
    "--calls",
    default="0,1",
    show_default=True,
    metavar="0,6,...",
    help="At --depth modules: of which calls of each denoiser.",
)
_SELECT = click.option(
    "--select",
    default="*",
    show_default=True,
    metavar="GLOBS",
    help="At --depth modules: of which modules, several by commas, !GLOB to leave out.",
)
_MOST = click.option(
    "--most",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    metavar="MB",
    help="At --depth modules: of all that is kept for it.",
)
_PROGRAM = click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED)

_RECORDING = (_PROGRAM, verbose_option, _MOST, _SELECT, _CALLS, _DEPTH, _LARGEST, _OUTPUT, _ENGINE)


def _recording(function: Command) -> Command:
    """The program, and options of what is recorded of it."""
    function = click.pass_context(function)  # type: ignore[assignment]
    for option in _RECORDING:
        function = option(function)
    return function


@click.group("engine")
def command() -> None:
    """Say in which stage another engine parts from the trusted model.

    Record a run of any program, unchanged; then judge it by a folder of diffusers with the same
    weights: schedule, noise, text, each prediction, guidance, update, decoding.
    """


@command.command("run", context_settings={"ignore_unknown_options": True})
@_recording
def run(
    context: click.Context,
    /,
    name: str,
    output: Path,
    largest: int,
    program: tuple[str, ...],
    **of: Any,
) -> None:
    """Record what a program's engine does: truestep engine run -- python generate.py ARGUMENTS

    The program is not changed, and its exit code is passed on.
    """
    _run(context, name, output, largest, program, reference=None, inside=_looked(**of))


@command.command("inject", context_settings={"ignore_unknown_options": True})
@click.argument("reference", type=click.Path(path_type=Path))
@_recording
def inject(
    context: click.Context,
    /,
    reference: Path,
    name: str,
    output: Path,
    largest: int,
    program: tuple[str, ...],
    **of: Any,
) -> None:
    """Record a program that is given noise, text and schedule of REFERENCE, a recording.

    What it makes otherwise then is its own.
    """
    _run(context, name, output, largest, program, reference=reference, inside=_looked(**of))


def _looked(depth: str, calls: str, select: str, most: int) -> Looked | None:
    """Which calls are recorded with their modules."""
    from truestep.engines.watch.request import Looked
    from truestep.errors import UsageError

    if depth == "steps":
        return None
    numbers = [part.strip() for part in calls.split(",")]
    if not all(part.isdecimal() for part in numbers):
        raise UsageError(f"calls are numbers by commas, not {calls!r}", hint="--calls 0,6")
    return Looked(tuple(map(int, numbers)), select, most << 20, depth == "operators")


def _run(
    context: click.Context,
    name: str,
    output: Path,
    largest: int,
    program: tuple[str, ...],
    *,
    reference: Path | None,
    inside: Looked | None,
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
        inside=inside,
        told=_told,
    )
    for error in ran.failures:
        say(str(error), err=True, lines=True)
    if not ran.recordings:
        print_screen(
            "NOT RECORDED: no denoiser, scheduler or known function ran, or the program runs a "
            "Python that ignores PYTHONPATH (-I, -E)"
        )
        context.exit(ran.code or 4)
    used = injected(ran.recordings[0][1]) if given is not None else {}
    put = ", ".join(f"{k} {v} x" for k, v in used.items()) or "nothing"
    first = _shown(ran.recordings[0][0])
    check = ["truestep", "engine", "check", first, "--model", "MODEL_FOLDER"]
    if reference is not None:
        check += ["--reference", str(reference)]
    check += ["--depth", "modules"] if inside is not None else []
    _print_recorded(
        ran.recordings,
        injected=put if given is not None else "",
        ending=f"check: {pasteable(check)}",
    )
    context.exit(ran.code)


def _shown(path: Path) -> str:
    """A path as it is typed here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _told(path: Path, _: CallRecording) -> None:
    """Say that a generation is recorded while the program still runs."""
    say(f"recorded: {_shown(path)}", err=True)


def _print_recorded(
    recordings: Sequence[tuple[Path, CallRecording]], *, injected: str = "", ending: str = ""
) -> None:
    """What was recorded: the first generation, its notes, and the others."""
    (_, first), *others = recordings
    notes = [("note", note) for note in first.recording.manifest.notes]
    print_screen(
        f"RECORDED {_counts(*recordings[0])}",
        facts([("injected", injected)]),
        rows((f"  RECORDED {_counts(*other)}" for other in others), "recordings"),
        Entries(facts(notes, most=None if verbose() else 2).lines, "notes"),
        ending=[ending],
    )


def _counts(path: Path, recording: CallRecording) -> str:
    """What a recording holds, in words."""
    from truestep.engines.seams import seams

    run = seams(recording, label=str(path))
    predictions = sum(len(step.passes) for step in run.steps)
    return (
        f"{_shown(path)}: {recording.recording.manifest.settings['label']}, "
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
@click.option(
    "--depth",
    type=click.Choice(["steps", "modules"]),
    default="steps",
    show_default=True,
    help="At modules, also name the module in which a red prediction goes wrong, of a run that was "
    "recorded at that depth.",
)
@output_options
def check(
    paths: tuple[Path, ...],
    model: Path,
    reference: Path | None,
    depth: Literal["steps", "modules"],
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
        result = check_paths(paths, model, reference=known, depth=depth, progress=progress)
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
    from truestep.report.answer import word_of
    from truestep.verdict import Verdict

    if len(runs) < 2:
        raise UsageError("two runs at least are compared", measured=f"given: {len(runs)}")
    read = [run_of(path) for path in runs]
    if len(read) == 2:
        result = compare_runs(*read)
        if result.exit_code and not result.hint:
            command = f"truestep engine check {_shown(runs[0])} --model FOLDER"
            hint = f"judge it by the trusted model: {command}"
            result = result.model_copy(update={"hint": hint})
        end(finish([result], json_path=json_path, report=report))
    text, results = odd_one_out(read)
    verdict = Verdict.worst(result.verdict for result in results)
    told = f"{word_of(verdict.value, passed=verdict.passed)} {text}"
    end(finish(results, json_path=json_path, report=report, told=told))


@command.command("recover")
@verbose_option
@click.argument("output", type=click.Path(path_type=Path))
def recover(output: Path) -> None:
    """Make recordings of what was left of OUTPUT when truestep was killed with the program."""
    from truestep.engines.running import recover as recovered

    _print_recorded(recovered(output, told=_told))


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
    if inputs is not None:
        from safetensors.torch import save_file

        with replacing(given, "the inputs") as temporary:
            save_file(inputs_of(run_of(inputs)), temporary)
    print_screen(
        f"{path}: nodes `Truestep: record` and `Truestep: inputs`, after a restart",
        ending=[f"inputs: {given}" if inputs is not None else ""],
    )


@command.command("list")
@verbose_option
def names() -> None:
    """Name the engines that are known, and what is watched in each."""
    from truestep.engines.engine import engines

    known = engines()
    wide = max(len(one.name) for one in known)
    lines = []
    for one in known:
        lines.append(
            f"  {one.name:<{wide}}  {len(one.boundaries)} functions, its modules and schedulers"
        )
        lines += [f"  {'':<{wide}}  {note}" for note in one.notes if verbose()]
    lines.append(f"  {'generic':<{wide}}  modules and schedulers of any program")
    print_screen(f"{len(known)} engines, and any other program", rows(lines, "engines"))
