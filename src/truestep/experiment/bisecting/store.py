"""What a bisect keeps in its folder, each whole at any moment.

::

    .truestep/.gitignore                   nothing here belongs into a commit
    .truestep/bisect/runs/KEY.jsonl        answers of a bisect that has not ended, a line each
    .truestep/bisect/verdicts/KEY.json     verdicts by content: seen twice at least, always alike;
                                           KEY begins with that of what they depend on
    .truestep/bisect/overlays/KEY/         packages of one version, for any probe
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from truestep.errors import FileFormatError, UsageError
from truestep.experiment.bisecting.records import Attempt
from truestep.experiment.bisecting.search import Outcome
from truestep.files import unwritten, write_text
from truestep.reading import read
from truestep.records import Record


class Kept(Record):
    """A verdict by content: the runs that there were, oldest first."""

    runs: tuple[Attempt, ...]

    @property
    def lasting(self) -> bool:
        """Whether it was seen twice at least, and was always the same."""
        return len(self.runs) > 1 and len({(r.exit_code, r.failure) for r in self.runs}) == 1


def key_of(parts: Iterable[str]) -> str:
    """A name of 32 digits for texts in their order."""
    return hashlib.sha256(json.dumps([*parts]).encode()).hexdigest()[:32]


class Store:
    """The folder of all bisects of a project."""

    def __init__(self, root: Path) -> None:
        self.folder = root / ".truestep" / "bisect"

    def prepare(self) -> None:
        """Make the folder.

        Raises:
            WriteError: It cannot be written.
        """
        ignored = self.folder.parent / ".gitignore"
        if not ignored.exists():
            write_text(ignored, "*", "the folder of bisects")
        for name in ("runs", "verdicts", "overlays"):
            try:
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise unwritten(self.folder / name, "the folder of bisects", error) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other bisects of this project out; the lock goes with the process.

        Raises:
            UsageError: There is one.
        """
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise unwritten(self.folder, "the folder of bisects", error) from error
                raise UsageError(
                    "another bisect of this project is running",
                    where=str(self.folder),
                    likely="two at once would share its machine, and its verdicts",
                    hint="wait for it; this command then begins where it stands",
                ) from None
            yield
        finally:
            os.close(handle)

    def log(self, key: str) -> list[Attempt]:
        """Answers of a bisect that was stopped; none where there was none."""
        path = self._log(key)
        if not path.exists():
            return []
        answers = []
        for line in read(path, "the log of a bisect cannot be read", bytes).split(b"\n"):
            try:
                answers.append(Attempt.model_validate_json(line))
            except ValidationError:  # cut by a kill: what comes after it was not answered
                break
        return answers

    def append(self, key: str, attempt: Attempt) -> None:
        """Add an answer to a log, on the disk when this returns.

        Raises:
            WriteError: It could not be written.
        """
        path = self._log(key)
        data = attempt.model_dump_json().encode() + b"\n"
        try:
            with path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(data) != len(data):
                    os.ftruncate(file.fileno(), end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritten(path, "the log of the bisect", error) from error

    def keep_log(self, key: str, answers: Iterable[Attempt]) -> None:
        """Write a log anew: of those answers that still hold."""
        text = "".join(f"{answer.model_dump_json()}\n" for answer in answers)
        if text:
            write_text(self._log(key), text, "the log of the bisect")
        else:
            self.forget_log(key)

    def forget_log(self, key: str) -> None:
        """The bisect has ended."""
        self._log(key).unlink(missing_ok=True)

    def verdict(self, key: str) -> Kept | None:
        """The verdict of a content, where it is known to last."""
        kept = self._kept(key)
        return kept if kept is not None and kept.lasting else None

    def add(self, key: str, attempt: Attempt) -> None:
        """Keep what a run of a content gave."""
        if attempt.outcome is Outcome.SKIPPED or attempt.exit_code is None:
            return
        kept = self._kept(key)
        before = kept.runs[-3:] if kept is not None else ()
        runs = Kept(runs=(*before, attempt))
        write_text(self._verdict(key), runs.model_dump_json(), "the verdict")

    def contradict(self, key: str) -> None:
        """Two runs of this content had two outcomes: none of them is worth to be kept."""
        self._verdict(key).unlink(missing_ok=True)

    def drop(self, base: str) -> None:
        """Forget all verdicts whose key begins so: one of them was wrong."""
        for path in self._verdict("").parent.glob(f"{base}-*.json"):
            path.unlink(missing_ok=True)

    def _kept(self, key: str) -> Kept | None:
        with suppress(FileFormatError):  # absent, or damaged: it is asked again
            return read(self._verdict(key), "the verdict cannot be read", Kept.model_validate_json)
        return None

    def _log(self, key: str) -> Path:
        return self.folder / "runs" / f"{key}.jsonl"

    def _verdict(self, key: str) -> Path:
        return self.folder / "verdicts" / f"{key}.json"
