"""Read the parameters of a weight file by name, whatever wrote it; nothing in it is executed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from truestep.errors import FileFormatError, MissingExtraError, UsageError

if TYPE_CHECKING:
    import torch


def load_state(path: Path) -> dict[str, torch.Tensor]:
    """Parameters of a file by name: safetensors, pt, pth, bin, ckpt, ONNX or HDF5 (Keras).

    Nothing in a file is executed.

    Raises:
        FileFormatError: It cannot be read, or holds no tensors.
        UsageError: Its kind is not known.
    """
    readers: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {
        ".safetensors": _safetensors,
        ".onnx": _onnx,
        ".h5": _hdf5,
        ".hdf5": _hdf5,
        **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), _torch),
    }
    if path.suffix not in readers:
        raise UsageError(
            f"{path.suffix or 'a file without a suffix'} is no kind of weight file known here",
            where=str(path),
            measured=f"there are: {', '.join(readers)}",
        )
    try:
        found = readers[path.suffix](path)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise FileFormatError(
            "the weights cannot be read",
            where=str(path),
            measured=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        ) from error
    if not found:
        raise FileFormatError("the file holds no tensors", where=str(path))
    return found


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def _torch(path: Path) -> dict[str, torch.Tensor]:
    import pickle

    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"refused to unpickle: {str(error).splitlines()[0]}") from None
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
            found[item.name] = torch.from_numpy(np.array(array))
    for name in [key for key, value in found.items() if value.dtype in (torch.int8, torch.uint8)]:
        scale = found.get(f"{name.removesuffix('_q')}_scale")
        if name.endswith("_q") and scale is not None:  # an integer matrix times its scale
            found[name.removesuffix("_q")] = found.pop(name).float() * scale
            del found[f"{name.removesuffix('_q')}_scale"]
    return found


def _hdf5(path: Path) -> dict[str, torch.Tensor]:
    import numpy as np
    import torch

    try:
        import h5py
    except ImportError:
        raise MissingExtraError("h5py", "bench", "reading HDF5 weights") from None
    found: dict[str, torch.Tensor] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "fiu":
            found[name] = torch.from_numpy(np.array(item))

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found
