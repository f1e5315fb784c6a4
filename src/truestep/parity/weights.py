"""Read the parameters of a weight file by name, whatever wrote it; nothing in it is executed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from truestep.errors import FileFormatError, MissingExtraError, TruestepError, UsageError
from truestep.magic import what_is
from truestep.reading import reason

if TYPE_CHECKING:
    import torch


def load_state(path: Path) -> dict[str, torch.Tensor]:
    """Parameters of a file by name: safetensors, GGUF, pt, pth, bin, ckpt, ONNX or HDF5.

    Nothing in a file is executed.

    Raises:
        FileFormatError: It cannot be read, or holds no tensors.
        UsageError: Its kind is not known.
    """
    readers: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {
        ".safetensors": _safetensors,
        ".gguf": _gguf,
        ".onnx": _onnx,
        ".h5": _hdf5,
        ".hdf5": _hdf5,
        **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), _torch),
    }
    if path.suffix not in readers:
        kind = what_is(path)
        raise UsageError(
            f"{path.suffix or 'a file without a suffix'} is no kind of weight file known here",
            where=str(path),
            measured=f"{f'it is {kind}; ' if kind else ''}there are: {', '.join(readers)}",
        )
    try:
        found = readers[path.suffix](path)
    except TruestepError:
        raise
    except Exception as error:  # onnx and h5py raise almost anything for a damaged file
        raise FileFormatError(
            "the weights cannot be read",
            where=str(path),
            measured=f"{type(error).__name__}: {reason(error)}",
        ) from error
    if not found:
        raise FileFormatError("the file holds no tensors", where=str(path))
    return found


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    from truestep.recording.format import read_plain

    return dict(read_plain(path))


def _gguf(path: Path) -> dict[str, torch.Tensor]:
    from truestep.recording.gguf_files import read_gguf

    return dict(read_gguf(path))


def _torch(path: Path) -> dict[str, torch.Tensor]:
    import torch

    from truestep.recording.torch_files import read_pt

    found = read_pt(path)
    for key in ("state_dict", "model", "module"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not a state dict")
    return {str(k): v for k, v in found.items() if isinstance(v, torch.Tensor)}


def _onnx(path: Path) -> dict[str, torch.Tensor]:
    import numpy as np
    import torch

    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise MissingExtraError("onnx", "bench", "reading ONNX weights") from None
    graph = onnx.load(str(path)).graph
    found: dict[str, torch.Tensor] = {}
    for item in graph.initializer:
        array = numpy_helper.to_array(item)
        if array.dtype.kind in "fiub":
            found[_name(item.name)] = torch.from_numpy(np.array(array))
    for name in [key for key, value in found.items() if value.dtype in (torch.int8, torch.uint8)]:
        scale = found.get(f"{name.removesuffix('_q')}_scale")
        if name.endswith("_q") and scale is not None:  # an integer matrix times its scale
            found[name.removesuffix("_q")] = found.pop(name).float() * scale
            del found[f"{name.removesuffix('_q')}_scale"]
    return found


def _name(name: str | bytes) -> str:
    """A name of ONNX, which is bytes where it is not UTF-8."""
    return name if isinstance(name, str) else name.decode("utf-8", "backslashreplace")


def _hdf5(path: Path) -> dict[str, torch.Tensor]:
    import numpy as np
    import torch

    try:
        import h5py
    except ImportError:
        raise MissingExtraError("h5py", "bench", "reading HDF5 weights") from None
    from truestep.recording.numpy_files import DEFLATE_RATIO, SMALL

    found: dict[str, torch.Tensor] = {}

    def visit(name: str, item: object) -> None:
        if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "fiu":
            return
        if item.nbytes > DEFLATE_RATIO * item.id.get_storage_size() + SMALL:
            raise ValueError(f"{name} claims {item.nbytes:,} bytes that the file does not hold")
        pieces = range(item.id.get_num_chunks()) if item.chunks else ()
        for piece in map(item.id.get_chunk_info, pieces):
            if piece.byte_offset + piece.size > path.stat().st_size:
                raise ValueError(f"a chunk of {name} lies outside the file")
        found[name] = torch.from_numpy(np.array(item))

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found
