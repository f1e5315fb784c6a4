"""What other engines write of a run: latents, trajectories, dumps and traces, under our names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from truestep.errors import FileFormatError
from truestep.keys import module_name, step_name
from truestep.reading import parse_json, read
from truestep.recording.torch_files import read_pt, tensors_in

COMFY, COMFY_MARK = "latent_tensor", "latent_format_version_0"
"""Tensors of a ComfyUI latent: it, and what says that it was not scaled (nodes.py, SaveLatent)."""

_COMFY_OLD = 1 / 0.18215
"""What ComfyUI multiplies a latent without the mark by when it loads it (nodes.py, LoadLatent)."""

FINAL, SIGMAS, TIMESTEPS = "latent/final", "schedule/sigmas", "schedule/timesteps"

VAE = "vae"
"""Space of a latent that a VAE decodes as it is."""

_STATISTICS = ("abs_mean", "mean", "std", "min", "max")
"""Of FastVideo's trace, numbers that are as large as the values themselves; `sum` is not."""

_MOST_DIMENSIONS = 64

_TAGS = "___"
_PASS = re.compile(r"Pass\d+")


@dataclass(frozen=True)
class Found:
    """What a file of another engine holds.

    Attributes:
        kind: What it is: "a ComfyUI latent".
        tensors: Under our names.
        notes: What is to be said of them wherever they are shown or judged.
        fields: Its other fields.
        space: `vae`, where it is a latent that was brought into the VAE's space.
    """

    kind: str
    tensors: Mapping[str, torch.Tensor]
    notes: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    space: str = ""


def comfy_latent(tensors: Mapping[str, torch.Tensor]) -> Found | None:
    """A latent as ComfyUI's SaveLatent writes it: in the VAE's space.

    Source:
        ComfyUI a125cd84, nodes.py, SaveLatent and LoadLatent.
    """
    if COMFY not in tensors:
        return None
    latent, notes = tensors[COMFY], tuple[str, ...]()
    if COMFY_MARK not in tensors:
        latent = latent.float() * _COMFY_OLD
        notes = (f"a latent of before {COMFY_MARK}: multiplied by 1 / 0.18215, as ComfyUI does",)
    rest = {name: t for name, t in tensors.items() if name not in (COMFY, COMFY_MARK) and t.numel()}
    return Found("a ComfyUI latent", {FINAL: latent, **rest}, notes, space=VAE)


def of_sglang(content: object) -> Found | None:
    """A trajectory or a dump of SGLang, as it was saved into a .pt file.

    `trajectory_latents` are those after each step, `latents` of a rollout those before each step
    and the last. A dump is `value` and `meta`.

    Source:
        sglang 0.5.23, multimodal_gen/runtime/pipelines_core/stages/denoising.py,
        `_record_trajectory`; post_training/rl_dataclasses.py, `RolloutDitTrajectory`;
        srt/debug_utils/dumper.py, `_dump_single`.
    """
    if not isinstance(content, Mapping):
        return None
    after, before = content.get("trajectory_latents"), content.get("latents")
    if _steps(after):
        times = content.get("trajectory_timesteps")
        return Found("a trajectory of SGLang", _trajectory(after, times, first=1))
    if _steps(before) and {"timesteps", "sigmas"} & content.keys():
        latents = _trajectory(before, content.get("timesteps"), first=0)
        sigmas = content.get("sigmas")
        latents |= {SIGMAS: sigmas} if isinstance(sigmas, torch.Tensor) else {}
        return Found("a trajectory of an SGLang rollout", latents)
    meta = content.get("meta")
    if content.keys() == {"value", "meta"} and isinstance(meta, Mapping) and "name" in meta:
        fields = {str(key): value for key, value in meta.items()}
        return Found(
            "a dump of SGLang", dict(tensors_in(content["value"], str(meta["name"]))), (), fields
        )
    return None


def _steps(latents: object) -> bool:
    """Whether it is latents of several steps: `b t ...`, or a list of `b ...`."""
    if isinstance(latents, torch.Tensor):
        return latents.ndim >= 4 and latents.shape[1] > 0
    tensors = isinstance(latents, list | tuple) and latents
    return bool(tensors) and all(isinstance(x, torch.Tensor) for x in latents)  # type: ignore[attr-defined]


def _trajectory(latents: Any, timesteps: object, *, first: int) -> dict[str, torch.Tensor]:
    """Latents by step, the last one as the final; what a file expands is made its own."""
    parts: Sequence[torch.Tensor] = (
        latents.unbind(1) if isinstance(latents, torch.Tensor) else latents
    )
    *steps, final = parts
    named = {TIMESTEPS: timesteps} if isinstance(timesteps, torch.Tensor) else {}
    named |= {step_name(first + i, "latent"): latent for i, latent in enumerate(steps)}
    return {**named, FINAL: final}


def dump_files(folder: Path) -> list[Path]:
    """Files of an SGLang dump in a folder, in the order in which they were written."""
    files = [p for p in folder.glob("*.pt") if _TAGS in p.stem or _PASS.fullmatch(p.stem)]
    return sorted(files, key=lambda path: (_number(path, "dump_index"), path.name))


