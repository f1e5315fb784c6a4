"""`truestep ab --quality`: is a change that is meant still good enough?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from truestep.cli.cases import choose_cases, parse_changes, refuse_plain
from truestep.cli.common import (
    case_options,
    change_digest,
    end,
    give,
    load_change,
    output_options,
    own_version,
    progress_bar,
    set_option,
    verbose,
)

if TYPE_CHECKING:
    from truestep.case import Case
    from truestep.experiment.quality.metrics import Metric
    from truestep.experiment.quality.records import Mechanism, Quality, QualityPlan
    from truestep.experiment.quality.store import QualityStore


def _share(_: click.Context, option: click.Parameter, value: str) -> float:
    """`10%` or `0.1`, above 0 and below 1."""
    number = number_of(value)
    if not 0 < number < 1:
        raise click.BadParameter(f"{value!r} is not a share like 10% or 0.1", param=option)
    return number


def number_of(text: str) -> float:
    """A number, or a share in percent; -1 of what is neither."""
    text = text.strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return -1.0


def _margins(
    _: click.Context, option: click.Parameter, values: Sequence[str]
) -> tuple[float | None, dict[str, float]]:
    """A share of the spread between seeds, and margins in units of a metric by its name."""
    share, declared = None, {}
    for value in values:
        name, equals, text = value.rpartition("=")
        number = number_of(text)
        if not 0 < number < float("inf") or (equals and text.strip().endswith("%")):
            raise click.BadParameter(
                f"{value!r} is neither a share like 50% nor METRIC=VALUE above 0", param=option
            )
        if equals:
            declared[name] = number
        else:
            share = number
    return share, declared


@click.command("quality")
@case_options
@set_option
@click.option("--vs", "against", multiple=True, metavar="KEY=VALUE", help="Likewise, the baseline.")
@click.option("--apply", "change", metavar="FILE.py:FUNCTION", help="The change in the candidate.")
@click.option(
    "--matrix", multiple=True, metavar="KEY=VALUE,...", help="Every combination is a candidate."
)
@click.option(
    "--prompts",
    "prompt_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prompts for a bare model, one a line.",
)
@click.option(
    "--num-prompts",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    metavar="N",
    help="Only the first N prompts or cases.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=3),
    default=4,
    show_default=True,
    help="Seeds of every prompt; both arms start from the same noise.",
)
@click.option(
    "--metric",
    "named",
    multiple=True,
    metavar="FILE.py:FUNCTION|clip:FOLDER",
    help="A further metric: of frames and prompt, a number, higher is better; or a CLIP model.",
)
@click.option(
    "--margin",
    multiple=True,
    callback=_margins,
    metavar="50%|METRIC=VALUE",
    help="What may be lost: a share of the spread between seeds of one prompt, or a value in "
    "units of a metric.  [default: 50%]",
)
@click.option(
    "--broken",
    default="10%",
    show_default=True,
    callback=_share,
    metavar="10%",
    help="Prompts that may be newly broken, at most, at 95 %.",
)
@click.option(
    "--mechanism",
    "mechanisms",
    multiple=True,
    type=click.Choice(["skip", "cache", "batch", "collapse", "quantise"]),
    help="What the change must have done, else the outcome is unmet; of settings it is known.",
)
@click.option("--two-sided", is_flag=True, help="Better by more than the margin is no pass either.")
@click.option(
    "--frontier",
    is_flag=True,
    help="Set candidates beside each other, and beside fewer steps: speed, drift and quality.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the arms' order."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("truestep-quality"),
    show_default=True,
    help="Folder of the results.",
)
@click.option("--resume", is_flag=True, help="Go on with the experiment in the folder.")
@output_options
def quality(  # 22 parameters: the options of the verb
    names: tuple[str, ...],
    case_file: Path,
    prompt: str | None,
    tier: str,
    changes: tuple[str, ...],
    against: tuple[str, ...],
    change: str | None,
    matrix: tuple[str, ...],
    prompt_file: Path | None,
    num_prompts: int,
    seeds: int,
    named: tuple[str, ...],
    margin: tuple[float | None, dict[str, float]],
    broken: float,
    mechanisms: tuple[Mechanism, ...],
    two_sided: bool,
    frontier: bool,
    seed: int,
    output: Path,
    resume: bool,
    json_path: str | None,
    report: Path | None,
) -> None:
    """Say whether a change that is meant is still good enough: `truestep ab CASES --quality`.

    Every prompt is generated from the same seeds by baseline and candidate, and scored by metrics
    that have noticed damage in the baseline's own clips. `truestep ab recover DIR --quality` shows
    a folder.
    """
    from truestep.experiment.quality.metrics import chosen
    from truestep.experiment.quality.planning import cases_of
    from truestep.experiment.quality.records import QualityPlan
    from truestep.experiment.quality.statistics import MARGIN_SHARE
    from truestep.experiment.quality.store import QualityStore
    from truestep.experiment.sources import Sources

    if names[:1] == ("recover",):
        _recover(names[1:], named, json_path=json_path, report=report)
    cases = cases_of(
        _cases(names, prompt_file, case_file=case_file, prompt=prompt, tier=tier), most=num_prompts
    )
    metrics = chosen(str(cases[0].content["model"]), named)
    _known_margins(margin[1], metrics)
    apply = load_change(change)
    plan = QualityPlan(
        tool_version=own_version(),
        cases=cases,
        cells=(),
        seeds=seeds,
        baseline=parse_changes(against),
        apply=change or "",
        apply_digest=change_digest(change),
        mechanisms=mechanisms,
        metrics={metric.name: metric.digest for metric in metrics},
        margin=margin[0] or MARGIN_SHARE,
        margins=margin[1],
        broken=broken,
        two_sided=two_sided,
        frontier=frontier,
        seed=seed,
    )
    plan = _with_cells(plan, parse_changes(changes), matrix)
    store = QualityStore(output, sources=Sources([change or "", *named]))
    found = _run(plan, store, metrics, apply, resume=resume)
    end(_show(found, store, json_path=json_path, report=report))


def _with_cells(
    plan: QualityPlan, candidate: Mapping[str, object], matrix: Sequence[str]
) -> QualityPlan:
    """The plan with its candidates, validated."""
    from truestep.experiment.planning import parse_matrix
    from truestep.experiment.quality.planning import alone, fewer_steps, validate, with_candidate

    if matrix:
        cells = with_candidate(parse_matrix(list(matrix)), candidate)
    else:
        cells = [alone(candidate)] if candidate or plan.apply or not plan.frontier else []
    if plan.frontier:
        cells += fewer_steps(plan.cases, cells, plan.baseline)
    plan = plan.model_copy(update={"cells": tuple(cells)})
    validate(plan)
    return plan


def _known_margins(margins: Mapping[str, float], metrics: Sequence[Metric]) -> None:
    """Refuse a margin of a metric that there is not."""
    from truestep.errors import UsageError
    from truestep.text import nearest

    names = [metric.name for metric in metrics]
    for name in margins:
        if name not in names:
            raise UsageError(
                f"--margin {name}: there is no such metric",
                measured=f"metrics: {', '.join(names)}",
                likely=nearest(name, names),
                hint=f"give --margin {names[0]}=VALUE",
            )


def _cases(
    names: tuple[str, ...],
    prompt_file: Path | None,
    *,
    case_file: Path,
    prompt: str | None,
    tier: str,
) -> dict[str, Case]:
    """Cases as every verb chooses them, or prompts for a bare model."""
    from truestep.case import load_cases
    from truestep.errors import UsageError
    from truestep.experiment.quality.planning import prompt_cases, prompts_for, prompts_in

    bare = len(names) == 1 and not names[0].endswith(".toml")
    if bare and case_file.exists() and names[0] in load_cases(case_file, tier=tier):
        bare = False
    if prompt_file is not None:
        if not bare:
            raise UsageError(
                "--prompts needs one model",
                hint="name the model, without a case file: builtin:digits or a folder",
            )
        refuse_plain(names[0])
        return prompt_cases(names[0], prompts_in(prompt_file))
    if prompt is None and bare and (":" in names[0] or "/" in names[0] or Path(names[0]).is_dir()):
        refuse_plain(names[0])
        return prompt_cases(names[0], prompts_for(names[0]))
    return choose_cases(names, case_file=case_file, prompt=prompt, tier=tier)


def _run(
    plan: QualityPlan,
    store: QualityStore,
    metrics: Sequence[Metric],
    apply: object,
    *,
    resume: bool,
) -> Quality:
    """Generate what is missing, and judge; also where it was stopped."""
    from truestep.environment import Environment, command_line
    from truestep.experiment.quality.running import run_quality
    from truestep.experiment.store import Store

    lock = Store(store.folder)
    with lock.locked():
        store.begin(plan, resume=resume)
        lock.write_environment(dict(Environment.current()))
        with progress_bar() as progress:
            run_quality(plan, store, metrics=metrics, apply=apply, progress=progress)  # type: ignore[arg-type]
        found = _judged(plan, store, metrics)
        return found.model_copy(update={"repeat": command_line()})


def _judged(plan: QualityPlan, store: QualityStore, metrics: Sequence[Metric]) -> Quality:
    from truestep.experiment.quality.result import summarise
    from truestep.experiment.store import Store

    clips, notes = store.clips()
    environment = Store(store.folder).environment()
    return summarise(plan, clips, metrics=metrics, environment=environment, notes=notes)


def _recover(
    folders: tuple[str, ...], named: Sequence[str], *, json_path: str | None, report: Path | None
) -> None:
    """Judge what lies in a folder; runs nothing."""
    from truestep.errors import UsageError
    from truestep.experiment.quality.metrics import described
    from truestep.experiment.quality.store import QualityStore

    if len(folders) != 1 or named:
        raise UsageError(
            "recover takes one folder and no metric: what was read of its clips is kept",
            hint="truestep ab recover truestep-quality --quality",
        )
    store = QualityStore(folders[0])
    plan = store.plan()
    found = _judged(plan, store, described(plan.metrics))
    end(_show(found, store, json_path=json_path, report=report))


def _show(
    found: Quality, store: QualityStore, *, json_path: str | None, report: Path | None
) -> int:
    from truestep.report.quality import print_quality, write_files

    write_files(store.folder, found, report=report)
    show = partial(
        print_quality,
        found,
        folder=str(store.folder),
        report=str(report) if report else "",
        verbose=verbose(),
    )
    give(found, json_path=json_path, show=show)
    return found.exit_code
