# SPDX-License-Identifier: Apache-2.0
# long: one file on purpose, to be copied to where truestep cannot be installed
"""Make truestep recordings where truestep is not installed: needs torch >= 1.13 and nothing else.

    import recorder                                     # this file, anywhere on the path
    samples = [recorder.inputs(seed, x=(1, 16, 64), t=((1,), torch.int64)) for seed in range(3)]
    recorder.record(block, samples, "block.safetensors")            # calls block(x=..., t=...)
    with recorder.capture(model, path="trace.safetensors", select="blocks.*") as trace:
        trace.step(0, "cond")                                       # says what comes next
        model(latent, timestep)

Where truestep is, `truestep.check_function(port, "block.safetensors")` judges the port, and
`truestep compare other.safetensors trace.safetensors` two traces. For a program that is not to be
edited: `python recorder.py run --class NAME --output trace.safetensors -- script.py ARGUMENTS`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import fnmatch
import functools
import hashlib
import json
import math
import os
import platform
import re
import runpy
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

VERSION = "source"  # of the truestep that wrote this file
LEVELS = ("stats", "sketch", "full")  # 8 moments of a tensor; these and 1,024 floats; every bit
_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy")
_DTYPES = {"bool": "BOOL", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
for _bits in (8, 16, 32, 64):
    _DTYPES.update(
        {f"{kind}{_bits}": f"{kind[0].upper()}{_bits}" for kind in ("int", "uint", "float")}
    )
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARALLEL = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
_CONTROL, _FQN, _KEY = (re.compile(rf"[{chars}\x00-\x1f\x7f]") for chars in ("", "/#%", "./#%"))

Function = Callable[..., Any]
Tensors = Mapping[str, torch.Tensor]


def inputs(seed: int, **wanted: Any) -> dict[str, torch.Tensor]:
    """Make the same inputs on every machine, from a CPU generator.

    Args:
        seed: Of all inputs; each depends on its own name too, and not on the others.
        wanted: Name to shape (float32) or (shape, dtype). Floating point is standard normal,
            integers are 0 to 99, booleans either.
    """
    made = {}
    for name, spec in wanted.items():
        typed = len(spec) == 2 and isinstance(spec[1], torch.dtype)
        shape, dtype = spec if typed else (spec, torch.float32)
        own = torch.Generator("cpu").manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        made[name] = torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
        if dtype.is_floating_point:
            made[name] = made[name].normal_(generator=own).to(dtype)
        else:
            high = 2 if dtype is torch.bool else 100
            made[name] = made[name].random_(0, high, generator=own).to(dtype)
    return made


def record(
    function: Function, samples: Sequence[Tensors], path: str | Path, *, floor: bool = True
) -> None:
    """Call a trusted function on every sample and write inputs, outputs and its noise floor.

    Args:
        function: Called without gradients, with a sample's tensors by name. A single tensor that it
            returns is `out`; in a nest the name is the way to it (`out.1`, `hidden`, `states.0`).
        samples: One or more mappings from input name to tensor, all with the same names.
        path: The file.
        floor: Also measure how far the function is from itself under harmless changes.
    """
    if not samples or any(set(sample) != set(samples[0]) for sample in samples):
        raise ValueError("needed: at least one sample, all with the same input names")
    store = _Store("full")
    outputs = [_call(function, sample, store.note) for sample in samples]
    for index, sample in enumerate(samples):
        for kind, tensors in (("input", sample), ("output", outputs[index])):
            for name, value in tensors.items():
                store.put(f"sample/{index:04d}/{kind}/{name}", value, kind)
    runs = _benign_runs(function, samples, outputs, store.note) if floor else None
    own = function.parameters() if isinstance(function, torch.nn.Module) else ()
    device = next((tensor.device for tensor in (*own, *samples[0].values())), "cpu")
    store.write(path, device, forwards=len(samples), runs=runs)


def _call(function: Function, sample: Tensors, note: Function) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        result = function(**{name: value.clone() for name, value in sample.items()})
    named = isinstance(result, Mapping) or dataclasses.is_dataclass(result)
    found = {}
    for path, value in _leaves(result, () if named else ("out",)):
        if isinstance(value, (bool, int, float)) or hasattr(value, "__array__"):
            found[_CONTROL.sub("_", ".".join(path))] = _copy(torch.as_tensor(value))
        else:
            note(f"values of type {type(value).__name__} are not recorded")
    if not found:
        raise ValueError(f"the function returned {type(result).__name__}, which holds no tensor")
    return found


def _benign_runs(
    function: Function, samples: Sequence[Tensors], recorded: Sequence[Tensors], note: Function
) -> list[dict[str, Any]]:
    """The function again, on other threads, and with its inputs rounded once more."""
    before = torch.get_num_threads()
    plans = [("repeat", "the same call again", before, -1)]
    others = sorted({1, min(2, os.cpu_count() or 1)} - {before})
    plans += [("threads", f"{before} -> {other} threads", other, -1) for other in others]
    plans += [("jitter", f"one rounding on the inputs, seed {i}", before, i) for i in range(3)]
    floats = (t.dtype for outputs in recorded for t in outputs.values() if t.is_floating_point())
    dtype, runs = str(next(floats, torch.float32))[6:], []
    for kind, detail, threads, seed in plans:
        torch.set_num_threads(threads)
        dice, rows = (torch.Generator("cpu").manual_seed(seed) if seed >= 0 else None), []
        try:
            for index, sample in enumerate(samples):
                moved = {k: _rounded(v, dice) if dice else v for k, v in sample.items()}
                made = _call(function, moved, lambda text: None)
                place = f"sample/{index:04d}/output/"
                rows += [_distance(place + k, made[k], v) for k, v in recorded[index].items()]
        except Exception as error:  # what a function cannot do is no benign change of it
            note(f"noise floor without {kind} ({detail}): {type(error).__name__}")
            continue
        finally:
            torch.set_num_threads(before)
        if kind == "repeat":
            _refuse_unsteady(rows, dtype)
        runs.append({"kind": kind, "detail": detail, "pair": f"{dtype}/{dtype}", "tensors": rows})
    return runs


def _refuse_unsteady(rows: Sequence[dict[str, Any]], dtype: str) -> None:
    """Raise where a second call gave something that no rounding explains."""
    limit = 4 * (epsilon := torch.finfo(getattr(torch, dtype)).eps) * (32 if epsilon < 1e-6 else 1)
    for row in rows:
        if float(row["rel_l2"]) > limit:
            raise ValueError(
                f"the function differs from itself when it is called again: {row['name']}, rel_l2 "
                f"{float(row['rel_l2']):.1e}. Dropout that is on, unseeded random numbers or state "
                "between calls do this; a reference of it could judge nothing"
            )


def _rounded(tensor: torch.Tensor, dice: torch.Generator) -> torch.Tensor:
    """One element in twelve moved to a neighbouring number: the variance of one rounding."""
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return tensor
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(kind)
    draw = torch.empty(bits.shape, dtype=torch.int8, device="cpu").random_(0, 24, generator=dice)
    move = ((draw == 0).to(bits.dtype) - (draw == 1).to(bits.dtype)).to(bits.device)
    return torch.where(tensor == 0, tensor, (bits + move).view(tensor.dtype))


def _distance(name: str, actual: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    """Size and structure of a residual over the reference's rms, as truestep measures them."""
    if actual.shape != reference.shape:
        raise ValueError("other shapes")
    r, e = reference.to(torch.float64), actual.to(torch.float64) - reference.to(torch.float64)
    fine = torch.isfinite(r) & torch.isfinite(e)
    count = max(int(fine.sum()), 1)
    r, e = (torch.where(fine, x, torch.zeros_like(x)) for x in (r, e))
    rms, size = (float(x.norm()) / math.sqrt(count) for x in (r, e))
    e /= rms or 1.0
    found: dict[str, float] = {}
    if rms and size and bool(fine.all()):
        gain = float((e * r).sum()) / count / rms
        found = {"gain": gain, "correlation": gain * rms / size}
        layout = {5: "-cfr-", 4: "-cr-", 3: "-tc", 2: "tc"}.get(e.dim(), "")
        for axis, kind in enumerate(layout):
            others = [other for other in range(e.dim()) if other != axis]
            if kind == "c" and e.shape[axis] > 1:
                found["channel_mean"] = float(e.mean(others).abs().max())
                found["token_energy"] = math.sqrt(float((e * e).mean(axis).max()))
            elif kind in "fr" and e.shape[axis] > 1:
                key = "frame_energy" if kind == "f" else "row_energy"
                found[key] = math.sqrt(float((e * e).mean(others).max()))
        flat = torch.stack([(e * rms).reshape(-1), r.reshape(-1)])
        if flat.shape[1] > 16384:
            at = torch.randint(flat.shape[1], (16384,), generator=torch.Generator().manual_seed(0))
            flat = flat[:, at.to(flat.device)]
        small = flat[:, flat[1].abs() <= flat[1][flat[1] != 0].abs().median()]
        found["bulk"] = float(small[0].norm() / small[1].norm())
    rel_l2 = size / rms if rms else "inf" if size else 0.0 if bool(fine.any()) else "nan"
    largest = float(e.abs().max()) if e.numel() else 0.0
    return {"name": name, "rel_l2": rel_l2, "max_abs": largest, "structure": found}


