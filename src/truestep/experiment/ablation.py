"""Ablation: which control accounts for how much of the distance between two profiles."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from truestep.case import Case
from truestep.controls import NAMES, differences, profiles
from truestep.environment import library_version, usable_device
from truestep.errors import CaseError, UsageError, surviving
from truestep.experiment.ablation_records import Ablation, EndRun, Matrix, MatrixCell, Switch
from truestep.experiment.attribution import (
    attribute,
    choices,
    end_run,
    leading_controls,
    matrix_sentence,
    reason,
    sentence,
    stage_distances,
)
from truestep.judge.floor import Limits, free_running, pair_of
from truestep.judge.rows import compare_tensors
from truestep.keys import FINALS
from truestep.measure.distance import same_bits
from truestep.recording.format import Recording
from truestep.replay.capture import Capture
from truestep.replay.check import check_pipeline
from truestep.replay.record import record_pipeline
from truestep.runtime.audio_video import perturbed_blocks, wanted_passes
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Pipeline, generate
from truestep.turns import taking_turns
from truestep.verdict import Verdict

if TYPE_CHECKING:
    import torch

    from truestep.experiment.ablation_records import Choice
    from truestep.progress import Progress


@taking_turns()
@surviving("the model")
def ablate(
    case: Case, *, reference: str, candidate: str, progress: Progress | None = None
) -> Ablation:
    """Attribute the distance between two profiles to the controls in which they differ.

    The case runs with the reference profile, recorded with its noise floor; with one control at a
    time switched to the candidate's value; with the controls switched one after the other and
    kept; and with the candidate profile, on a model that is loaded anew.

    Args:
        case: Of an LTX-2 model. Controls that it sets itself are not switched.
        reference, candidate: The two profiles.
        progress: Told (what, done, total).

    Returns:
        The ablation; `explained` says whether all switches together are the candidate bit for bit.

    Raises:
        UsageError: A profile is unknown, or both are one.
        CaseError, ModelLoadError: The case cannot run with one of the profiles.
    """
    found = differences(reference, candidate)
    if reference == candidate:
        raise UsageError(
            f"both profiles are {reference!r}: there is nothing to switch",
            hint="truestep show profile",
        )
    base, other = case.replace(profile=reference), case.replace(profile=candidate)
    switched, kept = choices(found, own_controls(case))
    to = {choice.control: found[choice.control][1].value for choice in switched}
    alone = [base.replace(**{name: value}) for name, value in to.items()]
    together = [base.replace(**dict(list(to.items())[: at + 1])) for at in range(len(to))]
    trusted = load(base)
    runs = _Runs(trusted, base, [*alone, *together, other])
    runs.record(progress)
    switches, last = [], runs.tensors(base, whole=True) if not to else {}
    for at, choice in enumerate(switched):
        if progress:
            progress(f"ablate: {choice.control}", at, len(switched) + 1)
        final = at == len(switched) - 1
        made = runs.tensors(together[at], whole=True) if final else {}
        switches.append(_switch(runs, choice, alone[at], together[at], tuple(to)[: at + 1], made))
        last = made or last
    whole, end = _afresh(runs, other)
    if progress:
        progress("ablate: both profiles", len(switched) + 1, len(switched) + 1)
    mismatch = first_difference(last, whole)
    attributions = attribute(switches, end)
    manifest = runs.recording.manifest
    return Ablation(
        tool_version=library_version("truestep") or "",
        sentence=sentence(reference, candidate, switches, end, attributions, mismatch=mismatch),
        reference=reference,
        candidate=candidate,
        case_id=base.id,
        case=base.canonical(),
        order=tuple(to),
        switches=tuple(switches),
        whole=end,
        attributions=attributions,
        kept=kept,
        explained=not mismatch,
        compared=len(whole),
        mismatch=mismatch,
        rule=runs.rule,
        floor_runs=len(manifest.noise_floor.runs) if manifest.noise_floor else 0,
        forwards=runs.forwards,
        environment=dict(manifest.environment),
        notes=manifest.notes,
    )


@taking_turns()
@surviving("the model")
def compare_profiles(case: Case, *, progress: Progress | None = None) -> Matrix:
    """Measure how far the profiles are from each other, each with its own noise floor.

    Args:
        case: Of an LTX-2 model. Controls that it sets itself are the same in all profiles.
        progress: Told (what, done, total).

    Raises:
        CaseError, ModelLoadError: The case cannot run with two profiles at least.
    """
    cases = {name: case.replace(profile=name) for name in profiles()}
    pipe = load(next(iter(cases.values())))
    left_out: dict[str, str] = {}
    refused: CaseError | None = None
    for name, own in list(cases.items()):
        try:
            _prepared(pipe, own)
        except CaseError as error:
            left_out[name], refused = error.what, refused or error
            del cases[name]
    if len(cases) < 2 and refused is not None:
        raise refused
    ends: dict[str, Mapping[str, torch.Tensor]] = {}
    known: dict[str, _Runs] = {}
    for done, (name, own) in enumerate(cases.items()):
        if progress:
            progress("profiles", done, len(cases))
        known[name] = runs = _Runs(pipe, own, [])
        runs.record(None)
        ends[name] = {key: runs.recording[key] for key in FINALS}
    cells = []
    for name, runs in known.items():
        singles = _singles(runs, name, [n for n in cases if n != name], case)
        for other in cases:
            if other != name:
                cells.append(
                    MatrixCell(
                        reference=name,
                        candidate=other,
                        run=runs.judged(tuple(singles[other]), ends[other], dtype=case.dtype),
                        leading=leading_controls(singles[other]),
                    )
                )
    if progress:
        progress("profiles", len(cases), len(cases))
    first = next(iter(known.values())).recording.manifest
    return Matrix(
        tool_version=library_version("truestep") or "",
        sentence=matrix_sentence(cells, tuple(cases)),
        case_id=case.id,
        case=case.canonical(),
        profiles=tuple(cases),
        cells=tuple(cells),
        left_out=left_out,
        kept=tuple(name for name, value in own_controls(case).items() if value is not None),
        environment=dict(first.environment),
        notes=first.notes,
    )


def own_controls(case: Case) -> dict[str, Any]:
    """What a case itself says of each control; None where it leaves it to the profile."""
    return {name: getattr(case.settings, name) for name in NAMES}


def first_difference(
    actual: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
) -> str:
    """Name of the first tensor of two runs that differs in a bit or is on one side only."""
    for name in dict.fromkeys([*reference, *actual]):
        own, theirs = actual.get(name), reference.get(name)
        if own is None or theirs is None or not same_bits(own, theirs):
            return name
    return "" if reference else "no tensor was compared"


class _Runs:
    """Runs of one loaded model against the recording of its reference profile."""

    def __init__(self, pipe: Pipeline, base: Case, later: Sequence[Case]) -> None:
        self.pipe, self.base = pipe, base
        self.rule, self.forwards = "", 0
        for case in (base, *later):  # what cannot be is said before any forward
            _prepared(pipe, case)

    def record(self, progress: Progress | None) -> None:
        """Record the reference profile with the noise floor of its stages and of a free run."""
        own = _prepared(self.pipe, self.base)
        self.recording: Recording = record_pipeline(
            own, case=self.base, floor="final", progress=progress
        )
        self.forwards += own.forwards

    def tensors(self, case: Case, *, whole: bool = False) -> dict[str, torch.Tensor]:
        """A free run: its final latents, or the whole of it with frames and sound."""
        own, capture = _prepared(self.pipe, case), Capture()
        generate(own, observer=capture, output="frames" if whole else "latent")
        self.forwards += own.forwards
        if whole:
            return capture.tensors
        return {name: capture.tensors[name] for name in FINALS}

    def judged(
        self, controls: Sequence[str], tensors: Mapping[str, torch.Tensor], *, dtype: str
    ) -> EndRun:
        """Final latents against the reference's, by the floor of a free run."""
        rows = compare_tensors(
            {name: tensors[name] for name in FINALS},
            {name: self.recording[name] for name in FINALS},
            limits=Limits(
                free_running(self.recording.manifest.noise_floor), pair_of(dtype, self.base.dtype)
            ),
        )
        return end_run(controls, rows, Verdict.worst(row.verdict for row in rows))


