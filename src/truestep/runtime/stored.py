"""Models whose large weights stay in their files: each is read whenever it is used.

diffusers and transformers load them by their own code, so names, ties, dtypes and the modules that
are kept in float32 are theirs; only what they open is another thing: safetensors files that give
stand-ins (see `truestep.runtime.lent`). A weight is read by `pread` into memory of its own, as no
mapping of a file would be within a limit of memory.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any
from unittest.mock import patch

import torch

from truestep.errors import FileFormatError, UsageError
from truestep.pairing.naming import runs_compiled
from truestep.recording.header import TORCH_NAMES, Header, Slot, read_header
from truestep.runtime.lent import LEAST, Lender, active, lending
from truestep.runtime.weight import Lent, Resident

PIECE = 1 << 26
"""Bytes that are read at once."""

_one_at_a_time = RLock()
"""Held while something stands in for what opens files."""


_M_MMAP_THRESHOLD = -3
_APART, _USUAL = 1 << 22, 1 << 25


@contextmanager
def large_apart() -> Iterator[None]:
    """Let glibc give large memory back when it is freed.

    It keeps more and more of it, in pieces that nothing fits into: of a Flux transformer of 6.4 GB
    a check took another 0.5 GB of address space so.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _APART)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _USUAL)


@contextmanager
def apart(*, from_disk: bool, low_memory: bool) -> Iterator[Lender | None]:
    """While weights stay in their files, if that was asked for.

    Args:
        from_disk: Each is read whenever it is used.
        low_memory: Those of the model that runs stay in memory until another one does.

    Raises:
        UsageError: Both were asked for.
    """
    if from_disk and low_memory:
        raise UsageError(
            "weights cannot both stay in memory while their model runs and be read at each use",
            measured="--low-memory and --from-disk",
            hint="leave --low-memory out",
        )
    if not (from_disk or low_memory):
        yield None
        return
    with large_apart(), lending() as lender:
        if not low_memory:
            yield lender
            return
        lender.resident = Resident()
        try:
            yield lender
        finally:
            lender.resident.leave()


@contextmanager
def in_files() -> Iterator[None]:
    """Let models that are loaded in it leave their large weights in their files.

    They can be used for as long as the lender is on that is on now (`truestep.runtime.lent.
    lending`); where none is, they are loaded as ever.
    """
    lender = active()
    if lender is None:
        yield
        return
    import safetensors.torch
    from transformers import modeling_utils

    with ExitStack() as stack:
        stack.enter_context(_one_at_a_time)
        stack.enter_context(lender.loading())
        lender.loaded += 1
        opened = partial(_opened, lender, modeling_utils.safe_open)
        loaded = partial(_loaded, lender, safetensors.torch.load_file)
        stack.enter_context(patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}))
        stack.enter_context(patch.object(modeling_utils, "safe_open", opened))
        stack.enter_context(patch.object(safetensors.torch, "load_file", loaded))
        yield


@contextmanager
def beside(models: Iterable[object]) -> Iterator[None]:
    """Run a trusted side beside a candidate's models without holding a second model.

    Nothing is lent where one of them is compiled: compiled code would not see who lends.
    """
    with nullcontext() if any(map(runs_compiled, models)) else lending():
        yield


def refuse_compiled(models: Iterable[object]) -> None:
    """Refuse compiled models where weights are left in files.

    Raises:
        UsageError: Their code would read what stands in for a weight.
    """
    lender = active()
    if lender is not None and any(map(runs_compiled, models)):
        raise UsageError(
            "compiled models cannot be run from disk",
            likely="compiled code reads the memory of its weights, and they are not in memory",
            hint="leave --low-memory out" if lender.resident else "leave --from-disk out",
        )


def _opened(lender: Lender, library: Any, *args: Any, **kwargs: Any) -> Any:
    """As `safetensors.safe_open` does; that opens what other threads load meanwhile."""
    return _File(lender, *args, **kwargs) if active() is lender else library(*args, **kwargs)


