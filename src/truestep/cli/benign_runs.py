"""More benign runs for the noise floors of references: `truestep record --runs N`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from truestep.cli.cases import find_reference
from truestep.cli.common import Told, progress_bar, verbose

if TYPE_CHECKING:
    from truestep.call_case import CallCase
    from truestep.case import AnyCase, Case
    from truestep.floors import NoiseFloor
    from truestep.recording.format import Recording
    from truestep.recording.store import Store
    from truestep.replay.calibration import Calibration
    from truestep.verdict import Comparison


def add_runs(
    cases: dict[str, AnyCase],
    runs: int,
    store: Store,
    told: Told,
    *,
    reference: Path | None,
    tier: str,
) -> None:
    """Tighten the noise floors of references: run harmless changes, measure the false alarms.

    Runs on the trusted side only: the model must still give what the reference holds. The benign
    runs are added to the reference; its tensors stay as they are.

    Raises:
        UsageError: A model gives something else.
        ReferenceNotFoundError: A case has no reference.
    """
    from truestep.case import Case
    from truestep.errors import UsageError
    from truestep.recording.format import Recording
    from truestep.recording.store import place_of

    if reference is not None and len(cases) != 1:
        raise UsageError(f"--reference takes one case, {len(cases)} were chosen")
    for name, case in cases.items():
        path = reference or find_reference(name, case, references=store.root, tier=tier)
        recording = Recording.open(path)
        if isinstance(case, Case):
            floor, lines = _of_stages(case, recording, path, runs)
        else:
            floor, lines = _of_calls(case, recording, path, runs)
        manifest = recording.manifest.model_copy(update={"noise_floor": floor})
        updated = Recording.in_memory(dict(recording), manifest)
        if reference is not None:
            updated.save(path)
        else:
            path = store.save(updated, place_of(updated, tier=tier), update=True)
        head = f"CALIBRATED {name}: {runs} benign runs added"
        told.say([head, *lines], ending=[f"reference: {path}"])


def _refuse(same: Comparison, path: Path) -> None:
    from truestep.errors import UsageError

    if not same.verdict.passed:
        raise UsageError(
            "the model does not give what its reference holds: it cannot calibrate it",
            where=str(path),
            measured=same.sentence,
            likely="another version of the model or of a library, or another machine",
            hint="truestep check CASE",
        )


def _of_stages(
    case: Case, recording: Recording, path: Path, runs: int
) -> tuple[NoiseFloor, list[str]]:
    """The floor of a case of truestep's stages, and what is said of the runs."""
    from truestep.floors import NoiseFloor
    from truestep.replay.calibration import calibrate
    from truestep.replay.check import check_pipeline
    from truestep.runtime.loading import load

    pipe = load(case)
    _refuse(check_pipeline(pipe, recording, case=case), path)
    before = recording.manifest.noise_floor or NoiseFloor()
    with progress_bar() as progress:
        found = calibrate(pipe, recording, before, runs=runs, progress=progress)
    return found.floor, _told(found)


def _of_calls(
    case: CallCase, recording: Recording, path: Path, runs: int
) -> tuple[NoiseFloor, list[str]]:
    """Likewise of a case of any pipeline's calls."""
    from truestep.engines.diffusers import more_runs
    from truestep.floors import NoiseFloor
    from truestep.judge.alarms import false_alarms

    before = recording.manifest.noise_floor or NoiseFloor()
    with progress_bar() as progress:
        same, new = more_runs(case, recording, runs=runs, progress=progress)
    _refuse(same, path)
    dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in recording.items()}
    flagged, below = false_alarms(before, new, dtypes)
    floor = before.model_copy(update={"runs": (*before.runs, *new)})
    return floor, _alarms(flagged, len(new), below)


def _told(found: Calibration) -> list[str]:
    """What the runs say; with -v of every stage."""
    lines = ["  stage       runs  needed  floor    x floor  before  spread  outcomes"]
    lines += [
        f"  {row.stage:<10}  {row.runs:4d}  {row.needed or '-':>6}  {row.floor:.1e}  "
        f"{row.bound:7.3g}  {row.before:6.3g}  {row.spread:6.0%}  {row.outcomes}"
        for row in found.stages
    ]
    return (lines if verbose() else []) + _alarms(found.flagged, found.added, found.flagged_below)


def _alarms(flagged: int, runs: int, below: float) -> list[str]:
    from truestep.judge.rule import RATE
    from truestep.text import wrapped

    text = f"{flagged} of {runs} benign runs, each judged by the others: below {below:.1%} "
    return [
        *wrapped("false alarms", text + "with 95 % confidence"),
        f"  bounds are made for 1 false alarm in {1 / RATE:,.0f} checks",
    ]
