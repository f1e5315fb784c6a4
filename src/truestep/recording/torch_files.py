"""Read .pt files as if they were hostile: no code is run, nothing is allocated that is not there.

torch's own reader of tensors without code still calls what a file names with what it says: classes
of tensors with a size, rebuilders with a shape. Here a file is looked through first.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from truestep.errors import FileFormatError
from truestep.magic import ARCHIVE, OLD_PT, PICKLE
from truestep.nests import parts
from truestep.recording.numpy_files import check_archive, clamped, refuse_as

DEEPEST = 50
"""Nests of dictionaries and lists."""

EXPANSION, SMALL = 16, 16 * 2**20
"""Elements that share memory (expanded or overlapping tensors) may need this many times the file's
bytes once each has its own, or this many bytes."""

_STORAGE = "torch.storage UntypedStorage"

_PLAIN = frozenset(
    f"torch._utils {name}"
    for name in (
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_sparse_tensor",
    )
) | {
    "collections OrderedDict",
    "collections Counter",
    "torch Size",
    "torch device",
    "torch.serialization _get_layout",
    "_codecs encode",
    _STORAGE,
    "__builtin__ set",
    "__builtin__ complex",
    "builtins set",
    "builtins complex",
}
"""What a pickle of plain tensors may name: nothing that allocates by a number in the file."""

_OWN = (ARCHIVE, OLD_PT, PICKLE)

_QUANTIZED, _NESTED = "torch._utils _rebuild_qtensor", "torch._utils _rebuild_nested_tensor"

_NEEDS_CODE = re.compile(r"Unsupported (global|class|type)[^.\n]*\.?\S*", re.IGNORECASE)
"""What torch says of a pickle that names code it does not allow."""

_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
_BETWEEN = {"NONE", "TUPLE", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}


def read_pt(path: Path) -> Any:
    """What a .pt file holds: tensors in nests of dictionaries and lists.

    Raises:
        FileFormatError: It cannot be read, needs code, or claims more than it holds.
    """
    try:
        _look_through(path)
        content = _loaded(path, "cpu")
        _check_sizes(path, content)
        return content
    except FileFormatError:
        raise
    except pickle.UnpicklingError as error:
        needed = _NEEDS_CODE.search(str(error))
        if needed is None:
            _refuse(path, "the .pt file cannot be read", measured="it is not a pickle of tensors")
        _needs_code(path, needed.group(0).strip())
    except Exception as error:  # a damaged archive raises almost anything
        refuse_as(path, "the .pt file cannot be read", error, own=_OWN)


def _loaded(path: Path, device: str) -> Any:
    if path.suffix != ".safetensors":
        return torch.load(path, map_location=device, weights_only=True)
    with path.open("rb") as file:  # given the name, torch would go by it
        return torch.load(file, map_location=device, weights_only=True)


def tensors_in(value: object, prefix: str = "", *, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Tensors in any nest of mappings and sequences, by dotted name; other values are left out.

    Raises:
        ValueError: It is nested more than 50 deep, or holds itself.
    """
    if depth > DEEPEST:
        raise ValueError(f"the .pt file is nested more than {DEEPEST} deep, or holds itself")
    if isinstance(value, torch.Tensor):
        yield prefix or "tensor", value
        return
    for key, item in parts(value):
        yield from tensors_in(item, f"{prefix}.{key}" if prefix else key, depth=depth + 1)


def _look_through(path: Path) -> None:
    """Refuse a file whose pickles name what allocates, or storages larger than the file."""
    size = path.stat().st_size
    with clamped(path) as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            _scan_old(path, file, size)
            return
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            check_archive(path, entries, kind=".pt")
            for info in entries:
                if info.filename.endswith("data.pkl"):
                    _scan(path, io.BytesIO(archive.read(info)), size)


