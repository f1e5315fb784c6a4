"""`truestep check`: judge a change against recorded references."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from truestep.cli.cases import (
    Words,
    any_or_recorded,
    changed_cases,
    find_reference,
    of_calls,
    of_the_runtime,
    said_with,
    values_of,
)
from truestep.cli.common import (
    case_options,
    end,
    expect_option,
    finish,
    from_disk_option,
    load_change,
    low_memory_option,
    numbers,
    output_options,
    progress_bar,
    set_option,
    subject_options,
)
from truestep.cli.grouped import Grouped
from truestep.cli.rules import Rules
from truestep.cli.words import spell_out, spelled
from truestep.text import quoted, say, visible

if TYPE_CHECKING:
    from truestep.case import AnyCase
    from truestep.errors import ReferenceNotFoundError
    from truestep.gates.thresholds.file import Thresholds
    from truestep.judge.known import Entry
    from truestep.verdict import Comparison, Verdict


GROUPS = {
    "The change under test": ("change", "changes", "model", "expect", "meant"),
    "How deep it looks": ("depth", "steps", "rename"),
    "What is printed": ("verbose", "report", "json_path", "brief"),
    "Which case": (
        "case_file",
        "tier",
        "prompt",
        "subject",
        "pipeline",
        "inputs",
        "loras",
        "prepare",
    ),
    "What it is judged by": (
        "references",
        "reference",
        "accept",
        "tolerance",
        "known",
        "locked",
        "thresholds",
        "platform",
    ),
    "Where it runs": ("dry_run", "low_memory", "from_disk", "ray", "accelerator"),
}
"""The options in the order in which one needs them."""


@click.command("check", cls=Grouped, groups=GROUPS)
@case_options
@subject_options
@set_option
@click.option("--apply", "change", metavar="FILE.py:FUNCTION", help="The change under test.")
@click.option("--model", help="Check this model folder or hub id instead of the case's.")
@click.option("--references", type=click.Path(path_type=Path), help="Reference folder.")
@click.option("--reference", type=click.Path(path_type=Path), help="One recording file.")
@click.option(
    "--depth",
    type=click.Choice(["steps", "modules", "cause", "final"]),
    default="steps",
    show_default=True,
    help="steps: replay each stage on recorded inputs; modules: also name the module that departs; "
    "cause: also try what could be its cause; final: generate freely and compare latents.",
)
@click.option(
    "--steps", metavar="I,J,...", help="Where to predict; default first, three in a row, last."
)
@click.option(
    "--tolerance", type=click.FloatRange(min=0), help="Judge rel_l2 by this, not by the floor."
)
@click.option(
    "--rename",
    metavar="MAP.toml",
    type=click.Path(path_type=Path),
    help="Where models are opened: which of the reference's modules the candidate's answer to.",
)
@click.option(
    "--accept",
    multiple=True,
    metavar="NAME",
    help="Judge by a reference that is quantised or patched in what has this in its name.",
)
@expect_option
@click.option(
    "--meant",
    metavar="CHANGE",
    help="The change is declared: int8, fp8, gguf:Q4_K, ...; auto finds out which. Exit 0 where it "
    "explains every layer; what is broken underneath is named.",
)
@click.option(
    "--thresholds",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="SGLang-Diffusion's threshold file: also generate freely, and show what its rule says.",
)
@click.option("--platform", help="With --thresholds: lay that platform's file over it.")
@click.option(
    "--known",
    metavar="FILE.toml",
    type=click.Path(path_type=Path),
    help="Ledger of known failures: a drift as stated there passes, and says so.",
)
@click.option(
    "--locked",
    is_flag=False,
    flag_value="",
    metavar="[REV]",
    help="Refuse where known failures, thresholds, references or cases were changed since REV; "
    "default: where this branch began, as git knows it.",
)
@click.option("--remade", is_flag=True, hidden=True, help="The reference was recorded just now.")
@from_disk_option
@low_memory_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only say what it would take: memory and time; nothing is computed.",
)
@click.option(
    "--ray",
    metavar="local|ADDRESS",
    help="Run every case as a task of a Ray cluster; this folder, models and references must be on "
    "a filesystem that its machines share, under the same path.",
)
@click.option(
    "--accelerator",
    metavar="TYPE",
    help="With --ray: type of the accelerator that every case needs, as Ray names it (H200); "
    "without it, one CPU.",
)
@output_options
def command(  # 33 parameters, long: the options of the verb
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
    change: str | None,
    model: str | None,
    references: Path | None,
    reference: Path | None,
    depth: str,
    steps: str | None,
    tolerance: float | None,
    rename: Path | None,
    accept: tuple[str, ...],
    expect: str | None,
    meant: str | None,
    thresholds: Path | None,
    platform: str | None,
    known: Path | None,
    locked: str | None,
    remade: bool,
    from_disk: bool,
    low_memory: bool,
    dry_run: bool,
    ray: str | None,
    accelerator: str | None,
    json_path: str | None,
    report: Path | None,
) -> None:
    """Say whether a change keeps the model the same.

    CASES are names in the case file, case files, or one model together with --prompt; none is all.
    The change is --set, --model or --apply; without one the check says whether this environment
    still reproduces the reference.
    """
    from truestep.cli.dry_run import dry_run as tell
    from truestep.errors import UsageError
    from truestep.recording.store import DEFAULT_ROOT

    if accelerator is not None and ray is None:
        raise click.UsageError("--accelerator needs --ray: it chooses among a cluster's machines")
    said = (prompt, pipeline, subject, inputs, references, loras, prepare)
    words = Words(names, case_file, tier, *said)
    cases = any_or_recorded(words, reference)
    if reference is not None and len(cases) != 1:
        raise UsageError(f"--reference takes one case, {len(cases)} were chosen")
    under_test = said_with(words, cases, changes)
    cases = changed_cases(cases, [change for change in changes if change not in under_test])
    settings = {name: values_of(case, under_test) for name, case in cases.items()}
    for name, case in cases.items():  # every option is validated before any forward
        settings[name] |= {} if model is None else {"model": model}
        _refuse(case.replace(**settings[name]), depth, accept, thresholds, meant)
    load_change(change)  # a change that cannot be read is refused before any forward
    if dry_run:
        changed = {name: case.replace(**settings[name]) for name, case in cases.items()}
        end(tell(changed, "check", from_disk=from_disk, low_memory=low_memory, change=change))
    ledger = _ledger(known, cases, case_file=case_file, tier=tier)
    decides = (case_file, known, thresholds, references or DEFAULT_ROOT)
    rules = Rules.of(*decides, reference=reference, locked=locked)
    common: dict[str, Any] = {
        "depth": depth,
        "steps": None if steps is None else numbers(steps, "--steps"),
        "tolerance": tolerance,
        "rename": _rename(rename, depth),
        "accept": accept,
        "expect": expect,
        "meant": meant,
        "from_disk": from_disk,
        "low_memory": low_memory,
        "remade": remade,
    }
    options = {name: {**common, "settings": settings[name]} for name in cases}
    check = partial(
        _check,
        reference=reference,
        references=references,
        tier=tier,
        change=change,
        thresholds=_thresholds(thresholds, platform, cases),
    )
    endings = _here(check, cases, options)
    if ray is not None:
        folder = references or DEFAULT_ROOT
        endings = _on_cluster(check, cases, options, ray, accelerator, reference or folder)
    results = [rules.told(result) for result in _results(endings, cases, ledger)]
    code = finish(results, json_path=json_path, report=report) if results else 2
    end(code if len(results) == len(cases) else 2)


def _results(
    endings: Generator[Ending], cases: Mapping[str, AnyCase], ledger: Mapping[str, Entry]
) -> list[Comparison]:
    """The results in the order of the cases, known failures among them; what broke is told."""
    from truestep.errors import TruestepError
    from truestep.judge.known import judged

    found: dict[str, Comparison] = {}
    with closing(endings):
        for name, outcome in endings:
            if not isinstance(outcome, Exception):
                hint = outcome.hint or _hint(outcome.verdict)
                hint = spell_out(hint, name, with_changes=of_calls(cases[name]))
                found[name] = judged(outcome.model_copy(update={"hint": hint}), ledger, name)
                continue
            if isinstance(outcome, TruestepError):
                spelled(outcome, name)
            if len(cases) == 1:
                raise outcome
            # One broken case must not cost the others' results.
            text = f"BROKEN {visible(name)}: {type(outcome).__name__}: {outcome}"
            say(text, err=True, lines=True)
    return [found[name] for name in cases if name in found]


def _hint(verdict: Verdict) -> str:
    """What would decide, where nothing is decided: more benign runs of the trusted side."""
    from truestep.verdict import Verdict

    return "truestep record CASE --runs 30" if verdict is Verdict.INCONCLUSIVE else ""


def _refuse(
    case: AnyCase,
    depth: str,
    accept: tuple[str, ...],
    thresholds: Path | None,
    meant: str | None,
) -> None:
    """Refuse options and arguments that a case cannot have, before any forward."""
    from truestep.call_case import CallCase
    from truestep.errors import UsageError
    from truestep.replay.meant import refuse_meant

    if not isinstance(case, CallCase):
        refuse_meant(meant, depth)
        return
    from truestep.engines.diffusers import refuse
    from truestep.engines.subjects import refuse_checking

    refuse_checking(depth, accept=accept, meant=meant)
    if thresholds is not None:
        raise UsageError(
            "--thresholds needs a free run in truestep's own stages; this is a plain pipeline",
            hint="leave --thresholds out",
        )
    refuse(case)


def _rename(path: Path | None, depth: str) -> dict[str, str] | None:
    """A rename map, which only `--depth modules` has a use for."""
    if path is None:
        return None
    if depth not in ("modules", "cause"):
        raise click.UsageError("--rename needs --depth modules: only there are models opened")
    from truestep.pairing.files import read

    return read(path)


def _thresholds(
    path: Path | None, platform: str | None, cases: Mapping[str, AnyCase]
) -> Thresholds | None:
    """The threshold file, with every limit that applies to a case read before any forward."""
    if path is None:
        if platform is not None:
            raise click.UsageError("--platform needs --thresholds: it chooses what lies over it")
        return None
    from truestep.gates.thresholds.file import limits_of, read

    thresholds = read(path, platform=platform)
    for name, case in of_the_runtime(cases).items():
        limits_of(thresholds, name, case, sound=True)
    return thresholds


def _ledger(
    path: Path | None, cases: Mapping[str, AnyCase], *, case_file: Path, tier: str
) -> Mapping[str, Entry]:
    """The known failures; an entry may name any case of the case file, chosen or not."""
    if path is None:
        return {}
    from truestep.case import read_cases
    from truestep.judge.known import read_ledger

    every = read_cases(case_file, tier=tier) if case_file.exists() else {}
    return read_ledger(path, cases=[*every, *(name for name in cases if name not in every)])


Ending = tuple[str, "Comparison | Exception"]
"""A case, and its result or what it raised."""


def _here(
    check: Callable[..., Comparison],
    cases: Mapping[str, AnyCase],
    options: Mapping[str, dict[str, Any]],
) -> Generator[Ending]:
    """Check the cases one by one in this process."""
    from truestep.errors import TruestepError

    for name, case in cases.items():
        try:
            with progress_bar() as progress:
                yield name, check(name, case, {**options[name], "progress": progress})
        except TruestepError as error:
            yield name, error


def _on_cluster(
    check: Callable[..., Comparison],
    cases: Mapping[str, AnyCase],
    options: Mapping[str, dict[str, Any]],
    address: str,
    accelerator: str | None,
    references: Path,
) -> Generator[Ending]:
    """Check the cases on a Ray cluster, each as a task, in the order they end."""
    from truestep.experiment.cluster import Task, connected, run_tasks

    tasks = {name: Task(check, (name, case, options[name])) for name, case in cases.items()}
    shared = {references: None} if references.exists() else {}
    with (
        connected(address, accelerator=accelerator),
        closing(run_tasks(tasks, accelerator=accelerator, shared=shared)) as endings,
        progress_bar() as progress,
    ):
        for done, ended in enumerate(endings, start=1):
            progress("cases", done, len(cases))
            yield ended.name, ended.value if ended.error is None else ended.error


def _name_changed(
    changed: AnyCase,
    case: AnyCase,
    error: ReferenceNotFoundError,
    references: Path | None,
    tier: str,
) -> None:
    """Where the case has a reference as it is *changed*, say how that is judged.

    It is not taken by itself: what is set is the change under test, and would be no longer tested.
    """
    from truestep.errors import TruestepError

    if changed == case:
        return
    try:
        path = find_reference(changed.id, changed, references=references, tier=tier)
    except TruestepError:
        return
    error.likely = "--set is the change under test; there is a reference recorded with it"
    error.hint = f"truestep check --reference {quoted(str(path))}"


def _check(
    name: str,
    case: AnyCase,
    options: dict[str, Any],
    *,
    reference: Path | None,
    references: Path | None,
    tier: str,
    change: str | None,
    thresholds: Thresholds | None,
) -> Comparison:
    from truestep.engines.subjects import check
    from truestep.errors import ReferenceNotFoundError
    from truestep.replay.check import missing_reference

    try:
        path = reference or find_reference(name, case, references=references, tier=tier)
    except ReferenceNotFoundError as error:
        _name_changed(case.replace(**options["settings"]), case, error, references, tier)
        return missing_reference(case, error)
    if thresholds is None:
        return check(case, path, apply=load_change(change), **options)
    from truestep.gates.thresholds.running import with_gate
    from truestep.recording.format import Recording

    (case,) = of_the_runtime({name: case}).values()
    recording = Recording.open(path)
    result = check(case, recording, apply=load_change(change), **options)
    return with_gate(
        result,
        case,
        recording,
        thresholds,
        name=name,
        apply=load_change(change),
        settings=options["settings"],
    )
