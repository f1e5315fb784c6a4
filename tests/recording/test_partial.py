"""What a record has finished: taken up whole, up to where it is damaged, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.recording.test_store import recording
from truestep.errors import UsageError
from truestep.floors import NoiseRun, RunMetrics
from truestep.recording.format import Recording
from truestep.recording.partial import RUN, Note, Partial, beside

NAMES = ("repeat", "batch", "jitter")


class Stopped(BaseException):
    """What a kill is here."""


def measured(name: str) -> NoiseRun:
    """A run with numbers that a text must not round."""
    odd = 1.0 / 3.0 if name != "batch" else float("nan")
    found = RunMetrics(name="x", rel_l2=odd, max_abs=2.0**-149, structure={"gain": 0.1})
    return NoiseRun(kind=name, detail="", pair="float32/float32", tensors=(found,))


def record(
    target: Path,
    *,
    stop: str = "",
    identity: str = "a",
    resume: bool = False,
    told: list[str] | None = None,
) -> tuple[str, list[str], list[str]]:
    """A record of three benign runs: its result as text, what was made, and what was told."""
    made: list[str] = []
    told = [] if told is None else told
    notes: list[str] = []

    def trusted(note: Note) -> Recording:
        if stop == RUN:
            raise Stopped
        made.append(RUN)
        return recording(3.0)

    def run(name: str, note: Note) -> list[NoiseRun]:
        if name == stop:
            raise Stopped
        made.append(name)
        note(f"noted of {name}")
        return [measured(name)]

    with Partial(target, resume=resume, tell=told.append) as kept:
        kept.begin({"identity": identity})
        first = kept.recording(RUN, trusted, notes.append)
        kept.expect(len(NAMES))
        runs = [kept.runs(n, lambda note, n=n: run(n, note), notes.append) for n in NAMES]  # type: ignore[misc]
        first.save(target)
        kept.remove()
    values = [first[name].tolist() for name in first]
    return repr((values, first.manifest.case, runs, notes)), made, told


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The target of a record that was stopped after two of three benign runs."""
    with pytest.raises(Stopped):
        record(tmp_path / "r", stop="jitter")
    return tmp_path / "r"


def test_a_finished_record_leaves_nothing(tmp_path: Path) -> None:
    _, made, told = record(tmp_path / "deep" / "r")
    assert (made, told) == ([RUN, *NAMES], [])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["r"]


def test_what_somebody_else_put_there_stays(stopped: Path, tmp_path: Path) -> None:
    """Also where the folder is a link to one on another disk."""
    folder = stopped.with_name("r.partial")
    left = folder / f".{RUN}.01234567.machine.1.89abcdef.tmp"
    left.mkdir()
    (left / "part").touch()
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "disk").mkdir()
    folder = folder.rename(tmp_path / "disk" / "there")
    stopped.with_name("r.partial").symlink_to(folder)
    assert record(stopped, resume=True)[1] == ["jitter"]
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_one_that_fails_before_anything_is_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        record(tmp_path / "deep" / "r", stop=RUN)
    assert [*tmp_path.iterdir()] == []


def test_what_is_finished_is_not_made_again(stopped: Path) -> None:
    whole, _, _ = record(stopped.with_name("whole"))
    result, made, told = record(stopped, resume=True)
    assert made == ["jitter"]
    assert told == ["goes on from its 2 of 3 benign runs"]
    assert result == whole
    assert not stopped.with_name("r.partial").exists()


def test_what_was_read_again_is_in_memory_of_its_own(stopped: Path) -> None:
    def never(note: Note) -> Recording:
        raise AssertionError

    with Partial(stopped, resume=True) as kept:
        kept.begin({"identity": "a"})
        taken = kept.recording(RUN, never, print)
        kept.remove()
    assert taken.path is None
    assert all(t.data_ptr() % 64 == 0 or not t.numel() for t in taken.values())
    assert torch.equal(taken["x"], recording(3.0)["x"])


