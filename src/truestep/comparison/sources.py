"""Read what people compare: recordings, safetensors, .npy, .npz, .pt, FastVideo latent bundles."""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from truestep.errors import FileFormatError, UsageError
from truestep.recording.format import Recording, read_plain
from truestep.recording.header import read_manifest
from truestep.recording.manifest import Manifest
from truestep.verdict import Side

FASTVIDEO_KEYS = {"latent", "expected_slice", "slice_spec", "format_version"}
"""Keys that tell a FastVideo latent bundle from any other dictionary in a .pt file."""

_MAX_NPY = 1 << 40
_MAX_DEPTH = 50

_NEEDS_CODE = re.compile(r"Unsupported (global|class|type)[^.\n]*\.?\S*", re.IGNORECASE)
"""What torch says of a pickle that names code it does not allow."""


@dataclass(frozen=True)
class Source:
    """Tensors of one side.

    Attributes:
        label: How the side is called in results.
        tensors: Name to tensor, in file order.
        path: The file, if there is one.
        manifest: Of a truestep recording.
        bundle: The other fields of a FastVideo latent bundle.
    """

    label: str
    tensors: Mapping[str, torch.Tensor]
    path: Path | None = None
    manifest: Manifest | None = None
    bundle: Mapping[str, Any] = field(default_factory=dict)


def side_of(source: Source) -> Side:
    """A side as a result names it."""
    return Side(
        label=source.label,
        path=str(source.path) if source.path else None,
        environment=dict(source.manifest.environment) if source.manifest else {},
    )


def load(what: object, *, label: str) -> Source:
    """Read one side of a comparison.

    Args:
        what: A path, a recording, a tensor or array, or a mapping from name to tensor or array.
        label: How the side is called where it has no path.

    Raises:
        FileFormatError: A file is absent, damaged, of an unknown kind, or needs code to unpickle.
        UsageError: A value is none of these.
    """
    if isinstance(what, str | Path):
        return _load_file(Path(what))
    if isinstance(what, Recording):
        return Source(
            label=str(what.path or label), tensors=what, path=what.path, manifest=what.manifest
        )
    if isinstance(what, Mapping):
        named = [(str(name), _tensor(value, str(name))) for name, value in what.items()]
        twice = _twice(name for name, _ in named)
        if twice is not None:
            raise UsageError(f"two tensors are called {twice!r}", where=label)
        return Source(label, dict(named))
    return Source(label, {"tensor": _tensor(what, label)})


def _twice(names: Iterable[str]) -> str | None:
    """The first name that appears twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _tensor(value: object, name: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return _plain(value, name)
    if isinstance(value, np.ndarray | np.generic):
        return _from_numpy(np.asarray(value), name)
    raise UsageError(
        f"{name} is a {type(value).__name__}, not a tensor",
        hint="give tensors, numpy arrays, a mapping of them, a recording or a path",
    )


def _plain(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor without its graph, if it holds its elements one by one."""
    kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
    if tensor.is_meta or kind != "strided":
        raise UsageError(
            f"{name} is a {'meta' if tensor.is_meta else kind} tensor, which cannot be compared",
            hint="" if tensor.is_meta else "give tensor.dequantize() or tensor.to_dense()",
        )
    return tensor.detach()


def _from_numpy(array: np.ndarray[Any, Any], name: str) -> torch.Tensor:
    if str(array.dtype) == "bfloat16":  # ml_dtypes, as JAX writes it
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype.kind not in "biuf":
        raise UsageError(f"{name} has dtype {array.dtype}, which cannot be compared")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    # Not numpy.ascontiguousarray: it gives an array without dimensions one.
    own = native.flags.writeable and native.flags.c_contiguous
    try:
        return torch.from_numpy(native if own else native.copy(order="C"))
    except TypeError:
        raise UsageError(f"{name} has dtype {array.dtype}, which torch cannot hold") from None


def _refuse(path: Path, what: str, *, measured: str = "", hint: str = "") -> NoReturn:
    raise FileFormatError(what, where=str(path), measured=measured, hint=hint)


def _load_file(path: Path) -> Source:
    if path.is_dir():
        _refuse(path, "a folder was given where a file is needed")
    try:
        size = path.stat().st_size
    except OSError as error:
        _refuse(path, "the file cannot be read", measured=str(error.strerror))
    if size == 0:
        _refuse(path, "the file is empty")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        manifest = read_manifest(path)
        if manifest is not None:
            return load(Recording.open(path), label=str(path))
        return Source(str(path), read_plain(path), path)
    if suffix == ".npy":
        return Source(str(path), {"tensor": _npy(path)}, path)
    if suffix == ".npz":
        return Source(str(path), _npz(path), path)
    if suffix in {".pt", ".pth", ".bin"}:
        return _pt(path)
    _refuse(
        path,
        f"files of kind {suffix or '(no suffix)'} cannot be compared",
        measured="known: .safetensors, .npy, .npz, .pt, .pth, .bin",
    )


