"""One side of a parity case: what its loader returned, its parameters, its outputs' hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from truestep.errors import UsageError
from truestep.nests import flatten
from truestep.parity.component import Loaded
from truestep.parity.missing import variable_prefix
from truestep.recording.format import Recording

Tensors = Mapping[str, torch.Tensor]
PLACES = ("OFFICIAL_REF_DIR", "LOCAL_WEIGHTS_DIR", "CONVERTED_WEIGHTS_DIR")


def loaded(value: Any) -> Loaded | Recording:
    """What a loader returned, as one side."""
    if isinstance(value, (Loaded, Recording)):
        return value
    if isinstance(value, (str, Path)):
        return Recording.open(value)
    if callable(value):
        return Loaded(value)
    raise UsageError(
        f"a loader returned {type(value).__name__}",
        hint="return a module, a function, Loaded(...), or a truestep recording",
    )


def module_of(side: Loaded | Recording | None) -> torch.nn.Module | None:
    """The torch module of a side, if it has one."""
    if not isinstance(side, Loaded):
        return None
    return side.call if isinstance(side.call, torch.nn.Module) else side.module


def state_of_side(side: Loaded | Recording | None) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a side by name; empty where none are known."""
    module = module_of(side)
    if module is not None:
        return dict(module.state_dict())
    return dict(side.state or {}) if isinstance(side, Loaded) else {}


def named_places(family: str) -> dict[str, Path]:
    """Folders of a family that are set in the environment, by their variable."""
    found = {}
    for part in PLACES:
        name = f"{variable_prefix(family)}_{part}"
        if os.environ.get(name):
            found[name] = Path(os.environ[name]).expanduser()
    return found


def hashable(output: Any) -> dict[str, torch.Tensor]:
    """An output as named tensors; a file as its bytes."""
    if isinstance(output, (str, Path)):
        data = bytearray(Path(output).read_bytes())
        return {"file": torch.frombuffer(data, dtype=torch.uint8)}
    return flatten(output)


def content_hash(tensors: Tensors) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(bits(tensor).numpy().tobytes())
    return digest.hexdigest()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes."""
    if not tensor.numel():
        return tensor
    kept = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return kept.reshape(-1).view(torch.uint8)
