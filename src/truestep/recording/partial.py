"""What a record has finished, kept beside the file that it will write, for one that is killed.

`TARGET.partial` is a folder. Its `journal` says first what is recorded, then has a line for every
recording and every benign run that was finished; tensors are in files of their own. A line begins
with a digest of itself and of all before it, so that what a kill cut short, or anything else
damaged, ends the journal there, and is made again. The folder goes when the file is written.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import xxhash
from pydantic import Field

from truestep.content import mapping_differences
from truestep.errors import FileFormatError, UsageError, WriteError
from truestep.files import ROOM, replacing, sha256_of
from truestep.floors import NoiseRun
from truestep.reading import parse_json
from truestep.recording.format import Recording
from truestep.recording.store import PARTIAL
from truestep.verdict import Record

JOURNAL = "journal"
RUN = "run"
"""Name of the recording of the trusted run."""

_FORMAT = "1"
_TENSORS = re.compile(r"[a-z]+\.[0-9a-f]{8}")
_TEMPORARY = re.compile(r"\.(journal|[a-z]+\.[0-9a-f]{8})\..+\.tmp")
"""What a writer that was killed leaves: see `truestep.files.beside`."""

_WHAT = "what is finished"
_LISTED = 6
"""Differences that an error names."""

Tell = Callable[[str], None]
Note = Callable[[str], None]


class Line(Record):
    """One thing that was finished.

    Attributes:
        name: What it is.
        identity: Of the first line: what is recorded.
        file, sha256: Of a recording: its file, and that file's content.
        runs: Of a benign run: what it measured.
        notes: What was noted meanwhile.
        expected: Benign runs that there will be.
    """

    name: str
    identity: dict[str, str] = Field(default_factory=dict)
    file: str = ""
    sha256: str = ""
    runs: tuple[NoiseRun, ...] | None = None
    notes: tuple[str, ...] = ()
    expected: int = 0


class Partial:
    """What is finished of a record, of this process and of a stopped one that it goes on with.

    Entered, it keeps other processes out of the folder, for as long as this one lives. What cannot
    be written is not kept, which is told, and the record goes on.

    Args:
        target: The file that will be written; None keeps nothing.
        resume: Go on from what is there. Else it is replaced, once the trusted run is finished.
        tell: Told, in a line each, what is there and what is made of it.
    """

    def __init__(
        self, target: Path | None, *, resume: bool = False, tell: Tell = lambda text: None
    ) -> None:
        self.target = target
        self.folder = Path() if target is None else target.with_name(target.name + PARTIAL)
        self._tell, self._resume = tell, resume
        self._keeps = target is not None
        self._identity: dict[str, str] = {"format": _FORMAT}
        self._left: list[Line] = []
        self._known: dict[str, Line] = {}
        self._chain = ""
        self._end = 0  # bytes of the journal that are whole; none: there is none of this record
        self._whole = True
        self._expected = self._size = 0
        self._handle: int | None = None
        self._new: list[Path] = []

    # --- the folder ------------------------------------------------------------------------------

    def __enter__(self) -> Partial:
        """Hold the folder, and look at what is there.

        Raises:
            UsageError: Another process records this now.
        """
        if not self._keeps:
            return self
        try:
            self._hold()
        except OSError as error:
            self._give_up(error)
            return self
        self._left, self._end, self._chain, self._whole = _read(self.folder / JOURNAL)
        if self._left and not self._resume:
            self._tell(
                f"a record that was stopped is at {self.folder}: --resume goes on "
                f"{_after(self._left)}"
            )
        elif self._resume and not self._left:
            self._tell(f"nothing was finished at {self.folder}: recorded from the beginning")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the folder go; an empty one is removed."""
        if self._handle is None:
            return
        with suppress(OSError):  # it holds something
            for folder in self._new:
                folder.rmdir()
        os.close(self._handle)
        self._handle = None

    def _hold(self) -> None:
        import fcntl

        missing = [folder for folder in self.folder.parents if not folder.exists()]
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(handle), self.folder.stat()):
                        self._handle, self._new = handle, [self.folder, *missing]
                        return
                os.close(handle)  # whoever held it has finished, and removed it
            except BlockingIOError:
                os.close(handle)
                raise UsageError(
                    "another process records this now",
                    where=str(self.target),
                    hint="wait for it, or give another --output",
                ) from None
            except OSError:
                os.close(handle)
                raise

    def remove(self) -> None:
        """Remove all of it: the file is written. What somebody else put there stays."""
        if self._handle is None:
            return
        (self.folder / JOURNAL).unlink(missing_ok=True)  # without it the rest is nothing
        with suppress(OSError):
            for path in [*self.folder.iterdir()]:
                if _TEMPORARY.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)
                elif _TENSORS.fullmatch(path.name):
                    path.unlink()
            self.folder.rmdir()
        self._new = []  # what is there from now on is another process's

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Remove all of it where the block refuses what is recorded, as it would again."""
        try:
            yield
        except UsageError:
            self.remove()
            raise

    # --- what is recorded ------------------------------------------------------------------------

    def know(self, identity: Mapping[str, str]) -> None:
        """Take note of something that what is recorded depends on."""
        if self._keeps:
            self._identity |= identity

    def begin(self, identity: Mapping[str, str]) -> None:
        """Say the rest of what is recorded; take up what is there, if that is to be.

        Raises:
            UsageError: What is there is of another thing; the error says what differs.
        """
        self.know(identity)
        if not self._resume or not self._left:
            self._end = 0
            return
        first, *lines = self._left
        differ = mapping_differences(self._identity, first.identity)
        if differ:
            told = [f"{d.key}: {d.actual:.80}, there {d.reference:.80}" for d in differ[:_LISTED]]
            more = f"and {len(differ) - _LISTED} more" if len(differ) > _LISTED else ""
            raise UsageError(
                "the record that was stopped is not of what is recorded now",
                where=str(self.folder),
                measured="\n".join([*told, *filter(None, [more])]),
                hint="--no-resume  # records from the beginning, and replaces it",
            )
        damaged = self._damaged(lines)
        if damaged:
            self._end = 0
            self._tell(f"{self.folder / damaged} is damaged: recorded from the beginning")
            return
        self._known = {line.name: line for line in lines}
        rest = "" if self._whole else "; what follows is damaged, and is made again"
        self._tell(f"goes on {_after(self._left)}{rest}")

    def _damaged(self, lines: Sequence[Line]) -> str:
        """A file of tensors that is not what was written."""
        for line in lines:
            path = self.folder / line.file
            try:
                if line.file and (
                    not _TENSORS.fullmatch(line.file) or sha256_of(path) != line.sha256
                ):
                    return line.file
                self._size += path.stat().st_size if line.file else 0
            except OSError:
                return line.file
        return ""

    # --- what is finished ------------------------------------------------------------------------

    def expect(self, count: int) -> None:
        """Say how many benign runs there will be."""
        self._expected = count

    def has(self, name: str) -> bool:
        """Whether something was finished by the record that this one goes on with."""
        return name in self._known

    def mark(self, name: str) -> None:
        """Keep a fact, for `has`."""
        self._keep(Line(name=name))

    def runs(
        self, name: str, make: Callable[[Note], Sequence[NoiseRun]], note: Note
    ) -> list[NoiseRun]:
        """A benign run, if need be made; a change that cannot be made gives none.

        Args:
            name: What no other run is called.
            make: Makes it, and is given whom to tell what could not be made.
            note: Told what `make` told, now or then.
        """
        line = self._known.get(name)
        if line is None or line.runs is None:
            notes: list[str] = []
            line = Line(name=name, runs=tuple(make(notes.append)), notes=tuple(notes))
            self._keep(line)
        for text in line.notes:
            note(text)
        return list(line.runs or ())

    def recording(self, name: str, make: Callable[[Note], Recording], note: Note) -> Recording:
        """A recording, if need be made; see `runs`."""
        line = self._known.get(name)
        if line is None:
            notes: list[str] = []
            recording = make(notes.append)
            if self._keeps:
                self._keep_tensors(Line(name=name, notes=tuple(notes)), recording)
            for text in notes:
                note(text)
            return recording
        for text in line.notes:
            note(text)
        try:
            kept = Recording.open(self.folder / line.file)
            # Copies, in memory as it is allocated: kernels may look at how numbers are aligned.
            return Recording.in_memory({n: t.clone() for n, t in kept.items()}, kept.manifest)
        except FileFormatError as error:  # of the content that was written: see `begin`
            raise UsageError(
                "what was finished cannot be read",
                where=str(self.folder / line.file),
                measured=error.what,
                hint="--no-resume  # records from the beginning, and replaces it",
            ) from error

    def _keep_tensors(self, line: Line, recording: Recording) -> None:
        """Write a recording and its line, where the disk then has room for the file as well."""
        size = sum(tensor.numel() * tensor.itemsize for tensor in recording.values())
        self._size += size
        try:
            if not self._end and not self._has_room(size):
                self._clear()  # this one takes the place of what another left
            if not self._has_room(size):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file = f"{line.name}.{secrets.token_hex(4)}"
            sha256 = recording.save(self.folder / file)
        except (OSError, WriteError) as error:
            self._give_up(error)
            return
        self._keep(line.model_copy(update={"file": file, "sha256": sha256}))

    def _has_room(self, size: int) -> bool:
        return shutil.disk_usage(self.folder).free >= size + self._size + ROOM

    def _clear(self, file: str = "") -> None:
        """Remove what no line of this record names."""
        if not file:
            (self.folder / JOURNAL).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if _TENSORS.fullmatch(path.name) and path.name != file:
                path.unlink()

    def _keep(self, line: Line) -> None:
        if not self._keeps:
            return
        line = line.model_copy(update={"expected": self._expected})
        try:
            if self._end:
                self._append(line)
            else:
                self._replace(line)
        except (OSError, WriteError) as error:
            self._give_up(error)

    def _replace(self, line: Line) -> None:
        """Begin the journal; what another record left is gone with that."""
        first = Line(name="record", identity=self._identity)
        text, self._chain = b"", ""
        for each in (first, line):
            data, self._chain = _encoded(each, self._chain)
            text += data
        with replacing(self.folder / JOURNAL, _WHAT) as temporary:
            temporary.write_bytes(text)
        self._end = len(text)
        self._clear(line.file)

    def _append(self, line: Line) -> None:
        data, chain = _encoded(line, self._chain)
        with (self.folder / JOURNAL).open("r+b", buffering=0) as file:
            file.truncate(self._end)  # what a kill cut short
            file.seek(self._end)
            written = file.write(data)
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        self._end, self._chain = self._end + len(data), chain

    def _give_up(self, error: OSError | WriteError) -> None:
        self._keeps = False
        why = error.measured if isinstance(error, WriteError) else error.strerror or str(error)
        self._tell(
            f"what is finished from here on is not kept at {self.folder}, should this be stopped: "
            f"{why}"
        )


NOWHERE = Partial(None)
"""Keeps nothing."""


def beside(path: str | Path | None, *, resume: bool, tell: Tell = lambda text: None) -> Partial:
    """What is finished of a record that will be written to a path; nothing without one, and where
    several processes record together: those that go on would wait for one another.

    Raises:
        UsageError: There is no path to resume at.
    """
    together = int(os.environ.get("WORLD_SIZE") or 1) > 1
    if resume and (path is None or together):
        what = "by several processes" if together else "without a path"
        raise UsageError(
            f"a record {what} keeps nothing that one could resume", hint="leave --resume out"
        )
    if path is None or together:
        return NOWHERE
    return Partial(Path(path), resume=resume, tell=tell)


def _after(lines: Sequence[Line]) -> str:
    """What is there, in words."""
    done = sum(max(len(line.runs), 1) for line in lines if line.runs is not None)
    if not done:
        return "after its trusted run"
    total = max(lines[-1].expected, done)
    return f"from its {done} of {total} benign runs"


def _encoded(line: Line, chain: str) -> tuple[bytes, str]:
    """A line as it is written, and what the next one's digest begins with."""
    text = line.model_dump_json(exclude_defaults=True).encode()
    mark = xxhash.xxh3_128_hexdigest(chain.encode() + text)
    return mark.encode() + b" " + text + b"\n", mark


def _read(path: Path) -> tuple[list[Line], int, str, bool]:
    """Whole lines of a journal, the bytes that they take, the last digest, and whether that is all.

    A line that is the last and was not ended is one that a kill cut short, and is no damage.
    """
    lines: list[Line] = []
    end, chain, whole = 0, "", True
    try:
        with path.open("rb") as file:
            for data in file:
                mark, _, text = data.removesuffix(b"\n").partition(b" ")
                found = xxhash.xxh3_128_hexdigest(chain.encode() + text)
                if not data.endswith(b"\n") or found.encode() != mark:
                    whole = not data.endswith(b"\n")
                    break
                lines.append(Line.model_validate(parse_json(text)))
                end, chain = end + len(data), found
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        whole = False
    if len(lines) < 2 or lines[1].name != RUN:  # without the trusted run it is nothing
        return [], 0, "", True
    return lines, end, chain, whole
