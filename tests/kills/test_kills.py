"""A short form of `python -m tests.kills.run`, which `make kills` runs in full."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kills.harness import Count, Writer, at_random, point_by_point, race

ROOT = Path(__file__).parents[2]


def test_every_writer_survives_kills_interrupts_and_races() -> None:
    options = ["--every", "9", "--lines", "301", "--random", "3", "--races", "1"]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.kills.run", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    last = ended.stdout.splitlines()[-1]
    told = re.fullmatch(r"([\d,]+) kills, ([\d,]+) interrupts, (\d+) races: 0 faults", last)
    assert told is not None, last
    assert int(told[1]) > 60
    assert int(told[3]) > 8


def in_place(folder: Path, value: int) -> None:
    """Planted: a writer that writes into the file itself."""
    import os

    file = os.open(folder / "number", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for _ in range(2):
        os.write(file, f"{value:010d}".encode())
    os.close(file)


def read_in_place(folder: Path) -> set[int]:
    text = (folder / "number").read_text()
    return {int(text[:10]), int(text[10:])}


def careless(folder: Path, value: int) -> None:
    """Planted: whole files by a temporary one that nobody sweeps."""
    import os

    temporary = folder / f"{os.getpid()}.tmp"
    temporary.write_text(f"{value:010d}" * 2)
    os.replace(temporary, folder / "number")


def merged(folder: Path, value: int) -> None:
    """Planted: reads, adds and writes without a lock."""
    import os

    path = folder / "numbers"
    known = path.read_text() if path.exists() else ""
    temporary = folder / f"{os.getpid()}.half"
    temporary.write_text(f"{known}{value}\n")
    os.replace(temporary, path)


def read_merged(folder: Path) -> set[int]:
    return {int(line) for line in (folder / "numbers").read_text().split()}


@pytest.mark.parametrize(
    ("write", "said"), [(in_place, "ValueError"), (careless, "left over")], ids=["torn", "left"]
)
def test_careless_writers_are_caught(tmp_path: Path, write, said: str) -> None:  # type: ignore[no-untyped-def]
    count = Count()
    writer = Writer("planted", write, read_in_place)
    point_by_point(writer, tmp_path / "files", count)
    at_random(writer, tmp_path / "files", count, times=5, seed=0)
    assert any(said in fault for fault in count.faults)


def test_a_writer_without_a_lock_is_caught(tmp_path: Path) -> None:
    count = Count()
    writer = Writer("planted", merged, read_merged, keeps=True)
    for seed in range(5):
        race(writer, tmp_path / "files", count, writers=6, seed=seed)
    assert any("lost" in fault for fault in count.faults)
