"""Recordings: bit-exact round trips, atomic writes, and no flipped bit unseen."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.counting import calls, calls_of
from truestep.errors import FileFormatError, UsageError, WriteError
from truestep.files import sha256_of
from truestep.measure.moments import moments
from truestep.measure.sketch import sketch
from truestep.recording.format import Recording, bytes_of
from truestep.recording.header import read_header
from truestep.recording.manifest import Level, Manifest
from truestep.recording.table import tensor_table
from truestep.records import STATS

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def recording(tensors: dict[str, torch.Tensor], *, level: Level = "full") -> Recording:
    manifest = Manifest(tool_version="0", created="now", level=level, tensors=tensor_table(tensors))
    return Recording.in_memory(tensors, manifest)


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


shapes = st.lists(st.integers(0, 5), max_size=4)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=6), st.data())
def test_round_trip_is_bit_exact(
    tmp_path: Path, specs: list[tuple[torch.dtype, list[int]]], data: st.DataObject
) -> None:
    tensors = {}
    for index, (dtype, shape) in enumerate(specs):
        count = torch.Size(shape).numel() * dtype.itemsize
        bits = data.draw(st.binary(min_size=count, max_size=count))
        if dtype is torch.bool:
            bits = bytes(b & 1 for b in bits)
        flat = torch.frombuffer(bytearray(bits), dtype=torch.uint8) if count else torch.empty(0)
        flat = flat.to(torch.uint8)
        tensors[f"t/{index:04d}/x"] = flat.view(dtype).reshape(shape)
    path = tmp_path / "r.safetensors"
    recording(tensors).save(path)
    opened = Recording.open(path)
    assert list(opened) == list(tensors)
    for name, tensor in tensors.items():
        assert opened[name].dtype == tensor.dtype
        assert opened[name].shape == tensor.shape
        assert raw(opened[name]) == raw(tensor)


def test_layouts_are_made_contiguous(tmp_path: Path) -> None:
    base = torch.randn(4, 6, 8)
    tensors = {
        "transposed": base.transpose(0, 2),
        "sliced": base[:, ::2],
        "expanded": base[:1].expand(5, 6, 8),
        "view": base[1],
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    path = tmp_path / "r.safetensors"
    recording(tensors).save(path)
    opened = Recording.open(path)
    for name, tensor in tensors.items():
        assert raw(opened[name]) == raw(tensor)


def test_any_safetensors_reader_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    recording({"latent/final": torch.arange(6.0).reshape(2, 3)}).save(path)
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["latent/final"]
        assert torch.equal(file.get_tensor("latent/final"), torch.arange(6.0).reshape(2, 3))


def test_an_unknown_name_names_the_closest() -> None:
    with pytest.raises(KeyError, match="the closest are latent/final"):
        recording({"latent/final": torch.ones(2)})["latent/finale"]


def test_the_closest_name_is_sought_only_where_somebody_reads_it() -> None:
    rec = recording({f"step/{i:04d}/cond": torch.ones(1) for i in range(20)})
    absent = [f"step/{i:04d}/mask" for i in range(20)]
    assert calls_of(lambda: [rec.get(name) for name in absent], "get_close_matches") == 0
    assert [name for name in absent if name in rec] == []
    few, many = (recording({str(i): torch.ones(1) for i in range(n)}) for n in (10, 1000))
    assert calls(lambda: few.get("x")) == calls(lambda: many.get("x"))


def test_names_are_found_without_a_search() -> None:
    """Hashed, not compared one by one: 20 look-ups among 2,000 names compare next to none."""

    class Name(str):
        compared = 0

        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Name.compared += 1
            return str.__eq__(self, other)

    rec = recording({f"t/{i}": torch.ones(1) for i in range(2000)})
    assert not any(Name(f"u/{i}") in rec for i in range(20))
    assert all(Name(f"t/{i}") in rec for i in range(0, 2000, 100))
    assert Name.compared < 60


def test_it_is_a_read_only_mapping() -> None:
    rec = recording({"x": torch.ones(2)})
    assert len(rec) == 1
    assert "x" in rec
    assert "y" not in rec
    assert not hasattr(rec, "__setitem__")


def test_level_stats_keeps_moments_only(tmp_path: Path) -> None:
    tensor = torch.tensor([1.0, -2.0, 3.0, float("nan")])
    path = tmp_path / "r.safetensors"
    recording({"latent/final": tensor}, level="stats").save(path)
    opened = Recording.open(path)
    assert list(opened) == ["stats/latent/final"]
    found = dict(zip(STATS, opened["stats/latent/final"].tolist(), strict=True))
    assert (found["count"], found["nonfinite"], found["min"], found["max"]) == (3, 1, -2, 3)
    assert found["mean"] == pytest.approx(2 / 3)
    assert found["rms"] == pytest.approx((14 / 3) ** 0.5)
    assert opened.manifest.tensors[0].shape == (4,)


def test_level_sketch_keeps_moments_and_sketches(tmp_path: Path) -> None:
    tensors = {
        "latent/final": torch.randn(2, 3, 700),
        "schedule/experts": torch.tensor([0, 0, 1]),
        "nothing": torch.empty(0, 4, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.0, dtype=torch.float64),
    }
    path = tmp_path / "r.safetensors"
    kept = recording(tensors, level="sketch")
    kept.save(path)
    opened = Recording.open(path)
    names = [f"{kind}/{name}" for name in tensors for kind in ("stats", "sketch")]
    assert list(opened) == list(kept) == names
    assert len(opened) == 8
    assert "sketch/latent/final" in opened
    assert "latent/final" not in opened
    for name, tensor in tensors.items():
        for found in (opened, kept):
            assert raw(found[f"stats/{name}"]) == raw(moments(tensor))
            assert raw(found[f"sketch/{name}"]) == raw(sketch(tensor))
    described = [(e.dtype, e.shape) for e in opened.manifest.tensors]
    assert described[0] == ("float32", (2, 3, 700))
    assert described[2] == ("bfloat16", (0, 4))
    with pytest.raises(KeyError, match="the closest are stats/latent/final, sketch/l"):
        opened["latent/final"]
    first = opened["sketch/scalar"]
    opened.release("sketch/scalar")
    assert torch.equal(opened["sketch/scalar"], first)
    opened.save(tmp_path / "again.safetensors")
    again = Recording.open(tmp_path / "again.safetensors")
    assert again.manifest == opened.manifest
    assert all(raw(again[name]) == raw(opened[name]) for name in opened)


@pytest.mark.parametrize("kind", ["stats", "sketch"])
def test_a_flipped_bit_is_seen_in_the_tensor_that_has_it(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    recording({"a": torch.randn(3000), "b": torch.randn(3000)}, level="sketch").save(path)
    header = read_header(path)
    slot = header.tensors[f"{kind}/b"]
    data = bytearray(path.read_bytes())
    data[header.data_start + slot.begin + 9] ^= 2
    path.write_bytes(data)
    opened = Recording.open(path)
    for name in opened:
        if name != f"{kind}/b":
            opened[name]
    with pytest.raises(FileFormatError, match=f"tensor '{kind}/b' is damaged"):
        opened[f"{kind}/b"]


@pytest.mark.parametrize("level", ["full", "stats"])
def test_other_levels_are_written_as_before_there_were_sketches(
    level: Level, tmp_path: Path
) -> None:
    path = tmp_path / "r.safetensors"
    recording({"a": torch.ones(3)}, level=level).save(path)
    (entry,) = json.loads(read_header(path).metadata["truestep"])["tensors"]
    old = ("name", "kind", "order", "dtype", "shape", "digest", "step", "branch", "fqn")
    assert tuple(entry) == old


def test_a_sketch_takes_5_kb_a_tensor_whatever_its_size(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    recording({f"step/{i:04d}/cond": torch.ones(200_000) for i in range(20)}, level="sketch").save(
        path
    )
    size = path.stat().st_size
    assert size < 20 * 5_000, f"{size:,} bytes for 20 tensors of 800,000"


def test_a_sketch_needs_a_row_in_the_table() -> None:
    manifest = Manifest(tool_version="0", created="now", level="sketch")
    with pytest.raises(ValueError, match="the manifest and the tensors have different names"):
        Recording.in_memory({"a": torch.ones(3)}, manifest)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=50))
def test_moments_agree_with_numpy(values: list[float]) -> None:
    tensor = torch.tensor(values)
    wide = tensor.double()
    found = dict(zip(STATS, moments(tensor).tolist(), strict=True))
    assert found["mean"] == pytest.approx(wide.mean().item(), abs=1e-9)
    assert found["std"] == pytest.approx(wide.std(correction=0).item(), abs=1e-4)
    assert found["abs_mean"] == pytest.approx(wide.abs().mean().item(), abs=1e-9)


def test_moments_of_nothing_finite() -> None:
    found = moments(torch.tensor([float("nan")] * 3)).tolist()
    assert found[:2] == [0.0, 3.0]
    assert moments(torch.empty(0)).tolist()[:2] == [0.0, 0.0]


def read_all(path: Path) -> None:
    opened = Recording.open(path)
    for name in opened:
        opened[name]


@pytest.mark.parametrize("level", ["full", "sketch", "stats"])
def test_every_flipped_bit_is_seen(level: Level, tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    recording({"a": torch.randn(40), "b": torch.arange(5)}, level=level).save(path)
    good = path.read_bytes()
    dice = random.Random(0)
    places = {*range(16), *(dice.randrange(len(good)) for _ in range(600))}
    unseen = []
    for place in sorted(places):
        bad = bytearray(good)
        bad[place] ^= 1 << dice.randrange(8)
        path.write_bytes(bad)
        try:
            read_all(path)
        except FileFormatError:
            continue
        unseen.append(place)
    assert unseen == []


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    recording({"a": torch.zeros(8), "b": torch.ones(8)}).save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    opened = Recording.open(path)
    opened["a"]
    with pytest.raises(FileFormatError, match="tensor 'b' is damaged"):
        opened["b"]


def test_a_foreign_file_is_not_a_recording(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(FileFormatError, match="but not a recording"):
        Recording.open(path)


WRITE_LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from truestep.errors import WriteError
from truestep.recording.table import tensor_table
from truestep.recording.format import Recording
from truestep.recording.manifest import Manifest
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
tensors = {"x": torch.zeros(100_000)}
m = Manifest(tool_version="0", created="", level="full", tensors=tensor_table(tensors))
try:
    Recording.in_memory(tensors, m).save(sys.argv[1])
except WriteError as error:
    print(error)
    sys.exit(7)
"""


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    recording({"x": torch.ones(3)}).save(path)
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", WRITE_LIMITED, str(path)], capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    assert "the recording could not be written" in done.stdout
    assert "hint: df -h" in done.stdout
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_unwritable_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="could not be written"):
        recording({"x": torch.ones(3)}).save(tmp_path / "file" / "r.safetensors")


