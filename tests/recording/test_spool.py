"""Streamed trace files: aligned, complete, atomic, and recovered after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import truestep
from tests.replay.models import given, model
from truestep.errors import FileFormatError, UsageError, WriteError
from truestep.recording.format import Recording
from truestep.recording.header import read_header
from truestep.recording.manifest import Level
from truestep.recording.recovery import PARTIAL, recover
from truestep.recording.spool import Spool


class Mixed(nn.Module):
    """Outputs of every size of item, in an order that would misalign them."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "flag": x[:1, 0, :3] > 0,
            "wide": x.double(),
            "half": x[0, 0, :3].bfloat16(),
            "word": x.clone(),
            "none": x[:0].double(),
            "byte": torch.arange(7, dtype=torch.uint8),
        }


def test_a_streamed_file_is_aligned_and_any_reader_reads_it(tmp_path: Path) -> None:
    net, path = Mixed(), tmp_path / "new" / "t.safetensors"
    with truestep.capture(net, level="full", path=path) as trace:
        for seed in range(3):
            net(given(seed))
    header = read_header(path)
    assert header.data_start % 8 == 0
    sizes = {"BOOL": 1, "U8": 1, "BF16": 2, "F32": 4, "F64": 8}
    assert all(slot.begin % sizes[slot.dtype] == 0 for slot in header.tensors.values())
    with safe_open(path, "pt") as file:
        assert len(file.keys()) == 18
        for seed in range(3):
            for key, value in net(given(seed)).items():
                assert torch.equal(file.get_tensor(f"module/(root)/{seed}/main/out.{key}"), value)
    assert trace.recording is not None
    orders = [entry.order for entry in trace.recording.manifest.tensors]
    assert orders == sorted(orders) == list(range(18))
    assert [p.name for p in path.parent.iterdir()] == ["t.safetensors"]


def test_memory_and_file_hold_the_same(tmp_path: Path) -> None:
    net = model()
    for level in ("stats", "sketch", "full"):
        kept = []
        for path in (None, tmp_path / "t.safetensors"):
            with torch.no_grad(), truestep.capture(net, level=level, path=path) as trace:  # type: ignore[arg-type]
                net(given())
            assert trace.recording is not None
            kept.append(trace.recording)
        memory, file = kept
        assert list(memory) == list(file)
        assert memory.manifest.tensors == file.manifest.tensors
        assert all(torch.equal(memory[name], file[name]) for name in memory)


def test_an_existing_trace_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"old")
    net = model()
    with truestep.capture(net, path=path):
        net(given())
        assert path.read_bytes() == b"old"
    assert Recording.open(path).manifest.tensors


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with (
        pytest.raises(WriteError, match="could not be written"),
        truestep.capture(model(), path=blocked / "t.safetensors"),
    ):
        raise AssertionError("unreached")


def test_a_full_disk_names_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    def fill() -> None:
        with truestep.capture(net, path=tmp_path / "t.safetensors", level="full"):
            monkeypatch.setattr("truestep.recording.spool._BUFFER", 1)
            monkeypatch.setattr(Spool, "_write", staticmethod(full))
            net(given())

    with pytest.raises(WriteError) as caught:
        fill()
    assert caught.value.where.endswith("t.safetensors (recording blocks.0.up)")
    assert not any(m._forward_hooks for m in net.modules())


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, {root!r})
import truestep
from tests.replay.models import given, model
net = model()
with torch.no_grad(), truestep.capture(net, level="full", path={path!r}):
    net(given(1))
    net(given(2))
    if {torn}:
        net.out.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        net(given(3))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_process_leaves_what_it_had(tmp_path: Path, torn: bool) -> None:
    path = tmp_path / "t.safetensors"
    root = str(Path(__file__).parents[2])
    code = textwrap.dedent(KILLED).format(root=root, path=str(path), torn=torn)
    ended = subprocess.run([sys.executable, "-c", code], check=False)
    assert ended.returncode == -signal.SIGKILL
    (spool,) = tmp_path.iterdir()
    assert not path.exists()
    with (spool / "journal.jsonl").open("ab") as file:
        file.write(b'["module/out/2/main/out.0", 22, "float')  # a line being written
    recording = recover(path)
    assert recording.path == path
    assert list(tmp_path.iterdir()) == [path]
    assert PARTIAL in recording.manifest.notes
    assert {entry.step for entry in recording.manifest.tensors} == {0, 1}
    net = model()
    with torch.no_grad():
        assert torch.equal(recording["module/(root)/1/main/out.0"], net(given(2)))


