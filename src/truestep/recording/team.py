"""What a team does with references: share them, promote a draft, go back to an earlier one.

The lock file in git says which content is promoted; a store has the contents, each under its own
hash. One order holds everywhere, so that a kill at any moment loses nothing: a content is in the
store before the lock names it as promoted, the lock is written whole, and only then is the file
here replaced. What the lock says is true; a file here is brought to what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from truestep.errors import FileFormatError, UsageError
from truestep.files import alone, beside, sha256_of
from truestep.progress import Progress, silent
from truestep.recording.lock import Entry, Event, put_entry
from truestep.recording.placing import (
    WHAT,
    changed,
    content_of,
    draft_of,
    draft_path,
    entry_of,
    forget,
    judged_by,
    may_hold,
    needed,
    pinned,
    restored,
)
from truestep.recording.remote.cache import fetched, lay, link
from truestep.recording.remote.objects import OtherContentError, Remote, name_of, pointed_at, put
from truestep.recording.remote.opening import open_store
from truestep.recording.tending import is_whole

if TYPE_CHECKING:
    from truestep.recording.manifest import Manifest
    from truestep.recording.remote.address import Address

Judge = Callable[[Path, Path], tuple[str, str]]
"""A verdict on a recording against the one that it replaces, and its sentence."""

OF_ENVIRONMENT = ("device.", "library.", "attention.", "machine.cpu", "python", "torch.cuda")
"""What of a recording's environment an event keeps: what is told when a reference is asked for."""


@dataclass(frozen=True)
class Note:
    """Why something is done, and by whom."""

    reason: str
    who: str
    commit: str | None
    when: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )


# --- store -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moved:
    """What became of one content: `sent`, `there`, `fetched`, `here` or `missing`."""

    name: str
    sha256: str
    state: Literal["sent", "there", "fetched", "here", "missing"]
    size: int = 0


def push(
    root: Path,
    names: Iterable[str],
    remote: Remote,
    *,
    again: bool = False,
    progress: Progress = silent,
) -> list[Moved]:
    """Send what the lock names and the store lacks: promoted ones, drafts, and earlier ones.

    Args:
        root: The folder of references.
        names: Of references.
        remote: The store.
        again: Read what the store has, and replace what is not what it is called by what is here.
        progress: Told bytes.

    Raises:
        FileFormatError: A file is not what the lock says.
        EndpointError: The store does not answer; what was sent before stays there.
    """
    moved = []
    for name in names:
        for sha256 in sorted(needed(root, name)):
            damaged = again and not is_whole(remote, sha256, progress)
            moved.append(_pushed(root, name, sha256, remote, damaged, progress))
    return moved


def _pushed(
    root: Path, name: str, sha256: str, remote: Remote, damaged: bool, progress: Progress
) -> Moved:
    known = {event.sha256: event.size for event in entry_of(root, name).history}
    size = None if damaged else remote.size(name_of(sha256))
    if size is not None and size == known.get(sha256):
        remote.renew(name_of(sha256))
        return Moved(name, sha256, "there", size)
    with beside(draft_path(root, sha256), WHAT) as temporary:
        for source in may_hold(root, name, sha256):
            with suppress(FileNotFoundError, OtherContentError):
                link(source, temporary)
                if damaged and sha256_of(temporary) == sha256:
                    remote.remove(name_of(sha256), 0)  # only where a good one is here
                    damaged = False
                if not damaged and pointed_at(temporary) is None:
                    sent = put(remote, temporary, sha256, progress)  # hashed while it is sent
                    state: Literal["sent", "there"] = "sent" if sent else "there"
                    return Moved(name, sha256, state, temporary.stat().st_size)
            temporary.unlink(missing_ok=True)
    _require_unchanged(root, name)
    return Moved(name, sha256, "missing" if size is None else "there", size or 0)


def _require_unchanged(root: Path, name: str) -> None:
    """Refuse to say that a content is missing where its file was changed.

    Raises:
        FileFormatError: The file is none that the lock names.
    """
    here = content_of(root / name)
    if here and here not in entry_of(root, name).named:
        raise changed(root, name)


def pull(
    root: Path,
    names: Iterable[str],
    place: Address,
    *,
    drafts: bool = False,
    progress: Progress = silent,
) -> list[Moved]:
    """Bring files to what the lock says; what is in the place of one and nobody knows is kept.

    Raises:
        FileFormatError: The store does not have one, or it is not what it is called.
        EndpointError: The store does not answer; what has come before stays here.
    """
    moved = []
    for name in names:
        entry, path = entry_of(root, name), root / name
        sha256, before = judged_by(entry), content_of(path)
        if sha256 is None:  # a record was stopped before its file was there
            continue
        restored(root, name, place, aside=True, progress=progress)
        state: Literal["here", "fetched"] = "here" if before == sha256 else "fetched"
        moved.append(Moved(name, sha256, state, path.stat().st_size))
        if drafts and entry.draft:
            moved.append(_pulled_draft(root, name, entry.draft, place, progress))
    return moved


def _pulled_draft(root: Path, name: str, sha256: str, place: Address, progress: Progress) -> Moved:
    path = draft_path(root, sha256)
    if content_of(path) == sha256:
        return Moved(name, sha256, "here", path.stat().st_size)
    lay(fetched(open_store(place), sha256, progress), path, WHAT)
    return Moved(name, sha256, "fetched", path.stat().st_size)