def _prepared(pipe: Pipeline, case: Case) -> Pipeline:
    """The loaded models with the settings of another case, as loading it would give them."""
    own = replace(
        pipe,
        settings=case.run_settings(),
        scheduler=copy.deepcopy(pipe.scheduler),
        controls=None,
        forwards=0,
    )
    own.prepare(own)
    own.scheduler = copy.deepcopy(pipe.scheduler)  # prepared again by the run itself
    return own


def _switch(
    runs: _Runs,
    choice: Choice,
    alone: Case,
    together: Case,
    controls: tuple[str, ...],
    made: Mapping[str, torch.Tensor],
) -> Switch:
    """One control: its stages in isolation, its free run, and that with all before it."""
    own = _prepared(runs.pipe, alone)
    stages = check_pipeline(own, runs.recording, case=runs.base, candidate=alone)
    runs.forwards += own.forwards
    runs.rule = stages.rule.text
    first = alone.id == together.id
    free = made if first and made else runs.tensors(alone)
    end = runs.judged((choice.control,), free, dtype=alone.dtype)
    after = end
    if not first:
        after = runs.judged(controls, made or runs.tensors(together), dtype=together.dtype)
    same = end.verdict.passed and stages.verdict.passed
    return Switch(
        choice=choice,
        stages_verdict=stages.verdict,
        stages_sentence=stages.sentence,
        first=stages.first_divergence,
        stages=stage_distances(stages.rows),
        alone=end,
        together=after,
        reason=reason(choice.control, _facts(runs, alone)) if same else "",
    )


def _facts(runs: _Runs, case: Case) -> dict[str, Any]:
    """What the reasons depend on."""
    scale = case.guidance_scale
    controls = [_prepared(runs.pipe, each).controls for each in (runs.base, case)]
    passes = [(wanted_passes(scale, c), perturbed_blocks(c)) for c in controls if c is not None]
    return {
        "image": case.settings.image is not None,
        "dtype": case.dtype,
        "clips": case.settings.videos_per_prompt or 1,
        "device": usable_device(case.settings.device),
        "same_passes": passes[0] == passes[-1],
    }


def _afresh(runs: _Runs, case: Case) -> tuple[dict[str, torch.Tensor], EndRun]:
    """The candidate profile itself, on a model loaded anew."""
    pipe, capture = load(case), Capture()
    generate(pipe, observer=capture, output="frames")
    runs.forwards += pipe.forwards
    return capture.tensors, runs.judged((), capture.tensors, dtype=case.dtype)


def _singles(
    runs: _Runs, name: str, others: Sequence[str], case: Case
) -> dict[str, dict[str, EndRun]]:
    """Free runs of single switches towards other profiles, each switch run once."""
    known: dict[tuple[str, Any], EndRun] = {}
    found: dict[str, dict[str, EndRun]] = {}
    for other in others:
        cells = differences(name, other)
        switched, _ = choices(cells, own_controls(case))
        found[other] = {}
        for choice in switched:
            key = (choice.control, cells[choice.control][1].value)
            if key not in known:
                changed = runs.base.replace(**dict([key]))
                known[key] = runs.judged(
                    (choice.control,), runs.tensors(changed), dtype=changed.dtype
                )
            found[other][choice.control] = known[key]
    return found
