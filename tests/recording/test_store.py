"""The reference folder: finding, refusing, locking, and surviving kills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from truestep.case import Case
from truestep.errors import FileFormatError, ReferenceNotFoundError, UsageError
from truestep.recording.format import Recording
from truestep.recording.lock import LOCK_FILE, Entry, put_entry, read_lock
from truestep.recording.manifest import Manifest
from truestep.recording.store import Place, Store, place_of
from truestep.recording.table import tensor_table

CASE = Case(model="builtin:digits", prompt="a red three", settings={"device": "cpu"})


def recording(value: float, case: Case = CASE, **environment: str) -> Recording:
    tensors = {"x": torch.full((1000,), value)}
    manifest = Manifest(
        tool_version="0",
        created="now",
        level="full",
        case_id=case.id,
        environment={"device.class": "cpu", "attention.kernel": "flash-cpu", **environment},
        tensors=tensor_table(tensors),
    )
    return Recording.in_memory(tensors, manifest)


def find(store: Store, case: Case = CASE, tier: str = "default") -> Path:
    return store.find(case, tier=tier, device_class="cpu", seed_command="truestep record three")


def save(store: Store, rec: Recording, *, tier: str = "default", update: bool = False) -> Path:
    return store.save(rec, place_of(rec, tier=tier), update=update)


def test_what_was_saved_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = save(store, recording(1.0))
    assert path == tmp_path / "default" / "cpu" / "flash-cpu" / f"{CASE.id}.safetensors"
    assert find(store) == path
    assert [place.case_id for place in store.places()] == [CASE.id]
    assert store.unused({CASE.id}) == []
    assert len(store.unused(set())) == 1


def test_an_existing_reference_is_kept_unless_told(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = save(store, recording(1.0))
    with pytest.raises(UsageError, match="a reference of this case exists") as caught:
        save(store, recording(2.0))
    assert "--update" in str(caught.value)
    assert Recording.open(path)["x"][0] == 1.0
    save(store, recording(2.0), update=True)
    assert Recording.open(find(store))["x"][0] == 2.0


def test_a_missing_reference_says_where_what_and_how(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ReferenceNotFoundError, match="no reference for case") as caught:
        find(store)
    assert "the folder holds no references" in str(caught.value)
    assert "hint: truestep record three" in str(caught.value)
    other = CASE.replace(seed=1)
    save(store, recording(1.0, other))
    with pytest.raises(ReferenceNotFoundError) as caught:
        find(store)
    assert f"the nearest {other.id}" in str(caught.value)
    save(store, recording(1.0), tier="full")
    with pytest.raises(ReferenceNotFoundError) as caught:
        find(store)
    assert "for this case there is: tier full, cpu, flash-cpu" in str(caught.value)
    assert find(store, tier="full").exists()


def test_the_kernel_used_here_chooses_among_several(tmp_path: Path) -> None:
    store = Store(tmp_path)
    math = save(store, recording(1.0, **{"attention.kernel": "math"}))
    assert find(store) == math
    flash = save(store, recording(1.0))
    assert find(store) == flash


def test_a_changed_reference_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = save(store, recording(1.0))
    recording(2.0).save(path)
    with pytest.raises(FileFormatError, match="does not match the lock file"):
        find(store)
    (tmp_path / LOCK_FILE).unlink()
    with pytest.raises(FileFormatError, match="is not in the lock file"):
        find(store)


@pytest.mark.parametrize("part", ["a/b", "..", ".hidden", "", "x" * 300])
def test_paths_stay_inside(part: str) -> None:
    with pytest.raises(UsageError, match="cannot be part of a reference's path"):
        Place(part).name  # noqa: B018


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"lock_version": 1, "references": 3}',
        "<<<<<<<",
        "\udcff",  # a byte that is not UTF-8
        "[" * 3000,
        '{"references": {"\\ud800": {}}}',
        '{"references": {}, "references": {}}',
    ],
)
def test_damaged_locks(text: str, tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FileFormatError, match="the lock file is damaged"):
        read_lock(tmp_path)


def test_a_newer_lock_says_upgrade(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text('{"lock_version": 9}')
    with pytest.raises(FileFormatError, match="written by a newer truestep"):
        read_lock(tmp_path)


LOCKER = """
import sys
from pathlib import Path
from truestep.files import alone
from truestep.recording.lock import Entry, put_entry
for i in range(25):
    with alone(Path(sys.argv[1]), "the lock file"):
        put_entry(Path(sys.argv[1]), f"{sys.argv[2]}/{i}", Entry(sha256="0"))
"""


def test_parallel_writers_keep_all_entries(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", LOCKER, str(tmp_path), str(i)]) for i in range(4)
    ]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert len(read_lock(tmp_path).references) == 100


def test_entries_are_replaced(tmp_path: Path) -> None:
    put_entry(tmp_path, "a", Entry(sha256="1"))
    put_entry(tmp_path, "a", Entry(sha256="2"))
    assert read_lock(tmp_path).references == {"a": Entry(sha256="2")}
