"""What made a recording: commits of the code, quantised weights and patched functions.

A reference made by other arithmetic than its name says is another reference. What is found here is
written into the recording; a check against one that is quantised or patched is `incomparable`
unless that is asked for by name.
"""

from __future__ import annotations

import functools
import inspect
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch

from truestep.reading import parse_json
from truestep.recording.manifest import Implementation
from truestep.runtime.pipeline import Pipeline, Stages, models_of

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that are not quantised."""

NARROW = tuple(
    dtype
    for name in ("float8_e5m2", "float8_e4m3fn")
    if (dtype := getattr(torch, name, None)) is not None
)
"""Dtypes through which weights are cast to save memory, and back again; the coarser first, whose
values the finer one has too."""

SAMPLE = 4096
"""Elements of a weight that are looked at."""

FEW = 64
"""Of them, those that are looked at first: of most weights these tell already."""

_LIBRARIES = ("truestep", "torch", "diffusers", "transformers")
_TRUSTED = ("torch", "diffusers", "transformers", "accelerate", "peft", "huggingface_hub")
"""Packages whose own wrappers around a method are no patch of it."""


def examine(pipe: Pipeline) -> Implementation:
    """Look at a pipeline's code and weights; nothing is run."""
    return Implementation(
        commits=commits(), quantised=tuple(quantised(pipe)), patched=tuple(patched(pipe))
    )


def commits() -> dict[str, str]:
    """Commits of the libraries that were installed from a repository (PEP 610)."""
    found = {}
    for name in _LIBRARIES:
        try:
            text = metadata.distribution(name).read_text("direct_url.json")
        except metadata.PackageNotFoundError:
            continue
        try:
            commit = parse_json(text or "{}")["vcs_info"]["commit_id"]
        except (ValueError, KeyError, TypeError):
            continue  # not installed from a repository
        found[name] = str(commit)
    return found


# --- quantised ---------------------------------------------------------------------------------


def quantised(pipe: Pipeline) -> Iterator[str]:
    """Models whose weights are stored, or were once rounded, in fewer bits than they seem."""
    for name, model in models_of(pipe).items():
        config = getattr(model, "config", None)
        if getattr(config, "quantization_config", None):
            yield f"{name}: quantised by its configuration"
        kinds = sorted({kind for kind in map(_storage, model.parameters()) if kind})
        yield from (f"{name}: weights in {kind}" for kind in kinds)
        weights = [p for p in model.parameters() if p.ndim > 1 and p.dtype in PLAIN]
        for narrow in NARROW:
            count = sum(rounded_to(weight.detach(), narrow) for weight in weights)
            if count:
                kind = str(narrow).removeprefix("torch.")
                yield f"{name}: values of {kind} in {count} of {len(weights)} weights"
                break


def _storage(parameter: torch.nn.Parameter) -> str:
    """Dtype or class of a weight that is not plain; empty for a plain one."""
    kind = type(parameter)
    if kind not in (torch.nn.Parameter, torch.Tensor):
        return kind.__name__
    return "" if parameter.dtype in PLAIN else str(parameter.dtype).removeprefix("torch.")


def rounded_to(weight: torch.Tensor, narrow: torch.dtype) -> bool:
    """Whether all values of a weight are ones of a narrower dtype, perhaps times one scale.

    Args:
        weight: Any floating-point shape; 4,096 elements, evenly spaced, are looked at.
        narrow: An 8-bit floating-point dtype.
    """
    step = max(weight.numel() // SAMPLE, 1)
    places = torch.arange(0, weight.numel(), step, device=weight.device)[:SAMPLE]
    some = weight.take(places)  # no view of it: a weight in a file would stay in memory
    few = some[:: max(some.numel() // FEW, 1)].cpu().double()
    top, slack = torch.finfo(narrow).max, torch.finfo(weight.dtype).eps

    def fits(values: torch.Tensor, scale: float) -> bool:
        scaled = values / scale
        near = scaled.to(torch.float32).to(narrow).double()
        return bool(((near - scaled).abs() <= slack * scaled.abs()).all())

    if not bool(few.isfinite().all()):
        return False
    largest = max(-float(weight.min()), float(weight.max()))  # without a copy of the weight
    scales = [scale for scale in (1.0, largest / top) if scale and fits(few, scale)]
    if not scales:
        return False
    values = some.cpu().double()
    if not bool(values.isfinite().all()) or values.unique().numel() < 16:
        return False  # zeros, ones: of any dtype
    return any(fits(values, scale) for scale in scales)


# --- patched -----------------------------------------------------------------------------------


def patched(pipe: Pipeline) -> Iterator[str]:
    """Functions that are not those of the class or library that they go by."""
    for field in fields(Stages):
        stage = getattr(pipe, field.name)
        if stage is not None and not _ours(stage):
            yield f"stage {field.name}: {_title(stage)}"
    seen: set[type] = set()
    for name, model in models_of(pipe).items():
        for fqn, module in model.named_modules():
            own = vars(module).get("forward")
            if own is not None and not hasattr(module, "_hf_hook") and not _ours(own):
                yield f"{name}.{fqn}.forward".replace("..", ".")
            for thing in (module, getattr(module, "processor", None)):
                for owner in type(thing).__mro__[:-1]:
                    if owner not in seen:
                        seen.add(owner)
                        yield from _patched_methods(owner)
    functional = torch.nn.functional
    for key, value in vars(functional).items():
        if isinstance(value, FunctionType) and not _of(value, (_root(torch), *_standard())):
            yield f"torch.nn.functional.{key}: {_title(value)}"


def _ours(function: Any) -> bool:
    """Whether truestep itself put a function where it is: a plan, a trace."""
    inner = function.func if isinstance(function, functools.partial) else function
    return str(getattr(inner, "__module__", "")).startswith("truestep.")


def _title(function: Any) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '?')}.{name}"


def _patched_methods(owner: type) -> Iterator[str]:
    home = sys.modules.get(owner.__module__)
    if home is None or getattr(home, "__file__", None) is None:
        return
    trusted = (_root(home), *_trusted(), *_standard())
    for key, value in vars(owner).items():
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if not isinstance(function, FunctionType) or _of(function, trusted):
            continue
        yield f"{owner.__module__}.{owner.__qualname__}.{key}"


def _of(function: FunctionType, roots: tuple[str, ...]) -> bool:
    """Whether a function and all that it wraps were written in files below some folders."""
    while True:
        file = function.__code__.co_filename
        if not file.startswith("<") and not file.startswith(roots):
            return False
        inner = inspect.getattr_static(function, "__wrapped__", None)
        if not isinstance(inner, FunctionType):
            return True
        function = inner


def _root(module: ModuleType) -> str:
    """Folder of a module's package; of a module on its own, its file."""
    package = sys.modules.get(module.__name__.partition(".")[0], module)
    file = getattr(package, "__file__", None) or getattr(module, "__file__", "") or ""
    return str(Path(file).parent) if Path(file).name == "__init__.py" else file


@functools.cache
def _trusted() -> tuple[str, ...]:
    found: Mapping[str, ModuleType] = sys.modules
    return tuple(_root(found[name]) for name in _TRUSTED if name in found)


@functools.cache
def _standard() -> tuple[str, ...]:
    """Folders of the standard library, without the packages installed beside it."""
    base = Path(sysconfig.get_path("stdlib"))
    packages = ("collections", "importlib")
    return (*map(str, base.glob("*.py")), *(str(base / name) for name in packages))
