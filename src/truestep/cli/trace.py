"""`truestep trace`: record what every module of a model gives, and say where two traces part."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from truestep.cli.cases import changed_cases, choose_cases, parse_changes
from truestep.cli.common import (
    GroupWithDefault,
    case_options,
    end,
    finish,
    load_change,
    output_options,
    print_screen,
    progress_bar,
    set_option,
    verbose,
    verbose_option,
)
from truestep.cli.recorder import recorder
from truestep.cli.words import case_words
from truestep.screen import Entries, facts, rows
from truestep.text import quoted

if TYPE_CHECKING:
    from truestep.recording.format import Recording

_SELECT = click.option(
    "--select",
    default="*",
    show_default=True,
    metavar="GLOBS",
    help="Modules by name, several by commas, !GLOB to leave out: 'blocks.*,!*.norm*'.",
)
_STEPS = click.option("--steps", metavar="0,5,...", help="Steps to record; default all.")
_LEVEL = click.option(
    "--level",
    type=click.Choice(["stats", "sketch", "full"]),
    default="stats",
    show_default=True,
    help="Keep moments, also 1,024 floats a tensor that tell distances, or the tensors.",
)
_INPUTS = click.option("--inputs", is_flag=True, help="Record what modules are given, too.")
_OPS = click.option(
    "--ops", metavar="GLOBS", help="In these modules, record each operator's output, too."
)
_OUTPUT = click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("trace.safetensors"),
    show_default=True,
    help="The trace.",
)


class _Trace(GroupWithDefault):
    """`truestep trace ACTUAL REFERENCE` compares."""

    default = "compare"


@click.group("trace", cls=_Trace, subcommand_metavar="ACTUAL REFERENCE | VERB [ARGS]...")
def command() -> None:
    """Say in which module two traces part, or record a trace.

    truestep trace ACTUAL REFERENCE compares two traces of the same input: the first module that
    introduced an error, what only inherited it, and how it grew. Its options: truestep trace
    compare --help.
    """


command.add_command(recorder)


@command.command("compare")
@click.argument("actual", type=click.Path(path_type=Path))
@click.argument("reference", type=click.Path(path_type=Path))
@click.option(
    "--rename",
    type=click.Path(path_type=Path),
    metavar="MAP.toml",
    help="Names of the actual side's modules. Default: the same, else paired by what they return.",
)
@click.option(
    "--noise",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="TRACE",
    help="A further trace of the trusted model under a harmless change: measures the floor.",
)
@click.option(
    "--tolerance", type=click.FloatRange(min=0), help="Judge rel_l2 by this, not by the floor."
)
@output_options
def compare(
    actual: Path,
    reference: Path,
    rename: Path | None,
    noise: tuple[Path, ...],
    tolerance: float | None,
    json_path: str | None,
    report: Path | None,
) -> None:
    """Compare two traces of the same input, module by module: the default of truestep trace."""
    from truestep.pairing import Pairing
    from truestep.replay.traces import compare_traces

    result = compare_traces(
        actual,
        reference,
        rename=Pairing.read(str(rename)) if rename else None,
        noise=noise,
        tolerance=tolerance,
    )
    end(finish([result], json_path=json_path, report=report))


@command.command("record")
@case_options
@_SELECT
@_STEPS
@_LEVEL
@_INPUTS
@_OPS
@set_option
@click.option("--apply", "change", metavar="FILE.py:FUNCTION", help="Change the pipeline first.")
@_OUTPUT
@verbose_option
@click.option(
    "--check-untraced/--no-check-untraced",
    default=True,
    show_default=True,
    help="First run one forward with and without tracing: outputs must agree bit for bit.",
)
def record(  # 13 parameters: the options of the verb
    names: tuple[str, ...],
    case_file: Path,
    prompt: str | None,
    tier: str,
    select: str,
    steps: str | None,
    level: str,
    inputs: bool,
    ops: str | None,
    changes: tuple[str, ...],
    change: str | None,
    output: Path,
    check_untraced: bool,
) -> None:
    """Trace one case on the builtin runtime. Generation ends after the last step asked for.

    With a glob that begins with text_encoder or vae those models are traced, too.
    """
    from truestep.errors import UsageError
    from truestep.replay.program import parse_steps

    cases = choose_cases(names, case_file=case_file, prompt=prompt, tier=tier)
    if len(cases) != 1:
        words = case_words(next(iter(cases), "CASE"), verb="trace record")
        raise UsageError(
            f"a trace is of one case, {len(cases)} were chosen",
            measured=", ".join(cases),
            hint=f"truestep trace record {words} --output {quoted(str(output))}",
        )
    case = next(iter(cases.values())).replace(**parse_changes(changes))
    chosen = parse_steps(steps) if steps is not None else None
    if chosen and max(chosen) >= case.steps:
        raise UsageError(
            f"no step {max(chosen)} in the case",
            measured=f"its steps are 0 to {case.steps - 1}",
        )
    apply = load_change(change)
    from truestep.files import require_room
    from truestep.replay.trace import record_trace

    require_room(output, "the trace")  # before any compute is spent

    with progress_bar() as progress:
        recording, checked = record_trace(
            case,
            path=output,
            select=select,
            steps=chosen,
            level=level,  # type: ignore[arg-type]
            inputs=inputs,
            ops=ops,
            apply=apply,
            check_untraced=check_untraced,
            progress=progress,
        )
    said = f"{checked.verdict.value}, {checked.reason}" if checked else ""
    _print_traced([recording], facts([("untraced", said)], most=2))


@command.command("run", context_settings={"ignore_unknown_options": True})
@_SELECT
@click.option(
    "--class",
    "class_name",
    default="*",
    metavar="GLOB",
    help="Class name of the model to trace, the first that is called; default all models.",
)
@click.option("--every", is_flag=True, help="All models of that class, not only the first.")
@_STEPS
@_LEVEL
@_INPUTS
@_OPS
@_OUTPUT
@verbose_option
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def run(  # 10 parameters: the context, and the options of the verb
    context: click.Context,
    select: str,
    class_name: str,
    every: bool,
    steps: str | None,
    level: str,
    inputs: bool,
    ops: str | None,
    output: Path,
    program: tuple[str, ...],
) -> None:
    """Run a program with tracing on: truestep trace run -- python run.py ARGUMENTS

    The program is not changed. Its exit code is passed on.
    """
    from truestep.errors import UsageError
    from truestep.replay.program import VARIABLE, Request, parse, parse_steps, with_site

    request = Request(
        select=select,
        class_name=class_name,
        every=every or class_name == "*",
        output=str(output.absolute()),
        level=level,
        steps=parse_steps(steps) if steps is not None else None,
        inputs=inputs,
        ops=ops,
    )
    if parse(request.text()) != request:
        raise UsageError(
            "a name has a semicolon, which cannot be passed on",
            where=f"{VARIABLE}={request.text()}",
        )
    began = time.time()
    try:
        ended = subprocess.run(program, env=with_site(VARIABLE, request.text()), check=False)
    except OSError as error:
        raise UsageError(
            "the program cannot be started",
            where=program[0],
            measured=error.strerror or str(error),
            hint="e.g. truestep trace run -- python run.py",
        ) from None
    code = ended.returncode if ended.returncode >= 0 else 128 - ended.returncode
    if not _report(output, began):
        code = code or 4
    context.exit(code)


@command.command("batch")
@case_options
@set_option
@click.option("--apply", "change", metavar="FILE.py:FUNCTION", help="Change the pipeline first.")
@output_options
def batch(
    names: tuple[str, ...],
    case_file: Path,
    prompt: str | None,
    tier: str,
    changes: tuple[str, ...],
    change: str | None,
    json_path: str | None,
    report: Path | None,
) -> None:
    """Name the first module whose rows differ between batch 1 and 2, in a case's first prediction.

    Every module is run on the inputs it has when each sample is alone: what differs is its own.
    """
    cases = choose_cases(names, case_file=case_file, prompt=prompt, tier=tier)
    cases = changed_cases(cases, changes)
    apply = load_change(change)
    from truestep.replay.batching import case_batch_invariance

    results = [case_batch_invariance(case, apply=apply) for case in cases.values()]
    end(finish(results, json_path=json_path, report=report))


@command.command("replay")
@click.argument("trace", type=click.Path(path_type=Path))
@click.argument("port", metavar="FILE.py:FUNCTION")
@click.option(
    "--rename",
    type=click.Path(path_type=Path),
    metavar="MAP.toml",
    help="What modules of the port are called in the trace: docs/modules.md.",
)
@click.option(
    "--steps", metavar="0,5,...", help="Steps of the trace to replay; all of them by default."
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Largest rel_l2 of an output that passes, in place of the rounding of its dtype.",
)
@output_options
def replay(
    trace: Path,
    port: str,
    rename: Path | None,
    steps: str | None,
    tolerance: float | None,
    json_path: str | None,
    report: Path | None,
) -> None:
    """Run each module of a port alone, on the inputs that a trace of the trusted model recorded.

    TRACE is one of truestep trace record --inputs. FUNCTION takes no arguments and returns the
    port, or the port and a function that calls it with the recorded tensors: for a port whose
    arguments have other names. Each module is judged by its output, so none inherits a fault.
    """
    from truestep.errors import UsageError

    function = load_change(port, "the port")
    assert function is not None
    make: Any = function
    made = make()
    model, call = made if isinstance(made, tuple) else (made, None)
    import torch

    from truestep.pairing import Pairing
    from truestep.replay.ports import replay_trace
    from truestep.replay.program import parse_steps

    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"{port} returned a {type(model).__name__}, not a torch module")
    result = replay_trace(
        model,
        trace,
        call=call,
        rename=Pairing.read(str(rename)) if rename else None,
        steps=parse_steps(steps) if steps is not None else None,
        tolerance=tolerance,
    )
    end(finish([result], json_path=json_path, report=report))


@command.command("recover")
@verbose_option
@click.argument("place", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Default: the intended file.")
def recover(place: Path, output: Path | None) -> None:
    """Make a trace of what a killed program left beside PLACE, the file it would have written.

    PLACE may also be the .spool folder itself, or a folder that holds one.
    """
    from truestep.recording.recovery import recover as recovered

    _print_traced([recovered(place, output=output)])


def _report(output: Path, began: float) -> bool:
    """Say what a traced program left; False where that is no trace."""
    from truestep.recording.format import Recording
    from truestep.recording.recovery import spools

    found = [
        path
        for path in sorted(output.parent.glob(f"{output.stem}*{output.suffix}"))
        if path.is_file() and path.stat().st_mtime >= began
    ]
    left = [path for path in spools(output) if path.stat().st_mtime >= began]
    recover = [f"partial: the program was killed. truestep trace recover {path}" for path in left]
    if found:
        _print_traced([Recording.open(path) for path in found], rows(recover))
    elif left:
        print_screen("NOT TRACED to its end: the program was killed", ending=recover[:_PARTS])
    else:
        print_screen(
            "NOT TRACED: no model was called, none was of that class, or the program runs a Python "
            "that ignores PYTHONPATH (-I, -E)"
        )
    return bool(found)


_PARTS = 4
"""Commands that are printed of what was left by as many ranks."""


def _print_traced(recordings: Sequence[Recording], *more: Entries) -> None:
    """What was traced: the first trace, what is noted of it, and the others."""
    first, *others = recordings
    notes = [("note", note) for note in first.manifest.notes]
    print_screen(
        f"TRACED: {_counts(first)}",
        *more,
        rows((f"  TRACED: {_counts(other)}: {other.path}" for other in others), "traces"),
        Entries(facts(notes, most=None if verbose() else 2).lines, "notes"),
        ending=[f"trace: {first.path}"],
    )


def _counts(recording: Recording) -> str:
    """What a trace holds, in words."""
    manifest = recording.manifest
    modules = len({entry.fqn for entry in manifest.tensors})
    steps = len({entry.step for entry in manifest.tensors})
    tensors = len(manifest.tensors)
    return f"{tensors} tensors of {modules} modules in {steps} steps, level {manifest.level}"
