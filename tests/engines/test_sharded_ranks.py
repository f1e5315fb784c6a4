"""Runs on several ranks: gathered into one, judged, and the collective before a fault named."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.bench_sharding import inner, judged, recorded, table
from bench.sharding.corpus import PORT, faulty, is_named, make, reference, right
from tests.commands import Captured, runner
from truestep.calls.recording import CallRecording, read
from truestep.engines.assembling import ENGINE, left_by, write
from truestep.engines.inside import INSIDE
from truestep.engines.named import run_of
from truestep.engines.ranks.checking import check_paths
from truestep.engines.ranks.collectives import broken
from truestep.engines.ranks.events import Event
from truestep.engines.ranks.files import files_of
from truestep.engines.ranks.layouts import Layouts, matched
from truestep.engines.ranks.shares import Split, split_of, splits
from truestep.engines.ranks.tracing import Part
from truestep.engines.running import run_engine
from truestep.engines.watch.spool import CallSpool
from truestep.errors import UsageError
from truestep.recording.manifest import CallEntry
from truestep.verdict import Verdict

RIGHT = ("ulysses/none/uneven/float32", "frames/none/uneven/float32", "guidance/none/even/float32")
FAULTS = (
    "ulysses/head-order/even/float32",
    "tensor/bias/even/float32",
    "tensor/unreduced/even/float32",
    "tensor/noise/even/float32",
    "guidance/exchanged/even/float32",
)


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, inputs, and recordings of two ranks in `on-2`."""
    folder = tmp_path_factory.mktemp("sharded")
    make(folder)
    recorded(folder, 2, (*RIGHT, *FAULTS))
    return folder


def path_of(sharded: Path, case: str, rank: int = 0) -> Path:
    number = (*RIGHT, *FAULTS).index(case) + 1
    end = f".{number}" if number > 1 else ""
    return sharded / "on-2" / f"run.rank{rank}{end}.safetensors"


def known(sharded: Path, case: str) -> Any:
    _, _, inputs, dtype = case.split("/")
    return run_of(reference(sharded, inputs, dtype))


@pytest.mark.parametrize("case", RIGHT)
def test_right_splits_are_gathered_and_what_was_gathered_is_said(sharded: Path, case: str) -> None:
    """With a reference by its noise, without one by what the trusted model agrees with."""
    said = {
        RIGHT[0]: "ranks: latent: repeated on ranks 0-1",
        RIGHT[1]: "ranks: latent: frames split over 2 ranks, padded by 1 on the last",
        RIGHT[2]: "ranks: cond on rank 0, uncond on rank 1",
    }
    for rank, given in enumerate((known(sharded, case), None)):  # whichever rank is named
        result = check_paths([path_of(sharded, case, rank)], sharded / "wan", reference=given)
        assert result.verdict is Verdict.EQUIVALENT, result.sentence
        assert said[case] in result.notes
    assert inner(sharded, path_of(sharded, case), None) == []


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_named_at_its_collective_or_where_one_is_missing(
    sharded: Path, case: str
) -> None:
    row = judged(sharded, case, path_of(sharded, case), 2, faulty(2)[case])
    assert row["found"], row
    assert row["named"], row


def test_what_is_wrong_is_said_in_words(sharded: Path) -> None:
    def notes(case: str) -> str:
        paths = [path_of(sharded, case, rank) for rank in (1, 0)]
        given = known(sharded, case)
        return "\n".join(check_paths(paths, sharded / "wan", reference=given).notes)

    assert "the same vector is added to every token" in notes(FAULTS[1])
    unreduced = notes(FAULTS[2])
    assert "partial sums that were not reduced, each with the bias" in unreduced
    assert "no collective between these" in unreduced
    assert "columns split over ranks 0-1" in unreduced
    assert "no collective before the first prediction" in notes(FAULTS[3])


def test_depth_changes_nothing_of_ranks_and_their_modules_are_kept_once(sharded: Path) -> None:
    """What was recorded is opened without being asked; nobody is sent to record it again."""
    path, given = path_of(sharded, FAULTS[1]), known(sharded, FAULTS[1])
    result = check_paths([path], sharded / "wan", reference=given, depth="modules")
    assert result == check_paths([path], sharded / "wan", reference=given)
    assert not result.hint
    recording = read(path)
    assert {"part", "collective"} <= {call.kind for call in recording.calls}
    assert INSIDE not in recording.recording.manifest.settings