def test_a_new_record_replaces_what_is_left_once_its_trusted_run_is_finished(stopped: Path) -> None:
    journal = stopped.with_name("r.partial") / "journal"
    before = journal.read_bytes()
    told: list[str] = []
    with pytest.raises(Stopped):
        record(stopped, identity="b", stop=RUN, told=told)
    assert told == [
        f"a record that was stopped is at {stopped}.partial: --resume goes on from its 2 of 3 "
        "benign runs"
    ]
    assert journal.read_bytes() == before
    with pytest.raises(Stopped):
        record(stopped, identity="b", stop="batch")
    assert len([*journal.parent.glob("run.*")]) == 1, "that of the other one is gone"
    _, made, _ = record(stopped, identity="b", resume=True)
    assert made == ["batch", "jitter"]


def test_of_another_thing_it_is_refused_and_left(stopped: Path) -> None:
    journal = stopped.with_name("r.partial") / "journal"
    before = journal.read_bytes()
    with pytest.raises(UsageError, match="not of what is recorded now") as caught:
        record(stopped, identity="b", resume=True)
    assert caught.value.measured == "identity: b, there a"
    assert journal.read_bytes() == before


def copies(stopped: Path) -> Iterator[Path]:
    """Folders with a copy of what is left, one after the other."""
    number = 0
    while True:
        folder = stopped.parent / str(number)
        shutil.copytree(stopped.with_name("r.partial"), folder / "r.partial")
        yield folder / "r"
        shutil.rmtree(folder)
        number += 1


def test_cut_anywhere_it_is_taken_up_to_the_last_whole_line(stopped: Path) -> None:
    whole, _, _ = record(stopped.with_name("whole"))
    content = (stopped.with_name("r.partial") / "journal").read_bytes()
    lines = content.splitlines(keepends=True)
    ends = [sum(map(len, lines[:count])) for count in range(len(lines) + 1)]
    places = {end + by for end in ends for by in (-1, 0, 1, 20)} | set(range(0, len(content), 61))
    targets = copies(stopped)
    for place in sorted(p for p in places if 0 <= p <= len(content)):
        target = next(targets)
        (target.with_name("r.partial") / "journal").write_bytes(content[:place])
        result, made, _ = record(target, resume=True)
        assert result == whole
        done = sum(end <= place for end in ends[1:])  # the first says what, the second the run
        assert made == ([RUN, *NAMES] if done < 2 else [*NAMES[done - 2 :]]), place


def test_damaged_anywhere_it_never_gives_another_result(stopped: Path) -> None:
    whole, _, _ = record(stopped.with_name("whole"))
    journal = (stopped.with_name("r.partial") / "journal").read_bytes()
    (run,) = stopped.with_name("r.partial").glob("run.*")
    targets = copies(stopped)
    for name, content in (("journal", journal), (run.name, run.read_bytes())):
        for place in range(0, len(content), max(len(content) // 30, 1)):
            target = next(targets)
            flipped = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
            (target.with_name("r.partial") / name).write_bytes(flipped)
            result, made, told = record(target, resume=True)
            assert result == whole
            assert len(made) > 1, "something was made again"
            assert name == "journal" or f"{name} is damaged: recorded from the beginning" in told[0]
    target = next(targets)
    (target.with_name("r.partial") / run.name).unlink()
    assert record(target, resume=True)[:2] == (whole, [RUN, *NAMES])


def test_lines_of_another_record_are_not_taken_for_its_own(stopped: Path) -> None:
    """The runs of one beside the trusted run of another, each line whole."""
    other = stopped.with_name("other")
    with pytest.raises(Stopped):
        record(other, stop="batch")
    mine = (stopped.with_name("r.partial") / "journal").read_bytes().splitlines(keepends=True)
    path = other.with_name("other.partial") / "journal"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2] + mine[3:]))
    _, made, told = record(other, resume=True)
    assert made == [*NAMES]
    assert told == ["goes on after its trusted run; what follows is damaged, and is made again"]


