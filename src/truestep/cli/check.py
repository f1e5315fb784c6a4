"""`truestep check`: judge a change against recorded references."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from truestep.cli.common import (
    case_options,
    choose_cases,
    find_reference,
    finish,
    load_change,
    output_options,
    parse_changes,
    progress_bar,
    set_option,
)

if TYPE_CHECKING:
    from truestep.case import Case
    from truestep.verdict import Comparison


@click.command("check")
@case_options
@set_option
@click.option("--apply", "change", metavar="FILE.py:FUNCTION", help="The change under test.")
@click.option("--model", help="Check this model folder or hub id instead of the case's.")
@click.option("--references", type=click.Path(path_type=Path), help="Reference folder.")
@click.option("--reference", type=click.Path(path_type=Path), help="One recording file.")
@click.option(
    "--depth",
    type=click.Choice(["steps", "modules", "final"]),
    default="steps",
    show_default=True,
    help="Replay each stage on recorded inputs; also name the module that departs; or generate "
    "freely and compare latents.",
)
@click.option("--steps", metavar="I,J,...", help="Where to predict; default first, middle, last.")
@click.option(
    "--tolerance", type=click.FloatRange(min=0), help="Judge rel_l2 by this, not by the floor."
)
@click.option(
    "--rename",
    metavar="MAP.toml",
    type=click.Path(path_type=Path),
    help="At --depth modules: which of the reference's modules the candidate's answer to.",
)
@output_options
def command(
    names: tuple[str, ...],
    case_file: Path,
    prompt: str | None,
    tier: str,
    changes: tuple[str, ...],
    change: str | None,
    model: str | None,
    references: Path | None,
    reference: Path | None,
    depth: str,
    steps: str | None,
    tolerance: float | None,
    rename: Path | None,
    json_path: str | None,
    report: Path | None,
) -> None:
    """Say whether a change keeps the model the same.

    CASES are names in the case file, case files, or one model together with --prompt; none is all.
    The change is --set, --model or --apply; without one the check says whether this environment
    still reproduces the reference.
    """
    from truestep.errors import TruestepError, UsageError

    cases = choose_cases(names, case_file=case_file, prompt=prompt, tier=tier)
    if reference is not None and len(cases) != 1:
        raise UsageError(f"--reference takes one case, {len(cases)} were chosen")
    settings = parse_changes(changes)
    if model is not None:
        settings["model"] = model
    for case in cases.values():  # every option is validated before any forward
        case.replace(**settings)
    options: dict[str, Any] = {
        "depth": depth,
        "apply": load_change(change),
        "settings": settings,
        "steps": _steps(steps),
        "tolerance": tolerance,
        "rename": _rename(rename, depth),
    }
    results: list[Comparison] = []
    broken = 0
    for name, case in cases.items():
        try:
            with progress_bar() as progress:
                asked = {**options, "progress": progress}
                results.append(_check(name, case, reference, references, tier, asked))
        except TruestepError as error:  # one broken case must not cost the others' results
            if len(cases) == 1:
                raise
            broken += 1
            click.echo(f"BROKEN {name}: {type(error).__name__}: {error}", err=True)
    code = finish(results, json_path=json_path, report=report) if results else 2
    sys.exit(2 if broken else code)


def _rename(path: Path | None, depth: str) -> dict[str, str] | None:
    """A rename map, which only `--depth modules` has a use for."""
    if path is None:
        return None
    if depth != "modules":
        raise click.UsageError("--rename needs --depth modules: only there are models opened")
    from truestep.pairing.files import read

    return read(path)


def _steps(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(f"--steps needs numbers like 0,10,19, got {text!r}") from None


def _check(
    name: str,
    case: Case,
    reference: Path | None,
    references: Path | None,
    tier: str,
    options: dict[str, Any],
) -> Comparison:
    from truestep.checking import check, missing_reference
    from truestep.errors import ReferenceNotFoundError

    try:
        path = reference or find_reference(name, case, references=references, tier=tier)
    except ReferenceNotFoundError as error:
        return missing_reference(case, error)
    return check(case, path, **options)
