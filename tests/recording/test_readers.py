"""Reading what people compare, and refusing what cannot be trusted."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from truestep import compare
from truestep.errors import FileFormatError, UsageError
from truestep.recording.readers import load
from truestep.verdict import Verdict

X = torch.arange(12.0).reshape(3, 4)


def write_npz(path: Path) -> None:
    np.savez_compressed(path, x=X.numpy())


WRITERS: dict[str, Callable[[Path], None]] = {
    ".safetensors": lambda path: save_file({"x": X}, path),
    ".npy": lambda path: np.save(path, X.numpy()),
    ".npz": write_npz,
    ".pt": lambda path: torch.save({"x": X}, path),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_kinds_of_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"f{suffix}"
    WRITERS[suffix](path)
    (tensor,) = load(path, label="").tensors.values()
    assert torch.equal(tensor, X)
    other = X if suffix == ".npy" else {"x": X}
    assert compare(path, other).verdict is Verdict.IDENTICAL


def test_nested_pt_files_are_flattened(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    torch.save({"a": [X, {"b": X}], "steps": 3}, path)
    assert sorted(load(path, label="").tensors) == ["a.0", "a.1.b"]


def test_values_in_python() -> None:
    assert list(load(X, label="").tensors) == ["tensor"]
    assert load({"a": X.numpy()}, label="").tensors["a"].dtype == torch.float32
    big_endian = X.numpy().astype(">f8")
    assert torch.equal(load(big_endian, label="").tensors["tensor"], X.double())
    with pytest.raises(UsageError, match="is a str, not a tensor"):
        load({"a": "text"}, label="actual")
    with pytest.raises(UsageError, match="is a int, not a tensor"):
        load(3, label="actual")


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch /tmp/truestep-was-here",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"x": Evil()}, path)
    with pytest.raises(FileFormatError, match="needs code to be unpickled") as caught:
        load(path, label="")
    assert "hint:" in str(caught.value)
    assert "system" in str(caught.value)
    assert not Path("/tmp/truestep-was-here").exists()


def object_array(path: Path) -> None:
    np.save(path, np.array([{}, 1], dtype=object), allow_pickle=True)


def lying_npy(path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 10**4)}
    )
    path.write_bytes(buffer.getvalue())


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\0" * 50_000_000)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("none.pt", lambda path: None, "the file cannot be read"),
        ("empty.npy", lambda path: path.touch(), "the file is empty"),
        ("folder.pt", lambda path: path.mkdir(), "the folder holds no safetensors files"),
        ("f.txt", lambda path: path.write_text("x"), "files of kind .txt cannot be compared"),
        ("f.npy", lambda path: path.write_bytes(b"garbage!"), ".npy file cannot be read"),
        ("o.npy", object_array, "the array holds Python objects"),
        ("l.npy", lying_npy, "the .npy file is truncated"),
        ("f.npz", lambda path: path.write_bytes(b"PK garbage"), ".npz file cannot be read"),
        ("b.npz", bomb, "compressed implausibly well"),
        ("f.pt", lambda path: path.write_bytes(b"garbage"), "the .pt file cannot be read"),
        ("z.pt", lambda path: path.write_bytes(b"PK\3\4garbage"), "the .pt file cannot be read"),
        ("f.safetensors", lambda path: path.write_bytes(b"garbage!"), "safetensors"),
    ],
)
def test_bad_files(
    name: str, write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(FileFormatError) as caught:
        load(path, label="")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def bundle(version: int = 1) -> dict[str, object]:
    latent = torch.randn(1, 4, 2, 8, 8)
    return {
        "latent": latent.half(),
        "shape": list(latent.shape),
        "dtype_original": "torch.bfloat16",
        "expected_slice": latent[0, :, 0, :3, :3].flatten(),
        "slice_spec": {"kind": "corner_3x3_first_frame", "version": 1},
        "metadata": {"model_id": "m"},
        "format_version": version,
    }


def test_fastvideo_bundles_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "prompt.pt"
    torch.save(bundle(), path)
    source = load(path, label="")
    assert sorted(source.tensors) == ["latent/final", "signature"]
    assert source.bundle["metadata"] == {"model_id": "m"}
    torch.save(bundle(version=2), path)
    with pytest.raises(FileFormatError, match="format_version 2 are not known"):
        load(path, label="")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("slice_spec", None, "does not say which slice"),
        ("slice_spec", {"kind": "corner_3x3_first_frame"}, "does not say which slice"),
        ("shape", [1, 2], "is not that of its latent"),
        ("format_version", True, "format_version True are not known"),
        ("expected_slice", [1.0], "is not a tensor"),
    ],
)
def test_damaged_fastvideo_bundles(field: str, value: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompt.pt"
    torch.save({**bundle(), field: value}, path)
    with pytest.raises(FileFormatError, match=message):
        load(path, label="")


def test_no_tensor_is_lost_to_its_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two tensors are called '1'"):
        load({1: X, "1": X}, label="actual")
    path = tmp_path / "f.pt"
    torch.save({"a.b": X, "a": {"b": X}}, path)
    with pytest.raises(FileFormatError, match=r"called 'a\.b' once names are joined"):
        load(path, label="")
    path = tmp_path / "f.npz"
    buffer = io.BytesIO()
    np.save(buffer, X.numpy())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", buffer.getvalue())
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", buffer.getvalue())
    with pytest.raises(FileFormatError, match=r"holds entry 'x.npy' twice"):
        load(path, label="")


def test_a_pt_file_that_holds_itself(tmp_path: Path) -> None:
    loop: list[object] = []
    loop.append(loop)
    path = tmp_path / "f.pt"
    torch.save({"a": loop}, path)
    with pytest.raises(FileFormatError, match="or holds itself"):
        load(path, label="")


def test_arrays_without_dimensions_keep_none(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.float32(2))
    two = torch.tensor(2.0)
    for value in (np.float32(2), np.array(2, dtype="f4"), tmp_path / "f.npy"):
        assert compare(value, two).verdict is Verdict.IDENTICAL


@pytest.mark.parametrize("dtype", ["c8", "S4", "V2", [("a", "f4")]])
def test_arrays_of_other_things(dtype: object, tmp_path: Path) -> None:
    array = np.zeros(3, dtype=dtype)  # type: ignore[call-overload]
    np.save(tmp_path / "f.npy", array)
    with pytest.raises(FileFormatError, match="which cannot be compared"):
        load(tmp_path / "f.npy", label="")
    with pytest.raises(UsageError, match="which cannot be compared"):
        load(array, label="actual")


def test_tensors_without_elements_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a sparse_coo tensor") as caught:
        compare({"x": torch.eye(3).to_sparse()}, {"x": torch.eye(3)})
    assert "to_dense()" in str(caught.value)
    with pytest.raises(UsageError, match="is a meta tensor"):
        compare(torch.empty(3, device="meta"), torch.ones(3))
    path = tmp_path / "f.pt"
    torch.save({"x": torch.eye(3).to_sparse()}, path)
    with pytest.raises(FileFormatError, match="is a sparse_coo tensor"):
        load(path, label="")