def test_the_content_of_a_brief_call_is_left_out_and_of_the_next_one_kept(tmp_path: Path) -> None:
    spool = CallSpool(tmp_path / "run.safetensors", 1, {}, largest=1 << 20)
    tensor = torch.ones(4)
    assert "dropped" in spool.keep(tensor, whole=False)
    tree, left = spool.keep_within(tensor, 1 << 20)
    assert "dropped" not in tree
    assert not left
    assert "dropped" not in spool.keep(tensor)


def test_a_place_is_named_only_for_a_fault_that_it_is_of() -> None:
    """The measure of the corpus can fail: another line, another place, or nothing."""
    fault = faulty(2)["ulysses/order/even/float32"]
    missing = faulty(2)["tensor/unreduced/even/float32"]
    assert not is_named(fault, ())
    assert not is_named(
        fault, (f"the collective before it: all_gather at {PORT.name}:1 (ranks 0-1)",)
    )
    assert not is_named(missing, ("no collective between these", "first wrong on the ranks: `x`"))


def test_commands_take_any_rank_or_what_run_was_told_to_write(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    run = runner(monkeypatch, capfd, "engine", "check")
    for rank in (0, 1):
        shutil.copy(path_of(sharded, RIGHT[0], rank), tmp_path / f"my run.rank{rank}.safetensors")
    model = ["--model", str(sharded / "wan")]
    for names in (
        ["my run.safetensors"],
        ["my run.rank1.safetensors"],
        ["my run.rank0.safetensors", "my run.rank1.safetensors"],
    ):
        paths = [str(tmp_path / name) for name in names]
        code, out, err = run(*paths, *model, "-v")
        assert code == 0, err
        assert "PASSED equivalent" in out
        assert "and 1 more ranks" in out


def edited(recording: CallRecording, path: Path, **changes: Any) -> None:
    """Write a recording with another rank, another number of ranks, or fewer calls."""
    manifest = recording.recording.manifest
    calls = manifest.calls[: changes.pop("calls", None)]
    own = {**manifest.settings[ENGINE], **changes}
    update = {"settings": {**manifest.settings, ENGINE: own}, "calls": calls}
    recording.with_manifest(manifest.model_copy(update=update)).write(path)


def test_ranks_without_files_and_files_without_ranks_are_refused(
    sharded: Path, tmp_path: Path
) -> None:
    first, second = (read(path_of(sharded, RIGHT[0], rank)) for rank in (0, 1))
    four = tmp_path / "four.rank0.safetensors"
    edited(first, four, ranks=4)
    edited(second, tmp_path / "four.rank1.safetensors", ranks=4)
    with pytest.raises(UsageError, match="4 ranks ran, recordings of 2 are there; missing: rank 2"):
        files_of([four])
    for rank in (0, 1):
        edited(first if not rank else second, tmp_path / f"two.rank{rank}.safetensors")
    edited(second, tmp_path / "two.rank2.safetensors", rank=2)
    with pytest.raises(UsageError, match="there are more recordings than ranks"):
        files_of([tmp_path / "two.rank0.safetensors"])
    pair = [tmp_path / "two.rank0.safetensors", tmp_path / "two.rank1.safetensors"]
    assert [one.rank for one in files_of(pair)] == [0, 1]
    with pytest.raises(UsageError, match="two recordings are of rank 1"):
        files_of([*pair, pair[1]])
    with pytest.raises(UsageError, match="the recordings are of several runs"):
        files_of([four, pair[1]])
    alone = tmp_path / "alone" / "two.rank1.safetensors"
    alone.parent.mkdir()
    shutil.copy(pair[1], alone)
    with pytest.raises(UsageError, match="2 ranks ran, recordings of 1 are there"):
        files_of([alone])
    with pytest.raises(UsageError, match="a file is no recording of a rank"):
        files_of([pair[0], reference(sharded, "even", "float32")])


def test_ranks_of_other_lengths_are_refused_by_number(sharded: Path, tmp_path: Path) -> None:
    first, second = (read(path_of(sharded, RIGHT[0], rank)) for rank in (0, 1))
    edited(first, tmp_path / "run.rank0.safetensors")
    last = next(i for i, call in enumerate(second.calls) if call.step == 1)
    edited(second, tmp_path / "run.rank1.safetensors", calls=last)
    with pytest.raises(UsageError) as raised:
        check_paths([tmp_path / "run.safetensors"], sharded / "wan")
    assert "rank 0: 2, rank 1: 1" in str(raised.value)
    assert (tmp_path / "run.rank1.safetensors").exists()  # nothing is lost


@pytest.mark.slow
def test_what_the_ranks_make_is_the_same_with_and_without_the_recorder(
    sharded: Path, tmp_path: Path
) -> None:
    case = RIGHT[0]
    for name in ("even", "uneven"):
        shutil.copy(sharded / f"{name}.safetensors", tmp_path)
    (tmp_path / "wan").symlink_to(sharded / "wan")
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    program = [torchrun, "--nproc-per-node", "2", str(PORT), str(tmp_path), case]
    made = []
    (tmp_path / "made").mkdir()
    for watched in (True, False):
        if watched:
            ran = run_engine(program, tmp_path / "run.safetensors")  # without modules
            assert (ran.code, ran.failures, len(ran.recordings)) == (0, [], 2)
        else:
            subprocess.run(program, check=True, capture_output=True)
        (path,) = (tmp_path / "made").iterdir()
        made.append(torch.load(path, weights_only=True))
        path.unlink()
    assert torch.equal(*made)
    result = check_paths([tmp_path / "run.safetensors"], sharded / "wan")
    assert result.verdict is Verdict.EQUIVALENT
    calls = read(tmp_path / "run.rank0.safetensors").calls
    kinds = {call.kind for call in calls}
    assert "part" not in kinds  # not asked for
    exchanged = [call for call in calls if call.kind == "collective"]
    assert exchanged
    assert all("dropped" in call.output for call in exchanged if call.method == "broadcast")


# layouts


def test_shares_are_told_by_axis_order_and_padding() -> None:
    whole = torch.randn(1, 3, 7, 4, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([whole, torch.zeros(1, 3, 1, 4)], 2)
    pieces = dict(enumerate(padded.chunk(2, 2)))
    assert split_of(pieces, whole) == Split(2, (0, 1), (4, 4), 1)
    assert torch.equal(Split(2, (0, 1), (4, 4), 1).gathered(pieces), whole)
    most = dict(enumerate(torch.cat([whole, torch.zeros(1, 3, 5, 4)], 2).chunk(4, 2)))
    assert split_of(most, whole) == Split(2, (0, 1, 2, 3), (3, 3, 3, 3), 5)  # one holds none of it
    front = dict(enumerate(torch.cat([torch.zeros(1, 3, 1, 4), whole], 2).chunk(2, 2)))
    assert split_of({0: whole[:, :, 4:], 1: whole[:, :, :4]}, whole) == Split(2, (1, 0), (4, 3))
    assert split_of(front, whole) is None
    assert split_of({r: p + 1e-2 for r, p in pieces.items()}, whole) is None
    assert not list(splits({0: whole[:, :, :2, :2], 1: whole}))
    said = Split(2, (0, 1), (4, 4), 1).said("latent", "frames")
    assert said == "latent: frames split over 2 ranks, padded by 1 on the last"


def part(value: torch.Tensor) -> Part:
    return Part("x", "output", 0, value, 1e-4)


def test_an_order_of_tokens_is_told_once_and_then_kept() -> None:
    dice = torch.Generator().manual_seed(0)
    first, second = (torch.randn(1, 8, 6, generator=dice) for _ in range(2))
    zigzag = {0: [0, 1, 6, 7], 1: [2, 3, 4, 5]}
    layouts = Layouts()
    held = layouts.held(part(first), {r: first[:, at] for r, at in zigzag.items()})
    assert held.right
    assert "rank 0: 0-1, 6-7" in held.how
    assert layouts.held(part(second), {r: second[:, at] for r, at in zigzag.items()}).right
    straight = {0: second[:, :4], 1: second[:, 4:]}
    assert not layouts.held(part(second), straight).right  # right for itself, but not in this run
    assert Layouts().held(part(second), straight).right
    assert layouts.held(part(second), {0: second, 1: second}).how == "repeated on ranks 0-1"


def test_tokens_that_no_rank_holds_are_named() -> None:
    whole = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(0))
    shares = {0: whole[:, :5], 1: whole[:, 4:8]}
    held = Layouts().held(part(whole), shares)
    assert not held.right
    assert held.how == "token 8 of 9 held by no rank, token 4 by several"
    padded = torch.cat([whole[:, 5:], torch.zeros(1, 1, 6)], 1)
    assert Layouts().held(part(whole), {0: whole[:, :5], 1: padded}).right


def test_columns_sums_and_what_is_wrong_with_them() -> None:
    dice = torch.Generator().manual_seed(0)
    whole, one = (torch.randn(1, 8, 6, generator=dice) for _ in range(2))
    layouts = Layouts()
    columns = {0: whole[..., :3], 1: whole[..., 3:]}
    assert layouts.held(part(whole), columns).how == "columns split over ranks 0-1"
    turned = layouts.held(part(whole), {0: columns[1], 1: columns[0]})
    assert not turned.right
    sums = {0: one, 1: whole - one}
    assert layouts.held(part(whole), sums).how == "partial sums of ranks 0-1"
    bias = torch.randn(6, generator=dice)
    more = layouts.held(part(whole), {0: one + bias, 1: whole - one + bias})
    assert more.how == "partial sums that were not reduced, each with the bias"
    twice = layouts.held(part(whole), {0: 2 * whole, 1: 2 * whole})
    assert twice.how == "2 times the trusted model's on rank 0"


def test_rows_are_told_by_content_and_not_by_likeness() -> None:
    known_rows = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 1, 15])
    assert matched(known_rows[order], known_rows, 1e-4).tolist() == [3, 1, 15]
    assert matched(known_rows[order] * 1.01, known_rows, 1e-4).tolist() == [-1, -1, -1]


