"""A short run of the fuzzer over every kind of file, and proof that it sees what it looks for."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import kinds
from tests.fuzz.kinds import KINDS, MAIN, Kind
from tests.fuzz.run import Bench, Tally, fuzz, keep, run
from truestep.errors import FileFormatError

COUNT = 100
"""Mutants of each kind here, 300 of the main ones; `make fuzz` reads a million."""


@pytest.mark.filterwarnings("ignore")  # numpy's and zipfile's, of files that they then refuse
@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_end_in_an_error_of_the_tree(name: str, tmp_path: Path) -> None:
    if name in ("onnx", "hdf5"):
        pytest.importorskip("onnx" if name == "onnx" else "h5py")
    count = 300 if name in MAIN else COUNT
    tally = run({name: count}, seed=1, out=tmp_path, processes=1).of(name)
    assert tally.failures == []
    assert tally.refused > 0
    assert tally.refused + tally.read == tally.done


def _raise_key_error(path: Path, _: Path) -> None:
    if path.read_bytes() != b"good":
        raise KeyError("x")


def _allocate(path: Path, _: Path) -> None:
    if path.read_bytes() != b"good":
        mmap.mmap(-1, 8 * 2**30).close()  # of addresses alone


def _hang(path: Path, _: Path) -> None:
    data = path.read_bytes()
    while data != b"good":
        pass


def _no_memory(path: Path, _: Path) -> None:
    if path.read_bytes() != b"good":
        raise FileFormatError("the file cannot be read", measured="MemoryError")


def _wrong_exit(path: Path, _: Path) -> None:
    if path.read_bytes() != b"good":
        error = FileFormatError("it cannot be")
        error.exit_code = 1  # type: ignore[misc]
        raise error


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (_raise_key_error, "outside the tree: KeyError"),
        (_allocate, "allocation: "),
        (_hang, "hang"),
        (_no_memory, "allocation"),
        (_wrong_exit, "an error that is none: exit 1"),
    ],
)
def test_every_fault_is_seen(
    use: Callable[[Path, Path], None],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seeds(folder: Path) -> None:
        (folder / "f").write_bytes(b"good")

    kind = Kind(seeds, {"": lambda data, generator: data + b"!"}, use)
    monkeypatch.setitem(kinds.KINDS, "planted", kind)
    monkeypatch.setattr("tests.fuzz.run.SECONDS", 0.2)
    tally = fuzz(Bench("planted", tmp_path, seed=0), range(1))
    assert (tally.done, tally.refused, tally.read) == (1, 0, 0)
    assert str(tally.failures[0]["outcome"]).startswith(said)
    assert tally.failures[0]["repeat"].endswith("--seed 0 --repeat planted:0")


def test_a_mutant_is_made_again_from_its_number(tmp_path: Path) -> None:
    for kind in KINDS:
        benches = [Bench(kind, tmp_path / kind / name, seed=4) for name in "ab"]
        mutants = [[bench.mutant(number) for number in range(20)] for bench in benches]
        assert mutants[0] == mutants[1], kind
    benches = [Bench("npz", tmp_path / name, seed=4) for name in "ab"]
    mutants = [[bench.mutant(number) for number in range(20)] for bench in benches]
    assert mutants[0] == mutants[1]
    assert (
        len({json.dumps(sorted(files), default=str) + repr(files) for _, files in mutants[0]}) > 15
    )
    assert keep(benches[0], 3, tmp_path).read_bytes() == benches[1].mutant(3)[1][""]


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = run({"lock": 40}, seed=2, out=tmp_path, processes=1)
    assert first.of("lock").done == 40
    kept = json.loads((tmp_path / "counts.json").read_text("utf-8"))
    assert kept["mutants"] == 40
    assert kept["failures"] == 0
    more = run({"lock": 70, "rename": 30}, seed=2, out=tmp_path, processes=2)
    assert more.of("lock").done == 70
    assert more.of("rename").done == 30
    whole = run({"lock": 70}, seed=2, out=tmp_path / "whole", processes=1)
    assert whole.of("lock") == more.of("lock")
    with pytest.raises(SystemExit, match="is of seed 2"):
        run({"lock": 1}, seed=3, out=tmp_path, processes=1)


def test_other_children_of_the_process_do_not_disturb(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
    assert run({"rename": 20}, seed=2, out=tmp_path, processes=1).of("rename").done == 20
    assert other.wait() == 7


def test_a_process_that_dies_is_told_with_its_mutant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    def seeds(folder: Path) -> None:
        (folder / "f").write_bytes(b"good")

    def die(path: Path, _: Path) -> None:
        if path.read_bytes() == b"good5":
            os.kill(os.getpid(), signal.SIGKILL)

    numbers = iter(range(100))
    kind = Kind(seeds, {"": lambda data, generator: data + str(next(numbers)).encode()}, die)
    monkeypatch.setitem(kinds.KINDS, "planted", kind)
    (found,) = run({"planted": 20}, seed=0, out=tmp_path, processes=1).of("planted").failures
    assert found["number"] == 5
    assert found["outcome"] == "the process died: wait status 9"


def test_tallies_add_up() -> None:
    tally = Tally(done=1, refused=1)
    tally.add(Tally(done=2, read=1, failures=[{"kind": "x"}]))
    assert tally == Tally(done=3, refused=1, read=1, failures=[{"kind": "x"}])
