"""Run a subject freely, nothing forced, and set what it ends with against what was recorded.

The end is what the last step of every scheduler gives; of a run without steps, what it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from truestep.calls.boundaries import FUNCTIONS, Arrival, watching
from truestep.calls.classes import STEP, Kind
from truestep.calls.forcing import copy_of
from truestep.calls.keys import Key
from truestep.calls.pairing import matched
from truestep.calls.recorder import RUN
from truestep.calls.recording import CallRecording
from truestep.calls.seen import END, Forced, Plan, Seen
from truestep.calls.subject import Subject
from truestep.calls.values import tensors
from truestep.errors import FOREIGN, TruestepError, one_line
from truestep.recording.manifest import CallEntry


def run_freely(subject: Subject, reference: CallRecording, plan: Plan | None = None) -> Forced:
    """Run a subject once, as it runs by itself; what it raises is part of what it shows.

    Args:
        subject: What runs.
        reference: What its end is set against.
        plan: Of a benign run: random numbers are the recorded ones, in its precision, changed by
            what it hands on.
    """
    return run_watched(subject, reference, Ends(reference, plan))


def run_watched(subject: Subject, reference: CallRecording, ends: Ends) -> Forced:
    """Run a subject freely, its calls told to an observer that keeps what it ends with."""
    result = Forced()
    try:
        with subject.code(), watching(subject, ends, reference.methods):
            output = subject.run()
    except TruestepError:
        raise
    except FOREIGN as error:  # whatever a candidate raises is its outcome
        result.raised = f"raised {one_line(error)}"
    else:
        ends.keep((RUN, RUN), output)
        result.missing = [call for call in ends.calls.values() if _method(call) not in ends.seen]
    result.seen = [seen for method in ends.calls for seen in ends.seen.get(method, ())]
    return result


def run_twice(subject: Subject, reference: CallRecording) -> Forced:
    """Run a subject freely two times: the second shows what the first one left behind."""
    first, second = (run_freely(subject, reference) for _ in range(2))
    first.again = {str(s.key): s.actual for s in second.seen if s.actual is not None and not s.odd}
    first.raised = first.raised or second.raised
    return first


def other_noise(subject: Subject, reference: CallRecording) -> dict[str, float]:
    """How far ends are from the recorded ones with other noise (what was drawn, in another order),
    by their keys.

    Empty where nothing is drawn in the run, or it fails.
    """
    from truestep.calls.judging import pairs
    from truestep.measure.distance import distance

    if not any(call.kind == Kind.RANDOM for call in reference.calls):
        return {}
    order = torch.Generator().manual_seed(0)

    def shuffled(drawn: torch.Tensor) -> torch.Tensor:
        places = torch.randperm(drawn.numel(), generator=order).to(drawn.device)
        return drawn.reshape(-1)[places].reshape(drawn.shape)

    made = run_freely(subject, reference, Plan(made=lambda call: True, handed=shuffled))
    found = {name: distance(*both) for name, both in pairs(reference, made).items()}
    return {name: each.rel_l2 for name, each in found.items() if not each.nonfinite_actual}


def end_calls(reference: CallRecording) -> list[CallEntry]:
    """Calls that give what a run ends with."""
    last = {
        (component, method): calls[-1]
        for (component, method), calls in reference.by_method.items()
        if method == STEP and (component == FUNCTIONS or calls[-1].kind == Kind.SCHEDULER)
    }
    steps = [call for call in last.values() if any(tensors(call.output))]
    return steps or [reference.calls[-1]]


class Ends:
    """An observer that lets every call be and keeps what the last one of a method gave."""

    def __init__(self, reference: CallRecording, plan: Plan | None) -> None:
        self.reference, self.plan = reference, plan
        self.calls = {_method(call): call for call in end_calls(reference)}
        self.seen: dict[tuple[str, str], Sequence[Seen]] = {}
        self._shapes = reference.shapes
        self._drawn = 0
        self._draws = [call for call in reference.calls if call.kind == Kind.RANDOM]

    def __call__(self, arrival: Arrival) -> Any:
        """Make a call."""
        output = arrival.proceed(*arrival.args, **arrival.kwargs)
        if arrival.kind is Kind.RANDOM:
            return output if self.plan is None else self._recorded_draw(arrival, output, self.plan)
        self.keep((arrival.component, arrival.method), output)
        return output

    def keep(self, method: tuple[str, str], output: Any) -> None:
        """Keep what a call gave, in the place of what an earlier one of the method did."""
        call = self.calls.get(method)
        if call is None:
            return
        matches = matched(output, call.output, self._shapes.__getitem__)
        self.seen[method] = [
            Seen(
                key=Key("output", RUN, END, 0, "out", (call.component, *match.path)),
                context=None,
                actual=copy_of(match),
                recorded=match.recorded,
                odd="shape" if match in matches.odd else "",
                note="of other sizes" if match in matches.odd else "",
            )
            for match in (*matches.alike, *matches.odd)
        ]

    def _recorded_draw(self, arrival: Arrival, output: Any, plan: Plan) -> Any:
        """The recorded random numbers: a change of precision would draw others."""
        number, self._drawn = self._drawn, self._drawn + 1
        if number >= len(self._draws) or not isinstance(output, torch.Tensor):
            return output
        name = next((name for _, name in tensors(self._draws[number].output)), None)
        if name is None or output.is_complex():
            return output
        recorded = self.reference.recording[name]
        if recorded.shape != output.shape:
            return output
        value = recorded.to(output.device, output.dtype, copy=True)
        value = value if plan.handed is None else plan.handed(value)
        in_place = bool(arrival.args) and arrival.args[0] is output
        return output.copy_(value) if in_place else value


def _method(call: CallEntry) -> tuple[str, str]:
    return (call.component, call.method)
