"""The SQLite history: transactions, two writers, kills, and files that are something else."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.experiment.test_baseline import COHORT, make_run
from truestep.errors import FileFormatError, WriteError
from truestep.experiment import history as module
from truestep.experiment.history import History, Import, open_history
from truestep.experiment.perf_records import Cohort, PerfBatch


def record(history: History, *, runs: int = 2, baseline: int | None = 1, day: int = 1) -> int:
    batch = history.begin(COHORT, started=f"2026-01-{day:02d}T00:00:00", label=f"day {day}")
    for _ in range(runs):
        history.add(batch, make_run())
    history.finish(batch, baseline=baseline)
    return batch


def test_runs_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "perf.sqlite"
    with open_history(path) as history:
        record(history)
    with open_history(path, create=False) as history:
        assert history.cohorts() == [(COHORT, 2)]
        (batch,) = history.batches(COHORT)
    assert batch.runs == (make_run(), make_run())
    assert (batch.label, batch.baseline, batch.complete) == ("day 1", 1, True)


def test_only_the_latest_baseline_counts(tmp_path: Path) -> None:
    with open_history(tmp_path / "perf.sqlite") as history:
        record(history, day=1)
        record(history, baseline=2, day=2)
        record(history, baseline=None, day=3)
        record(history, baseline=2, day=4)
        assert [b.label for b in history.baseline(COHORT)] == ["day 2", "day 4"]
        assert len(history.batches(COHORT)) == 4


def test_a_killed_run_leaves_a_readable_history(tmp_path: Path) -> None:
    path = tmp_path / "perf.sqlite"
    code = (
        "import os, signal, sys\n"
        "from tests.experiment.test_baseline import COHORT, make_run\n"
        "from truestep.experiment.history import open_history\n"
        "with open_history(sys.argv[1]) as history:\n"
        "    batch = history.begin(COHORT, started='2026-01-01')\n"
        "    history.add(batch, make_run()); history.add(batch, make_run())\n"
        "    history._db.execute('BEGIN IMMEDIATE')\n"
        "    history._db.execute('DELETE FROM run')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60)
    assert done.returncode == -9
    with open_history(path) as history:
        (batch,) = history.batches(COHORT)
        assert len(batch.runs) == 2
        assert (batch.complete, batch.baseline) == (False, None)
        assert history.baseline(COHORT) == []
        record(history)
        assert len(history.baseline(COHORT)) == 1


@pytest.mark.parametrize("shared", [True, False], ids=["with its index", "the log alone"])
def test_what_a_killed_writer_left_in_the_log_is_seen_in_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    path = tmp_path / "perf.sqlite"
    code = (
        "import os, signal, sys\n"
        "from tests.experiment.test_history import open_history, record\n"
        "with open_history(sys.argv[1]) as history:\n"
        "    record(history)\n"
        "with open_history(sys.argv[1]) as history:\n"
        "    record(history, day=2)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60)
    assert done.returncode == -9
    assert (tmp_path / "perf.sqlite-wal").stat().st_size
    if not shared:
        (tmp_path / "perf.sqlite-shm").unlink()
    before = {place.name: place.read_bytes() for place in tmp_path.iterdir()}
    monkeypatch.setattr(module.os, "access", lambda *_: False)
    if not shared:  # what SQLite says where it cannot write beside the file
        monkeypatch.setattr(module, "_header", refusing_once(module._header))
    with open_history(path, create=False) as history:
        assert [batch.label for batch in history.batches(COHORT)] == ["day 1", "day 2"]
    if not shared:
        after = {place.name: place.read_bytes() for place in tmp_path.iterdir()}
        assert {name: after[name] for name in before} == before


def refusing_once(header: Any) -> Any:
    calls: list[int] = []

    def first(db: sqlite3.Connection) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise sqlite3.OperationalError("unable to open database file")
        return header(db)

    return first


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "perf.sqlite"
    code = (
        "import sys\n"
        "from tests.experiment.test_baseline import COHORT, make_run\n"
        "from truestep.experiment.history import open_history\n"
        "with open_history(sys.argv[1]) as history:\n"
        "    batch = history.begin(COHORT, started='2026-01-01')\n"
        "    for _ in range(25):\n"
        "        history.add(batch, make_run())\n"
        "    history.finish(batch, baseline=1)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(2)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    with open_history(path) as history:
        assert [len(batch.runs) for batch in history.baseline(COHORT)] == [25, 25]


def test_processes_that_make_the_same_history_at_once(tmp_path: Path) -> None:
    code = (
        "import multiprocessing, sys\n"
        "from tests.experiment.test_baseline import COHORT, make_run\n"
        "from truestep.experiment.history import open_history\n"
        "def write(path, gate):\n"
        "    gate.wait()\n"
        "    with open_history(path) as history:\n"
        "        history.add(history.begin(COHORT, started=''), make_run())\n"
        "context = multiprocessing.get_context('fork')\n"
        "for number in range(12):\n"
        "    path, gate = f'{sys.argv[1]}/{number}.sqlite', context.Barrier(4)\n"
        "    four = [context.Process(target=write, args=(path, gate)) for _ in range(4)]\n"
        "    [one.start() for one in four]; [one.join() for one in four]\n"
        "    assert [one.exitcode for one in four] == [0] * 4\n"
        "    with open_history(path) as history:\n"
        "        assert len(history.batches(COHORT)) == 4\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=False,
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_writer_waits_no_longer_than_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "perf.sqlite"
    with open_history(path) as history:
        record(history)
        monkeypatch.setattr(module, "WAIT_S", 0.05)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        try:
            with open_history(path) as second, pytest.raises(WriteError) as caught:
                record(second)
        finally:
            other.close()
    assert "could not be written" in str(caught.value)
    assert "another process has been writing" in str(caught.value)


def test_a_full_disk_is_told_and_costs_nothing_that_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "perf.sqlite"
    with open_history(path) as history:
        record(history)
        batch = history.begin(COHORT, started="2026-01-02")

        def full(*_: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        with monkeypatch.context() as patched:
            patched.setattr(module, "_put_run", full)
            with pytest.raises(WriteError) as caught:
                history.add(batch, make_run())
        assert "the disk is full" in str(caught.value)
        assert f"df -h {tmp_path}" in str(caught.value)
        assert len(history.baseline(COHORT)[0].runs) == 2
        history.add(batch, make_run())  # no transaction was left open


def test_a_really_full_disk(tmp_path: Path) -> None:
    with open_history(tmp_path / "perf.sqlite") as history:
        batch = record(history)
        pages = history._db.execute("PRAGMA page_count").fetchone()[0]
        history._db.execute(f"PRAGMA max_page_count = {pages}")
        big = make_run(denoise_step_ms={str(i): 0.1 for i in range(5000)})
        with pytest.raises(WriteError, match="could not be written"):
            history.add(batch, big)
        assert len(history.batches(COHORT)[0].runs) == 2


@pytest.mark.parametrize("content", [b"not a database, and long enough for a header" * 40, b"{}"])
def test_a_file_that_is_not_sqlite(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "perf.sqlite"
    path.write_bytes(content)
    with pytest.raises(FileFormatError) as caught, open_history(path):
        pass
    assert str(caught.value).startswith("this is not a history: it is not a SQLite file")
    assert path.read_bytes() == content


def test_another_programs_sqlite_file(tmp_path: Path) -> None:
    path = tmp_path / "perf.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE bookmark (url TEXT)")
    other.close()
    with pytest.raises(FileFormatError, match="but not a history of truestep"), open_history(path):
        pass


def test_a_newer_schema(tmp_path: Path) -> None:
    path = tmp_path / "perf.sqlite"
    with open_history(path) as history:
        history._db.execute("PRAGMA user_version = 2")
    with pytest.raises(FileFormatError) as caught, open_history(path):
        pass
    text = str(caught.value)
    assert text.startswith("the history was written by a newer truestep")
    assert "schema 2; this version reads up to 1" in text
    assert "pip install --upgrade truestep" in text


def test_no_history(tmp_path: Path) -> None:
    path = tmp_path / "perf.sqlite"
    with (
        pytest.raises(FileFormatError, match="there is no history"),
        open_history(path, create=False),
    ):
        pass
    assert not path.exists()


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    with open_history(tmp_path / "perf.sqlite") as history:
        record(history)
        history._db.execute("UPDATE run SET stages_ms = '[1'")
        with pytest.raises(FileFormatError, match="a run of batch 1 in the history cannot be read"):
            history.batches(COHORT)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (f"UPDATE cohort SET identity = '{'[' * 3000}'", "cohort in the history cannot be read"),
        ("UPDATE cohort SET identity = 3", "cohort in the history cannot be read"),
        (f"UPDATE run SET stages_ms = '{{\"a\": {'9' * 400}}}'", "a run of batch 1 in the history"),
        ("UPDATE run SET started = CAST(x'ff' AS TEXT)", "this is not a history"),
        ("DROP TABLE run", "not a history of truestep"),
        ("CREATE TRIGGER t AFTER INSERT ON run BEGIN DELETE FROM run; END", "not a history of"),
        ("CREATE TABLE more (x)", "not a history of truestep"),
    ],
)
def test_what_another_program_wrote_is_refused(statement: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "perf.sqlite"
    with open_history(path) as history:
        record(history)
        history._db.execute(statement)
    with (
        pytest.raises(FileFormatError, match=said),
        open_history(path, create=False) as history,
    ):
        history.cohorts()


def test_a_view_without_an_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "perf.sqlite"
    with open_history(path) as history:
        record(history)
        history._db.execute("DROP TABLE run")
        history._db.execute(
            "CREATE VIEW run AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) "
            "SELECT i FROM n"
        )
    with (
        pytest.raises(FileFormatError, match="not a history of truestep"),
        open_history(path, create=False),
    ):
        pass


def test_a_reading_without_an_end_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEPS", 10**6)
    monkeypatch.setattr(module, "STEPS_PER_BYTE", 0)
    with (
        pytest.raises(FileFormatError, match="interrupted"),
        open_history(tmp_path / "perf.sqlite") as history,
        module._errors(history.path),
    ):
        history._db.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT sum(i) FROM n"
        ).fetchall()


def test_a_nan_comes_back_as_one(tmp_path: Path) -> None:
    with open_history(tmp_path / "perf.sqlite") as history:
        batch = history.begin(COHORT, started="")
        history.add(batch, make_run(e2e_ms=float("nan")))
        (found,) = history.batches(COHORT)
    assert found.runs[0].e2e_ms != found.runs[0].e2e_ms


def test_an_import_is_whole_or_not_at_all_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = Cohort(source="sglang", case_id="qwen")
    batch = PerfBatch(baseline=1, runs=(make_run(),))
    items = [Import(cohort, batch, "one"), Import(cohort, batch, "two")]
    put = module._put_run
    calls: list[int] = []

    def second_fails(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise sqlite3.OperationalError("disk I/O error")
        put(*arguments)  # type: ignore[arg-type]

    with open_history(tmp_path / "perf.sqlite") as history:
        with monkeypatch.context() as patched:
            patched.setattr(module, "_put_run", second_fails)
            with pytest.raises(WriteError):
                history.import_all(items)
        assert history.cohorts() == []
        assert history.import_all(items) == 2
        assert history.import_all(items) == 0
        assert len(history.baseline(cohort)) == 2
