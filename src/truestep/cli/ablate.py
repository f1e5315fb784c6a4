"""`truestep ab ablate`: which of the differences between two profiles matters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from truestep.cli.cases import choose_cases, parse_changes
from truestep.cli.common import (
    case_options,
    end,
    give,
    output_options,
    progress_bar,
    set_option,
    verbose,
)

if TYPE_CHECKING:
    from truestep.case import Case
    from truestep.experiment.ablation_records import Ablation, Matrix


@click.command("ablate")
@case_options
@set_option
@click.option("--from", "reference", metavar="PROFILE", help="The reference profile.")
@click.option("--to", "candidate", metavar="PROFILE", help="The profile whose values are taken on.")
@click.option(
    "--all", "everything", is_flag=True, help="Every profile against every other, at the end only."
)
@click.option("--output", type=click.Path(path_type=Path), help="Write the tables as Markdown.")
@output_options
def ablate(  # 11 parameters: the options of the verb
    names: tuple[str, ...],
    case_file: Path,
    prompt: str | None,
    tier: str,
    changes: tuple[str, ...],
    reference: str | None,
    candidate: str | None,
    everything: bool,
    output: Path | None,
    json_path: str | None,
    report: Path | None,
) -> None:
    """Attribute the distance between two profiles of an LTX-2 case to their differences.

    CASES is one name in the case file, or a model together with --prompt. It runs as --from says;
    with one control at a time as --to says; with the controls switched one after the other; and as
    --to says, which must equal all switches together bit for bit: else exit 1. A control that the
    case sets itself stays. `truestep show profile A B` lists the differences.
    """
    from truestep.controls import find_profile
    from truestep.errors import UsageError

    if everything == bool(reference or candidate) or bool(reference) != bool(candidate):
        raise UsageError(
            "ablate needs --from and --to, or --all alone",
            hint="--from official@f4b06fb --to diffusers-0.42.1",
        )
    for name in (reference, candidate):
        if name is not None:
            find_profile(name)
    case = _case(names, case_file=case_file, prompt=prompt, tier=tier)
    case = case.replace(**parse_changes(changes))
    result = _run(case, reference, candidate)
    end(_show(result, json_path=json_path, output=output, report=report))


def _case(names: tuple[str, ...], *, case_file: Path, prompt: str | None, tier: str) -> Case:
    from truestep.errors import UsageError

    cases = choose_cases(names, case_file=case_file, prompt=prompt, tier=tier)
    if len(cases) != 1:
        raise UsageError(
            f"ablate takes one case, {len(cases)} were chosen",
            measured=", ".join(cases),
            hint="name one of them",
        )
    return next(iter(cases.values()))


def _run(case: Case, reference: str | None, candidate: str | None) -> Ablation | Matrix:
    from truestep.environment import command_line
    from truestep.experiment.ablation import ablate, compare_profiles

    with progress_bar() as progress:
        result: Ablation | Matrix
        if reference is None or candidate is None:
            result = compare_profiles(case, progress=progress)
        else:
            result = ablate(case, reference=reference, candidate=candidate, progress=progress)
    return result.model_copy(update={"repeat": command_line()})


def _show(
    result: Ablation | Matrix, *, json_path: str | None, output: Path | None, report: Path | None
) -> int:
    from truestep.report.ablation import print_result, write_files

    write_files(result, output=output, report=report)
    names = {"output": str(output) if output else None, "report": str(report) if report else None}
    give(result, json_path=json_path, show=lambda: print_result(result, verbose=verbose(), **names))
    return result.exit_code
