"""Recordings as safetensors files: written atomically, read lazily, every byte accounted for."""

from __future__ import annotations

import dataclasses
import difflib
import mmap
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from truestep.errors import FileFormatError, UsageError, WriteError
from truestep.files import beside, settle, sha256_of
from truestep.measure.moments import moments
from truestep.measure.plain import plain
from truestep.measure.sketch import sketch
from truestep.recording import header as headers
from truestep.recording import manifest_reading
from truestep.recording.header import TORCH_NAMES, Header, Slot, digest, manifest_digest
from truestep.recording.manifest import DIGEST_KEY, METADATA_KEY, Level, Manifest
from truestep.recording.manifest_reading import Packed
from truestep.records import Shown
from truestep.text import short

WHAT = "the recording"
"""What is written, for errors."""


class _NoTensorError(KeyError):
    """A name that a recording lacks; the closest ones are sought only where the error is read."""

    def __init__(self, name: str, names: Iterable[str]) -> None:
        super().__init__(name)
        self._name, self._names = name, names

    def __str__(self) -> str:
        near = difflib.get_close_matches(self._name, self._names, n=3)
        likely = f"; the closest are {', '.join(near)}" if near else ""
        return f"no tensor {self._name!r} in the recording{likely}"


class Recording(Shown, Mapping[str, torch.Tensor]):
    """What one run produced: a read-only mapping from tensor name to tensor, with a manifest.

    Opened from a file, a tensor is mapped when first asked for. Tensors share the file's pages, or
    the memory of what was recorded: do not write to them. The digest of a tensor is checked each
    time that it is asked for, so that nothing is judged by what a candidate left there.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        tensors: Mapping[str, torch.Tensor] | None = None,
        source: _File | None = None,
    ) -> None:
        self.manifest = manifest
        self._tensors = dict(tensors or {})
        self._source = source
        self._digests: dict[str, str] = {}
        packed = source is not None and isinstance(source.header.tensors, Packed)
        for entry in manifest.tensors if source and not packed else ():
            self._digests |= manifest_reading.stored_digests(entry, manifest.level)
        self._names: Collection[str] = (
            source.header.tensors
            if source and packed
            else dict.fromkeys(self._digests if source else self._tensors)
        )
        self._views: dict[str, tuple[tuple[Any, ...], memoryview]] = {}
        self._seen = {name: self._digest(name, tensor) for name, tensor in self._tensors.items()}

    @property
    def path(self) -> Path | None:
        """The file; None for a recording in memory."""
        return self._source.header.path if self._source else None

    @classmethod
    def open(cls, path: str | Path) -> Recording:
        """Open a recording; reads the header only.

        Raises:
            FileFormatError: It is unreadable, damaged, of a newer format, or not a recording.
        """
        header, manifest = manifest_reading.read_recording(path)
        if manifest is None:
            raise FileFormatError(
                "the file is a safetensors file, but not a recording",
                where=str(path),
                hint="any two safetensors files are judged by truestep compare",
            )
        return cls.opened(header, manifest)

    @classmethod
    def opened(cls, header: Header, manifest: Manifest) -> Recording:
        """A recording whose header was read; see `manifest_reading.read_recording`."""
        return cls(manifest, source=_File(header))

    @classmethod
    def in_memory(cls, tensors: Mapping[str, torch.Tensor], manifest: Manifest) -> Recording:
        """A recording that is not on disk; below level `full` only what stands for each is kept."""
        tensors = {name: plain(tensor, name).to("cpu") for name, tensor in tensors.items()}
        if manifest.level == "full":
            return cls(manifest, tensors=tensors)
        if set(tensors) != {entry.name for entry in manifest.tensors}:
            raise ValueError("the manifest and the tensors have different names")
        kept: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            kept[f"stats/{name}"] = moments(tensor)
            if manifest.level == "sketch":
                kept[f"sketch/{name}"] = sketch(tensor)
        return cls(manifest, tensors=kept)

    def require_tensors(self, *, where: str) -> None:
        """Refuse a level that keeps no tensors.

        Raises:
            UsageError: There is nothing to replay.
        """
        level = self.manifest.level
        if level != "full":
            raise UsageError(
                f"the reference holds level {level!r} only: there are no tensors to replay",
                where=where,
                hint="truestep record CASE --level full --update",
            )

    def at_level(self, level: Level) -> Recording:
        """The same run at a level that keeps no more than this one's, which is `full`."""
        if level == self.manifest.level:
            return self
        manifest = self.manifest.model_copy(update={"level": level})
        return Recording.in_memory(dict(self), manifest)

    def at(self, path: Path) -> Recording:
        """The same recording once its file has been moved; nothing is read again."""
        if self._source is None:
            raise ValueError("the recording has no file")
        moved = dataclasses.replace(self._source.header, path=path)
        return Recording(self.manifest, source=_File(moved))

    def save(self, path: str | Path) -> str:
        """Write atomically; see `write`."""
        return write(path, self)

    def kept(self, path: str | Path | None) -> Recording:
        """The recording as it is in a file that it is written to; itself where none is named."""
        if path is None:
            return self
        self.save(path)
        return Recording.open(path)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            if self._source is None or name not in self._source.header.tensors:
                raise _NoTensorError(name, self._names)
            known = self._source.header.tensors[name].digest or self._digests[name]
            tensor = self._tensors[name] = self._source.read(name, known)
            slow = known.startswith(headers.SHA256)
            self._seen[name] = self._digest(name, tensor) if slow else known
        elif self._digest(name, tensor) != self._seen[name]:
            raise UsageError(
                f"tensor {name!r} of a recording was changed in memory",
                where=str(self.path or "a recording in memory"),
                measured="its bytes are not those that were recorded",
                likely="a candidate wrote to it in place, or to memory that it shares",
                hint="give what runs copies: tensor.clone()",
            )
        return tensor

    def moments(self, name: str) -> tuple[float, ...]:
        """Moments that were kept of a tensor, read as numbers; see `records.STATS`.

        Raises:
            KeyError: None were kept of it.
            FileFormatError: They are damaged.
        """
        kept = f"stats/{name}"
        if self._source is None or kept in self._tensors:
            return tuple(self[kept].tolist())
        if kept not in self._source.header.tensors:
            raise _NoTensorError(kept, self._names)
        known = self._source.header.tensors[kept].digest or self._digests[kept]
        return self._source.doubles(kept, known)

    def _digest(self, name: str, tensor: torch.Tensor) -> str:
        """Digest of the bytes that a tensor has now; where they lie is found once."""
        if not tensor.is_contiguous() or tensor.numel() < 2:  # bytes of one may be a copy
            return digest(bytes_of(tensor))
        layout = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        known = self._views.get(name)
        if known is None or known[0] != layout:
            known = self._views[name] = layout, bytes_of(tensor)
        return digest(known[1])

    def release(self, name: str) -> None:
        """Forget a mapped tensor and let its pages go; whoever holds it reads the file again.

        Changes made to it in place are lost.
        """
        if self._source is not None and self._tensors.pop(name, None) is not None:
            del self._seen[name]
            self._views.pop(name, None)
            self._source.release(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        place = self.path or "in memory"
        case = short(str(self.manifest.case_id), 90)
        return f"Recording({short(str(place), 150)}, {len(self)} tensors, case {case})"


class _File:
    """A memory-mapped safetensors file."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self._map: mmap.mmap | None = None

    def read(self, name: str, expected: str | None) -> torch.Tensor:
        """Map one tensor, checking its digest if one is known."""
        slot = self._slot(name)
        tensor = _mapped(self._map, self.header.data_start, slot)
        if expected is not None:
            self._verify(name, bytes_of(tensor), expected)
        return tensor

    def doubles(self, name: str, expected: str) -> tuple[float, ...]:
        """Read one small float64 tensor as numbers, without a tensor: there may be a million."""
        slot, start = self._slot(name), self.header.data_start
        data = self._map[start + slot.begin : start + slot.end] if self._map is not None else b""
        self._verify(name, data, expected)
        return struct.unpack(f"<{len(data) // 8}d", data)

    def _slot(self, name: str) -> Slot:
        """Where one tensor is in the file, which is mapped now if it holds anything."""
        slot = self.header.tensors[name]
        if self._map is None and slot.end > slot.begin:
            self._map = self._open()
        return slot

    def _verify(self, name: str, data: bytes | memoryview, expected: str) -> None:
        if not headers.has_digest(data, expected):
            headers.refuse(
                self.header.path,
                f"tensor {name!r} is damaged",
                measured="its digest does not match",
                likely="a flipped bit or an edited file",
            )

    def release(self, name: str) -> None:
        """Give the pages of one tensor back to the system, where it has a way to."""
        slot = self.header.tensors[name]
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        begin = self.header.data_start + slot.begin
        begin -= begin % mmap.PAGESIZE
        size = self.header.data_start + slot.end - begin
        if size > 0:
            self._map.madvise(mmap.MADV_DONTNEED, begin, size)

    def _open(self) -> mmap.mmap:
        try:
            with self.header.path.open("rb") as file:
                # Copy on write: torch wants writable memory, and the file must not change.
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            headers.refuse(self.header.path, "the file cannot be mapped", measured=str(error))


def _mapped(memory: mmap.mmap | None, start: int, slot: Slot) -> torch.Tensor:
    dtype = getattr(torch, TORCH_NAMES[slot.dtype])
    if memory is None or slot.end == slot.begin:
        return torch.empty(slot.shape, dtype=dtype)
    raw = torch.frombuffer(
        memory, dtype=torch.uint8, count=slot.end - slot.begin, offset=start + slot.begin
    )
    if (start + slot.begin) % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).reshape(slot.shape)


class Plain(Mapping[str, torch.Tensor]):
    """Tensors of any safetensors file, mapped when they are asked for."""

    def __init__(self, header: Header) -> None:
        self._file = _File(header)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._file.header.tensors:
            raise KeyError(name)
        return self._file.read(name, None)

    def release(self, name: str) -> None:
        """Let the pages of a tensor go; whoever holds it reads the file again."""
        if name in self._file.header.tensors:
            self._file.release(name)

    def __contains__(self, name: object) -> bool:
        return name in self._file.header.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.header.tensors)

    def __len__(self) -> int:
        return len(self._file.header.tensors)


def read_plain(path: str | Path) -> Plain:
    """All tensors of any safetensors file, mapped, through the same checks.

    Raises:
        FileFormatError: It is unreadable or damaged.
    """
    return Plain(headers.read_header(path))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Bytes of a host tensor in C order; a view of its memory where that is contiguous."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # a single element is contiguous whatever its stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def write(path: str | Path, recording: Recording) -> str:
    """Write a recording: temporary file beside it, read back, fsync, rename, fsync of the folder.

    Args:
        path: The file; an existing one is replaced only when the new one is complete and readable.
        recording: Tensors and manifest; the digests of the tensor table are filled in here.

    Returns:
        SHA-256 of the file's content, hexadecimal.

    Raises:
        WriteError: The file could not be written; an existing one is untouched.
    """
    path = Path(path)
    with beside(path, WHAT) as temporary:
        sha256 = stage(temporary, recording)
        settle(temporary, path)
    return sha256


def stage(temporary: Path, recording: Recording) -> str:
    """Write a complete recording to a temporary path (see `files.beside`) and read it back.

    Returns:
        SHA-256 of the file's content.

    Raises:
        OSError: It could not be written.
        WriteError: No reader would take it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored = _stored(recording)
    try:
        save_file(stored, temporary, metadata=_metadata(recording.manifest, stored))
    except SafetensorError as error:
        raise OSError(str(error)) from error
    temporary.chmod(temporary.parent.stat().st_mode & 0o666)  # the library makes it private
    verify(temporary)
    return sha256_of(temporary)


def verify(temporary: Path) -> Recording:
    """Open what was written as a reader will, before it takes the place of an earlier file.

    Raises:
        WriteError: No reader would take it.
    """
    try:
        return Recording.open(temporary)
    except FileFormatError as error:
        raise WriteError(
            "the recording could not be read again, and was not put in place",
            where=str(temporary.parent.with_name(temporary.name)),
            measured=": ".join(filter(None, (error.what, error.measured))),
        ) from error


def _stored(recording: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that share no memory, each a contiguous host tensor."""
    stored: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, tensor in recording.items():
        own = _own_storage(tensor)
        if own.numel() and own.data_ptr() in places:  # one output under two names
            own = own.clone()
        places.add(own.data_ptr())
        stored[name] = own
    return stored


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous host tensor that owns exactly its bytes, as safetensors wants it."""
    host = tensor.detach().to("cpu").contiguous()
    return host if host.untyped_storage().nbytes() == host.numel() * host.itemsize else host.clone()


def _metadata(manifest: Manifest, stored: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The manifest with digests, as safetensors metadata."""
    table, named = [], 0
    for entry in manifest.tensors:
        names = headers.stored_names(entry.name, manifest.level)
        for name in names:
            if name not in stored:
                raise ValueError(f"the manifest names {name!r}, which is not among the tensors")
        first, *rest = (digest(bytes_of(stored[name])) for name in names)
        sketched = rest[0] if rest else entry.sketch_digest
        table.append(dataclasses.replace(entry, digest=first, sketch_digest=sketched))
        named += len(names)
    if named != len(stored):
        raise ValueError("there are tensors that the manifest does not name")
    return metadata_of(manifest.model_copy(update={"tensors": tuple(table)}))


def metadata_of(manifest: Manifest) -> dict[str, str]:
    """A manifest whose digests are filled in, as safetensors metadata."""
    # What no row uses is left out: files are what they were before there was such a column.
    unused = set() if manifest.level == "sketch" else {"sketch_digest"}
    if not any(entry.call for entry in manifest.tensors):
        unused.add("call")
    exclude: Any = {"tensors": {"__all__": unused}} if unused else {}
    for name in ("columns", "calls"):
        if not getattr(manifest, name):
            exclude[name] = True
    text = manifest.model_dump_json(exclude=exclude)
    return {METADATA_KEY: text, DIGEST_KEY: manifest_digest(text)}