def test_a_collective_that_does_not_do_what_it_says_is_seen() -> None:
    event = Event("collective", "all_reduce", 0)
    event.entries = {0: _entry(), 1: _entry()}
    given = {0: torch.ones(4), 1: torch.full((4,), 2.0)}
    assert broken(event, given, {0: torch.full((4,), 3.0), 1: torch.full((4,), 3.0)}) == ""
    assert "rank 1" in broken(event, given, {0: torch.full((4,), 3.0), 1: torch.full((4,), 2.0)})


def _entry() -> CallEntry:
    arguments = {"ranks": {"list": [0, 1]}, "op": "sum"}
    return CallEntry(
        component="torch.distributed",
        method="all_reduce",
        kind="collective",
        stage="output",
        call=0,
        owner="torch.distributed",
        parameters=(),
        arguments=arguments,
        output=None,
    )


# many calls


@contextmanager
def few_files(most: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_calls_are_assembled_than_files_may_be_open(tmp_path: Path) -> None:
    output = tmp_path / "run.safetensors"
    spool = CallSpool(output, 1, {"engine": "generic"}, largest=1 << 20)
    for number in range(400):
        call = {"component": "M", "method": "forward", "kind": "model", "owner": "m.M"}
        call |= {"begun": number, "parameters": [], "arguments": {}}
        spool.add({**call, "output": spool.keep(torch.tensor([float(number)]))})
    spool.end({})
    (left,) = left_by(output)
    with few_files(len(os.listdir("/proc/self/fd")) + 200):
        assert len(write(left, output).calls) == 400


# the corpus


@pytest.mark.bar
@pytest.mark.parametrize("world", [2, 4])
def test_all_right_splits_pass_and_all_faults_are_found(tmp_path: Path, world: int) -> None:
    make(tmp_path)
    faults = faulty(world)
    rows = [
        judged(tmp_path, case, path, world, faults.get(case))
        for case, path in recorded(tmp_path, world, [*right(world), *faults]).items()
    ]
    accused = [row for row in rows if row["fault"] == "none" and not row["right"]]
    assert not accused
    missed = [row for row in rows if row["fault"] != "none" and not row["found"]]
    assert not missed
    named = sum(bool(row["named"]) for row in rows)
    assert named >= 0.9 * len(faults), table(rows)
