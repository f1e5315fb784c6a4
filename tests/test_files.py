"""Files are written whole or not at all, and what killed writers left goes with the next write."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from truestep import files
from truestep.errors import WriteError
from truestep.files import alive, alone, beside, replacing, write_text

NOBODY = 2**22 + 1
"""A number that no process has."""


def leftover(path: Path, *, pid: int, machine: str | None = None, hours: float = 0.0) -> Path:
    """What a writer of `path` leaves that is killed."""
    mark = machine or files._machine()
    folder = path.with_name(f".{path.name}.{mark}.{pid}.0123abcd.tmp")
    folder.mkdir()
    (folder / path.name).write_text("half")
    then = time.time() - hours * 3600
    for place in (folder / path.name, folder):
        os.utime(place, (then, then))
    return folder


def test_the_next_writer_sweeps_what_dead_ones_left(tmp_path: Path) -> None:
    path = tmp_path / "parity.toml"
    dead = leftover(path, pid=NOBODY)
    living = leftover(path, pid=os.getppid())
    elsewhere = leftover(path, pid=NOBODY, machine="0" * 8)
    ancient = leftover(path, pid=NOBODY, machine="1" * 8, hours=25)
    other = leftover(tmp_path / "other.toml", pid=NOBODY)
    write_text(path, "new", "the ledger")
    assert path.read_text() == "new\n"
    assert [place for place in (dead, ancient, other) if place.exists()] == []
    assert living.exists()
    assert elsewhere.exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_block_that_ends_early_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def cut() -> None:
        with replacing(path, "the report") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(WriteError if isinstance(error, OSError) else type(error)):
        cut()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "it's here").mkdir()
    with pytest.raises(WriteError, match="the report could not be written") as caught:
        write_text(tmp_path / "it's here", "text", "the report")
    assert caught.value.likely == "a folder is in its place"
    assert [place.name for place in tmp_path.iterdir()] == ["it's here"]


def test_names_as_long_as_they_may_be(tmp_path: Path) -> None:
    for name in ("x" * 255, "ü" * 127):
        write_text(tmp_path / name, "text", "the report")
        assert (tmp_path / name).read_text() == "text\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_threads_of_one_process_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with beside(path, "a") as first, beside(path, "b") as second:
        assert first != second
        assert first.parent.exists()


def test_it_is_on_the_disk_before_it_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One flush of the file, the move, one flush of the folder: no more, in this order."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *p: (done.append("replace"), replace(*p)))
    write_text(tmp_path / "a", "text", "the report")
    assert done == ["fsync", "replace", "fsync"]


def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []

    def work(number: int) -> None:
        with alone(tmp_path / "new", "the lock file"):
            inside.append(number)
            time.sleep(0.01)
            assert inside.pop() == number

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == []
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(WriteError, match="the lock file could not be written"),
        alone(tmp_path / "file" / "x", "the lock file"),
    ):
        raise AssertionError("unreached")


def test_which_processes_run() -> None:
    assert alive(os.getpid())
    assert alive(1)
    assert not alive(NOBODY)
    assert not alive(10**30)