def read_dumps(folder: Path) -> Found:
    """All of a folder that SGLang dumped into, one tensor after the other as they were written.

    A tensor is called as its file's tags say (`rank=0/step=3/name=x`), without the running number;
    where several are called so, they are counted.

    Raises:
        FileFormatError: A file is damaged, or needs code to be read.
    """
    named: dict[str, torch.Tensor] = {}
    for path in dump_files(folder):
        content = read_pt(path)
        found = of_sglang(content)
        head = path.stem if found is None else _tags(path)
        inner = content if found is None else content["value"]
        for name, tensor in tensors_in(inner, "value"):
            rest = name.removeprefix("value").removeprefix(".")
            key = f"{head}/{rest}" if rest else head
            count = sum(other == key or other.startswith(f"{key}#") for other in named)
            named[f"{key}#{count}" if count else key] = tensor
    return Found("a folder of SGLang's dumps", named)


def _tags(path: Path) -> str:
    parts = path.stem.split(_TAGS)
    return "/".join(part for part in parts if not part.startswith("dump_index="))


def _number(path: Path, tag: str) -> int:
    text = next((p for p in path.stem.split(_TAGS) if p.startswith(f"{tag}=")), "")
    number = text.partition("=")[2]
    return int(number) if number.isdecimal() else 0


def activation_trace(path: Path) -> Found:
    """A trace of FastVideo: statistics of what every module gave, one JSON object a line.

    The statistics of one output are one tensor, rounded to the dtype that the output had; of one
    that is not told to bfloat16, in which models mostly run. A `sum` is divided by the number of
    elements, and left out where no shape tells that: sums of values that cancel have no floor.

    Raises:
        FileFormatError: A line is damaged, or holds nothing that can be compared.

    Source:
        fastvideo 0.2.1, fastvideo/hooks/activation_trace.py.
    """
    lines: list[dict[str, Any]] = read(path, "the activation trace cannot be read", _records)
    tensors: dict[str, torch.Tensor] = {}
    counts: dict[tuple[str, str, int], int] = {}
    without_shape = False
    for line in lines:
        step = line["step"] or 0
        key = (line["module"], line["tensor"], step)
        call = counts[key] = counts.get(key, -1) + 1
        without_shape |= "sum" in line and _elements(line) is None
        name = module_name(
            line["module"], step=step, branch="trace", slot=_slot(line["tensor"]), call=call
        )
        values = _statistics(line)
        if values is not None:
            tensors[name] = values
        if "shape" in line:
            tensors[f"{name}.shape"] = torch.tensor(line["shape"], dtype=torch.int64)
    if not tensors:
        raise FileFormatError(
            "the activation trace holds nothing that can be compared",
            where=str(path),
            measured=f"{len(lines)} lines with {', '.join(sorted(set().union(*lines))[:9])}",
            likely="sums alone: they say nothing without a shape",
        )
    notes = ["statistics of whole tensors: what leaves them as they are was not seen"]
    notes += ["sums were left out: no shape says of how many elements"] if without_shape else []
    return Found("an activation trace of FastVideo", tensors, tuple(notes))


def _slot(label: str) -> str:
    """`out` to `out.0`, and `out[1][0]` to `out.1.0`."""
    slot = label.replace("[", ".").replace("]", "")
    return slot if "." in slot else f"{slot}.0"


def _records(data: bytes) -> list[dict[str, Any]]:
    """The lines of a trace; a last one that was not written to its end is left out."""
    *lines, _unfinished = data.split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        record = parse_json(line)
        if not (isinstance(record, dict) and _says_where(record)):
            raise ValueError(f"line {number} says no module, tensor and step")
        if "shape" in record and _elements(record) is None:
            raise ValueError(f"line {number} has a shape that is none")
        records.append(record)
    if not records:
        raise ValueError("it has no whole line")
    return records


def _says_where(record: Mapping[str, Any]) -> bool:
    step = record.get("step", "")
    texts = all(isinstance(record.get(key), str) for key in ("module", "tensor"))
    return texts and (step is None or (type(step) is int and 0 <= step < 10**9))


def _statistics(line: Mapping[str, Any]) -> torch.Tensor | None:
    found = [*_numbers(line)]
    if not found:
        return None
    dtype = getattr(torch, str(line.get("dtype", "torch.bfloat16")).removeprefix("torch."), None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        dtype = torch.float32
    elif dtype.itemsize == 1:  # what is computed of float8 is not in it
        dtype = torch.bfloat16
    return torch.tensor(found, dtype=torch.float64).to(dtype)


def _numbers(line: Mapping[str, Any]) -> Iterator[float]:
    """The statistics of a line in a fixed order; one that failed, as the trace says, is NaN."""
    for key in _STATISTICS:
        if key in line:
            value = line[key]
            yield float(value) if isinstance(value, int | float) else math.nan
    count = _elements(line)
    if count and isinstance(line.get("sum"), int | float):
        yield line["sum"] / count


def _elements(line: Mapping[str, Any]) -> int | None:
    """Number of elements that a line's shape says; None where it has none."""
    shape = line.get("shape")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS:
        return None
    return math.prod(shape) if all(type(n) is int and 0 <= n < 2**40 for n in shape) else None