class capture:  # noqa: N801 (read as a function: `with capture(...) as trace`)
    """Record what modules return (and are given) while a block of code runs.

    Tensors are named `module/<name>/<step>/<branch>/out.<path>`; the module itself is `(root)`, a
    second call within a step has `#1` after the name. Until `step` is called, each call of the
    module itself is one step. The file is written when the block ends without an exception.

    Args:
        module: What is called inside the block.
        path: The file.
        select: Names of modules inside it, with `*` (dots too) and `?`; several with commas, after
            `!` not these.
        inputs: Also keep what modules are given, as `in.<path>`.
        level: One of `LEVELS`.

    Raises:
        ValueError: A pattern fits no module, or there is no such level.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        path: str | Path,
        select: str = "*",
        inputs: bool = False,
        level: str = "full",
    ) -> None:
        self.store = _Store(level)
        names = _named(module, self.store.note)
        globs = [part.strip() for part in select.split(",")]
        hits = {}
        for glob in globs:
            hits[glob] = {n for n in names if fnmatch.fnmatchcase(n, glob.lstrip("!"))}
            if not hits[glob]:
                near = difflib.get_close_matches(glob.strip("*.?!"), names, n=3, cutoff=0.0)
                raise ValueError(f"no module fits {glob!r}; the closest are {', '.join(near)}")
        wanted = [hits[glob] for glob in globs if glob[:1] != "!"] or [set(names)]
        left = [hits[glob] for glob in globs if glob[:1] == "!"]
        taken = set.union(*wanted).difference(*left)
        self.chosen = {name: module for name, module in names.items() if name in taken}
        self.module, self.path, self.inputs = module, path, inputs
        self.forwards, self.index, self.branch, self.told = 0, 0, "main", False
        self.calls: dict[tuple[Any, ...], int] = {}

    def step(self, index: int, branch: str = "main") -> None:
        """Say which step and guidance branch the next calls belong to."""
        if index < 0 or not re.fullmatch(r"[^/\x00-\x1f\x7f]+", branch):
            raise ValueError(f"a step is 0 or more, a branch one plain word: {index}, {branch!r}")
        self.index, self.branch, self.told = int(index), branch, True

    def __enter__(self) -> capture:
        with contextlib.ExitStack() as hooks:  # all of them, or none
            hooks.callback(self.module.register_forward_pre_hook(self._begin).remove)
            for name, module in self.chosen.items():
                self._hook(name, module, hooks)
            self.hooks = hooks.pop_all()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.hooks.close()
        if kind is not None:
            return
        if not self.store.table:
            raise ValueError("nothing was recorded: no selected module returned a tensor")
        device = next((p.device for p in self.module.parameters()), "cpu")
        self.store.write(self.path, device, forwards=self.forwards)

    def _begin(self, *_: object) -> None:
        self.index = self.index if self.told else self.forwards
        self.forwards += 1

    def _hook(self, name: str, module: torch.nn.Module, hooks: contextlib.ExitStack) -> None:
        def before(_: object, args: Any, kwargs: Any = None) -> None:
            self._keep(name, "in", {**dict(enumerate(args)), **(kwargs or {})})

        def after(_: object, args: object, output: Any) -> None:
            self._keep(name, "out", output)

        if self.inputs:
            try:
                handle = module.register_forward_pre_hook(before, with_kwargs=True)
            except TypeError:  # torch before 2.0
                handle = module.register_forward_pre_hook(before)
                self.store.note("keyword arguments are not recorded with torch before 2.0")
            hooks.callback(handle.remove)
        hooks.callback(module.register_forward_hook(after).remove)

    def _keep(self, name: str, side: str, value: Any) -> None:
        place = (name, side, self.index, self.branch)
        call = self.calls[place] = self.calls.get(place, -1) + 1
        fqn, again = (f"{name}#{call}", {"call": call}) if call else (name, {})
        where = {"step": self.index, "branch": self.branch, "fqn": name, **again}
        for path, leaf in _leaves(value, (side,)):
            if isinstance(leaf, torch.Tensor):
                parts = [_KEY.sub(_escaped, part) for part in path]
                slot = ".".join(parts if len(parts) > 1 else (side, "0"))
                full = f"module/{fqn}/{self.index}/{self.branch}/{slot}"
                self.store.put(full, leaf, "module", **where)
            elif not isinstance(leaf, (bool, int, float, str)):
                self.store.note(f"values of type {type(leaf).__name__} are not recorded")


def _named(root: torch.nn.Module, note: Function) -> dict[str, torch.nn.Module]:
    """Modules by name, without the names of wrappers; of a wrapper and its inside, the wrapper."""
    found: dict[str, torch.nn.Module] = {}
    seen: set[int] = set()

    def walk(module: torch.nn.Module, name: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found.setdefault(name or "(root)", module)
        kind = type(module).__name__
        if kind == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            note(f"{name or '(root)'} is compiled: modules inside it are not recorded")
            return
        for part, child in module.named_children():
            wraps = part in _WRAPPERS or (part == "module" and kind in _PARALLEL)
            walk(child, name if wraps else f"{name}.{_FQN.sub(_escaped, part)}".lstrip("."))

    walk(root, "")
    return found


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What is in a nest of tuples, lists, mappings and dataclasses, with the way to it."""
    items: Any
    if isinstance(value, Mapping):
        items = value.items()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, (list, tuple)):
        fields = getattr(value, "_fields", None)  # of a namedtuple
        items = [(name, getattr(value, name)) for name in fields] if fields else enumerate(value)
    else:
        if value is not None:
            yield path, value
        return
    for key, item in items:
        yield from _leaves(item, (*path, str(key)))


