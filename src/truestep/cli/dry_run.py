"""`--dry-run` of record and check: what they would take, and whether it is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from truestep.cli.common import print_screen
from truestep.screen import Entries
from truestep.text import say, visible, wrapped

if TYPE_CHECKING:
    from truestep.case import AnyCase
    from truestep.engines.needs import Estimate, Needs
    from truestep.recording.manifest import Keep
    from truestep.replay.record import FloorChoice

Verb = Literal["record", "check"]

LARGE = 1_000_000_000
"""Bytes of weights from which on a recording begins with what it takes."""


@dataclass(frozen=True)
class Written:
    """What would be written.

    Attributes:
        target: Where.
        keep: Which steps are kept.
        floor: Which noise floor is measured.
        tensors: Whether the tensors are kept, of which alone it is told how large they are.
    """

    target: Path
    keep: Keep = ()
    floor: FloorChoice = "steps"
    tensors: bool = True

    def every(self, case: AnyCase) -> bool:
        """Whether every step of a case is kept."""
        from truestep.engines.subjects import keeps_every_step

        return keeps_every_step(case, self.floor, self.keep)

    def lacking(self, told: Estimate, case: AnyCase) -> tuple[int, int] | None:
        """Bytes that it takes and that are free, where those are too few."""
        from truestep.engines.needs import free_disk

        takes = told.whole if self.every(case) else told.recording
        there = free_disk(self.target)
        return (takes, there) if self.tensors and takes > there else None


def dry_run(
    cases: Mapping[str, AnyCase],
    verb: Verb,
    written: Written | None = None,
    *,
    from_disk: bool,
    low_memory: bool,
    change: str | None,
) -> int:
    """Say what cases take.

    Args:
        cases: By name.
        from_disk, low_memory: Where weights would be.
        verb: Whose needs are held against what is there.
        written: The recording that would be.
        change: What is applied to the pipeline; it is not run.

    Returns:
        Exit code: 2 where something is too little.
    """
    from truestep.engines.needs import estimate

    entries: list[list[str]] = []
    lacks = False
    for name, case in cases.items():
        told = estimate(case, from_disk=from_disk, low_memory=low_memory)
        problems = [f"PROBLEM   {problem}" for problem in _problems(told, verb, case, written)]
        lacks = lacks or bool(problems)
        every = written is not None and written.every(case)
        if len(cases) == 1:
            entries += [wrapped("", line) for line in (*problems, *_lines(told, every))]
            continue
        needs = _needs(told.record if verb == "record" else told.check)
        entries.append(wrapped("", f"{name}: {verb} {'; '.join([needs, *problems])}", indent=2))
    which = next(iter(cases)) if len(cases) == 1 else f"{len(cases)} cases"
    note = f"note: all of it without --apply {change}, which was not run"
    head = f"DRY RUN {which}: nothing was computed{'; there is too little room' * lacks}"
    print_screen(head, Entries(entries), ending=[note] if change is not None else [])
    return 2 if lacks else 0


def foresee(
    name: str, case: AnyCase, written: Written, *, from_disk: bool, low_memory: bool
) -> None:
    """Before a large model is recorded: say what it takes, and refuse what finds no room.

    Raises:
        WriteError: The recording is larger than what is free on its disk.
    """
    from truestep.engines.needs import estimate
    from truestep.errors import UsageError, WriteError
    from truestep.runtime.loading import folder_of

    if sum(file.stat().st_size for file in folder_of(case).rglob("*.safetensors")) < LARGE:
        return
    try:
        told = estimate(case, from_disk=from_disk, low_memory=low_memory)
    except UsageError:  # it cannot be foretold; it may well be recorded
        return
    takes = f"{_needs(told.record)}{_written(told, written.every(case))}"
    say(f"{visible(name)}: {takes}", err=True)
    for problem in _problems(told, "record", case, None):
        say(f"PROBLEM   {problem}", err=True)
    lacking = written.lacking(told, case)
    if lacking:
        raise WriteError(
            "there is no room for the recording",
            where=str(written.target),
            measured=f"it is of {amount(lacking[0])}, {amount(lacking[1])} are free",
            hint="give --references a folder on a larger disk",
        )


def _lines(told: Estimate, every: bool) -> Iterator[str]:
    parts = ", ".join(
        f"{part} {amount(size)}"
        for part, size in sorted(told.weights.items(), key=lambda item: -item[1])
        if size >= 0.01 * sum(told.weights.values())
    )
    total = amount(sum(told.weights.values()))
    yield f"weights   {total}, most of them {told.dtype}: {parts}"
    yield (
        f"one run   {told.steps} steps, {told.forwards} forwards, {operations(told.flops)} "
        "floating-point operations"
    )
    for label, needs in (
        ("generate", told.generation),
        ("record", told.record),
        ("check", told.check),
    ):
        yield f"{label:<9} {_needs(needs)}{_written(told, every) if label == 'record' else ''}"


def amount(size: float) -> str:
    """Bytes in words: `6.7 GB`."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"


def operations(count: float) -> str:
    """Operations in words: `1.3 peta`."""
    for factor, unit in ((1e15, "peta"), (1e12, "tera"), (1e9, "giga"), (1e6, "mega")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """Seconds in words: `3.2 h`."""
    for factor, unit in ((86_400.0, "days"), (3_600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * factor:
            return f"{seconds / factor:.2g} {unit}"
    return f"{seconds:.2g} s"


def _needs(needs: Needs) -> str:
    device = f" and {amount(needs.device)} of the accelerator's" if needs.device else ""
    return f"at least {duration(needs.seconds)}, about {amount(needs.memory)} of memory{device}"


def _written(told: Estimate, every: bool) -> str:
    if every:
        return f", {amount(told.whole)} on disk"
    more = f", {amount(told.whole)} with --keep all" if told.whole > 1.1 * told.recording else ""
    return f", {amount(told.recording)} on disk{more}"


def _problems(told: Estimate, verb: Verb, case: AnyCase, written: Written | None) -> list[str]:
    """What is too little here."""
    from truestep.engines.needs import free_device_memory, free_memory

    needs = told.record if verb == "record" else told.check
    found = []
    there = free_memory()
    if there is not None and needs.memory > there:
        text = f"{verb} takes {amount(needs.memory)} of memory, {amount(there)} are free"
        found.append(f"{text}; --from-disk leaves weights in their files")
    device = free_device_memory("cuda") if needs.device else None
    if device is not None and needs.device > device:
        found.append(
            f"{verb} takes {amount(needs.device)} of the accelerator's memory, "
            f"{amount(device)} are free"
        )
    lacking = written.lacking(told, case) if written else None
    if lacking:
        found.append(
            f"the recording is of {amount(lacking[0])}, {amount(lacking[1])} of disk are free"
        )
    return found
