"""Read what people compare: recordings, safetensors, .npy, .npz, .pt, .gguf, files of engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from truestep.errors import FileFormatError, UsageError
from truestep.magic import ACTIVATIONS, SAFETENSORS, what_is
from truestep.measure.plain import plain
from truestep.reading import reason
from truestep.recording.engine_files import (
    Found,
    activation_trace,
    comfy_latent,
    dump_files,
    of_sglang,
    read_dumps,
)
from truestep.recording.format import Plain, Recording
from truestep.recording.gguf_files import read_gguf
from truestep.recording.manifest import Manifest
from truestep.recording.manifest_reading import read_recording
from truestep.recording.numpy_files import read_npy, read_npz
from truestep.recording.shards import is_checkpoint, read_checkpoint
from truestep.recording.torch_files import read_pt, tensors_in
from truestep.verdict import Side

FASTVIDEO_KEYS = {"latent", "expected_slice", "slice_spec", "format_version"}
"""Keys that tell a FastVideo latent bundle from any other dictionary in a .pt file."""

_PLAIN_BY = {"quantized": "give tensor.dequantize()", "nested": "give tensor.unbind()"}


@dataclass(frozen=True)
class Source:
    """Tensors of one side.

    Attributes:
        label: How the side is called in results.
        tensors: Name to tensor, in file order.
        path: The file, if there is one.
        manifest: Of a truestep recording.
        bundle: The other fields of a FastVideo latent bundle or an SGLang dump.
        kind: What it is, where another engine wrote it.
        notes: What is to be said of such a file.
        space: `vae`, where its latent was brought into the VAE's space.
    """

    label: str
    tensors: Mapping[str, torch.Tensor]
    path: Path | None = None
    manifest: Manifest | None = None
    bundle: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""
    notes: tuple[str, ...] = ()
    space: str = ""


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
        what: A path of a file or of a checkpoint's folder, a recording, a tensor or array, or a
            mapping from name to tensor or array.
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
    kind = "nested" if tensor.is_nested else kind
    if tensor.is_meta or kind != "strided":
        raise UsageError(
            f"{name} is a {'meta' if tensor.is_meta else kind} tensor, which cannot be compared",
            hint="" if tensor.is_meta else _PLAIN_BY.get(kind, "give tensor.to_dense()"),
        )
    return plain(tensor, name)


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
    try:
        if path.is_dir() and dump_files(path):
            return _of_engine(path, read_dumps(path))
        if is_checkpoint(path):
            return Source(str(path), read_checkpoint(path), path)
        size = path.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        _refuse(path, "the file cannot be read", measured=reason(error))
    if size == 0:
        _refuse(path, "the file is empty")
    return read_source(path, path.suffix.lower())


def read_source(path: Path, suffix: str) -> Source:
    """Read a file as what a suffix says.

    Raises:
        FileFormatError: It is damaged, of an unknown kind, or needs code to unpickle.
    """
    readers: dict[str, Callable[[Path], Source]] = {
        ".safetensors": _safetensors,
        ".npy": _npy,
        ".npz": _npz,
        ".gguf": _gguf,
        **dict.fromkeys((".pt", ".pth", ".bin"), _pt),
    }
    kind = what_is(path)
    if suffix not in readers and kind == SAFETENSORS:
        suffix = ".safetensors"
    if kind == ACTIVATIONS:
        return _of_engine(path, activation_trace(path))
    if suffix not in readers:
        known = f"known: {', '.join(readers)}"
        _refuse(
            path,
            f"files of kind {suffix or '(no suffix)'} cannot be compared",
            measured=f"{_is(path)}; {known}" if _is(path) else known,
        )
    try:
        return readers[suffix](path)
    except UsageError as error:
        _refuse(path, error.what, hint=error.hint)


def _is(path: Path) -> str:
    kind = what_is(path)
    return f"it is {kind}" if kind else ""


def _safetensors(path: Path) -> Source:
    header, manifest = read_recording(path)
    if manifest is not None:
        return load(Recording.opened(header, manifest), label=str(path))
    plain_tensors = Plain(header)
    found = comfy_latent(plain_tensors)
    return _of_engine(path, found) if found else Source(str(path), plain_tensors, path)


def _of_engine(path: Path, found: Found) -> Source:
    try:
        tensors = {name: _plain(tensor, name) for name, tensor in found.tensors.items()}
    except UsageError as error:
        _refuse(path, error.what, hint=error.hint)
    if not tensors:
        _refuse(path, f"{found.kind} holds no tensor")
    return Source(
        str(path),
        tensors,
        path,
        bundle=found.fields,
        kind=found.kind,
        notes=found.notes,
        space=found.space,
    )


def _npy(path: Path) -> Source:
    return Source(str(path), {"tensor": _tensor(read_npy(path), "the array")}, path)


def _npz(path: Path) -> Source:
    arrays = read_npz(path)
    return Source(str(path), {name: _tensor(arrays[name], name) for name in arrays}, path)


def _gguf(path: Path) -> Source:
    return Source(str(path), read_gguf(path), path)


def _pt(path: Path) -> Source:
    content = read_pt(path)
    if isinstance(content, Mapping) and content.keys() >= FASTVIDEO_KEYS:
        return _fastvideo(path, content)
    try:
        found = of_sglang(content)
        if found is not None:
            return _of_engine(path, found)
        flat = [(name, _plain(tensor, name)) for name, tensor in tensors_in(content)]
    except ValueError as error:
        _refuse(path, str(error))
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
    tensors = {name: _plain(tensor, name) for name, tensor in tensors.items()}
    stated, shape = content.get("shape"), list(tensors["latent/final"].shape)
    if stated is not None and (not isinstance(stated, list | tuple) or list(stated) != shape):
        _refuse(
            path,
            "the FastVideo bundle's shape is not that of its latent",
            measured=f"it says {str(stated)[:80]}; the latent has {shape}",
        )
    rest = {key: value for key, value in content.items() if key not in ("latent", "expected_slice")}
    return Source(str(path), tensors, path, bundle=rest, kind="a FastVideo latent bundle (.pt)")
