"""What a file or folder is and holds, for `truestep show`: tensors as rows, all else in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truestep import magic
from truestep.errors import FileFormatError
from truestep.reading import parse_json, read, reason
from truestep.text import quoted

if TYPE_CHECKING:
    import torch

    from truestep.recording.header import Header
    from truestep.recording.manifest import Manifest
    from truestep.recording.readers import Source

Row = tuple[str, str, tuple[int, ...] | str]
"""Name, dtype and shape; of a folder, a part, what it is, and its size."""


@dataclass(frozen=True)
class Contents:
    """What is shown.

    Attributes:
        kind: What it is: "a PNG picture".
        rows: What is in it.
        noun: What the rows are.
        lines: What else is to be said.
        manifest: Of a recording.
    """

    kind: str
    rows: tuple[Row, ...] = ()
    noun: str = "tensors"
    lines: tuple[str, ...] = ()
    manifest: Manifest | None = field(default=None, repr=False)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        labels = ("dtype", "shape") if self.noun == "tensors" else ("kind", "size")
        rows = {name: dict(zip(labels, rest, strict=True)) for name, *rest in self.rows}
        return {"kind": self.kind, self.noun: rows, "notes": list(self.lines)}


def contents_of(path: Path) -> Contents:
    """Look into a file or folder.

    Raises:
        FileFormatError: It is absent, damaged, or of a kind that nothing tells.
    """
    kind = magic.what_is(path)
    try:
        if path.is_dir():
            return _folder(path, kind)
        path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise FileFormatError(
            "the file cannot be read", where=str(path), measured=reason(error)
        ) from None
    readers: Mapping[str, Callable[[Path, str], Contents]] = {
        magic.SAFETENSORS: _safetensors,
        magic.NUMPY: _tensors,
        magic.ARCHIVE: _archive,
        magic.GGUF: _gguf,
        magic.OLD_PT: _tensors,
        magic.ACTIVATIONS: _tensors,
        magic.JSON: _json,
    }
    if kind in readers:
        return readers[kind](path, kind)
    if kind == "":
        return _safetensors(path, kind)  # which says what is wrong with it
    if kind in (magic.ONNX, magic.HDF5):
        return _weights(path, kind)
    return Contents(kind, lines=(_NOTES.get(kind, "no tensors are read from files of this kind"),))


_NOTES = {
    magic.PICKLE: "loading a pickle could run code: truestep opens none but .pt files of tensors",
    magic.SQLITE: "truestep perf show --history FILE reads a history of runs",
    magic.TEXT: "truestep shows files and folders of tensors",
}


def _safetensors(path: Path, _: str) -> Contents:
    from truestep.recording.header import read_header
    from truestep.recording.manifest_reading import manifest_of

    header = read_header(path)
    manifest = manifest_of(header)
    if manifest is not None:
        rows = tuple((e.name, e.dtype, e.shape) for e in manifest.tensors)
        return Contents("a recording", rows, manifest=manifest)
    rows = tuple((name, slot.dtype, slot.shape) for name, slot in header.tensors.items())
    if "latent_tensor" in header.tensors:
        return Contents("a ComfyUI latent", rows, lines=_comfy(header))
    if "truestep.serve" in header.metadata:
        return Contents("answers of a server (truestep serve-check)", rows)
    return Contents("a safetensors file that truestep did not write", rows)


def _comfy(header: Header) -> tuple[str, ...]:
    """What is said of a ComfyUI latent; its metadata is the workflow that made it."""
    lines = ["in the space of its VAE, not in that of the sampler"]
    if "latent_format_version_0" not in header.tensors:
        lines.append("of an old ComfyUI: read multiplied by 1 / 0.18215, as ComfyUI does")
    held = [name for name in ("prompt", "workflow") if name in header.metadata]
    return (*lines, *([f"holds its {' and '.join(held)}"] if held else []))


def _tensors(path: Path, kind: str) -> Contents:
    from truestep.recording.readers import read_source

    return _of_source(read_source(path, _SUFFIX.get(kind, "")), kind)


def _of_source(source: Source, kind: str) -> Contents:
    lines = tuple(f"{key}: {str(value)[:80]}" for key, value in source.bundle.items())
    return Contents(source.kind or kind, _rows(source.tensors), lines=(*lines, *source.notes))


_NPZ, _PT = "numpy arrays (.npz)", "a .pt file"
_SUFFIX = {magic.NUMPY: ".npy", magic.OLD_PT: ".pt", _NPZ: ".npz", _PT: ".pt"}


def _archive(path: Path, kind: str) -> Contents:
    """A zip archive: what torch or numpy writes, or any other."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # a damaged archive raises almost anything
        raise FileFormatError(
            "the zip archive is damaged", where=str(path), measured=reason(error)
        ) from None
    names = [info.filename for info in entries]
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return _tensors(path, _PT)
    if names and all(name.endswith(".npy") for name in names):
        return _tensors(path, _NPZ)
    rows = tuple((info.filename, "", f"{info.file_size:,} bytes") for info in entries)
    return Contents(kind, rows, "entries")


def _gguf(path: Path, kind: str) -> Contents:
    from truestep.recording.gguf_files import read_gguf

    found = read_gguf(path)
    rows = tuple((name, entry.called, entry.shape) for name, entry in found.entries.items())
    lines = (f"architecture: {found.architecture}",) if found.architecture else ()
    return Contents(kind, rows, lines=lines)


