"""Files of references here, brought to what the lock says.

What the lock says is true: a file that is not here, or an earlier one, is fetched, and what is in
the place of one and nobody knows is kept among the drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from truestep.errors import FileFormatError, UsageError
from truestep.files import alone, beside, settle, sha256_of
from truestep.progress import Progress, silent
from truestep.recording.lock import DEFAULT_ROOT, Entry, put_entry, read_lock
from truestep.recording.remote.cache import cache_root, fetched, lay, link
from truestep.recording.remote.objects import name_of, pointed_at, require_content
from truestep.recording.remote.opening import open_store
from truestep.text import quoted

if TYPE_CHECKING:
    from truestep.recording.remote.address import Address

DRAFTS = "drafts"
"""Folder of contents that are not promoted, beside those that are."""

WHAT = "the reference"


def draft_path(root: Path, sha256: str) -> Path:
    """Where a draft stands."""
    return root / DRAFTS / f"{sha256}.safetensors"


def entry_of(root: Path, name: str) -> Entry:
    """What the lock says of a reference.

    Raises:
        UsageError: Nothing.
    """
    entry = read_lock(root).references.get(name)
    if entry is None:
        raise UsageError(
            "the lock file names no such reference",
            where=f"{root}: {name}",
            hint="truestep references list",
        )
    return entry


def draft_of(entry: Entry) -> str | None:
    """The content that may be promoted."""
    return entry.draft if entry.history else entry.sha256


def judged_by(entry: Entry) -> str | None:
    """The content that a check judges by."""
    return entry.promoted or entry.sha256


def restored(
    root: Path,
    name: str,
    place: Address | None,
    *,
    aside: bool = False,
    progress: Progress = silent,
) -> Path:
    """Bring a file to what the lock says: fetched, verified, linked into place.

    Args:
        root: The folder of references.
        name: Of the reference.
        place: The store; it is asked only where the content is not on this machine.
        aside: Put a content that nobody knows among the drafts; else it is refused.
        progress: Told bytes.

    Raises:
        FileFormatError: The file here was changed, or the object is not what it is called.
        EndpointError: The store does not answer.
        WriteError: The disk is full.
        UsageError: The content is not on this machine, and there is no store.
    """
    path = root / name
    while True:
        entry = entry_of(root, name)
        sha256, here = judged_by(entry), content_of(path)
        if sha256 is None or here == sha256 or (here and here == entry.pending):
            return path
        if here and not aside and here not in entry.named:
            if entry_of(root, name) != entry:
                continue  # another writer was here in between
            raise changed(root, name)
        fetch = partial(_fetched, sha256, place, path, progress)
        with pinned(root, name, sha256, fetch) as source, alone(root, WHAT):
            if judged_by(entry_of(root, name)) != sha256 or content_of(path) != here:
                continue  # another writer was here meanwhile
            if here and here not in {event.sha256 for event in entry.history}:
                lay(path, draft_path(root, here), WHAT)
            lay(source, path, WHAT)
        return path


def content_of(path: Path) -> str | None:
    """SHA-256 of a file; None where there is none, or a pointer of Git LFS in its place."""
    if pointed_at(path) is not None:
        return None
    try:
        return sha256_of(path)
    except FileNotFoundError:
        return None


def changed(root: Path, name: str) -> FileFormatError:
    """The error for a file that is none of those that the lock names."""
    folder = "" if root == DEFAULT_ROOT else f" --references {quoted(str(root))}"
    return FileFormatError(
        "the reference does not match the lock file",
        where=str(root / name),
        likely="it was changed or copied without `truestep record`, or the lock is a newer one",
        hint=f"truestep references pull{folder}  # keeps it among the drafts, fetches the promoted",
    )


@contextmanager
def pinned(root: Path, name: str, sha256: str, fetch: Callable[[], Path]) -> Iterator[Path]:
    """A file of a content that nobody takes away meanwhile: a name of its own for what is in the
    reference's place, among the drafts, in the cache, or fetched; read through.

    Args:
        root, name: The reference.
        sha256: The content.
        fetch: Gives a file of it from elsewhere, or raises.
    """
    with beside(draft_path(root, sha256), WHAT) as temporary:
        for source in may_hold(root, name, sha256):
            with suppress(FileNotFoundError):
                link(source, temporary)
                if content_of(temporary) == sha256:
                    break
            temporary.unlink(missing_ok=True)
        else:
            link(fetch(), temporary)
        yield temporary


def may_hold(root: Path, name: str, sha256: str) -> tuple[Path, ...]:
    """Files here that may have a content; none needs to be there."""
    return root / name, draft_path(root, sha256), cache_root() / name_of(sha256)


def _fetched(sha256: str, place: Address | None, path: Path, progress: Progress) -> Path:
    """A content from the store."""
    if place is None:
        require_content(path)
        raise UsageError(
            "the reference is not on this machine, and no store is named",
            where=str(path),
            measured=f"the lock file asks for SHA-256 {sha256[:12]}",
            hint="give --store, TRUESTEP_STORE, or [references] store in truestep.toml",
        )
    return fetched(open_store(place), sha256, progress)


def keep_draft(root: Path, name: str, temporary: Path, sha256: str) -> Path:
    """Make a finished file the draft of a promoted reference; the caller holds the folder."""
    entry = entry_of(root, name)
    if sha256 == entry.promoted:
        return root / name
    path = draft_path(root, sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    settle(temporary, path)
    put_entry(root, name, entry.model_copy(update={"draft": sha256}))
    forget(root, entry.draft, keep=sha256)
    return path


def forget(root: Path, sha256: str | None, *, keep: str | None = None) -> None:
    """Remove the file of a draft that is none any more, unless another reference has it, too."""
    named = {sha for entry in read_lock(root).references.values() for sha in (entry.draft, keep)}
    if sha256 is not None and sha256 not in named:
        draft_path(root, sha256).unlink(missing_ok=True)


def needed(root: Path, name: str) -> set[str]:
    """What the lock names; of a file that was about to be replaced, the one that is there."""
    entry = entry_of(root, name)
    if entry.pending is None:
        return entry.named
    here = content_of(root / name)
    return entry.named - {entry.sha256 if here == entry.pending else entry.pending}


def adopt(root: Path, name: str, path: Path) -> tuple[str, Path]:
    """Take a recording that is elsewhere, or was copied here, as the draft of a reference.

    Returns:
        Its hash, and where it stands now.

    Raises:
        FileFormatError: It is not a recording, or a tensor of it is damaged.
        WriteError: It could not be written; nothing was changed.
    """
    import shutil

    from truestep.recording.format import Recording

    require_content(path)
    recording = Recording.open(path)
    for tensor in recording:  # reads each, and compares its digest
        _ = recording[tensor]
        recording.release(tensor)
    target = root / name
    with beside(target, WHAT) as temporary:
        shutil.copyfile(path, temporary)
        sha256 = sha256_of(temporary)
        temporary.chmod(temporary.parent.stat().st_mode & 0o666)
        with alone(root, WHAT):
            entry = read_lock(root).references.get(name, Entry())
            if entry.history:
                return sha256, keep_draft(root, name, temporary, sha256)
            here = content_of(target)
            if here and here != sha256:
                lay(target, draft_path(root, here), WHAT)  # nothing is lost
            put_entry(root, name, Entry(sha256=entry.sha256, pending=sha256))
            settle(temporary, target)
            put_entry(root, name, Entry(sha256=sha256))
    return sha256, target
