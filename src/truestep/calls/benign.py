"""The noise floor of any subject: what harmless changes of a trusted one make of its calls.

Each change runs the subject once, forced. What calls give then differs by their own rounding, what
arrives at them by that of the code between. A change that a subject cannot do is named.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from truestep.calls.batching import NoBatchError, is_measured, with_neighbour
from truestep.calls.boundaries import RANDOM
from truestep.calls.choosing import cached_components
from truestep.calls.elsewhere import begun_elsewhere
from truestep.calls.forcing import Forcing
from truestep.calls.freely import run_freely
from truestep.calls.instructions import Elsewhere
from truestep.calls.judging import pairs
from truestep.calls.keys import key_of
from truestep.calls.precision import raised, recorded_precision, working_dtype
from truestep.calls.recording import CallRecording
from truestep.calls.seen import Forced, Plan, Proceed
from truestep.calls.subject import Subject
from truestep.errors import TruestepError, UsageError
from truestep.floors import FREELY, NoiseFloor, NoiseRun
from truestep.judge.floor import pair_of, repeat_limit
from truestep.judge.refusals import refuse_unsteady
from truestep.judge.rows import measured_run
from truestep.pairing.naming import runs_compiled
from truestep.progress import Progress, silent
from truestep.recording.manifest import CallEntry
from truestep.recording.partial import NOWHERE, Partial
from truestep.runtime.changes import (
    JITTERS,
    OtherFunctions,
    math_kernel,
    one_rounding,
    thread_count,
)
from truestep.runtime.precision import HIGHER
from truestep.turns import taking_turns

Note = Callable[[str], None]

FUNCTIONS = 2
"""Runs with elementary functions of another library."""

BEYOND_OTHERS = 8.0
"""Above this multiple of the largest other benign change, and beyond `MOST`, it is no rounding."""

MOST: Mapping[str, float] = {"batch": 1.0, "functions": 64.0}
"""How far rounding may go in runs of a kind, in multiples of `repeat_limit`; of others as far as it
does. What functions give may be multiplied by a timestep."""


@dataclass(frozen=True)
class Benign:
    """One harmless change.

    Attributes:
        kind, detail: As in the noise floor.
        plan: How the run is forced.
        around: What is changed while it runs.
        alone: Components whose calls did not take the change, and why; filled while it runs.
    """

    kind: str
    detail: str
    plan: Plan
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    alone: dict[str, str] = field(default_factory=dict)


@taking_turns()
def measure(
    subject: Subject,
    reference: CallRecording,
    plan: Plan,
    note: Note,
    progress: Progress | None = None,
    kept: Partial = NOWHERE,
) -> NoiseFloor:
    """Measure the noise floor of a recording on the subject that made it.

    Args:
        subject: The trusted subject.
        reference: Its recording.
        plan: Which calls of models are made.
        note: Told which kind of change could not be made, and why.
        progress: Told (what, done, total) after every run.
        kept: Runs that are finished.

    Raises:
        UsageError: A call gives something else when the same run is made again.
    """
    told = partial(progress or silent, "noise floor")
    dtype = working_dtype(reference)
    runs = _in_precision(subject, reference, plan, dtype, note, told, kept, repeated=True)
    precision = recorded_precision(reference)
    if precision:
        lifted = _lifted(plan, precision)
        with raised(subject, precision, lambda text: None):
            told = partial(progress or silent, f"noise floor in {precision}")
            runs += _in_precision(subject, reference, lifted, precision, note, told, kept)
    return NoiseFloor(runs=tuple(runs))


@taking_turns()
def more(
    subject: Subject,
    reference: CallRecording,
    plan: Plan,
    *,
    runs: int,
    progress: Progress | None = None,
) -> list[NoiseRun]:
    """Further benign runs of a subject that gives what its recording holds: jitter by new seeds.

    Args:
        subject, reference, plan: As of `measure`.
        runs: How many, in each precision that the recording is judged in.
        progress: Told (what, done, total) after every run.
    """
    before = reference.floor or NoiseFloor()
    precision = recorded_precision(reference)
    dtypes = [(working_dtype(reference), plan)]
    dtypes += [(precision, _lifted(plan, precision))] if precision else []
    added: list[NoiseRun] = []
    for dtype, own in dtypes:
        pair = pair_of(dtype, dtype)
        others = [run for run in before.runs if run.pair == pair]
        first = sum(run.kind == "jitter" for run in others)
        lifted = raised(subject, dtype, _nobody) if own is not plan else nullcontext()
        with lifted:
            for benign in jitters(subject, own, range(first, first + runs)):
                made = _run(subject, reference, benign, pair, _nobody)
                added += _of_rounding(made, others, _nobody)
                (progress or silent)("benign runs", len(added), runs * len(dtypes))
    return added


def _lifted(plan: Plan, precision: str) -> Plan:
    return replace(plan, precision=getattr(torch, precision), raised=precision)


def expected(subject: Subject, reference: CallRecording, plan: Plan, *, end: bool) -> int:
    """How many benign runs a floor takes, with those that are given up."""
    dtype, precision = working_dtype(reference), recorded_precision(reference)
    count = len(changes(subject, plan, dtype, _nobody)) + 1  # by other instructions
    if precision:
        count += len(changes(subject, _lifted(plan, precision), precision, _nobody))
    if end:
        count += len(_of_free_runs(subject, dtype, _nobody))
    return count


def _nobody(text: str) -> None:
    """Told, and says nothing."""


def _in_precision(
    subject: Subject,
    reference: CallRecording,
    plan: Plan,
    dtype: str,
    note: Note,
    told: Callable[[int, int], None],
    kept: Partial,
    *,
    repeated: bool = False,
) -> list[NoiseRun]:
    """Runs of every change in one precision, if asked for beginning with the same run again."""
    pair = pair_of(dtype, dtype)
    repeat, *others = changes(subject, plan, dtype, note)
    runs: list[NoiseRun] = []
    said: list[str] = []

    def name(benign: Benign) -> str:
        return f"{pair}: {benign.kind}, {benign.detail}"

    def run(benign: Benign) -> list[NoiseRun]:
        make = partial(_run, subject, reference, benign, pair)
        return kept.runs(name(benign), make, note)

    def collected(tell: Note) -> list[NoiseRun]:
        made = collect(pair)
        for text in said:
            tell(text)
        return made

    with Elsewhere(said.append) as elsewhere:
        if repeated:
            resumed = kept.has(name(repeat))
            with kept.refusing():
                runs += run(repeat)
                refuse_unsteady(runs)
            if resumed:
                _refuse_another(_run(subject, reference, repeat, pair, note))
        there = f"{pair}: {elsewhere.detail}"
        if not kept.has(there):
            collect = begun_elsewhere(subject, reference, plan, elsewhere)
        for done, benign in enumerate(others):
            if not kept.has(name(benign)):  # of those that are made the pace is told
                told(done, len(others) + 1)
            runs += _of_rounding(run(benign), runs, note)
        told(len(others), len(others) + 1)
        runs += kept.runs(there, collected, note)
        told(len(others) + 1, len(others) + 1)
    return runs


def _refuse_another(runs: list[NoiseRun]) -> None:
    """Refuse to go on with a record of a subject that does something else.

    Its weights and classes are the same, and its code may have been changed all the same: in the
    noise floor that change would be noise.
    """
    try:
        refuse_unsteady(runs)
    except UsageError as error:
        raise UsageError(
            "the record that was stopped is not of what is recorded now",
            where=error.where,
            measured=error.measured,
            likely="its weights are the same, and its code was changed",
            hint="--no-resume  # records from the beginning, and replaces it",
        ) from error


def _of_rounding(more: list[NoiseRun], others: Sequence[NoiseRun], note: Note) -> list[NoiseRun]:
    """Runs without components that they changed by more than rounding.

    A row that depends on its neighbours, or draws random numbers for all of them, is no noise, and
    neither is a choice that turned over.
    """
    largest: dict[str, float] = {}
    for run in others:
        for found in run.tensors:
            largest[found.name] = max(found.rel_l2, largest.get(found.name, 0.0))
    kept = []
    for run in more:
        least = MOST.get(run.kind, math.inf) * repeat_limit(run.pair)
        odd = {
            found.name
            for found in run.tensors
            if not found.rel_l2 <= max(least, BEYOND_OTHERS * largest.get(found.name, 0.0))
        }
        of = sorted({key_of(name).component for name in odd})
        if odd:
            note(f"noise floor without {run.kind} ({run.detail}) of {', '.join(of)}: no rounding")
        tensors = tuple(m for m in run.tensors if key_of(m.name).component not in of)
        kept.append(run.model_copy(update={"tensors": tensors}))
    return kept


@taking_turns()
def measure_end(
    subject: Subject, reference: CallRecording, note: Note, kept: Partial = NOWHERE
) -> tuple[NoiseRun, ...]:
    """Measure what harmless changes make of the end of a free run; see `measure`."""
    dtype = working_dtype(reference)
    pair = pair_of(dtype, dtype)
    runs = []
    for benign in _of_free_runs(subject, dtype, note):
        make = partial(_run, subject, reference, benign, pair, by=run_freely)
        for run in kept.runs(f"{pair}: {FREELY}{benign.kind}, {benign.detail}", make, note):
            runs.append(run.model_copy(update={"kind": f"{FREELY}{run.kind}"}))
    return tuple(runs)


def _of_free_runs(subject: Subject, dtype: str, note: Note) -> list[Benign]:
    """The changes but a batch, which is a way to make a recorded call."""
    every = changes(subject, Plan(lambda call: True), dtype, note)
    return [benign for benign in every if benign.kind != "batch"]


def changes(subject: Subject, plan: Plan, dtype: str, note: Note) -> list[Benign]:
    """Every change that this machine can make to a subject, in its working precision."""
    higher = HIGHER.get(dtype)
    listed = [Benign("repeat", "the same run again", plan)]
    if higher:
        lifted = replace(plan, precision=getattr(torch, higher))
        text = f"{dtype} against {higher}"
        listed.append(Benign("precision", text, lifted, lambda: raised(subject, higher, note)))
    current, cores = torch.get_num_threads(), os.cpu_count() or 1
    listed += [
        Benign("threads", f"{current} -> {count} threads", plan, partial(thread_count, count))
        for count in sorted({1, min(2, cores), cores} - {current})
    ]
    listed.append(Benign("attention", "math kernel", plan, math_kernel))
    if not any(map(runs_compiled, subject.components.values())):
        listed += [
            Benign(
                "functions",
                f"exp, sin and their like, seed {seed}",
                plan,
                partial(OtherFunctions, seed),
            )
            for seed in range(FUNCTIONS)
        ]
    listed.append(_in_batch(subject, plan))
    return listed + jitters(subject, plan)


def jitters(subject: Subject, plan: Plan, seeds: Iterable[int] = range(JITTERS)) -> list[Benign]:
    """One rounding on what calls are given, and on what is handed on, by several seeds."""
    listed = []
    for seed in seeds:
        change = rounding(torch.Generator("cpu").manual_seed(seed))
        moved = replace(plan, given=change, handed=change)
        text = f"one rounding on inputs and outputs, seed {seed}"
        listed.append(Benign("jitter", text, moved, lambda c=change: embeddings(subject, c)))  # type: ignore[misc]
    return listed


def _in_batch(subject: Subject, plan: Plan) -> Benign:
    """Every call of a model beside a neighbour, where it takes one and keeps nothing of it."""
    alone: dict[str, str] = {}
    alike = set(subject.components) - cached_components(subject)

    def by(call: CallEntry, proceed: Proceed) -> Proceed:
        if call.kind != "model" or call.component not in alike:
            return proceed

        def made(*args: Any, **kwargs: Any) -> Any:
            try:
                return with_neighbour(proceed, args, kwargs)
            except NoBatchError as error:
                alone.setdefault(call.component, f"{call.method}: {error}")
                return proceed(*args, **kwargs)

        return made

    return Benign("batch", "beside a neighbour", replace(plan, by=by), alone=alone)


def _forced(subject: Subject, reference: CallRecording, plan: Plan) -> Forced:
    return Forcing(reference, plan).run(subject)


def _run(
    subject: Subject,
    reference: CallRecording,
    benign: Benign,
    pair: str,
    note: Note,
    *,
    by: Callable[[Subject, CallRecording, Plan], Forced] = _forced,
) -> list[NoiseRun]:
    """What one change makes of every call; nothing of one that the subject cannot do."""
    try:
        with benign.around():
            result = by(subject, reference, benign.plan)
    except TruestepError:
        raise
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        note(f"noise floor without {benign.kind} ({benign.detail}): {error}"[:200])
        return []
    if result.raised:
        if benign.kind == "repeat":
            raise UsageError(
                "the trusted side cannot be run again",
                measured=result.raised,
                likely="it keeps something from the run before",
                hint="reset it inside what is recorded",
            )
        note(f"noise floor without {benign.kind} ({benign.detail}): {result.raised}"[:200])
        return []
    both = pairs(reference, result)
    if benign.kind == "precision":  # another dtype draws other numbers
        both = {n: sides for n, sides in both.items() if key_of(n).component != RANDOM}
    for name, why in benign.alone.items():
        note(f"noise floor without a batch of two of {name}: {why}")
    both = {n: sides for n, sides in both.items() if key_of(n).component not in benign.alone}
    return [measured_run(benign.kind, benign.detail, pair, both)]


def rounding(generator: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    """Round a tensor once more, where it holds measured numbers; see `is_measured`."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        return one_rounding(tensor, generator) if is_measured(tensor) else tensor

    return change


@contextmanager
def embeddings(subject: Subject, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Pass what is looked up for ids through a change: ids themselves have no neighbours."""
    with ExitStack() as stack:
        for component in subject.components.values():
            if not isinstance(component, torch.nn.Module) or runs_compiled(component):
                continue
            for module in component.modules():
                if isinstance(module, torch.nn.Embedding):
                    handle = module.register_forward_hook(lambda m, i, output: change(output))
                    stack.callback(handle.remove)
        yield