def _weights(path: Path, kind: str) -> Contents:
    from truestep.errors import MissingExtraError
    from truestep.parity.weights import load_state

    if path.suffix not in (".onnx", ".h5", ".hdf5"):
        return Contents(kind)
    try:
        return Contents(kind, _rows(load_state(path)))
    except MissingExtraError as error:
        return Contents(kind, lines=(f"{error.what}: {error.hint}",))


def _rows(tensors: Mapping[str, torch.Tensor]) -> tuple[Row, ...]:
    return tuple(
        (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    )


def _json(path: Path, kind: str) -> Contents:
    data = read(path, "the JSON file is damaged", parse_json)
    if not isinstance(data, dict):
        return Contents(kind, lines=(f"a list of {len(data)}",))
    weights = data.get("weight_map")
    if isinstance(weights, dict):
        rows = tuple((str(name), str(file), "") for name, file in weights.items())
        files = sorted({str(file) for file in weights.values()})
        absent = [file for file in files if not (path.parent / file[:200]).is_file()]
        lines = [f"in {len(files)} files: {', '.join(files[:5])}"]
        lines += [f"not there: {', '.join(absent[:5])}"] if absent else []
        return Contents("the index of a model in several files", rows, lines=tuple(lines))
    if "_class_name" in data:
        return Contents(f"the configuration of a {data['_class_name']}")
    return Contents(kind, lines=(f"a table of {', '.join(list(data)[:8])}",))


def _folder(path: Path, kind: str) -> Contents:
    place = quoted(str(path))
    if kind == magic.REFERENCES:
        from truestep.recording.lock import read_lock

        found = read_lock(path).references
        rows = tuple((name, "", _size(path / name)) for name in found)
        return Contents(kind, rows, "references")
    if kind == magic.EXPERIMENT:
        return Contents(kind, lines=(f"truestep ab recover {place} prints its table",))
    if kind == magic.SPOOL:
        return Contents(kind, lines=(f"truestep trace recover {place} makes a trace of it",))
    if kind == magic.MODEL:
        from truestep.runtime.loading import model_index

        index = model_index(path)
        parts = [name for name in index if not name.startswith("_") and (path / name).is_dir()]
        rows = tuple((part, _class(index[part]), _weights_of(path / part)) for part in parts)
        absent = [n for n, v in index.items() if _class(v) and not (path / n).is_dir()]
        lines = (f"not there: {', '.join(absent)}",) if absent else ()
        named = f"{kind}: {index.get('_class_name')}"
        return Contents(named, rows, "parts", lines)
    if any("___" in p.name or p.name.startswith("Pass") for p in path.glob("*.pt")):
        from truestep.recording.readers import load

        return _of_source(load(path, label=str(path)), kind)
    files = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    rows = tuple((p.name, magic.what_is(p), _size(p)) for p in files)
    return Contents(kind, rows, "entries")


def _class(entry: object) -> str:
    """`Library.Class` of a part's entry in model_index.json; nothing for a part that is off."""
    return ".".join(map(str, entry)) if isinstance(entry, list) and entry[:1] != [None] else ""


def _weights_of(folder: Path) -> str:
    files = [p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt")]
    return f"{len(files)} files of weights, {_bytes(sum(p.stat().st_size for p in files))}"


def _size(path: Path) -> str:
    if path.is_dir():
        return ""
    return _bytes(path.stat().st_size) if path.is_file() else "not there"


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size:,} bytes"


def call_lines(manifest: Manifest) -> list[tuple[str, str]]:
    """What a recording of calls was called with, and its calls: stage, whose, how many, steps."""
    said = manifest.settings.get("call")
    lines: list[tuple[str, str]] = []
    if isinstance(said, dict):
        given = ", ".join(f"{key} {value!r}" for key, value in said.items() if value is not None)
        lines.append(("call", f"{manifest.settings.get('pipeline')}: {given}"))
    prepared = manifest.settings.get("prepared")
    if prepared:
        lines.append(("prepared", str(prepared)))
    hashes = (manifest.case or {}).get("sha256")
    if isinstance(hashes, dict) and hashes:
        lines.append(("sha256", ", ".join(f"{key} {value}" for key, value in hashes.items())))
    groups: dict[tuple[str, str], list[int | None]] = {}
    for call in manifest.calls:
        if call.component != call.method:  # the run itself, whose parts these are
            groups.setdefault((call.stage, f"{call.component}.{call.method}"), []).append(call.step)
    width = max((len(name) for _, name in groups), default=0)
    for (stage, name), places in groups.items():
        steps = sorted({step for step in places if step is not None})
        at = f", steps {steps[0]} to {steps[-1]}" if steps[1:] else ""
        lines.append(("calls", f"{stage:<10}  {name:<{width}}  {len(places)}{at}"))
    kept = kept_text(manifest)
    return [*lines, ("kept", kept)] if kept else lines


def kept_text(manifest: Manifest) -> str:
    """What a recording keeps of its steps, where that is not everything."""
    steps = manifest.settings.get("steps" if manifest.calls else "kept_steps")
    total = 1 + max((entry.step or 0 for entry in manifest.tensors), default=0)
    total = 1 + max((call.step or 0 for call in manifest.calls), default=total - 1)
    if not isinstance(steps, list) or len(steps) >= total:
        return ""
    return f"what checks read, models at steps {', '.join(map(str, steps))} of {total}"
