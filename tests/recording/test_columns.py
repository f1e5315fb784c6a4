"""Packed recordings: the table as columns beside the data, in place of rows in the header."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import truestep
from tests.recording.test_spool import Mixed
from tests.replay.models import given, model
from truestep.cli.show import command as show
from truestep.errors import FileFormatError, WriteError
from truestep.recording import columns
from truestep.recording.columns import columns_of, rows_of
from truestep.recording.format import Recording, bytes_of
from truestep.recording.header import read_header
from truestep.recording.manifest import Level, TensorEntry
from truestep.recording.manifest_reading import read_manifest
from truestep.recording.recovery import recover
from truestep.recording.spool import Spool

LEVELS: tuple[Level, ...] = ("stats", "sketch", "full")


def traced(path: Path, level: Level, net: torch.nn.Module) -> Recording:
    with torch.no_grad(), truestep.capture(net, path=path, level=level, inputs=True):
        for seed in range(3):
            net(given(seed))
    return Recording.open(path)


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Pack every trace, or none."""
    return lambda on: monkeypatch.setattr("truestep.recording.spool.PLAIN", 0 if on else 10**9)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("net", [model(), Mixed()], ids=["model", "mixed"])
def test_a_packed_trace_holds_what_a_plain_one_holds(
    tmp_path: Path, level: Level, net: torch.nn.Module, packing: Callable[[bool], None]
) -> None:
    packing(False)
    plain = traced(tmp_path / "plain.safetensors", level, net)
    packing(True)
    packed = traced(tmp_path / "packed.safetensors", level, net)
    assert (plain.manifest.format_version, packed.manifest.format_version) == (1, 2)
    assert list(packed) == list(plain)
    assert len(packed) == len(plain)
    assert packed.manifest.tensors == plain.manifest.tensors
    for name in plain:
        assert name in packed
        assert packed[name].dtype == plain[name].dtype
        assert packed[name].shape == plain[name].shape
        assert bytes_of(packed[name]) == bytes_of(plain[name])
    assert "nothing" not in packed
    assert f"stats/stats/{next(iter(plain))}" not in packed
    with pytest.raises(KeyError, match="no tensor 'nothing'"):
        packed["nothing"]
    assert len(read_header(tmp_path / "packed.safetensors").tensors) <= len(columns.KINDS) + 4


def test_any_reader_of_safetensors_reads_the_columns(
    tmp_path: Path, packing: Callable[[bool], None]
) -> None:
    packing(True)
    recording = traced(tmp_path / "t.safetensors", "stats", model())
    rows = recording.manifest.tensors
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert file.get_tensor("table.order").tolist() == [row.order for row in rows]
        names = bytes(file.get_tensor("table.names").tolist()).decode().split()
        assert names == [row.name for row in rows]
        moments = file.get_tensor("data.8").view(torch.float64).reshape(len(rows), -1)
    assert torch.equal(moments[3], recording[f"stats/{rows[3].name}"])


@pytest.mark.parametrize("packed", [False, True])
def test_moments_are_read_as_numbers_and_a_flipped_bit_is_seen_in_them(
    tmp_path: Path, packed: bool, packing: Callable[[bool], None]
) -> None:
    packing(packed)
    path = tmp_path / "t.safetensors"
    recording = traced(path, "stats", model())
    name = next(iter(recording)).removeprefix("stats/")
    assert recording.moments(name) == tuple(recording[f"stats/{name}"].tolist())
    with pytest.raises(KeyError, match="no tensor 'stats/nothing'"):
        recording.moments("nothing")
    header = read_header(path)
    data = bytearray(path.read_bytes())
    data[header.data_start + recording._source.header.tensors[f"stats/{name}"].begin] ^= 1  # type: ignore[union-attr]
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="is damaged"):
        Recording.open(path).moments(name)


@pytest.mark.parametrize("level", LEVELS)
def test_every_flipped_bit_is_seen(
    tmp_path: Path, level: Level, packing: Callable[[bool], None]
) -> None:
    packing(True)
    path = tmp_path / "t.safetensors"
    names = list(traced(path, level, model()))
    good, dice = path.read_bytes(), random.Random(0)
    header = read_header(path)
    table = header.data_start + header.tensors["data.8" if level != "full" else "data.4"].end
    places = [*range(0, header.data_start, 11)]
    places += [dice.randrange(table, len(good)) for _ in range(200)]
    places += [dice.randrange(header.data_start, table) for _ in range(20)]

    def read_all() -> None:
        recording = Recording.open(path)
        assert list(recording) == names
        for name in recording:
            recording[name]

    for place in places:
        data = bytearray(good)
        data[place] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        with pytest.raises(FileFormatError):
            read_all()


