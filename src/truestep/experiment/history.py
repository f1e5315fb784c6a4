"""The history of runs: one SQLite file, one row a run, each written in its own transaction.

Several processes may write at once (write-ahead log; a writer waits for the other). A process that
is killed leaves every run that it had finished, in a batch that is marked as cut short.

::

    cohort(id, source, case_id, identity)          identity: JSON, keys as in `Cohort.values`
    batch(id, cohort, started, label, tool_version, baseline, complete, digest)
    run(batch, number, started, e2e_ms, load_ms, memory_mib, memory_kind, stages_ms,
        denoise_step_ms)                           the last two: JSON, {name: ms}
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from truestep.errors import FileFormatError, WriteError
from truestep.experiment.perf_records import Cohort, PerfBatch, PerfRun
from truestep.magic import what_is
from truestep.reading import parse_json, reason
from truestep.text import quoted

APPLICATION_ID = 0x54535046
"""`TSPF`, in the file's header."""

SCHEMA = 1
"""`user_version` of the file; raised with every change of the tables."""

STEPS, STEPS_PER_BYTE = 10**7, 1000
"""Steps of SQLite's machine that a reading may take: a table whose pages point at each other has no
end, and a whole history of 1 MB takes fewer than 10 a byte."""

WAIT_S = 30.0
"""How long a writer waits for another."""

_TABLES = """
CREATE TABLE cohort (
    id TEXT PRIMARY KEY, source TEXT NOT NULL, case_id TEXT NOT NULL, identity TEXT NOT NULL);
CREATE TABLE batch (
    id INTEGER PRIMARY KEY, cohort TEXT NOT NULL REFERENCES cohort(id), started TEXT NOT NULL,
    label TEXT NOT NULL, tool_version TEXT NOT NULL, baseline INTEGER,
    complete INTEGER NOT NULL, digest TEXT, UNIQUE (cohort, digest));
CREATE TABLE run (
    batch INTEGER NOT NULL REFERENCES batch(id), number INTEGER NOT NULL, started TEXT NOT NULL,
    e2e_ms REAL, load_ms REAL, memory_mib REAL, memory_kind TEXT NOT NULL,
    stages_ms TEXT NOT NULL, denoise_step_ms TEXT NOT NULL, PRIMARY KEY (batch, number));
CREATE INDEX batch_of_cohort ON batch(cohort);
"""


@dataclass(frozen=True)
class Import:
    """A batch of another tool's, with the digest that keeps it from being imported twice."""

    cohort: Cohort
    batch: PerfBatch
    digest: str


