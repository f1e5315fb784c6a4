"""An experiment's folder: written as results come, readable after any crash.

::

    DIR/plan.json                                what was asked
    DIR/environment.json                         where it ran
    DIR/sources.json                             digests of the user's files that were run
    DIR/<mode>/<cell>/samples.jsonl              one line a generation, flushed
    DIR/<mode>/<cell>/<arm>/<case>.safetensors   final latent and frames
    DIR/recordings/<cell>/<case>.safetensors     the baseline's, uncompiled, with its noise floor
    DIR/<mode>/<cell>/candidate/<case>.check.json
    DIR/result.json, table.md, report.html       the table, made of the above
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter, ValidationError

from truestep.errors import FileFormatError, UsageError, WriteError
from truestep.experiment.records import (
    ArmName,
    Failure,
    Line,
    Plan,
    PlannedCell,
    Remark,
    Repeat,
    Sameness,
    Sample,
)
from truestep.experiment.sources import Sources
from truestep.files import replacing, write_text
from truestep.reading import parse_json, read
from truestep.records import Record
from truestep.text import quoted

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_FREE = ("rounds", "until", "most_rounds", "margin", "expect", "tool_version")
"""What of a plan may be another when one goes on."""

_LINE: TypeAdapter[Sample | Failure | Remark | Repeat] = TypeAdapter(Line)


class Store:
    """The folder of one experiment.

    Args:
        sources: The user's files that are run, which are kept with what they made.
    """

    def __init__(self, folder: str | Path, *, sources: Sources | None = None) -> None:
        self.folder, self.sources = Path(folder), sources

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out. The lock goes with the process, however it ends.

        Raises:
            UsageError: A living process has the folder; the message names it.
            WriteError: The folder cannot be written.
        """
        import fcntl

        path = self.folder / "lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unwritten("the folder", self.folder, error) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise _unwritten("the lock", path, error) from error
                pid = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
                raise UsageError(
                    f"the folder is in use by process {pid or '(unknown)'}",
                    where=str(self.folder),
                    hint="wait for it, or give another --output",
                ) from None
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(handle)

    def begin(self, plan: Plan, *, resume: bool) -> None:
        """Write the plan, or make sure that the one that is there is the same.

        Raises:
            UsageError: There is an experiment already and `resume` is off, there is none to
                resume, or the plan there is another.
        """
        hint = (
            "--resume  # goes on with it; truestep ab recover shows it, another --output keeps it"
        )
        begin(self.folder, plan, self.plan, self.sources, resume=resume, free=_FREE, hint=hint)

    def plan(self) -> Plan:
        """What was asked.

        Raises:
            FileFormatError: There is no plan here, or it is damaged.
        """
        path = self.folder / "plan.json"
        return read(
            path,
            "this is not the folder of an experiment, or its plan is damaged",
            lambda data: Plan.model_validate(parse_json(data)),
            hint="begin one: truestep ab CASE --set KEY=VALUE --output DIR",
        )

    def write_environment(self, values: Mapping[str, str]) -> None:
        """Keep the environment of the latest start."""
        text = json.dumps(dict(values), indent=1, sort_keys=True)
        write_text(self.folder / "environment.json", text, "the environment")

    def environment(self) -> dict[str, str]:
        """The environment; empty where none was kept."""
        try:
            path = self.folder / "environment.json"
            found = read(path, "the environment cannot be read", parse_json)
        except FileFormatError:
            return {}
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}

    def append(self, cell: PlannedCell, line: Sample | Failure | Remark | Repeat) -> None:
        """Add a line to a cell's samples, flushed to the operating system.

        Raises:
            WriteError: It could not be written; the lines before it are untouched.
        """
        keep(self.sources, self.folder)
        append_line(self._samples(cell), line.model_dump_json(), "the samples")

    def lines(
        self, cell: PlannedCell
    ) -> tuple[list[Sample | Failure | Remark | Repeat], list[str]]:
        """Every line of a cell that can be read, and what is said of those that cannot."""
        path = self._samples(cell)
        found, damaged = read_lines(path, "the samples", _LINE.validate_json)
        if not damaged:
            return found, []
        places = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        count = f"{len(damaged)} damaged line{'s' if len(damaged) > 1 else ''}"
        return found, [f"{count} left out: {cell.folder}/samples.jsonl, line {places}"]

    def save_tensors(
        self, cell: PlannedCell, arm: ArmName, case: str, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Keep an arm's final latent and frames, atomically.

        Raises:
            WriteError: They could not be written.
        """
        from safetensors.torch import save

        path = self.media(cell, arm, case)
        own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        data = save(own)  # clones: tensors that share memory would be refused
        with replacing(path, "latent and frames") as temporary:
            temporary.write_bytes(data)

    def tensors(self, cell: PlannedCell, arm: ArmName, case: str) -> dict[str, torch.Tensor]:
        """What was kept of an arm; empty where there is nothing that can be read."""
        from truestep.recording.format import read_plain

        try:
            return dict(read_plain(self.media(cell, arm, case)))
        except FileFormatError:
            return {}

    def save_check(self, cell: PlannedCell, check: Sameness) -> None:
        """Keep how the numbers of a case compare, atomically."""
        write_text(self._check(cell, check.case), check.model_dump_json(), "the check")

    def check(self, cell: PlannedCell, case: str) -> Sameness | None:
        """How the numbers of a case compare; None where that was not found out."""
        try:
            path = self._check(cell, case)
            return read(path, "the check cannot be read", Sameness.model_validate_json)
        except FileFormatError:
            return None

    def recording(self, cell: PlannedCell, case: str) -> Path:
        """Where the baseline's recording of a case is kept; one for both modes of a cell."""
        return self.folder / "recordings" / Path(cell.folder).name / f"{case}.safetensors"

    def media(self, cell: PlannedCell, arm: ArmName, case: str) -> Path:
        """Where an arm's final latent and frames are kept."""
        return self._arm(cell, arm) / f"{case}.safetensors"

    def _arm(self, cell: PlannedCell, arm: ArmName) -> Path:
        return self.folder / cell.folder / arm

    def _samples(self, cell: PlannedCell) -> Path:
        return self.folder / cell.folder / "samples.jsonl"

    def _check(self, cell: PlannedCell, case: str) -> Path:
        return self._arm(cell, "candidate") / f"{case}.check.json"


def begin(
    folder: Path,
    plan: Record,
    known: Callable[[], Record],
    sources: Sources | None,
    *,
    resume: bool,
    free: Collection[str],
    hint: str,
) -> None:
    """Write the plan of an experiment, or make sure that the one that is there is the same.

    Args:
        known: Reads the one that is there.
        free: What of it may be another one.
        hint: What to do where there is one and `resume` is off.
    """
    path = folder / "plan.json"
    if path.exists() is not resume:
        raise UsageError(
            "there is an experiment in this folder already"
            if path.exists()
            else "there is no experiment to resume",
            where=str(folder),
            hint=hint if path.exists() else "leave out --resume to begin one",
        )
    if resume:
        ours, theirs = (p.model_dump(mode="json") for p in (plan, known()))
        changed = [key for key in ours if key not in free and ours[key] != theirs[key]]
        if changed:
            raise UsageError(
                f"the experiment in this folder is another one: {', '.join(changed)} changed",
                where=str(path),
                hint="give another --output",
            )
        if sources is not None:
            sources.check(folder)
    write_text(path, plan.model_dump_json(indent=1), "the plan")
    keep(sources, folder)


def keep(sources: Sources | None, folder: Path) -> None:
    """Keep digests of the user's files beside what they made."""
    if sources is not None:
        sources.keep(folder)


def read_lines(path: Path, what: str, parse: Callable[[bytes], T]) -> tuple[list[T], list[int]]:
    """Every line of a file that can be read, and the numbers of those that cannot."""
    found: list[T] = []
    damaged: list[int] = []
    raw = read(path, f"{what} cannot be read", bytes) if path.exists() else b""
    for number, text in enumerate(raw.split(b"\n"), start=1):
        try:
            found += [parse(text)] if text.strip() else []
        except ValidationError:
            damaged.append(number)
    return found, damaged


def append_line(path: Path, text: str, what: str) -> None:
    """Add a line to a file, flushed to the operating system.

    Raises:
        WriteError: It could not be written; the lines before it are untouched.
    """
    data = text.encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # a line that a kill cut short
                    data = b"\n" + data
            written = file.write(data)
            if written != len(data):
                os.ftruncate(file.fileno(), end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise _unwritten(what, path, error) from error


def _unwritten(what: str, path: Path, error: OSError) -> WriteError:
    return WriteError(
        f"{what} could not be written",
        where=str(path),
        measured=error.strerror or str(error),
        likely="the disk is full" if error.errno == errno.ENOSPC else "",
        hint=f"df -h {quoted(str(path.parent))}  # what is measured is kept: --resume goes on",
    )