def spool_of(tmp_path: Path, *, pid: int = 2**22 + 1) -> Path:
    """A spool with two tensors, of a process that is not there."""
    spool = Spool(
        tmp_path / "t.safetensors", head={"tool_version": "0", "created": ""}, level="full"
    )
    from truestep.recording.format import bytes_of
    from truestep.recording.spool import Blob

    for order in range(2):
        blob = Blob("float32", (4,), bytes_of(torch.arange(4.0) + order))
        name = f"module/a/{order}/main/out.0"
        spool.add((name, order, "float32", (4,), order, "main", "a", 0), [blob])
    spool.flush()
    spool.release()
    folder = tmp_path / f"t.safetensors.{pid}.spool"
    spool.folder.rename(folder)
    return folder


def test_damaged_data_end_the_recovery(tmp_path: Path) -> None:
    folder = spool_of(tmp_path)
    data = bytearray((folder / "data.4").read_bytes())
    data[20] ^= 1
    (folder / "data.4").write_bytes(data)
    assert len(recover(folder, output=tmp_path / "o.safetensors")) == 1


@pytest.mark.parametrize(
    ("line", "change"),
    [
        (2, lambda row: row.__setitem__(0, "module/a/0/main/out.0")),  # a name twice
        (2, lambda row: row.__setitem__(0, "a\nb")),
        (2, lambda row: row.__setitem__(0, "__metadata__")),
        (2, lambda row: row.__setitem__(3, [2**50])),
        (2, lambda row: row.__setitem__(3, [-4])),
        (2, lambda row: row.__setitem__(9, [2**60])),
        (2, lambda row: row.__setitem__(9, [0])),  # over the row before it
        (2, lambda row: row.__setitem__(9, ["0"])),
        (2, lambda row: row.__setitem__(2, "float128")),
        (2, lambda row: row.clear()),
    ],
)
def test_a_hostile_line_ends_the_recovery(
    line: int, change: Callable[[list[Any]], object], tmp_path: Path
) -> None:
    folder = spool_of(tmp_path)
    journal = folder / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")
    row = json.loads(lines[line])
    change(row)
    lines[line] = json.dumps(row).encode()
    journal.write_bytes(b"\n".join(lines))
    output = tmp_path / "o.safetensors"
    assert list(recover(folder, output=output)) == ["module/a/0/main/out.0"]
    assert output.stat().st_size < 5000


@pytest.mark.parametrize(
    "head", [b"[1, 2]", b"3", b"null", b"[" * 3000, b'{"level": 3}', b"\xff", b'{"level": "full"}']
)
def test_a_journal_whose_head_is_none(head: bytes, tmp_path: Path) -> None:
    folder = spool_of(tmp_path)
    journal = folder / "journal.jsonl"
    journal.write_bytes(b"\n".join([head, *journal.read_bytes().split(b"\n")[1:]]))
    with pytest.raises(FileFormatError, match="journal cannot be read"):
        recover(folder)
    assert (folder / "data.4").stat().st_size == 32


