"""`truestep ab`: two arms and a control interleaved, judged for speed and sameness."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from truestep.cli.ab_quality import number_of, quality
from truestep.cli.ablate import ablate
from truestep.cli.cases import choose_cases, parse_changes, refuse_plain
from truestep.cli.common import (
    GroupWithDefault,
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
from truestep.text import say

if TYPE_CHECKING:
    from truestep.case import Case
    from truestep.experiment.records import Expectation, Experiment, Plan
    from truestep.experiment.store import Store
    from truestep.runtime.applying import Apply

_DIMENSION = re.compile(r"[A-Za-z_]\w*=")
"""A positional argument that goes on with --matrix."""


_FEWEST = 4
"""Fewer rounds make no interval of the speed; see `experiment.statistics`."""


def _too_few(rounds: int, expect: tuple[Expectation, ...]) -> None:
    """Refuse rounds that cannot decide what is expected; else say what they leave open."""
    from truestep.errors import UsageError

    text = f"--rounds {rounds} cannot decide the speed: {_FEWEST} are the least"
    if {"faster", "same"} & set(expect):
        raise UsageError(text, hint=f"--rounds {_FEWEST}")
    say(f"note: {text}; whether the model stays the same is judged", err=True)


def _share(value: object) -> float:
    """`1%` or `0.01`, above 0 and below 1."""
    text = str(value).strip()
    number = number_of(text)
    if not 0 < number < 1:
        raise click.BadParameter(f"{text!r} is not a share like 1% or 0.01")
    return number


class _Ab(GroupWithDefault):
    """`truestep ab CASES` runs an experiment."""

    default = "run"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """`--quality` and `--frontier` ask another question, which has options of its own."""
        if {"--quality", "--frontier"} & set(args) and args[0] not in ("quality", "ablate"):
            rest = args[1:] if args[0] == "run" else args
            args = ["quality", *(word for word in rest if word != "--quality")]
        return super().parse_args(ctx, args)


@click.group(
    "ab", cls=_Ab, subcommand_metavar="[CASES]... | VERB [ARGS]...", invoke_without_command=True
)
@click.pass_context
def command(context: click.Context) -> None:
    """Say whether a switch makes a model faster, and whether it stays the same model.

    truestep ab CASES --set KEY=VALUE runs baseline, candidate and a control side by side. Its
    options: truestep ab run --help. With --quality it says whether a change that is meant is still
    good enough: truestep ab quality --help.
    """
    if context.invoked_subcommand is None:
        context.invoke(run)


command.add_command(ablate)
command.add_command(quality)


@command.command("run")
@case_options
@set_option
@click.option("--vs", "against", multiple=True, metavar="KEY=VALUE", help="Likewise, the baseline.")
@click.option("--apply", "change", metavar="FILE.py:FUNCTION", help="The change in the candidate.")
@click.option(
    "--matrix",
    multiple=True,
    metavar="KEY=VALUE,...",
    help="Run every combination of these values in both arms; compile=off,on among them. Alone, it "
    "is the switch: the first value is the baseline, every other one a candidate.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Rounds of a cell; each runs baseline, candidate and control twice.",
)
@click.option(
    "--until",
    type=_share,
    metavar="1%",
    help="Go on until the interval of the ratio is this narrow, plus or minus; twice as much is "
    "then the same speed, if --margin is not less.",
)
@click.option(
    "--max-rounds",
    type=click.IntRange(min=1),
    default=400,
    show_default=True,
    help="Where --until gives up.",
)
@click.option(
    "--margin",
    type=_share,
    metavar="5%",
    default="5%",
    show_default=True,
    help="Difference in time that still is the same speed.",
)
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Runs of every arm before the first round, not counted.",
)
@click.option(
    "--expect",
    type=click.Choice(["faster", "same", "different"]),
    multiple=True,
    help="What the switch must do; else exit 1, or 4 if it did nothing.",
)
@click.option(
    "--num-prompts", type=click.IntRange(min=1), metavar="N", help="Only the first N cases."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the order of the arms.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("truestep-ab"),
    show_default=True,
    help="Folder of the results.",
)
@click.option("--resume", is_flag=True, help="Go on with the experiment in the folder.")
@click.option(
    "--ray",
    metavar="local|ADDRESS",
    help="Run every cell as a task of a Ray cluster; --output must be on a filesystem that "
    "its machines share, under the same path. Cells that share a machine disturb each other's "
    "times.",
)
@click.option(
    "--accelerator",
    metavar="TYPE",
    help="With --ray: type of the accelerator that every cell needs, as Ray names it (H200); "
    "without it, one CPU.",
)
@output_options
def run(  # 22 parameters, long: the options of the verb
    names: tuple[str, ...],
    case_file: Path,
    prompt: str | None,
    tier: str,
    changes: tuple[str, ...],
    against: tuple[str, ...],
    change: str | None,
    matrix: tuple[str, ...],
    rounds: int,
    until: float | None,
    max_rounds: int,
    margin: float,
    warmup: int,
    expect: tuple[Expectation, ...],
    num_prompts: int | None,
    seed: int,
    output: Path,
    resume: bool,
    ray: str | None,
    accelerator: str | None,
    json_path: str | None,
    report: Path | None,
) -> None:
    """Say whether a switch makes a model faster, and whether it stays the same model.

    CASES are names in the case file, case files, or one model: with --prompt, or else with five
    pinned prompts. The baseline is the case with --vs, the candidate the case with --set and
    --apply; the baseline runs once more as a control. `truestep ab recover DIR` rebuilds the table
    of whatever lies in a folder.
    """
    from truestep.experiment.cluster import connected
    from truestep.experiment.running import run_experiment, run_on_cluster
    from truestep.experiment.sources import Sources
    from truestep.experiment.store import Store

    if accelerator is not None and ray is None:
        raise click.UsageError("--accelerator needs --ray: it chooses among a cluster's machines")
    if names[:1] == ("recover",):
        _recover(names[1:], json_path=json_path, report=report)
    if until is None and rounds < _FEWEST:  # said before the first forward, not after the last
        _too_few(rounds, expect)
    dimensions = [*matrix, *(n for n in names if matrix and _DIMENSION.match(n))]
    names = tuple(name for name in names if name not in dimensions)
    plan, apply = _planned(
        _cases(names, case_file=case_file, prompt=prompt, tier=tier),
        dimensions,
        baseline=parse_changes(against),
        candidate=parse_changes(changes),
        change=change,
        num_prompts=num_prompts,
        rounds=rounds,
        until=until,
        most_rounds=max(max_rounds, rounds),
        margin=margin if until is None else min(margin, 2 * until),
        warmup=warmup,
        expect=expect,
        seed=seed,
    )
    store = Store(output, sources=Sources([change or ""]))
    connection = connected(ray, accelerator=accelerator) if ray is not None else nullcontext()
    with connection, store.locked():
        store.begin(plan, resume=resume)
        if ray is None:
            work = partial(run_experiment, plan, store, apply=apply)
        else:
            there = partial(load_change, change)
            work = partial(run_on_cluster, plan, store, change=there, accelerator=accelerator)
        experiment = _run(work, store, json_path=json_path, report=report)
    end(_show(experiment, store, json_path=json_path, report=report))


def _planned(
    cases: dict[str, Case],
    dimensions: list[str],
    *,
    baseline: dict[str, object],
    candidate: dict[str, object],
    change: str | None,
    num_prompts: int | None,
    expect: tuple[Expectation, ...],
    **length: Any,
) -> tuple[Plan, Apply | None]:
    """What is to be run, and the loaded change, checked before anything runs.

    Args:
        length: Fields of the plan that say how long it runs, as they are.
    """
    from truestep.experiment.planning import matrix_alone, parse_matrix, planned_cases, validate
    from truestep.experiment.records import Plan

    if dimensions and not (baseline or candidate or change or expect == ("same",)):
        baseline, cells = matrix_alone(dimensions)
    else:
        cells = parse_matrix(dimensions)
    chosen = planned_cases(cases, most=num_prompts)
    validate(
        chosen,
        cells,
        baseline=baseline,
        candidate=candidate,
        apply=change or "",
        alike="same" in expect,
    )
    apply = load_change(change)
    plan = Plan(
        tool_version=own_version(),
        cases=chosen,
        cells=tuple(cells),
        baseline=baseline,
        candidate=candidate,
        apply=change or "",
        apply_digest=change_digest(change),
        expect=expect,
        **length,
    )
    return plan, apply


def _cases(
    names: tuple[str, ...], *, case_file: Path, prompt: str | None, tier: str
) -> dict[str, Case]:
    """Cases as every verb chooses them, or the pinned prompts for a bare model."""
    from truestep.case import load_cases
    from truestep.experiment.planning import pinned_cases

    if prompt is None and len(names) == 1 and not names[0].endswith(".toml"):
        model = names[0]
        known = case_file.exists() and model in load_cases(case_file, tier=tier)
        if not known and (":" in model or "/" in model or Path(model).is_dir()):
            refuse_plain(model)
            return pinned_cases(model)
    return choose_cases(names, case_file=case_file, prompt=prompt, tier=tier)


def _run(
    run: Callable[..., None], store: Store, *, json_path: str | None, report: Path | None
) -> Experiment:
    """Run what is missing, and make the table; also where it was stopped, before that ends it."""
    from truestep.environment import Environment, command_line
    from truestep.experiment.table import summarise
    from truestep.report.ab import write_tables

    def table() -> Experiment:
        experiment = summarise(store).model_copy(update={"repeat": command_line()})
        write_tables(store, experiment, report=report)
        return experiment

    store.write_environment(dict(Environment.current()))
    try:
        with progress_bar() as progress:
            run(progress=progress)
    except KeyboardInterrupt:
        _show(table(), store, json_path=json_path, report=report)
        raise
    return table()


def _recover(folders: tuple[str, ...], *, json_path: str | None, report: Path | None) -> None:
    """Rebuild the table of a folder; runs nothing."""
    from truestep.errors import UsageError
    from truestep.experiment.store import Store
    from truestep.experiment.table import summarise
    from truestep.report.ab import write_tables

    if len(folders) != 1:
        raise UsageError("recover takes one folder", hint="truestep ab recover truestep-ab")
    store = Store(folders[0])
    store.plan()
    with store.locked():
        experiment = summarise(store)
        write_tables(store, experiment, report=report)
    end(_show(experiment, store, json_path=json_path, report=report))


def _show(
    experiment: Experiment, store: Store, *, json_path: str | None, report: Path | None
) -> int:
    from truestep.report.ab import print_experiment

    folder, name = str(store.folder), str(report) if report else None
    give(
        experiment,
        json_path=json_path,
        show=partial(print_experiment, experiment, folder=folder, report=name, verbose=verbose()),
    )
    return experiment.exit_code