def _npy(path: Path) -> torch.Tensor:
    try:
        with path.open("rb") as file:
            _check_npy_size(path, file, path.stat().st_size)
        return _tensor(np.load(path, allow_pickle=False), "the array")
    except UsageError as error:
        _refuse(path, error.what)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        _refuse(path, "the .npy file cannot be read", measured=_first_line(error))


def _check_npy_size(path: Path, file: Any, size: int) -> None:
    """Refuse a header that claims more data than the file holds, before memory is taken."""
    version = np.lib.format.read_magic(file)
    reader = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = reader(file)
    if dtype.hasobject:
        _refuse(
            path,
            "the array holds Python objects",
            measured="loading them could run code",
            hint="save plain numbers: numpy.save(path, array, allow_pickle=False)",
        )
    need = math.prod(shape) * dtype.itemsize
    if need > min(size, _MAX_NPY):
        _refuse(path, "the .npy file is truncated", measured=f"{size:,} bytes, it needs {need:,}")


def _npz(path: Path) -> dict[str, torch.Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            twice = _twice(info.filename for info in archive.infolist())
            if twice is not None:
                _refuse(path, f"the .npz file holds entry {twice!r} twice")
            for info in archive.infolist():
                if info.file_size > 1000 * max(info.compress_size, 1) + 1_000_000:
                    _refuse(
                        path,
                        f"entry {info.filename!r} is compressed implausibly well",
                        measured=f"{info.compress_size:,} bytes claim to be {info.file_size:,}",
                    )
                with archive.open(info) as file:
                    _check_npy_size(path, file, info.file_size)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _tensor(arrays[name], name) for name in arrays.files}
    except UsageError as error:
        _refuse(path, error.what)
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        _refuse(path, "the .npz file cannot be read", measured=_first_line(error))


def _pt(path: Path) -> Source:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = _NEEDS_CODE.search(str(error))
        if needed is None:
            _refuse(path, "the .pt file cannot be read", measured="it is not a pickle of tensors")
        _refuse(
            path,
            "the file needs code to be unpickled, which truestep never runs",
            measured=needed.group(0).strip(),
            hint="where you trust it: torch.save(dict_of_plain_tensors, path)",
        )
    except Exception as error:  # a damaged archive raises almost anything
        _refuse(path, "the .pt file cannot be read", measured=_first_line(error))
    if isinstance(content, Mapping) and content.keys() >= FASTVIDEO_KEYS:
        return _fastvideo(path, content)
    try:
        flat = _flatten(content, "", depth=0)
    except UsageError as error:
        _refuse(path, error.what)
    twice = _twice(name for name, _ in flat)
    if twice is not None:
        _refuse(path, f"two tensors of the .pt file are called {twice!r} once names are joined")
    return Source(str(path), dict(flat), path)


def _fastvideo(path: Path, content: Mapping[str, Any]) -> Source:
    """A FastVideo latent bundle (format_version 1)."""
    version = content["format_version"]
    if type(version) is not int or version != 1:
        _refuse(
            path,
            f"FastVideo latent bundles of format_version {version!r} are not known",
            measured="this truestep reads format_version 1",
        )
    spec = content["slice_spec"]
    if not isinstance(spec, Mapping) or not {"kind", "version"} <= spec.keys():
        _refuse(
            path,
            "the FastVideo bundle does not say which slice it holds",
            measured=f"slice_spec is {str(spec)[:80]}; it needs kind and version",
        )
    tensors = {"latent/final": content["latent"], "signature": content["expected_slice"]}
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        _refuse(path, "the FastVideo bundle's latent or slice is not a tensor")
    try:
        tensors = {name: _plain(tensor, name) for name, tensor in tensors.items()}
    except UsageError as error:
        _refuse(path, error.what)
    stated, shape = content.get("shape"), list(tensors["latent/final"].shape)
    if stated is not None and list(stated) != shape:
        _refuse(
            path,
            "the FastVideo bundle's shape is not that of its latent",
            measured=f"it says {str(stated)[:80]}; the latent has {shape}",
        )
    rest = {key: value for key, value in content.items() if key not in ("latent", "expected_slice")}
    return Source(str(path), tensors, path, bundle=rest)


def _flatten(value: object, prefix: str, *, depth: int) -> list[tuple[str, torch.Tensor]]:
    """Tensors in any nest of mappings and sequences, by dotted name; other values are left out."""
    if depth > _MAX_DEPTH:
        raise UsageError(f"the .pt file is nested more than {_MAX_DEPTH} deep, or holds itself")
    if isinstance(value, torch.Tensor):
        return [(prefix or "tensor", _plain(value, prefix or "tensor"))]
    items: list[tuple[str, object]] = []
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(index), item) for index, item in enumerate(value)]
    found = []
    for key, item in items:
        found += _flatten(item, f"{prefix}.{key}" if prefix else key, depth=depth + 1)
    return found


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