class History:
    """An open history. Use `open_history`."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path, self._db = path, connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of the block, or none of it."""
        with _errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def begin(
        self, cohort: Cohort, *, started: str, label: str = "", tool_version: str = ""
    ) -> int:
        """Begin a batch that counts for nothing until it is finished."""
        with self._writing() as db:
            _put_cohort(db, cohort)
            return _put_batch(
                db, cohort, PerfBatch(started=started, label=label, tool_version=tool_version), None
            )

    def add(self, batch: int, run: PerfRun) -> None:
        """Keep one run, in a transaction of its own.

        Raises:
            WriteError: The disk is full or the file is locked; what was there before is kept.
        """
        with self._writing() as db:
            found = db.execute("SELECT COUNT(*) FROM run WHERE batch = ?", (batch,)).fetchone()
            _put_run(db, batch, int(found[0]), run)

    def finish(self, batch: int, *, baseline: int | None) -> None:
        """Mark a batch as complete, and say for which baseline it counts."""
        with self._writing() as db:
            db.execute(
                "UPDATE batch SET complete = 1, baseline = ? WHERE id = ?", (baseline, batch)
            )

    def import_all(self, items: list[Import]) -> int:
        """Keep batches of another tool in one transaction; those already there are left out."""
        new = 0
        with self._writing() as db:
            for item in items:
                _put_cohort(db, item.cohort)
                known = db.execute(
                    "SELECT 1 FROM batch WHERE cohort = ? AND digest = ?",
                    (item.cohort.id, item.digest),
                ).fetchone()
                if known:
                    continue
                number = _put_batch(db, item.cohort, item.batch, item.digest)
                for place, run in enumerate(item.batch.runs):
                    _put_run(db, number, place, run)
                new += 1
        return new

    def cohorts(self) -> list[tuple[Cohort, int]]:
        """Every cohort with the runs that count for its latest baseline."""
        found = []
        with _errors(self.path):
            for row in self._db.execute(
                "SELECT source, case_id, identity FROM cohort ORDER BY rowid"
            ).fetchall():
                cohort = self._cohort(row)
                found.append((cohort, sum(len(b.runs) for b in self.baseline(cohort))))
        return found

    def batches(self, cohort: Cohort) -> list[PerfBatch]:
        """Every batch of a cohort that holds runs, in the order they were begun."""
        found = []
        with _errors(self.path):
            for row in self._db.execute(
                "SELECT id, started, label, tool_version, baseline, complete FROM batch "
                "WHERE cohort = ? ORDER BY started, id",
                (cohort.id,),
            ).fetchall():
                runs = self._runs(int(row[0]))
                if runs:
                    found.append(self._batch(row, runs))
        return found

    def baseline(self, cohort: Cohort) -> list[PerfBatch]:
        """The batches that count for the latest baseline."""
        found = self.batches(cohort)
        latest = max((b.baseline for b in found if b.baseline is not None), default=None)
        return [b for b in found if latest is not None and b.baseline == latest]

    def _cohort(self, row: tuple[str, str, str]) -> Cohort:
        with self._readable("cohort"):
            return Cohort.model_validate(
                {"source": row[0], "case_id": row[1], "values": parse_json(row[2])}
            )

    def _batch(self, row: tuple[object, ...], runs: tuple[PerfRun, ...]) -> PerfBatch:
        keys = ("id", "started", "label", "tool_version", "baseline", "complete")
        with self._readable(f"batch {row[0]}"):
            return PerfBatch.model_validate({**dict(zip(keys, row, strict=True)), "runs": runs})

    def _runs(self, batch: int) -> tuple[PerfRun, ...]:
        rows = self._db.execute(
            "SELECT started, e2e_ms, load_ms, memory_mib, memory_kind, stages_ms, denoise_step_ms "
            "FROM run WHERE batch = ? ORDER BY number",
            (batch,),
        ).fetchall()
        keys = ("started", "e2e_ms", "load_ms", "memory_mib", "memory_kind")
        with self._readable(f"a run of batch {batch}"):
            return tuple(
                PerfRun.model_validate(
                    {
                        **dict(zip(keys, row[:5], strict=True)),
                        "e2e_ms": "nan" if row[1] is None else row[1],  # SQLite keeps NaN as NULL
                        "stages_ms": parse_json(row[5]),
                        "denoise_step_ms": parse_json(row[6]),
                    }
                )
                for row in rows
            )

    @contextmanager
    def _readable(self, what: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, OverflowError) as error:  # pydantic's are ValueErrors
            raise FileFormatError(
                f"{what} in the history cannot be read",
                where=str(self.path),
                measured=reason(error),
                likely="the file was changed by another program",
            ) from None


@contextmanager
def open_history(path: str | Path, *, create: bool = True) -> Iterator[History]:
    """Open a history; close it with the block.

    Args:
        path: The file.
        create: Make it, and its folder, if there is none.

    Raises:
        FileFormatError: It is absent (without `create`), not SQLite, not a history, or newer.
        WriteError: It cannot be made or written.
    """
    path = Path(path)
    if not create and not path.is_file():
        raise FileFormatError(
            "there is no history",
            where=str(path),
            hint="truestep perf record --prompt 'a cat'  # makes one",
        )
    with ExitStack() as stack:
        with _errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if create or (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
                connection = _connect(path, "rwc" if create else "rw")
            else:
                connection = _reading(path, stack)
            stack.callback(connection.close)
            _prepare(path, connection)
        yield History(path, connection)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    db = sqlite3.connect(uri, uri=True, timeout=WAIT_S, isolation_level=None)
    _limit(db, path.stat().st_size if path.exists() else 0)
    return db


def _reading(path: Path, stack: ExitStack) -> sqlite3.Connection:
    """Open a file that may not be written, with what its write-ahead log holds.

    SQLite needs to write beside a file to read its log, unless a process that writes has done so;
    a log that such a process left when it was killed is read from a copy of both.
    """
    log = path.with_name(f"{path.name}-wal")
    if not (log.is_file() and log.stat().st_size):
        return _connect(path, "ro&immutable=1")
    db = _connect(path, "ro")
    try:
        _header(db)
    except sqlite3.OperationalError:
        db.close()
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="truestep-")))
        for file in (log, path):
            shutil.copyfile(file, folder / file.name)
        return _connect(folder / path.name, "rw")
    return db