def _escaped(match: Any) -> str:
    return f"%{ord(match.group()):02X}"


class _Store:
    """Tensors on their way into a file, each with its row of the manifest's table."""

    def __init__(self, level: str) -> None:
        if level not in LEVELS:
            raise ValueError(f"level {level!r} is none of {', '.join(LEVELS)}")
        self.level = level
        self.table: dict[str, dict[str, Any]] = {}
        self.stored: dict[str, torch.Tensor] = {}
        self.notes: dict[str, None] = {}

    def note(self, text: str) -> None:
        """Say what is left out, once, here and in the file."""
        if text not in self.notes:
            print(f"recorder: {text}", file=sys.stderr)
        self.notes[text] = None

    def put(self, name: str, value: torch.Tensor, kind: str, **place: Any) -> None:
        """Keep a copy, or what stands for it; `place` is its step, branch, fqn and call."""
        if value.is_complex():
            self.note("complex tensors are recorded as pairs of real numbers")
            value = torch.view_as_real(value.detach().resolve_conj())
        dtype = str(value.dtype)[6:]
        if dtype not in _DTYPES or value.layout is not torch.strided or value.is_meta:
            self.note(f"tensors like {value.layout} {dtype} on {value.device} are not recorded")
            return
        while name in self.table:  # keys 1 and "1" of one mapping
            name += "'"
        row = {"name": name, "kind": kind, "order": len(self.table), "dtype": dtype}
        self.table[name] = {**row, **place, "shape": list(value.shape)}
        host = _copy(value)
        for key, keep in {"stats": _moments, "sketch": _sketch}.items():
            if self.level in (key, "sketch"):
                self.stored[f"{key}/{name}"] = keep(host.reshape(-1))
        if self.level == "full":
            self.stored[name] = host

    def write(self, target: str | Path, device: object, *, forwards: int, runs: Any = None) -> None:
        """A temporary file beside it, flushed and renamed: there is never half a recording."""
        path, header, position = Path(target), {}, 0
        order = sorted(self.stored, key=lambda name: -self.stored[name].element_size())  # aligned
        for name in order:
            tensor, begin = self.stored[name], position
            position += tensor.numel() * tensor.element_size()
            dtype, shape = _DTYPES[str(tensor.dtype)[6:]], list(tensor.shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, position]}
        for name, row in self.table.items():
            row["digest"] = _digest(self.stored[name if self.level == "full" else f"stats/{name}"])
            if self.level == "sketch":
                row["sketch_digest"] = _digest(self.stored[f"sketch/{name}"])
        manifest = {
            "format_version": 1,
            "tool_version": f"{VERSION} (recorder.py)",
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "level": self.level,
            "environment": _environment(torch.device(str(device))),
            "tensors": list(self.table.values()),
            "forwards": forwards,
            "noise_floor": None if runs is None else {"runs": runs},
            "notes": list(self.notes),
        }
        text = json.dumps(manifest, allow_nan=False)
        ours = {"truestep": text, "truestep_digest": _digest(text.encode())}
        head = json.dumps({"__metadata__": ours, **header}).encode()
        head += b" " * (-len(head) % 8)
        if len(head) > 100_000_000:  # the limit of the format: no reader would take it
            raise ValueError(f"{len(order):,} tensors in one file: record fewer modules or steps")
        path.parent.mkdir(parents=True, exist_ok=True)
        mark = f".{path.name}.{platform.node()}."
        for left in path.parent.glob("*.tmp") if Path("/proc/self").exists() else ():
            pid = left.name[len(mark) : -4]
            if left.name.startswith(mark) and not Path("/proc", pid).exists():
                left.unlink()  # its writer was killed
        temporary = path.with_name(f"{mark}{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(struct.pack("<Q", len(head)) + head)
                file.writelines(_bytes(self.stored[name]) for name in order)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous host tensor, without numpy. It must outlive the view."""
    size = tensor.numel() * tensor.element_size()
    memory = (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""
    return memoryview(memory).cast("B")


def _digest(data: Any) -> str:
    data = _bytes(data) if isinstance(data, torch.Tensor) else data
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text("utf-8"))
        name = found.group(1) if found else platform.machine()
    values = {
        "attention.kernel": "unknown",
        "device.class": re.sub(r"[^a-z0-9]+", "-", name.lower()) if device.type != "cpu" else "cpu",
        "device.name": name,
        "machine.platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch.deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "torch.matmul_precision": torch.get_float32_matmul_precision(),
        "torch.threads": str(torch.get_num_threads()),
    }
    return {**values, **library_versions()}


def library_versions() -> dict[str, str]:
    """`library.torch` and so on to what is installed."""
    values = {}
    for library in _LIBRARIES:
        try:
            values[f"library.{library}"] = metadata.version(library)
        except metadata.PackageNotFoundError:
            values[f"library.{library}"] = "(not installed)"
    return values


def _moments(flat: torch.Tensor) -> torch.Tensor:
    """count, nonfinite, mean, abs_mean, std, rms, min, max; non-finite values left out."""
    count, sums, low, high = 0, [0.0, 0.0, 0.0], math.inf, -math.inf
    for start in range(0, flat.numel(), 1 << 20):
        chunk = flat[start : start + (1 << 20)].to(torch.float64)
        fine = chunk[torch.isfinite(chunk)]
        if fine.numel():
            count += fine.numel()
            for i, part in enumerate((fine.sum(), fine.abs().sum(), torch.dot(fine, fine))):
                sums[i] += float(part)
            low, high = min(low, float(fine.min())), max(high, float(fine.max()))
    values = [math.nan] * 6
    if count:
        mean, size, power = (part / count for part in sums)
        variance = max(power - mean * mean, 0.0) if low < high else 0.0
        values = [mean, size, variance**0.5, power**0.5, low, high]
    found = [count, flat.numel() - count, *values]
    return torch.tensor(found, dtype=torch.float64, device="cpu")


def _sketch(flat: torch.Tensor) -> torch.Tensor:
    """Project to 16,384 sums, and these to 1,024 floats; truestep's sketch.py has the reasons."""
    count, chunk, width = flat.numel(), 16_384, 16_384
    signs, places = _tables()
    starts = [[0, 0, 1]]  # for each chunk: slice of the signs, shift of the sums, sign
    if count > chunk:
        dice = _hash(2, -(-count // chunk))
        number = torch.arange(len(dice), device="cpu")
        first = _shift(dice, 32)[number // 4 * 4] % (len(signs) - 4 * chunk)  # of four chunks
        parts = (first + number % 4 * chunk, _shift(dice, 8) % width)
        starts = torch.stack((*parts, (dice & 1) * 2 - 1), dim=1).tolist()
    elif count > 1024:
        width = 256 << (-(-count // 256) - 1).bit_length()
    sums = torch.zeros(width + chunk, dtype=torch.float64, device="cpu")
    for index, (start, shift, flip) in enumerate(starts):
        part = flat[index * chunk : (index + 1) * chunk].to(torch.float64, copy=True)
        part.nan_to_num_(0.0, 0.0, 0.0)
        if count <= 1024:
            sums[:count] = part
            return sums[:1024].to(torch.float32)
        size = part.numel()
        sums[shift : shift + size].addcmul_(part, signs[start : start + size], value=flip)
    if count > chunk:
        sums[:chunk] += sums[width:]  # shifts wrap around
    signed = torch.stack((sums[:width], -sums[:width]), dim=1).reshape(-1)
    rows = signed[places[: width * 4]].reshape(-1, 1024)
    while len(rows) > 1:
        rows = rows[: len(rows) // 2] + rows[len(rows) // 2 :]
    return (rows[0] / 2).to(torch.float32)


@functools.lru_cache(None)
def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    bit, lane, lowest = torch.arange(64, device="cpu"), torch.arange(256, device="cpu"), -(1 << 63)
    signs = ((_hash(0, 4096)[:, None] >> bit) & 1).reshape(-1).to(torch.float64) * 2 - 1
    keys = (_hash(1, 16_384 * 4).reshape(64, 4, 256) & -256) | lane
    keys = (keys ^ lowest).sort(-1).values ^ lowest  # in the order of unsigned numbers
    rows = torch.arange(64, device="cpu")[:, None, None] * 256
    return signs, (2 * (rows + (keys & 255)) + ((keys >> 20) & 1)).reshape(-1)


def _hash(stream: int, count: int) -> torch.Tensor:
    """SplitMix64, in signed numbers that wrap around."""
    state = torch.arange(1, count + 1, device="cpu") + (stream << 40)
    state = state * (0x9E3779B97F4A7C15 - (1 << 64))
    state = (state ^ _shift(state, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    state = (state ^ _shift(state, 27)) * (0x94D049BB133111EB - (1 << 64))
    return state ^ _shift(state, 31)


def _shift(state: torch.Tensor, bits: int) -> torch.Tensor:
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a program and trace the first module of a class that it calls."""
    parser = argparse.ArgumentParser(description="Make truestep recordings without truestep.")
    run = parser.add_subparsers(dest="verb", required=True).add_parser(
        "run", help="trace a program: recorder.py run --class NAME --output FILE -- script.py ..."
    )
    run.add_argument("--class", dest="kind", required=True, help="class of the module to trace")
    run.add_argument("--output", dest="path", required=True, help="the recording (safetensors)")
    run.add_argument("--select", default="*", help="modules inside it, e.g. 'blocks.*'")
    run.add_argument("--level", default="full", choices=LEVELS, help="what is kept of a tensor")
    run.add_argument("--inputs", action="store_true", help="also keep what modules are given")
    run.add_argument("program", nargs=argparse.REMAINDER, help="-- script.py and its arguments")
    options = parser.parse_args(arguments)
    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    if not program:
        run.error("give a program to run after --")
    wanted = {key: getattr(options, key) for key in ("path", "select", "inputs", "level")}
    seen: dict[str, None] = {}
    module: Any = torch.nn.Module
    original = module.__call__
    with contextlib.ExitStack() as stack:

        def called(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen[type(self).__name__] = None
            if type(self).__name__ == options.kind:
                module.__call__ = original
                stack.enter_context(capture(self, **wanted))
            return original(self, *args, **kwargs)

        stack.callback(setattr, module, "__call__", original)
        module.__call__ = called
        sys.argv[:] = program
        sys.path.insert(0, str(Path(program[0]).resolve().parent))
        try:
            runpy.run_path(program[0], run_name="__main__")
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise
    if options.kind not in seen:
        near = difflib.get_close_matches(options.kind, seen, n=5, cutoff=0.3) or [*seen][:5]
        run.error(f"no {options.kind} was called; the closest are {', '.join(near) or '(none)'}")
    print(f"recorder: wrote {options.path}", file=sys.stderr)


if __name__ == "__main__":
    main()