def _scan_old(path: Path, file: BinaryIO, size: int) -> None:
    """The form before torch 1.6: magic number, protocol, system, content and keys, then storages.

    Its storages could grow to any shape that a tensor claims, so shapes are rebuilt without memory.
    """
    for _ in range(5):
        _scan(path, file, size)
    content = _loaded(path, "meta")
    for name, tensor in tensors_in(content):
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = tensor.storage_offset() + sum((n - 1) * step for n, step in steps)
        if tensor.numel() and (last + 1) * tensor.itemsize > size:
            _refuse(path, f"tensor {name[:80]!r} is larger than the file")


def _scan(path: Path, file: BinaryIO, size: int) -> None:
    """Look through one pickle without running it."""
    number: int | None = None
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        called = _step(operation, argument, stack, memo)
        if called == _STORAGE:  # a class that takes a number of bytes; others only name it
            _needs_code(path, f"a call of {_STORAGE}")
        if name == "GLOBAL":
            _check_global(path, str(argument))
        elif name == "BINPERSID" and (number is None or not 0 <= number <= size):
            _refuse(
                path,
                "a tensor of the .pt file is larger than the file",
                measured=f"{number} elements, {size:,} bytes",
            )
        if name in _NUMBERS:
            number = argument
        elif name not in _BETWEEN:
            number = None


def _step(operation: Any, argument: Any, stack: list[Any], memo: dict[int, Any]) -> Any:
    """Follow the names on a pickle's stack over one operation; what it calls, if it calls one."""
    name = operation.name
    if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if argument is None else argument] = stack[-1]
        return None
    if name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
        return None
    before = operation.stack_before
    if pickletools.markobject in before:
        while stack.pop() is not pickletools.markobject:
            pass
        before = before[: before.index(pickletools.markobject)]
    taken = [stack.pop() for _ in before]
    made = {"GLOBAL": argument, "MARK": pickletools.markobject}.get(name)
    stack += [made for _ in operation.stack_after]
    return taken[-1] if name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX") else None


def _check_global(path: Path, name: str) -> None:
    if name in _PLAIN:
        return
    module, _, what = name.rpartition(" ")
    known = getattr(torch, what, None) if module in ("torch", "torch.storage") else None
    if isinstance(known, torch.dtype) or (module == "torch" and what.endswith("Storage")):
        return
    if name in (_QUANTIZED, _NESTED):
        kind, plain = (
            ("quantized", "dequantize()") if name == _QUANTIZED else ("nested", "unbind()")
        )
        _refuse(
            path,
            f"the .pt file holds a {kind} tensor, which cannot be compared",
            hint=f"save tensor.{plain}",
        )
    _needs_code(path, f"Unsupported global: {module}.{what}"[:120])


def _check_sizes(path: Path, content: object) -> None:
    """Refuse tensors whose elements would need far more than the file holds."""
    allowed = SMALL + EXPANSION * path.stat().st_size
    need = 0
    for name, tensor in tensors_in(content):
        if tensor.is_nested or tensor.layout != torch.strided:
            continue  # refused by whoever wants to compare it
        need += math.prod(tensor.shape) * tensor.itemsize
        if need > allowed:
            _refuse(
                path,
                f"tensor {name[:80]!r} claims far more elements than the file holds",
                measured=f"shape {str(list(tensor.shape))[:80]}: {need:,} bytes, "
                f"the file has {path.stat().st_size:,}",
                likely="an expanded tensor",
                hint="save tensor.contiguous(), or a smaller part of it",
            )


def _needs_code(path: Path, measured: str) -> NoReturn:
    _refuse(
        path,
        "the file needs code to be unpickled, which truestep never runs",
        measured=measured,
        hint="where you trust it: torch.save(dict_of_plain_tensors, path)",
    )


def _refuse(
    path: Path, what: str, *, measured: str = "", likely: str = "", hint: str = ""
) -> NoReturn:
    raise FileFormatError(what, where=str(path), measured=measured, likely=likely, hint=hint)
