"""A forced run made once more by other instructions, as a processor of another kind has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from truestep.calls.forcing import Forcing
from truestep.calls.instructions import Elsewhere
from truestep.calls.judging import Recorded, pairs
from truestep.calls.recording import CallRecording
from truestep.calls.seen import Forced, Plan, RunRaisedError, Seen
from truestep.calls.subject import Subject
from truestep.floors import NoiseRun
from truestep.judge.rows import measured_run
from truestep.pairing.naming import runs_compiled

Collect = Callable[[str], list[NoiseRun]]


def begun_elsewhere(
    subject: Subject, reference: CallRecording, plan: Plan, elsewhere: Elsewhere
) -> Collect:
    """Tape a forced run and begin to play it in a process with other instructions.

    Every call is given the recorded tensors themselves, so that the other process, too, hands on
    nothing that it made.

    Args:
        subject, reference: The trusted subject and its recording.
        plan: Which calls of models are made.
        elsewhere: Entered; see `Elsewhere`.

    Returns:
        What waits for the run, as the noise of a pair of precisions; nothing where it cannot be
        had, which `elsewhere` has said.
    """
    names = [name for name, part in subject.components.items() if runs_compiled(part)]
    if names:
        elsewhere.refuse(f"{', '.join(names)} is compiled")
        return lambda pair: []
    forced = replace(plan, given=_itself, handed=_itself, copies=True)
    seen: dict[str, Seen] = {}
    recorded: dict[str, torch.Tensor] = {}

    def again() -> Mapping[str, torch.Tensor]:
        result = Forcing(reference, forced).run(subject)
        if result.raised:
            raise RunRaisedError(result.raised)
        for each in result.seen:
            if isinstance(each.recorded, str) and each.actual is not None and not each.odd:
                seen[str(each.key)] = each
        expected = Recorded(reference, seen.values())
        recorded.update((name, expected[name]) for name in seen)
        return {name: each.actual for name, each in seen.items() if each.actual is not None}

    try:
        elsewhere.start(again, recorded)
    except RunRaisedError as error:
        elsewhere.refuse(str(error))

    def collected(pair: str) -> list[NoiseRun]:
        def measured(made: Mapping[str, torch.Tensor]) -> NoiseRun:
            there = [replace(seen[name], actual=tensor) for name, tensor in made.items()]
            both = pairs(reference, Forced(seen=there))
            return measured_run("instructions", elsewhere.detail, pair, both)

        run = elsewhere.run(measured)
        return [] if run is None else [run]

    return collected


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