def rewritten(path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A packed trace whose columns were changed by someone who also mends every digest."""
    from truestep.recording.header import digest, manifest_digest

    header, data = read_header(path), path.read_bytes()
    content = {
        name: data[header.data_start + slot.begin : header.data_start + slot.end]
        for name, slot in header.tensors.items()
    }
    own = {name.removeprefix("table."): c for name, c in content.items() if "table." in name}
    change(own)
    content |= {f"table.{name}": c for name, c in own.items()}
    manifest = json.loads(header.metadata["truestep"])
    manifest["columns"] = {name: digest(c) for name, c in own.items()}
    text = json.dumps(manifest)
    out: dict[str, Any] = {
        "__metadata__": {"truestep": text, "truestep_digest": manifest_digest(text)}
    }
    position = 0
    sizes = {"U8": 1, "I64": 8, "U64": 8, "I32": 4}
    for name, part in content.items():
        dtype = header.tensors[name].dtype
        out[name] = {
            "dtype": dtype,
            "shape": [len(part) // sizes[dtype]],
            "data_offsets": [position, position + len(part)],
        }
        position += len(part)
    head = json.dumps(out).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"".join(content.values()))
    return path


def put(column: str, code: str, value: int) -> Callable[[dict[str, bytes]], None]:
    """Set the first number of a column."""

    def change(own: dict[str, bytes]) -> None:
        number = struct.pack(f"<{code}", value)
        own[column] = number + own[column][len(number) :]

    return change


def words(change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def apply(own: dict[str, bytes]) -> None:
        value = json.loads(own["words"])
        change(value)
        own["words"] = json.dumps(value).encode()

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("dtype", "i", 10**6), "points to a text that is not there"),
        (put("dtype", "i", -1), "points to a text that is not there"),
        (put("shape", "i", -2), "points to a text that is not there"),
        (lambda own: own.update(names=own["names"][:-1]), "the last name has no end"),
        (lambda own: own.update(names=own["names"] + b"x\n"), "different lengths"),
        (lambda own: own.update(names=b"\xff" + own["names"][1:]), "not UTF-8"),
        (lambda own: own.update(names=b"\n" + own["names"][1:]), "different lengths"),
        (lambda own: own.update(names=b"\x1b" + own["names"][1:]), "control characters"),
        (lambda own: own.update(order=own["order"][8:]), "different lengths"),
        (lambda own: own.update(words=b"[" * 5000), "nested"),
        (words(lambda w: w[0].__setitem__(1, "float31")), "unknown dtype"),
        (words(lambda w: w[1].__setitem__(0, [2**62, 4])), "impossible shape"),
        (words(lambda w: w[1].__setitem__(0, [1, 1])), "does not fit its data"),
        (words(lambda w: w[1].__setitem__(0, [-1])), "not texts and shapes"),
        (words(lambda w: w[0].__setitem__(0, 3)), "not texts and shapes"),
        (words(lambda w: w.append([])), "not texts and shapes"),
    ],
)
def test_tables_that_do_not_fit(
    tmp_path: Path,
    change: Callable[[dict[str, bytes]], None],
    message: str,
    packing: Callable[[bool], None],
) -> None:
    packing(True)
    path = tmp_path / "t.safetensors"
    traced(path, "full", model())
    rewritten(path, lambda own: None)
    assert len(Recording.open(path))  # the helper itself changes nothing
    with pytest.raises(FileFormatError, match=message):
        Recording.open(rewritten(path, change))


def test_a_name_that_is_there_twice(tmp_path: Path, packing: Callable[[bool], None]) -> None:
    packing(True)
    path = tmp_path / "t.safetensors"
    traced(path, "stats", model())

    def twice(own: dict[str, bytes]) -> None:
        first, _, *rest = own["names"].split(b"\n")
        own["names"] = b"\n".join([first, first, *rest])

    with pytest.raises(FileFormatError, match="lists a tensor twice"):
        Recording.open(rewritten(path, twice))


def test_rows_survive_columns() -> None:
    rows = [
        TensorEntry("a", "module", 5, "float32", (2, 3), "0" * 15 + "f", "f" * 16, 3, "cond", "b"),
        TensorEntry("é", "", 6, "bool", (), "0" * 16, "0" * 16, None, None, None, 2**40),
    ]
    content = columns_of(rows)
    assert rows_of(content, sketched=True, words=json.loads(content["words"])) == rows
    with pytest.raises(ValueError, match="too"):
        columns_of([TensorEntry("a", "", 2**80, "bool", (), "0")])


def test_a_killed_process_leaves_a_spool_that_is_packed(
    tmp_path: Path, packing: Callable[[bool], None]
) -> None:
    from tests.recording.test_spool import spool_of

    packing(True)
    recording = recover(spool_of(tmp_path))
    assert recording.manifest.format_version == 2
    assert recording["module/a/1/main/out.0"].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_header_that_no_reader_takes_leaves_the_earlier_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a limit that the table outgrows."""
    path, net = tmp_path / "t.safetensors", model()
    traced(path, "stats", net)
    before = path.read_bytes()
    monkeypatch.setattr("truestep.recording.header.MAX_HEADER", len(before) // 4)
    with pytest.raises(WriteError, match="was not put in place") as caught:
        traced(path, "stats", net)
    assert "the safetensors header does not fit" in caught.value.measured
    assert path.read_bytes() == before
    monkeypatch.undo()
    (spool,) = [place for place in tmp_path.iterdir() if place != path]
    assert len(recover(spool, output=tmp_path / "other.safetensors")) == len(Recording.open(path))


def test_show_lists_a_packed_trace(tmp_path: Path, packing: Callable[[bool], None]) -> None:
    from click.testing import CliRunner

    outputs = []
    for packed in (False, True):
        packing(packed)
        path = tmp_path / str(packed) / "t.safetensors"
        traced(path, "stats", model())
        printed = CliRunner().invoke(show, [str(path)]).output.splitlines()
        lines = [line.replace(str(path), "FILE") for line in printed]
        outputs.append(
            [t for t in lines if "MB" not in t and "recorded" not in t and "FILE" not in t]
        )
        as_json = json.loads(CliRunner().invoke(show, [str(path), "--json"]).output)
        assert len(as_json["tensors"]) == len(read_manifest(path).tensors)  # type: ignore[union-attr]
    assert outputs[0] == outputs[1]


def test_a_trace_is_packed_long_before_its_header_is_full(tmp_path: Path) -> None:
    """A plain header is at most four times the journal, whatever the names."""
    from truestep.recording.header import MAX_HEADER
    from truestep.recording.spool import PLAIN

    assert 4 * PLAIN < MAX_HEADER
    for name in ("a", "n" * 1000):
        path = tmp_path / f"{len(name)}.safetensors"
        spool = spool_with(path, 500, name)
        journal = (spool.folder / "journal.jsonl").stat().st_size
        from truestep.recording.manifest import Manifest

        spool.close(Manifest(tool_version="", created="", level="sketch"))
        assert read_header(path).data_start < 4 * journal


def spool_with(path: Path, count: int, prefix: str) -> Spool:
    from truestep.recording.spool import Blob

    spool = Spool(path, head={"tool_version": "", "created": ""}, level="sketch")
    blobs = [Blob("float64", (8,), bytes(64)), Blob("float32", (1024,), bytes(4096))]
    for order in range(count):
        spool.add((f"{prefix}{order}", order, "float32", (2,), 0, "", "", 0), blobs)
    spool.flush()
    return spool


MILLION = """
import resource, struct, sys
from pathlib import Path
from truestep.recording.format import Recording
from truestep.recording.manifest import Manifest
from truestep.recording.spool import Blob, Spool
path, count = Path(sys.argv[1]), int(sys.argv[2])
if sys.argv[3] == "write":
    spool = Spool(path, head={"tool_version": "", "created": ""}, level="stats")
    for order in range(count):
        step, part = divmod(order, 1000)
        fqn = f"transformer_blocks.{part // 20}.attn{part % 20}.to_q"
        data = struct.pack("<8d", 6, 0, order, 1, 1, order, 0, 1)
        name = f"module/{fqn}/{step}/cond/out.0"
        fields = (name, order, "float32", (2, 3), step, "cond", fqn, 0)
        spool.add(fields, [Blob("float64", (8,), data)])
    recording = spool.close(Manifest(tool_version="", created="", level="stats"))
else:
    recording = Recording.open(path)
assert len(recording) == len(recording.manifest.tensors) == count
last = recording[f"stats/{recording.manifest.tensors[-1].name}"]
assert last[2] == count - 1
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
"""


@pytest.mark.bar
def test_a_million_rows_take_less_than_a_gigabyte_and_a_half(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    for verb in ("write", "open"):
        ended = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(MILLION), str(path), "1000000", verb],
            check=True,
            capture_output=True,
            text=True,
        )
        assert int(ended.stdout) < 1_500_000_000, verb


def test_a_row_takes_less_than_a_kilobyte(tmp_path: Path, packing: Callable[[bool], None]) -> None:
    """The same by what Python allocates, which does not depend on what else is loaded."""
    import tracemalloc

    packing(True)

    spool = spool_with(tmp_path / "t.safetensors", 0, "")
    from truestep.recording.manifest import Manifest
    from truestep.recording.spool import Blob

    spool._level = "stats"
    blob = Blob("float64", (8,), bytes(64))
    for order in range(20_000):
        fqn = f"transformer_blocks.{order % 50}.attn.to_q"
        name = f"module/{fqn}/{order // 50}/cond/out.0"
        spool.add((name, order, "float32", (2, 3), order // 50, "cond", fqn, 0), [blob])
    spool.flush()
    tracemalloc.start()
    try:
        recording = spool.close(Manifest(tool_version="", created="", level="stats"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert recording.manifest.format_version == 2
    assert len(recording) == 20_000
    assert peak / 20_000 < 1000