def test_what_no_reader_would_take_is_not_put_in_place(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    recording({"x": torch.ones(3)}).save(path)
    before = path.read_bytes()
    with pytest.raises(WriteError, match="was not put in place") as caught:
        recording({"a\x1bb": torch.ones(3)}).save(path)
    assert "has control characters" in caught.value.measured
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_it(tmp_path: Path) -> None:
    path, plain = tmp_path / "r.safetensors", tmp_path / "plain"
    recording({"x": torch.ones(3)}).save(path)
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    assert recording({"x": torch.ones(3)}).save(path) == sha256_of(path)


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_change_in_memory_is_seen_where_the_tensor_is_next_used(
    on_disk: bool, tmp_path: Path
) -> None:
    rec = recording({"x": torch.randn(9, 4), "y": torch.ones(2)})
    if on_disk:
        rec.save(tmp_path / "r.safetensors")
        rec = Recording.open(tmp_path / "r.safetensors")
    before = rec["x"].clone()
    assert torch.equal(rec["x"], before)
    rec["x"][3, 1] += 1
    with pytest.raises(UsageError, match="tensor 'x' of a recording was changed in memory"):
        rec["x"]
    assert torch.equal(rec["y"], torch.ones(2))
    if on_disk:
        rec.release("x")
        assert torch.equal(rec["x"], before)


def test_bytes_of_a_view_that_is_lazily_negated_are_those_of_what_it_shows() -> None:
    lazy = torch.complex(torch.zeros(3), torch.ones(3)).conj().imag
    assert lazy.is_neg()
    assert bytes(bytes_of(lazy)) == bytes(bytes_of(torch.full((3,), -1.0)))
