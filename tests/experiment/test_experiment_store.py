"""The folder of an experiment: locks, torn and damaged lines, a full disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from truestep.errors import FileFormatError, UsageError, WriteError
from truestep.experiment.planning import parse_matrix, pinned_cases, planned_cases
from truestep.experiment.records import Failure, Plan, Sample
from truestep.experiment.store import Store

CELL = parse_matrix([])[0]
PLAN = Plan(
    cases=planned_cases(pinned_cases("builtin:digits", most=1)),
    cells=(CELL,),
    candidate={"guidance_scale": "3.5"},
    rounds=4,
    most_rounds=4,
    margin=0.05,
)


def sample(place: int, *, number: int = 0, session: int = 0) -> Sample:
    return Sample(
        arm="baseline",
        case="c",
        round=number,
        session=session,
        place=place,
        seconds=1.0,
        stages_s={"step": (0.5, 0.5)},
        forwards=4,
        latent="a",
        frames="b",
    )


def test_lines_come_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    failure = Failure(arm="candidate", doing="loading", text="ValueError: no")
    for line in (sample(0), failure):
        store.append(CELL, line)
    assert store.lines(CELL) == ([sample(0), failure], [])
    assert Store(tmp_path / "none").lines(CELL) == ([], [])


def test_a_damaged_line_is_left_out_and_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append(CELL, sample(0))
    path = tmp_path / CELL.folder / "samples.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "sample", "arm": 3}\n\xff\xfe\n')
    store.append(CELL, sample(1))
    lines, said = store.lines(CELL)
    assert lines == [sample(0), sample(1)]
    assert said == ["2 damaged lines left out: eager/as-is/samples.jsonl, line 2, 3"]


def test_a_line_that_a_kill_cut_short_does_not_take_the_next_along(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append(CELL, sample(0))
    path = tmp_path / CELL.folder / "samples.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind":"sample","arm":"ba')
    store.append(CELL, sample(1))
    lines, said = store.lines(CELL)
    assert lines == [sample(0), sample(1)]
    assert said == ["1 damaged line left out: eager/as-is/samples.jsonl, line 2"]


def test_a_full_disk_is_said_and_what_was_written_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = tmp_path / CELL.folder / "samples.jsonl"
    path.parent.mkdir(parents=True)
    path.symlink_to("/dev/full")
    with pytest.raises(WriteError) as caught:
        store.append(CELL, sample(0))
    assert caught.value.what == "the samples could not be written"
    assert "No space left on device" in caught.value.measured
    assert caught.value.likely == "the disk is full"
    assert "--resume goes on" in caught.value.hint


def test_a_second_process_is_refused_by_name_and_a_dead_one_is_not_in_the_way(
    tmp_path: Path,
) -> None:
    code = (
        "import sys, time\n"
        "from truestep.experiment.store import Store\n"
        f"with Store({str(tmp_path)!r}).locked():\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "locked\n"
        with (
            pytest.raises(UsageError, match=f"in use by process {other.pid}"),
            Store(tmp_path).locked(),
        ):
            pass
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert (tmp_path / "lock").read_text() == f"{other.pid}\n"
    with Store(tmp_path).locked():
        pass


def test_beginning_and_resuming(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(FileFormatError, match="not the folder of an experiment"):
        store.plan()
    with pytest.raises(UsageError, match="no experiment to resume"):
        store.begin(PLAN, resume=True)
    store.begin(PLAN, resume=False)
    with pytest.raises(UsageError, match="there is an experiment in this folder already"):
        store.begin(PLAN, resume=False)
    more = PLAN.model_copy(update={"rounds": 9, "most_rounds": 9})
    store.begin(more, resume=True)
    assert store.plan() == more
    with pytest.raises(UsageError, match="is another one: candidate changed"):
        store.begin(PLAN.model_copy(update={"candidate": {"steps": "3"}}), resume=True)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(FileFormatError, match="its plan is damaged"):
        store.plan()


def test_tensors_come_back_or_are_absent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    latent = torch.randn(1, 2, 3)
    store.save_tensors(CELL, "control", "case", {"latent/final": latent})
    assert torch.equal(store.tensors(CELL, "control", "case")["latent/final"], latent)
    store.media(CELL, "control", "case").write_bytes(b"damaged")
    assert store.tensors(CELL, "control", "case") == {}
    assert store.tensors(CELL, "candidate", "case") == {}