def _loaded(
    lender: Lender, library: Any, path: str | Path, device: Any = "cpu"
) -> dict[str, torch.Tensor]:
    """As `safetensors.torch.load_file` does; that loads what other threads do meanwhile."""
    if active() is not lender:
        tensors: dict[str, torch.Tensor] = library(path, device=device)
        return tensors
    with _File(lender, path, device=device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


class _File:
    """A safetensors file, as `safetensors.safe_open` opens it."""

    def __init__(
        self,
        lender: Lender,
        path: str | Path,
        framework: str = "pt",
        device: Any = "cpu",
        backend: str = "pread",
    ) -> None:
        self._lender = lender
        self._device = torch.device(device)
        path = Path(path).absolute()  # it is read for as long as its weights are used
        self._state = _state(os.stat(path))
        self._header = read_header(path)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def keys(self) -> list[str]:
        """Names of its tensors."""
        return list(self._header.tensors)

    def offset_keys(self) -> list[str]:
        """Names of its tensors, in the order in which they lie in it."""
        return sorted(self._header.tensors, key=lambda name: self._header.tensors[name].begin)

    def metadata(self) -> Mapping[str, str]:
        """What it says of itself."""
        return self._header.metadata

    def get_slice(self, name: str) -> _Slice:
        """A tensor that parts can be taken of."""
        return _Slice(self, name, self._header.tensors[name])

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor; where it is large, what stands in for it.

        It lies as in a mapped file, on which depends which kernel runs.
        """
        slot = self._header.tensors[name]
        dtype = getattr(torch, TORCH_NAMES[slot.dtype])
        beside = (self._header.data_start + slot.begin) % 64
        beside = 0 if beside % dtype.itemsize else beside
        size = slot.end - slot.begin
        if size < LEAST or not dtype.is_floating_point:
            memory = torch.empty(beside + size, dtype=torch.uint8)
            tensor = memory[beside:].view(dtype).data
            _read(self._header, self._state, name, tensor, 0, tensor.numel())
            return tensor.view(slot.shape).to(self._device)
        like = torch.empty(slot.shape, dtype=dtype, device="meta")
        content = (str(self._header.path), name, dtype)
        read = partial(_read, self._header, self._state, name)
        weight = Lent(like, torch.device("cpu"), read, content=content, beside=beside)
        weight.model = (self._lender.loaded, self._header.path.parent)
        weight.stays = self._lender.resident
        self._lender.stored[content] = weight.size
        return self._lender.lend(weight).to(self._device)


class _Slice:
    """A tensor of a file, as `safe_open` slices it."""

    def __init__(self, file: _File, name: str, slot: Slot) -> None:
        self._file, self._name, self._slot = file, name, slot

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self._slot.shape)

    def get_dtype(self) -> str:
        """Its dtype as the file calls it."""
        return self._slot.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        whole = self._file.get_tensor(self._name)
        return whole if index is ... else whole[index]


def _state(stat: os.stat_result) -> tuple[int, int]:
    """What tells whether a file was written to, or another one is in its place."""
    return stat.st_size, stat.st_mtime_ns


def _read(
    header: Header, state: tuple[int, int], name: str, into: torch.Tensor, start: int, stop: int
) -> None:
    """Read elements of a tensor, from one to before another, into a flat one of its dtype.

    Raises:
        FileFormatError: The file ends before it, cannot be read any more, or is not what it was.
    """
    memory = into.view(torch.uint8).numpy().data if stop > start else memoryview(b"")
    at = header.data_start + header.tensors[name].begin + start * into.itemsize
    done = 0
    try:
        file = os.open(header.path, os.O_RDONLY)
        try:
            while done < len(memory):
                count = os.preadv(file, [memory[done : done + PIECE]], at + done)
                if not count:
                    raise OSError(f"it ends {len(memory) - done:,} bytes too early")
                done += count
            if _state(os.fstat(file)) != state:
                raise OSError("it is not the file that was loaded")
        finally:
            os.close(file)
    except OSError as error:
        raise FileFormatError(
            f"{name} cannot be read",
            where=str(header.path),
            measured=str(error),
            likely="the file was changed or removed while it was in use",
            hint="run the check again",
        ) from error
