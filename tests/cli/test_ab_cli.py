"""`truestep ab`: options, outputs, exit codes, a kill in the middle, and recovery."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import Run, runner, write_cases
from truestep.experiment.records import Experiment, PlannedCell, Sample
from truestep.experiment.store import Store

CHANGES = """
import time

def fused(pipe):
    pipe.transformer.fuse_qkv_projections()

def slow(pipe):
    decode = pipe.decode
    def later(inner, latent):
        time.sleep(0.1)
        return decode(inner, latent)
    pipe.decode = later

def broken(pipe):
    raise RuntimeError("no such kernel")
"""


@pytest.fixture
def folder(tiny_wan: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a case file and changes, to run in."""
    write_cases(tmp_path, tiny_wan["wan21"], "three")
    (tmp_path / "change.py").write_text(CHANGES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ab(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `truestep ab`."""
    return runner(monkeypatch, capsys, "ab")


def test_a_planted_slow_down_is_not_faster(ab: Run, folder: Path) -> None:
    code, out, _ = ab(
        "three", "--apply", "change.py:slow", "--rounds", "6", "--expect", "faster",
        "--report", "r.html", "--json", "r.json",
    )  # fmt: skip
    assert code == 1
    lines = out.splitlines()
    assert lines[0].startswith("FAILED unmet: apply slow is ")
    assert any(line.startswith("  note         expected faster, it is ") for line in lines)
    assert lines[-2:] == ["results: truestep-ab", "report: r.html"]
    assert len(lines) <= 12
    found = Experiment.model_validate_json((folder / "r.json").read_text())
    assert found == Experiment.model_validate_json((folder / "truestep-ab/result.json").read_text())
    assert found.environment["device.class"] == "cpu"
    assert len(found.cells[0].samples) == 36
    assert "latents identical" in (folder / "truestep-ab" / "table.md").read_text()
    assert (folder / "r.html").read_text().count("data:image/png") >= 6
    code, out, _ = ab("recover", "truestep-ab", "--json")
    again = Experiment.model_validate_json(out)
    assert (code, again.cells) == (1, found.cells)
    _, out, _ = ab("recover", "truestep-ab", "-v")
    assert "FAILED unmet as it is [apply slow]" in out


def test_bad_input_is_refused_before_anything_runs(ab: Run, folder: Path) -> None:
    for arguments, message in (
        (["three"], "the arms do not differ: there is no switch to test"),
        (["three", "--set", "step=3"], "did you mean 'steps'?"),
        (["three", "--set", "steps=2"], "the candidate is the baseline"),
        (["three", "--set", "steps"], "--set needs KEY=VALUE, got 'steps'"),
        (["three", "--apply", "change.py:fuse"], "did you mean 'fused'?"),
        (["three", "--apply", "none.py:fused"], "the file of --apply cannot be read"),
        (["three", "--set", "steps=3", "--matrix", "dtype="], "--matrix dtype has no values"),
        (["three", "--set", "steps=3", "--matrix", "dtype=float8"], "dtype = 'float8'"),
        (["three", "--set", "steps=3", "--matrix", "dtpye=float32"], "unknown setting 'dtpye'"),
        (["three", "--set", "steps=3", "--until", "x"], "'x' is not a share like 1% or 0.01"),
        (["four", "--set", "steps=3"], "no case named 'four'"),
        (["recover"], "recover takes one folder"),
        (["recover", "nowhere"], "this is not the folder of an experiment"),
        (["three", "--set", "steps=3", "--resume"], "there is no experiment to resume"),
    ):
        code, _, err = ab(*arguments)
        assert code == 2, arguments
        assert message in err
    assert not list(folder.rglob("samples.jsonl"))


def test_a_matrix_may_go_on_without_the_option(ab: Run, folder: Path) -> None:
    code, out, _ = ab(
        "three", "--apply", "change.py:broken", "--matrix", "steps=2,3", "guidance_scale=4,5"
    )
    assert code == 1
    assert "INVALID" not in out
    assert "apply broken: 4 cells: 4 invalid" in out
    assert "the change broken raised RuntimeError: no such kernel" in " ".join(out.split())
    assert {p.name for p in (folder / "truestep-ab" / "eager").iterdir()} == {
        "steps=2_guidance_scale=4",
        "steps=2_guidance_scale=5",
        "steps=3_guidance_scale=4",
        "steps=3_guidance_scale=5",
    }


def test_a_killed_run_is_recovered_and_resumed(ab: Run, folder: Path) -> None:
    arguments = ("three", "--apply", "change.py:slow", "--rounds", "5")
    child = subprocess.Popen(
        [sys.executable, "-m", "truestep", "ab", *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    samples = folder / "truestep-ab" / "eager" / "as-is" / "samples.jsonl"
    deadline = time.monotonic() + 120
    while not (samples.exists() and samples.read_bytes().count(b"\n") >= 8):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.02)
    refused, _, err = ab(*arguments, "--resume")
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert refused == 2
    assert re.search(r"the folder is in use by process \d+", err)

    code, out, err = ab("recover", "truestep-ab", "--report", "r.html", "-v")
    while "in use by process" in err:  # the verb's own process follows the killed one
        time.sleep(0.02)
        code, out, err = ab("recover", "truestep-ab", "--report", "r.html", "-v")
    kept = samples.read_bytes()
    assert code == 4
    assert " of 5 rounds" in " ".join(out.split())
    assert "it is not complete" in " ".join(out.split())
    assert (folder / "r.html").read_text().count("data:image/png") >= 6
    assert ab(*arguments)[2].startswith("UsageError: there is an experiment in this folder already")
    code, _, err = ab("three", "--apply", "change.py:fused", "--rounds", "5", "--resume")
    assert (code, "is another one: apply changed" in err) == (2, True)

    code, out, _ = ab(*arguments, "--resume", "--json")
    found = Experiment.model_validate(json.loads(out))
    assert code == found.exit_code
    assert code in (0, 4)  # five rounds may not decide the speed
    assert found.cells[0].missing == ()
    assert found.cells[0].speed is not None
    assert found.cells[0].speed.rounds == 5
    assert samples.read_bytes().startswith(kept[: kept.rindex(b"\n")])


def test_a_full_disk_stops_the_run_and_keeps_what_there_is(
    ab: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Store.append

    def full(store: Store, cell: PlannedCell, line: Sample) -> None:
        if getattr(line, "place", 0) < 4:
            append(store, cell, line)
            return
        with monkeypatch.context() as patch:
            patch.setattr(Store, "_samples", lambda *_: Path("/dev/full"))
            append(store, cell, line)

    monkeypatch.setattr(Store, "append", full)
    code, _, err = ab("three", "--apply", "change.py:fused", "--rounds", "1")
    assert code == 2
    assert "WriteError: the samples could not be written" in err
    assert "likely   the disk is full" in err
    code, out, _ = ab("recover", "truestep-ab")
    assert code == 4
    assert "1 of 1 rounds" in out
    samples = folder / "truestep-ab" / "eager" / "as-is" / "samples.jsonl"
    assert samples.read_bytes().count(b"\n") == 4
