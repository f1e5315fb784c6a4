"""`truestep gate thresholds`: gates that cannot fail, and limits from a measured floor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from truestep.cli.cases import choose_cases, find_reference
from truestep.cli.common import (
    end,
    file_option,
    give,
    json_option,
    print_screen,
    progress_bar,
    verbose,
    verbose_option,
)
from truestep.screen import Entries, aligned, facts, rows
from truestep.text import listed, quoted

if TYPE_CHECKING:
    import torch

    from truestep.case import Case
    from truestep.gates.thresholds.linting import Finding, Lint

MAX_NAMES = 3
STAND_IN = "builtin:digits, a stand-in (--case or --reference tries the model's own frames)"

Tensors = dict[str, "torch.Tensor"]


@click.group("thresholds")
def thresholds() -> None:
    """Lint threshold files of SGLang-Diffusion, and write new ones from a measured floor.

    `truestep check CASE --thresholds FILE` runs such a file beside truestep's own verdict.
    """


@thresholds.command("lint")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--case", "name", help="Lint this case only, on its own reference and another seed.")
@click.option("--platform", help="Lay that platform's file over it first.")
@click.option(
    "--reference", type=click.Path(path_type=Path), help="Recording whose frames are damaged."
)
@click.option(
    "--other", type=click.Path(path_type=Path), help="Recording of another seed of the same case."
)
@click.option("--references", type=click.Path(path_type=Path), help="Reference folder.")
@click.option("--tier", default="default", show_default=True, help="Tier of the case.")
@file_option
@json_option
@verbose_option
def lint_command(  # 9 parameters: the options of the verb
    file: Path,
    name: str | None,
    platform: str | None,
    reference: Path | None,
    other: Path | None,
    references: Path | None,
    tier: str,
    case_file: Path,
    json_path: str | None,
) -> None:
    """Damage a reference on purpose and say which gates of FILE let it pass.

    Tries another seed, a gain and noise of 10 %, and grosser damages. Without a reference the
    builtin digits model stands in. Exit code 1 says that something was found.
    """
    from truestep.environment import command_line, library_version
    from truestep.gates.thresholds.file import read
    from truestep.gates.thresholds.linting import lint

    thresholds = read(file, platform=platform)
    case = _case(name, case_file=case_file, tier=tier)
    if reference is None and case is not None:
        reference = find_reference(str(name), case, references=references, tier=tier)
    only = None if name is None else [_entry(thresholds.cases, name, case)]
    tensors = _stand_in(seed=0) if reference is None else _decoded(reference)
    seed = _other(other, case, stand_in=reference is None)
    _check_sides(tensors, seed)
    found = lint(
        thresholds,
        tensors,
        tried_on=STAND_IN if reference is None else str(reference),
        other=seed,
        only=only,
        fine=reference is not None,
        sample_rate=None if reference is None else _sample_rate(reference),
    ).model_copy(
        update={"tool_version": library_version("truestep") or "", "repeat": command_line()}
    )
    give(found, json_path=json_path, show=lambda: _print(found))
    end(1 if found.findings else 0)


@thresholds.command("write")
@click.argument("name", metavar="CASE")
@click.argument("reference", required=False, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Threshold file.")
@click.option("--as", "case_id", metavar="ID", help="Id of the case in the file; default CASE.")
@click.option("--commit", default="", help="Commit of the code that made the reference.")
@click.option("--update", is_flag=True, help="Replace the limits that the case has there.")
@click.option("--references", type=click.Path(path_type=Path), help="Reference folder.")
@click.option("--tier", default="default", show_default=True, help="Tier of the case.")
@file_option
@verbose_option
def write_command(  # 9 parameters: the options of the verb
    name: str,
    reference: Path | None,
    output: Path,
    case_id: str | None,
    commit: str,
    update: bool,
    references: Path | None,
    tier: str,
    case_file: Path,
) -> None:
    """Measure limits for CASE on the trusted side, and put them into a threshold file.

    REFERENCE is its recording; default the stored one. The case generates freely under every
    harmless change that the noise floor knows, and the limits come from how far that takes it.
    Other cases of the file stay as they are.
    """
    from truestep.errors import UsageError
    from truestep.gates.thresholds.file import CASES, Thresholds, read, write
    from truestep.gates.thresholds.writing import calibrated, refuse
    from truestep.recording.format import Recording
    from truestep.replay.check import check_pipeline
    from truestep.runtime.loading import load

    ((_, case),) = choose_cases((name,), case_file=case_file, prompt=None, tier=tier).items()
    key = case_id or name
    existing = read(output) if output.exists() else Thresholds(output.name, {CASES: {}})
    if key in existing.cases and not update:
        raise UsageError(
            f"the file has limits of case {key!r}",
            where=str(output),
            hint="--update  # replaces them; --as ID writes beside them",
        )
    path = reference or find_reference(name, case, references=references, tier=tier)
    recording = Recording.open(path)
    refuse(recording)
    pipe = load(case)
    same = check_pipeline(pipe, recording, case=case)
    if not same.verdict.passed:
        raise UsageError(
            "the model does not give what its reference holds: its noise is not the reference's",
            where=str(path),
            measured=same.sentence,
            likely="another version of the model or of a library, or another machine",
            hint="truestep check CASE",
        )
    with progress_bar() as progress:
        found = calibrated(pipe, recording, commit=commit, progress=progress)
    write(output, existing.with_case(key, found.entry))
    cells = [("metric", "worst benign", "limit")]
    cells += [(m, f"{found.floor[m]:.6g}", f"{limit:.6g}") for m, limit in found.limits.items()]
    lint = f"truestep gate thresholds lint {quoted(str(output))} --case {quoted(key)}"
    print_screen(
        f"WRITTEN {key}: limits from {found.runs} benign free runs; clip is not written: no CLIP "
        "weights here",
        rows(aligned(cells), "limits"),
        ending=[f"thresholds: {output}", f"next: {lint} --reference {quoted(str(path))}"],
    )


def _case(name: str | None, *, case_file: Path, tier: str) -> Case | None:
    """The case of that name, if the case file has one."""
    from truestep.case import load_cases

    if name is None or not case_file.exists():
        return None
    return load_cases(case_file, tier=tier).get(name)


def _entry(cases: object, name: str, case: Case | None) -> str:
    """Name of the case's entry in the threshold file."""
    import difflib

    from truestep.errors import UsageError

    known = list(cases)  # type: ignore[call-overload]
    for key in (name, case.id if case is not None else name):
        if key in known:
            return str(key)
    near = difflib.get_close_matches(name, known, n=1)
    raise UsageError(
        f"the threshold file has no case {name!r}",
        measured=f"it holds: {', '.join(known[:20]) or 'none'}",
        likely=f"did you mean {near[0]!r}?" if near else "",
    )