# --- promotion -------------------------------------------------------------------------------


def promote(
    root: Path,
    name: str,
    remote: Remote,
    *,
    judge: Judge,
    note: Note,
    progress: Progress = silent,
) -> Event:
    """Make the draft of a reference the promoted one.

    It, and the one that it replaces, are in the store before the lock says so.

    Raises:
        UsageError: There is no draft, or another writer has changed the reference meanwhile.
        FileFormatError, EndpointError, WriteError: As `push` and `restored`.
    """
    entry = entry_of(root, name)
    sha256 = draft_of(entry)
    if entry.pending is not None and entry.pending in needed(root, name):
        sha256 = entry.pending
    if sha256 is None:
        raise UsageError(
            "there is no draft to promote",
            where=f"{root}: {name}",
            measured=f"promoted is {str(entry.promoted)[:12]}, and nothing was recorded since",
            hint="truestep references list",
        )
    change = _Change(root, name, remote, judge, note, progress)
    event = change.made("promote", entry, sha256)
    forget(root, entry.draft)
    return event


def rollback(
    root: Path,
    name: str,
    remote: Remote,
    *,
    to: str | None,
    judge: Judge,
    note: Note,
    progress: Progress = silent,
) -> Event:
    """Make an earlier content the promoted one again; it is fetched before the lock says so.

    Args:
        to: How its hash begins; default the one before the present.

    Raises:
        UsageError: There is none, or another writer has changed the reference meanwhile.
        FileFormatError, EndpointError, WriteError: As `restored`.
    """
    entry = entry_of(root, name)
    sha256 = _earlier(entry, to, f"{root}: {name}")
    change = _Change(root, name, remote, judge, note, progress)
    return change.made("rollback", entry, sha256)


def _earlier(entry: Entry, to: str | None, where: str) -> str:
    """The content of the history that is meant."""
    known = list(dict.fromkeys(e.sha256 for e in reversed(entry.history)))
    others = [sha for sha in known if sha != entry.promoted]
    if to is None:
        before = entry.history[-1].replaces if entry.history else None
        fitting = [before] if before else []
    else:
        fitting = [sha for sha in others if sha.startswith(to)] if len(to) >= 4 else []
    if len(fitting) != 1:
        raise UsageError(
            "there is no earlier reference to go back to" if not others else "which one is meant?",
            where=where,
            measured="earlier: " + (", ".join(sha[:12] for sha in others[:10]) or "none"),
            hint="truestep references list --history",
        )
    return fitting[0]


@dataclass(frozen=True)
class _Change:
    """Another content is promoted: of which reference, with which store, why."""

    root: Path
    name: str
    remote: Remote
    judge: Judge
    note: Note
    progress: Progress

    def made(self, action: Literal["promote", "rollback"], entry: Entry, sha256: str) -> Event:
        """Send it, judge it, write the lock, bring the file: in this order."""
        with self._pinned(sha256) as path:
            put(self.remote, path, sha256, self.progress)
            event = self._event(action, entry, sha256, path)
            draft = None if action == "promote" else entry.draft
            after = Entry(sha256=sha256, draft=draft, history=(*entry.history, event))
            _settle(self.root, self.name, entry, after, self.remote)
        return event

    def _pinned(self, sha256: str) -> AbstractContextManager[Path]:
        def fetch() -> Path:
            return fetched(self.remote, sha256, self.progress)

        return pinned(self.root, self.name, sha256, fetch)

    def _event(
        self, action: Literal["promote", "rollback"], entry: Entry, sha256: str, path: Path
    ) -> Event:
        from truestep.recording.format import Recording

        manifest = Recording.open(path).manifest
        verdict, sentence = self._verdict(path, entry.promoted)
        return Event(
            action=action,
            sha256=sha256,
            size=path.stat().st_size,
            replaces=entry.promoted,
            reason=self.note.reason,
            who=self.note.who,
            when=self.note.when,
            commit=self.note.commit,
            environment=_environment(manifest),
            revision=str((manifest.case or {}).get("revision") or "") or None,
            verdict=verdict,
            sentence=sentence,
        )

    def _verdict(self, path: Path, replaced: str | None) -> tuple[str, str]:
        """Against the one that is replaced; where that is lost, it is what is gone away from."""
        if replaced is None:
            return "", ""
        try:
            with self._pinned(replaced) as before:
                put(self.remote, before, replaced, self.progress)
                return self.judge(path, before)
        except FileFormatError as error:
            return "missing", f"not judged: of the one before, {error.what}"


def _environment(manifest: Manifest) -> dict[str, str]:
    told = {k: v for k, v in manifest.environment.items() if k.startswith(OF_ENVIRONMENT)}
    return {key: value for key, value in told.items() if value != "(not installed)"}


def _settle(root: Path, name: str, before: Entry, after: Entry, remote: Remote) -> None:
    """Write what the lock says from now on, unless it says something new; then bring the file."""
    with alone(root, WHAT):
        if entry_of(root, name) != before:
            raise UsageError(
                "another writer has changed the reference meanwhile: nothing was done",
                where=f"{root}: {name}",
                hint="truestep references list --history",
            )
        put_entry(root, name, after)
    restored(root, name, remote.address, aside=True)