def _limit(db: sqlite3.Connection, size: int) -> None:
    """Let a damaged or hostile file take no more memory and time than its size justifies."""
    if hasattr(db, "setlimit"):  # Python 3.11
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, size + 2**20)
    left = itertools.count((STEPS + STEPS_PER_BYTE * size) // 10**6, -1)
    db.set_progress_handler(lambda: next(left) <= 0, 10**6)


def _prepare(path: Path, db: sqlite3.Connection) -> None:
    """Check that it is a history of a schema known here; make the tables in an empty file."""
    db.execute("PRAGMA foreign_keys = ON")
    application, schema, tables = _header(db)
    if not tables and not application:
        _use_log(db)
        db.execute("BEGIN IMMEDIATE")
        if not _header(db)[2]:  # another process may have been first
            for statement in _TABLES.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {SCHEMA}")
        db.execute("COMMIT")
        application, schema, tables = _header(db)
    if application != APPLICATION_ID or (schema == SCHEMA and _schema(db) != _expected_schema()):
        raise FileFormatError(
            "this is a SQLite file, but not a history of truestep",
            where=str(path),
            hint="give another --history",
        )
    if schema > SCHEMA:
        raise FileFormatError(
            "the history was written by a newer truestep",
            where=str(path),
            measured=f"schema {schema}; this version reads up to {SCHEMA}",
            hint="pip install --upgrade truestep",
        )


def _header(db: sqlite3.Connection) -> tuple[int, int, int]:
    """Application id, schema, and number of tables, all of one moment."""
    application, schema, tables = db.execute(
        "SELECT application_id, user_version, (SELECT COUNT(*) FROM sqlite_master) "
        "FROM pragma_application_id, pragma_user_version"
    ).fetchone()
    return int(application), int(schema), int(tables)


def _schema(db: sqlite3.Connection) -> set[str]:
    """What makes the tables; a view or trigger in their place could run anything."""
    rows = db.execute("SELECT sql FROM sqlite_master WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'")
    return {" ".join(str(row[0]).split()) for row in rows}


@functools.cache
def _expected_schema() -> set[str]:
    return {" ".join(text.split()) for text in _TABLES.split(";") if text.strip()}


def _use_log(db: sqlite3.Connection) -> None:
    """Switch to the write-ahead log; SQLite does not wait for others here, so this does."""
    end = time.monotonic() + WAIT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.02)


def _put_cohort(db: sqlite3.Connection, cohort: Cohort) -> None:
    db.execute(
        "INSERT OR IGNORE INTO cohort VALUES (?, ?, ?, ?)",
        (cohort.id, cohort.source, cohort.case_id, json.dumps(cohort.values, sort_keys=True)),
    )


def _put_batch(db: sqlite3.Connection, cohort: Cohort, batch: PerfBatch, digest: str | None) -> int:
    done = db.execute(
        "INSERT INTO batch (cohort, started, label, tool_version, baseline, complete, digest) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            cohort.id,
            batch.started,
            batch.label,
            batch.tool_version,
            batch.baseline,
            int(digest is not None),
            digest,
        ),
    )
    return int(done.lastrowid or 0)


def _put_run(db: sqlite3.Connection, batch: int, number: int, run: PerfRun) -> None:
    plain = run.model_dump(mode="json")
    db.execute(
        "INSERT INTO run VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            batch,
            number,
            run.started,
            run.e2e_ms,
            run.load_ms,
            run.memory_mib,
            run.memory_kind,
            json.dumps(plain["stages_ms"]),
            json.dumps(plain["denoise_step_ms"]),
        ),
    )


_SYSTEM = re.compile("locked|busy|full|read-?only|unable to open|disk I/O", re.IGNORECASE)
"""What SQLite says where the file is not to blame."""


def _damaged(path: Path, text: str) -> FileFormatError:
    kind = what_is(path)
    return FileFormatError(
        "this is not a history: it is not a SQLite file, or it is damaged",
        where=str(path),
        measured=f"it is {kind}; {text}" if kind else text,
        hint="give another --history; this file was not touched",
    )


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """SQLite's and the system's errors as ours."""
    folder = quoted(str(path.parent))
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        if not _SYSTEM.search(text):
            raise _damaged(path, text) from None
        likely = (
            "another process has been writing for long"
            if "locked" in text or "busy" in text
            else "the disk is full"
            if "full" in text
            else ""
        )
        raise WriteError(
            "the history could not be written",
            where=str(path),
            measured=text,
            likely=likely,
            hint=f"df -h {folder}; ls -ld {folder}  # the runs before it are kept",
        ) from error
    except sqlite3.Error as error:
        raise _damaged(path, str(error)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise WriteError(
            "the history could not be written",
            where=str(path),
            measured=reason(error),
            hint=f"ls -ld {folder}",
        ) from error
