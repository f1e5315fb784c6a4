"""Everything of a subject raised to a higher precision for a while.

Rounding in 16 bits hides faults of up to a percent. The same calls on the same inputs in float32 do
not: weights keep their values, so the candidate's own code runs; only the noise goes. The code
between calls computes in float32 too, as it is handed float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch

from truestep.calls.classes import Kind
from truestep.calls.forcing import Forcing
from truestep.calls.recording import CallRecording, key, placed_trees
from truestep.calls.seen import Forced, Plan, Seen
from truestep.calls.subject import Subject
from truestep.calls.values import tensors
from truestep.floors import EPSILON
from truestep.keys import PRECISIONS
from truestep.measure.distance import same_bits
from truestep.pairing.naming import runs_compiled
from truestep.recording.table import table_entry
from truestep.runtime.precision import HIGHER, converted


@contextmanager
def raised(subject: Subject, precision: str, note: Callable[[str], None]) -> Iterator[None]:
    """Raise the weights of a subject's modules; on leaving, every weight is what it was.

    Args:
        precision: `float32` or `float64`.
        note: Told of a component that stays as it is, and why.
    """
    with ExitStack() as stack:
        for name, component in subject.components.items():
            if runs_compiled(component):
                note(f"{name} is compiled, and was not raised to {precision}")
            elif isinstance(component, torch.nn.Module):
                stack.enter_context(converted(component, getattr(torch, precision)))
        yield


def working_dtype(reference: CallRecording) -> str:
    """Dtype that rounds most of the models that predict; without any, of the first with weights."""
    models = [call for call in reference.calls if call.kind == "model" and call.dtype]
    predicting = {call.dtype for call in models if call.stage == "prediction"}
    dtypes = sorted(predicting) or [call.dtype for call in models[:1]]
    return max(dtypes, key=lambda dtype: EPSILON.get(dtype, 0.0), default="float32")


def narrow(reference: CallRecording) -> str | None:
    """Precision that a reference is judged in beside its own; None of 32 bits and more."""
    dtype = working_dtype(reference)
    return HIGHER.get(dtype) if EPSILON.get(dtype, 0.0) > EPSILON["float32"] else None


def recorded_precision(reference: CallRecording) -> str:
    """Precision in which a recording has its calls beside their own, if so."""
    prefixes = {name.partition("/")[0] for name in reference.recording}
    return next((p for p in PRECISIONS if p in prefixes), "")


def without_unraised(reference: CallRecording, result: Forced, precision: str) -> list[int]:
    """Leave out what models gave, raised, at steps of which nothing raised was recorded.

    Args:
        reference: Raised at the steps at which models were run for it, and at no others.
        result: Of a run in that precision; it is left out of what was seen.
        precision: The one that the reference holds.

    Returns:
        The steps at which something was left out.
    """
    models = {
        (call.stage, call.step, call.component, call.method, call.call): call
        for call in reference.calls
        if call.kind == str(Kind.MODEL) and call.step is not None and not call.live
    }
    made = {
        call.step
        for call in models.values()
        for side, place, tree in placed_trees(call)
        for path, _ in tensors(tree)
        if side == "out" and str(key(call, side, (*place, *path), precision)) in reference.recording
    }

    def unraised(seen: Seen) -> bool:
        place = seen.key
        call = (place.stage, place.step, place.component, place.method, place.call)
        return place.side == "out" and place.step not in made and call in models

    steps = {seen.key.step for seen in result.seen if unraised(seen)}
    result.seen = [seen for seen in result.seen if not unraised(seen)]
    return sorted(step for step in steps if step is not None)


def widened(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A recorded tensor as a raised run hands it on: whole numbers stay what they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def with_raised(
    subject: Subject, reference: CallRecording, plan: Plan, note: Callable[[str], None]
) -> CallRecording:
    """A recording with what the calls of its subject give in the higher precision, too.

    What only has another dtype there is not kept again; see `widened`.

    Args:
        subject: What was recorded.
        plan: Which calls of models are made; raised to the precision of `narrow`.
        note: See `raised`.
    """
    precision = narrow(reference)
    if precision is None:
        return reference
    with raised(subject, precision, note):
        plan = replace(plan, precision=getattr(torch, precision), raised=precision)
        result = Forcing(reference, plan).run(subject)
    if result.raised:
        note(f"not judged in {precision}: the subject {result.raised}")
        return reference
    manifest = reference.recording.manifest
    dtype = getattr(torch, precision)
    more = {
        str(seen.key): seen.actual
        for seen in result.seen
        if seen.actual is not None and isinstance(seen.recorded, str) and not seen.odd
        if not same_bits(seen.actual, widened(reference.recording[seen.recorded], dtype))
    }
    entries = [
        table_entry(
            str(seen.key),
            seen.actual,
            len(manifest.tensors) + index,
            kind=seen.key.stage,
            step=seen.key.step,
            branch=seen.context,
        )
        for index, seen in enumerate(result.seen)
        if str(seen.key) in more and seen.actual is not None
    ]
    table = {entry.name: entry for entry in (*manifest.tensors, *entries)}
    return reference.with_manifest(
        manifest.model_copy(update={"tensors": tuple(table.values())}), more
    )