def test_what_cannot_be_recovered(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no spool"):
        recover(tmp_path / "t.safetensors")
    folder = spool_of(tmp_path)
    (tmp_path / "t.safetensors").write_text("")
    with pytest.raises(UsageError, match="the target exists"):
        recover(folder)
    other = spool_of(tmp_path, pid=2**22 + 2)
    with pytest.raises(UsageError, match="2 spools were left"):
        recover(tmp_path / "t.safetensors")
    (other / "journal.jsonl").write_text("nothing")
    with pytest.raises(FileFormatError, match="journal cannot be read"):
        recover(other, output=tmp_path / "o.safetensors")
    alive = folder.rename(tmp_path / f"t.safetensors.{os.getppid()}.spool")
    with pytest.raises(UsageError, match="still running"):
        recover(alive)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("level", ["stats", "full"])
def test_a_model_called_from_several_threads_is_traced(tmp_path: Path, level: Level) -> None:
    net, path = model(), tmp_path / "t.safetensors"
    results: dict[int, list[torch.Tensor]] = {}

    def work(number: int) -> None:
        with torch.no_grad():
            results[number] = [net(given(10 * number + i)) for i in range(10)]

    with truestep.capture(net, path=path, level=level) as trace:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    recording = Recording.open(path)
    with torch.no_grad(), truestep.capture(net) as alone:
        net(given())
    assert len(recording.manifest.tensors) == 80 * len(alone.names)
    assert {entry.step for entry in recording.manifest.tensors} == set(range(80))
    assert recording.manifest.forwards == 80
    assert trace.fired == trace.hooks
    assert all(recording[name].numel() for name in recording)
    if level == "full":
        outputs = {
            recording[f"module/(root)/{step}/main/out.0"].numpy().tobytes() for step in range(80)
        }
        assert outputs == {t.numpy().tobytes() for kept in results.values() for t in kept}
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_capture_on_one_path_is_refused_before_it_runs(tmp_path: Path) -> None:
    net, path = model(), tmp_path / "t.safetensors"
    with truestep.capture(net, path=path):
        net(given())
        with (
            pytest.raises(UsageError, match="another trace is being written to this path"),
            truestep.capture(net, path=path),
        ):
            raise AssertionError("unreached")
        net(given())
    assert {entry.step for entry in Recording.open(path).manifest.tensors} == {0, 1}
    with truestep.capture(net, path=path):  # free again
        net(given())
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_at_the_target_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.mkdir()
    with (
        pytest.raises(WriteError, match="the trace could not be written") as caught,
        truestep.capture(model(), path=path),
    ):
        raise AssertionError("unreached")
    assert caught.value.likely == "a folder is in its place"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_put_in_place_stays_in_the_spool(tmp_path: Path) -> None:
    net, path = model(), tmp_path / "t.safetensors"
    before = open_files()

    def run() -> None:
        with truestep.capture(net, path=path):
            net(given())
            path.mkdir()

    with pytest.raises(WriteError, match="the trace could not be written") as caught:
        run()
    (spool,) = [place for place in tmp_path.iterdir() if place != path]
    other = tmp_path / "other.safetensors"
    command = f"truestep trace recover {spool} --output other.safetensors"
    assert caught.value.hint == command
    recording = recover(spool, output=other)
    assert {entry.step for entry in recording.manifest.tensors} == {0}
    assert PARTIAL not in recording.manifest.notes  # it was closed; this process still runs
    assert sorted(place.name for place in tmp_path.iterdir()) == [other.name, path.name]
    del recording
    assert open_files() == before


def test_a_block_that_raises_does_not_replace_a_trace(tmp_path: Path) -> None:
    net, path = model(), tmp_path / "t.safetensors"
    with truestep.capture(net, path=path):
        net(given())
    before = path.read_bytes()

    def interrupted() -> None:
        with truestep.capture(net, path=path):
            net(given())
            net(given())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted()
    assert path.read_bytes() == before
    (spool,) = [place for place in tmp_path.iterdir() if place != path]
    if sys.version_info >= (3, 11):
        assert f"truestep trace recover {spool}" in caught.value.__notes__[0]
    recording = recover(spool, output=tmp_path / "other.safetensors")
    assert {entry.step for entry in recording.manifest.tensors} == {0, 1}
    assert "partial: the traced block raised KeyboardInterrupt" in recording.manifest.notes


def test_a_spool_that_a_process_of_our_number_left_is_kept(tmp_path: Path) -> None:
    old = spool_of(tmp_path, pid=os.getpid())
    net, path = model(), tmp_path / "t.safetensors"
    with truestep.capture(net, path=path):
        net(given())
    assert old.exists()
    assert len(recover(old, output=tmp_path / "old.safetensors")) == 2


class Odd(nn.Module):
    """Keys that are equal as text, that are no text, and that are too long."""

    def forward(self, x: torch.Tensor) -> dict[object, torch.Tensor]:
        return {1: x, "1": x + 1, "\ud800": x, "k" * 2000: x, "fine": x}


def test_names_that_no_file_can_hold_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    net = Odd()
    with truestep.capture(net, path=path) as trace:
        net(given())
    assert set(trace.names) == {"module/(root)/0/main/out.1", "module/(root)/0/main/out.fine"}
    notes = " ".join(Recording.open(path).manifest.notes)
    assert "(root) has two tensors under out.1: the first was recorded" in notes
    assert "(root) has tensors under names that no recording can hold (2 times)" in notes


def test_a_forked_child_leaves_the_trace_to_its_parent(tmp_path: Path) -> None:
    net, path = model(), tmp_path / "t.safetensors"

    def run() -> None:
        with truestep.capture(net, path=path):
            net(given())
            child = os.fork()
            if child == 0:
                raise SystemExit
            assert os.waitpid(child, 0)[1] == 0
            net(given())

    parent = os.getpid()
    try:
        run()
    except SystemExit:
        os._exit(0 if os.getpid() != parent else 1)
    assert {entry.step for entry in Recording.open(path).manifest.tensors} == {0, 1}


@pytest.mark.bar
def test_a_trace_larger_than_memory_may_grow(tmp_path: Path) -> None:
    """1.5 GB of activations in a process that may not hold 1 GB, torch included."""
    code = f"""
    import torch, truestep
    from torch import nn
    torch.set_num_threads(1)
    net = nn.Sequential(*[nn.Identity() for _ in range(10)])
    x = torch.zeros(6_000_000)
    with truestep.capture(net, level="full", path={str(tmp_path / "big.safetensors")!r}) as trace:
        for step in range(6):
            net(x + step)
    r = trace.recording
    assert sum(t.end - t.begin for t in r._source.header.tensors.values()) > 1.5e9
    assert float(r["module/3/5/main/out.0"][7]) == 5
    # Not ru_maxrss: a child inherits its parent's.
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(peak.split()[1]) * 1024)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True
    )
    assert int(ended.stdout) < 1_000_000_000
