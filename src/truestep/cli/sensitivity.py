"""`truestep sensitivity`: which layers quantisation costs most in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from truestep.cli.cases import Words, changed_cases, choose_any
from truestep.cli.common import (
    case_options,
    end,
    give,
    load_change,
    numbers,
    progress_bar,
    set_option,
    subject_options,
    verbose,
    verbose_option,
)

if TYPE_CHECKING:
    from truestep.case import AnyCase


@click.command("sensitivity")
@case_options
@subject_options
@set_option
@click.option(
    "--change",
    required=True,
    metavar="CHANGE",
    help="int8, fp8, gguf:Q4_K, ..., or FILE.py:FUNCTION, which changes the pipeline's weights.",
)
@click.option(
    "--keep",
    default="10%",
    show_default=True,
    metavar="SHARE",
    help="Of the bytes of all layers, what may be left as it is: 10% or 0.1.",
)
@click.option(
    "--steps", metavar="I,J,...", help="Where predictions are made; default first, middle, last."
)
@click.option(
    "--probes",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Random directions at each step by which all layers are estimated.",
)
@click.option(
    "--exact", is_flag=True, help="Run every layer changed on its own, instead of an estimate."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the layers to keep for other tools: JSON, or TOML by its name.",
)
@click.option(
    "--json",
    "json_path",
    is_flag=False,
    flag_value="-",
    metavar="[PATH]",
    help="Write the result as JSON; without a path, or with -, to stdout alone.",
)
@verbose_option
def command(  # 17 parameters: the options of the verb
    names: tuple[str, ...],
    case_file: Path,
    prompt: str | None,
    tier: str,
    inputs: tuple[str, ...],
    loras: tuple[str, ...],
    prepare: str | None,
    pipeline: str | None,
    subject: str | None,
    changes: tuple[str, ...],
    change: str,
    keep: str,
    steps: str | None,
    probes: int,
    exact: bool,
    output: Path | None,
    json_path: str | None,
) -> None:
    """Rank a model's layers by what quantising each costs, and say which to leave as they are.

    CASES is one name in the case file, or a model together with --prompt. What a layer costs is the
    error that it makes in the prediction, times what the rest of the run makes of that. What the
    list of layers to keep buys is measured by running it.
    """
    from truestep.environment import command_line
    from truestep.experiment.sensitivity import sensitivity
    from truestep.files import require_room
    from truestep.report.sensitivity import print_sensitivity, write_list

    share, what = _share(keep), _change(change)
    for path, called in ((output, "the list"), (json_path, "the result")):
        if path is not None and path != "-":
            require_room(Path(path), called)
    said = (prompt, pipeline, subject, inputs, None, loras, prepare)
    case = _case(Words(names, case_file, tier, *said), changes)
    with progress_bar() as progress:
        result = sensitivity(
            case,
            change=what,
            budget=share,
            steps=None if steps is None else numbers(steps, "--steps"),
            probes=probes,
            exact=exact,
            progress=progress,
        )
    result = result.model_copy(update={"repeat": command_line(), "change": change})
    if output is not None:
        write_list(result, output)
    shown = str(output) if output is not None else None
    again = f"next: {result.repeat} --output keep.json" if result.kept else ""
    give(
        result,
        json_path=json_path,
        show=lambda: print_sensitivity(result, verbose=verbose(), output=shown, again=again),
    )
    end(result.exit_code)


def _share(text: str) -> float:
    """A share that was given as `10%` or `0.1`."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise click.UsageError(f"--keep needs a share like 10% or 0.1, got {text!r}")
    return share


def _change(spec: str) -> Any:
    """A quantiser's name, or the user's function."""
    from truestep.errors import UsageError
    from truestep.measure.quantisers import QUANTISERS
    from truestep.text import nearest

    if spec in QUANTISERS:
        return spec
    if ".py:" in spec:
        return load_change(spec)
    raise UsageError(
        f"--change {spec!r} is neither a quantiser nor FILE.py:FUNCTION",
        measured=f"known are {', '.join(QUANTISERS)}",
        likely=nearest(spec, list(QUANTISERS)),
    )


def _case(words: Words, changes: tuple[str, ...]) -> AnyCase:
    from truestep.errors import UsageError

    cases = changed_cases(choose_any(words), changes)
    if len(cases) != 1:
        raise UsageError(
            f"sensitivity takes one case, {len(cases)} were chosen",
            measured=", ".join(cases),
            hint="name one of them",
        )
    return next(iter(cases.values()))
