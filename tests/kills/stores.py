"""What writes into a team's store and its lock, each as a writer of numbers.

Whatever happens, every content that the lock names has to be whole, and to be found: what was once
promoted in the store, what is promoted now here or in the store.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.kills.harness import Writer
from tests.recording.test_store import CASE, recording
from truestep.errors import UsageError
from truestep.files import replacing, sha256_of
from truestep.recording.format import Recording
from truestep.recording.lock import LOCK_FILE, read_lock
from truestep.recording.placing import adopt, content_of, draft_path, entry_of
from truestep.recording.remote.address import address
from truestep.recording.remote.objects import Remote, name_of, put
from truestep.recording.remote.opening import open_store
from truestep.recording.store import Store, place_of
from truestep.recording.team import Note, promote, push, rollback
from truestep.recording.tending import prune

NAME = place_of(recording(1.0)).name
HOUR_S = 3600.0


def _root(folder: Path) -> Path:
    os.environ["TRUESTEP_CACHE"] = str(folder / "cache")
    os.environ["TRUESTEP_STORE"] = str(folder / "store")
    return folder / "references"


def _remote(folder: Path) -> Remote:
    return open_store(address(str(folder / "store")))


def _value(path: Path) -> int:
    values = Recording.open(path)["x"]
    if not torch.equal(values, values[:1].expand_as(values)):
        raise ValueError("half of one, half of another")
    return int(values[0])


def _judge(actual: Path, reference: Path) -> tuple[str, str]:
    return "drifted", f"{_value(actual)}, and was {_value(reference)}"


def _note(value: int) -> Note:
    return Note(str(value), "Ada", None)


def _object(folder: Path, sha256: str) -> Path:
    """A content of the store, whole."""
    path = folder / "store" / name_of(sha256)
    if sha256_of(path) != sha256:
        raise ValueError(f"the object {sha256[:12]} is not what it is called")
    return path


def _again(change: Callable[[], bool]) -> None:
    """Try until it is done: another writer may be first, and both have to wait for each other."""
    dice = random.Random(os.getpid())
    for tries in range(1000):
        time.sleep(dice.uniform(0.0, 0.1 * min(tries, 20)))
        try:
            if change():
                return
        except UsageError as error:
            if "meanwhile" not in error.what and "no draft" not in error.what:
                raise
    raise TimeoutError("never first of all writers")


def _promoted(folder: Path, value: int) -> str:
    """Take a recording of a value and promote it, whoever else does so; its hash."""
    root, remote = _root(folder), _remote(folder)
    sha256, loose = _loose(folder, value)

    def change() -> bool:
        adopt(root, NAME, loose)
        if read_lock(root).references[NAME].promoted == sha256:
            return True
        return promote(root, NAME, remote, judge=_judge, note=_note(value)).sha256 == sha256

    _again(change)
    return sha256


def _loose(folder: Path, value: int) -> tuple[str, Path]:
    """A recording in a file that no lock knows, and its hash; its bytes differ if made again."""
    path = folder / "loose" / f"{value}.safetensors"
    if not path.exists():
        recording(float(value)).save(path)
    return sha256_of(path), path


def _read_history(folder: Path) -> set[int]:
    """Every value that was promoted; what is judged by is the last of them."""
    root = _root(folder)
    history = entry_of(root, NAME).history if (root / LOCK_FILE).exists() else ()
    found = {event.sha256: _value(_object(folder, event.sha256)) for event in history}
    for event in history:
        if event.replaces and event.replaces not in found:
            raise ValueError("the one that was replaced is not in the history")
    if history:
        (place,) = Store(root).known()
        if _value(Store(root).verified(place)) != found[history[-1].sha256]:
            raise ValueError("what is judged by is not what the lock says")
    return set(found.values())


def _write_promoted(folder: Path, value: int) -> None:
    _promoted(folder, value)


def _write_rolled_back(folder: Path, value: int) -> None:
    """Promote a value, and go back to the first of all."""
    sha256 = _promoted(folder, value)
    root, remote = _root(folder), _remote(folder)

    def change() -> bool:
        history = entry_of(root, NAME).history
        first = history[0].sha256
        if history[-1].sha256 == first:
            return True
        rollback(root, NAME, remote, to=first, judge=_judge, note=_note(value))
        return True

    if sha256 != entry_of(root, NAME).history[0].sha256:
        _again(change)


def _write_pruned(folder: Path, value: int) -> None:
    """Promote what was an old object that nothing needed, while others tidy up; then tidy up."""
    root, remote = _root(folder), _remote(folder)
    sha256, loose = _loose(folder, value)
    put(remote, loose, sha256)
    if sha256 not in _named(root):
        _old(folder, sha256)
    _promoted(folder, value)
    nobody = folder / "loose" / f"{value}.nobody"
    nobody.write_text(str(value))
    put(remote, nobody, sha256_of(nobody))
    _old(folder, sha256_of(nobody))
    prune(root, remote, older_s=HOUR_S, remove=True)


def _named(root: Path) -> set[str]:
    return set().union(*(entry.named for entry in read_lock(root).references.values()))


def _old(folder: Path, sha256: str) -> None:
    """Make an object two hours old; another writer may have taken it away."""
    try:
        path = folder / "store" / name_of(sha256)
        at = path.stat().st_mtime - 2 * HOUR_S
        os.utime(path, (at, at))
    except FileNotFoundError:
        return


def _write_pushed(folder: Path, value: int) -> None:
    """References of many cases, none of them promoted."""
    root, own = _root(folder), recording(float(value), CASE.replace(seed=value))
    place = place_of(own)
    Store(root).save(own, place, update=True)
    (moved,) = push(root, [place.name], _remote(folder))
    if moved.state == "missing":
        raise ValueError("what was pushed is missing")


def _read_pushed(folder: Path) -> set[int]:
    root = _root(folder)
    found = {_value(_object(folder, each.sha256)) for each in _remote(folder).listed()}
    store = Store(root)
    here = {_value(store.verified(place)) for place in store.known()}
    if not found <= here:
        raise ValueError("the store has what the lock does not name")
    return found


def _write_pulled(folder: Path, value: int) -> None:
    """What a colleague has once the lock came by git: fetched when it is asked for."""
    _promoted(folder, value)
    root, theirs = _root(folder), folder / "theirs"
    with replacing(theirs / LOCK_FILE, "the lock file") as temporary:
        temporary.write_bytes((root / LOCK_FILE).read_bytes())
    os.environ["TRUESTEP_CACHE"] = str(folder / "their cache")
    store = Store(theirs)
    for place in store.known():
        store.verified(place)


def _read_pulled(folder: Path) -> set[int]:
    found, theirs = _read_history(folder), folder / "theirs"
    os.environ["TRUESTEP_CACHE"] = str(folder / "their cache")
    here = content_of(theirs / NAME)
    if here and here not in _named(theirs):
        raise ValueError("a file in its place is no content that the lock names")
    if (theirs / LOCK_FILE).exists():
        store = Store(theirs)
        for place in store.known():
            if _value(store.verified(place)) not in found:
                raise ValueError("a colleague has what was never promoted")
    return found


def _write_draft(folder: Path, value: int) -> None:
    """A draft beside a promoted reference."""
    root = _root(folder)
    if not read_lock(root).references.get(NAME):
        _promoted(folder, 0)
    own = recording(float(value))
    Store(root).save(own, place_of(own), update=True)


def _read_draft(folder: Path) -> set[int]:
    root = _root(folder)
    if _read_history(folder) != {0}:
        raise ValueError("a draft has changed what is promoted")
    draft = entry_of(root, NAME).draft
    if draft is None:
        return {0}
    path = draft_path(root, draft)
    if sha256_of(path) != draft:
        raise ValueError("the draft is not what it is called")
    return {_value(path)}


STORES = (
    Writer("store: push", _write_pushed, _read_pushed, keeps=True),
    Writer("store: pull", _write_pulled, _read_pulled, keeps=True),
    Writer("store: promote", _write_promoted, _read_history, keeps=True),
    Writer("store: rollback", _write_rolled_back, _read_history, keeps=True),
    Writer("store: prune", _write_pruned, _read_history, keeps=True),
    Writer("store: draft", _write_draft, _read_draft),
)