def test_what_is_refused_is_not_left_to_be_refused_again(stopped: Path) -> None:
    with Partial(stopped, resume=True) as kept:
        kept.begin({"identity": "a"})
        with pytest.raises(UsageError), kept.refusing():
            raise UsageError("it is never the same")
    assert [*stopped.parent.iterdir()] == []


def test_one_at_a_time(stopped: Path) -> None:
    with Partial(stopped), pytest.raises(UsageError, match="another process records this now"):
        record(stopped)
    assert record(stopped, resume=True)[1] == ["jitter"]


def test_what_cannot_be_kept_is_told_and_the_record_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, _ = record(tmp_path / "whole")
    (tmp_path / "a.partial").write_text("a file in the place of the folder")
    result, made, (told,) = record(tmp_path / "a")
    assert (result, made) == (whole, [RUN, *NAMES])
    assert told == (
        f"what is finished from here on is not kept at {tmp_path}/a.partial, should this be "
        "stopped: File exists"
    )

    with monkeypatch.context() as patch:
        patch.setattr("truestep.recording.partial.ROOM", 2**62)
        result, made, (told,) = record(tmp_path / "b")
    assert (result, made) == (whole, [RUN, *NAMES])
    assert told.endswith("No space left on device")
    assert not (tmp_path / "b.partial").exists()


def test_on_a_full_disk_what_is_left_gives_its_room_to_what_replaces_it(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = next(stopped.with_name("r.partial").glob("run.*"))
    usage = shutil.disk_usage(stopped.parent)

    def free(folder: Path) -> object:
        return usage._replace(free=2**20 if old.exists() else 2**40)

    monkeypatch.setattr("shutil.disk_usage", free)
    with pytest.raises(Stopped):
        record(stopped, identity="b", stop="batch")
    assert record(stopped, identity="b", resume=True)[1] == ["batch", "jitter"]


def test_a_recording_of_nothing_is_kept(tmp_path: Path) -> None:
    """What cannot be raised gives no tensors, and notes why."""

    def nothing(note: Note) -> Recording:
        note("it cannot be")
        return Recording.in_memory({}, recording(1.0).manifest.model_copy(update={"tensors": ()}))

    def never(note: Note) -> Recording:
        raise AssertionError

    for make, resume in ((nothing, False), (never, True)):
        notes: list[str] = []
        with Partial(tmp_path / "r", resume=resume) as kept:
            kept.begin({})
            kept.recording(RUN, lambda note: recording(3.0), notes.append)
            assert len(kept.recording("raised", make, notes.append)) == 0
        assert notes == ["it cannot be"]


def test_on_a_disk_that_gets_full_what_was_kept_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, _ = record(tmp_path / "whole")
    synced, sync = [0], os.fsync

    def full(file: int) -> None:
        synced[0] += 1
        if synced[0] > 5:  # two of the trusted run, two of the journal, one of the first benign run
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    told: list[str] = []
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Stopped):
        record(tmp_path / "r", stop="jitter", told=told)
    monkeypatch.undo()
    assert len(told) == 1
    assert "No space left on device" in told[0]
    result, made, _ = record(tmp_path / "r", resume=True)
    assert result == whole
    assert made in (["jitter"], ["batch", "jitter"])  # the line was written, or not


def test_what_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with beside(None, resume=False) as kept:
        kept.begin({})
        assert kept.runs("x", lambda note: [measured("x")], print) == [measured("x")]
        kept.remove()
    with pytest.raises(UsageError, match="without a path"):
        beside(None, resume=True)
    monkeypatch.setenv("WORLD_SIZE", "2")  # ranks wait for one another
    with beside(tmp_path / "r", resume=False):
        assert [*tmp_path.iterdir()] == []
    with pytest.raises(UsageError, match="by several processes"):
        beside(tmp_path / "r", resume=True)