def _decoded(path: Path) -> Tensors:
    from truestep.errors import UsageError
    from truestep.gates.thresholds.rule import FRAMES
    from truestep.gates.thresholds.running import decoded
    from truestep.recording.readers import load

    tensors = decoded(load(path, label="reference").tensors)
    if FRAMES not in tensors or tensors[FRAMES].ndim != 5 or tensors[FRAMES].shape[1] != 3:
        raise UsageError(
            "there are no decoded frames to damage",
            where=str(path),
            measured=f"needed: {FRAMES}, b c f h w with 3 channels, in [-1, 1]",
            hint="record the case with its frames: truestep record",
        )
    return tensors


def _sample_rate(path: Path) -> int | None:
    """Hz, of a recording's sound; None where the file says none."""
    from truestep.measure.sound import sample_rate_of
    from truestep.recording.readers import load

    manifest = load(path, label="reference").manifest
    return sample_rate_of(manifest.settings) if manifest else None


def _check_sides(reference: Tensors, other: Tensors | None) -> None:
    """Refuse another seed that is of another size."""
    from truestep.errors import UsageError

    for key, tensor in reference.items():
        if other is not None and key in other and other[key].shape != tensor.shape:
            raise UsageError(
                f"{key} of the other seed has another shape",
                measured=f"{tuple(other[key].shape)} against {tuple(tensor.shape)}",
                likely="it is of another case, not of another seed",
            )


def _other(path: Path | None, case: Case | None, *, stand_in: bool) -> Tensors | None:
    """What another seed gives: recorded, or generated where there is a case."""
    if stand_in:
        return _stand_in(seed=1)
    if path is not None:
        return _decoded(path)
    return None if case is None else _generated(case.replace(seed=case.seed + 1))


def _stand_in(*, seed: int) -> Tensors:
    from truestep.case import Case

    prompt = "a red three moving left"
    return _generated(Case(model="builtin:digits", prompt=prompt, steps=20, seed=seed))


def _generated(case: Case) -> Tensors:
    from truestep.gates.thresholds.running import free_run
    from truestep.runtime.loading import load

    return free_run(load(case))


def _print(found: Lint) -> None:
    """The findings one can grep, each kind once; what was tried under -v."""
    sentence = found.sentence.removeprefix("FAILED ").removeprefix("PASSED ")
    head = f"{'FAILED' if found.findings else 'PASSED'} {sentence}"
    groups = facts(
        [(group[0].kind, _told(group)) for group in _groups(found)], most=None if verbose() else 2
    )
    listed = [Entries(groups.lines, "findings")]
    if found.tried:
        # what it was tried on decides what the findings are worth: it stands before them
        tried = [("tried", ", ".join(found.tried))]
        tried += [("not tried", reason) for reason in found.not_tried]
        stand_in = facts([("tried on", found.tried_on)], most=2)
        known = facts(tried if verbose() else tried[:1], most=None if verbose() else 2)
        listed = [stand_in, *listed, known]
    print_screen(head, *listed, ending=[f"repeat: {found.repeat}"], exit_code=bool(found.findings))


def _groups(found: Lint) -> list[list[Finding]]:
    """Findings that say the same of several cases, together; in order of the first of each."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in found.findings:
        groups.setdefault((finding.kind, finding.damage or finding.text), []).append(finding)
    return list(groups.values())


def _told(group: list[Finding]) -> str:
    """One finding, or the first of several with their number and the names of some."""
    first, rest = group[0], [finding.case for finding in group[1:]]
    if not rest:
        return f"{first.case}: {first.text}"
    names = listed(rest, MAX_NAMES)
    if first.damage:  # each by its own numbers
        return f"{len(group)} cases: {first.case}: {first.text}; likewise {names}"
    return f"{len(group)} cases: {first.text}: {first.case}, {names}"
