"""Calls of a generation on their way to disk: a file each, complete or not there.

A generation's folder `OUTPUT.PID-NUMBER.calls` holds `head.json` (who writes), `000012.safetensors`
for its twelfth call (tensors by their content, each once a generation; the call itself as JSON in
the metadata), `000012-000345.tensors` (more of its tensors) and, once it is over, `ended.json`. A
process that is killed leaves all calls that ended. Nothing here needs more than torch and
safetensors: engines have environments of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from truestep.calls.values import dropped, encode, in_real_numbers
from truestep.measure.plain import plain
from truestep.standalone.recorder import library_versions

SUFFIX = ".calls"
HEAD, ENDED, CALL = "head.json", "ended.json", "call"
TENSORS = ".tensors"
"""Suffix of files that hold tensors of a call before it has ended."""

AT_ONCE = 256 << 20
"""Bytes of tensors that wait for their call to end; more are written before."""

NOTED = "noted"
"""Calls without tensors that are written with another."""

FORMAT = 1


class CallSpool:
    """The folder of one generation in one process.

    Args:
        output: The recording that will be made of it.
        number: Of the generation in this process.
        head: What is known of it from the start.
        largest: Bytes of a tensor above which only its shape is kept.
    """

    def __init__(self, output: Path, number: int, head: dict[str, Any], *, largest: int) -> None:
        self.folder = output.with_name(f"{output.name}.{os.getpid()}-{number}{SUFFIX}")
        self.folder.mkdir(parents=True)
        self.calls = 0
        self._largest = largest
        self._known: set[str] = set()
        self._new: dict[str, torch.Tensor] = {}
        self._inside = 0
        self._room: int | None = None
        self._left: dict[str, tuple[tuple[int, ...], str]] = {}
        self._noted: list[dict[str, Any]] = []
        self._whole = True
        started = {"format": FORMAT, "started": time.time(), "pid": os.getpid(), **head}
        self._json(HEAD, started)

    def keep(self, value: Any, *, whole: bool = True) -> Any:
        """A value as a tree, its tensors copied to be written with the call, or their shapes."""
        self._whole = whole
        try:
            tree = encode(value, self._keep)
        finally:
            self._whole = True
        if not self._left:
            return tree
        left, self._left = self._left, {}
        return dropped(tree, lambda _, name: name in left, left.__getitem__)

    def keep_within(self, value: Any, limit: int) -> tuple[Any, int]:
        """A value as a tree, of its tensors those with which all that is so kept is not larger.

        Returns:
            The tree, and how many tensors were left out.
        """
        self._room = limit
        try:
            tree = encode(value, self._keep)
        finally:
            self._room = None
        left, self._left = self._left, {}
        if left:
            tree = dropped(tree, lambda _, name: name in left, left.__getitem__)
        if sum(t.numel() * t.element_size() for t in self._new.values()) > AT_ONCE:
            self._write(self.folder / f"{self.calls:06d}-{len(self._known):06d}{TENSORS}", {})
        return tree, len(left)

    def add(self, call: dict[str, Any]) -> None:
        """Write one call, and the tensors that no call before it had."""
        path = self.folder / f"{self.calls:06d}.safetensors"
        self.calls += 1
        if self._noted:
            call = {**call, NOTED: self._noted}
            self._noted = []
        self._write(path, {CALL: json.dumps(call)})

    def _write(self, path: Path, metadata: dict[str, str]) -> None:
        from safetensors.torch import save_file

        new, self._new = self._new, {}
        temporary = path.with_suffix(".part")
        save_file(new, temporary, metadata=metadata)
        os.replace(temporary, path)

    def note(self, call: dict[str, Any]) -> None:
        """Write a call that holds no tensors with the next one, or at the end."""
        self._noted.append(call)

    def end(self, injected: Mapping[str, int]) -> None:
        """Say that the generation is over, and how often what was given to it."""
        ended = {"ended": time.time(), "calls": self.calls, "rank": rank(), "ranks": ranks()}
        self._json(ENDED, {**ended, "injected": dict(injected), NOTED: self._noted})

    def _keep(self, _: tuple[str, ...], value: torch.Tensor) -> str:
        tensor = plain(value).detach()
        size = tensor.numel() * tensor.element_size()
        full = self._room is not None and self._inside + size > self._room
        if not self._whole or size > self._largest or full:
            name = f"left out {len(self._left)}"
            self._left[name] = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            return name
        numbers = in_real_numbers(tensor)  # a copy in C order: expanded ones are in none
        copy = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu").copy_(numbers)
        name = _content(copy)
        if name not in self._known:
            self._known.add(name)
            self._new[name] = copy
            self._inside += 0 if self._room is None else size
        return name

    def _json(self, name: str, content: dict[str, Any]) -> None:
        temporary = self.folder / f"{name}.part"
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, self.folder / name)


def _content(tensor: torch.Tensor) -> str:
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    shape = "x".join(map(str, tensor.shape))
    return f"{str(tensor.dtype)[6:]}.{shape}.{hashlib.blake2b(data, digest_size=16).hexdigest()}"


def rank() -> int | None:
    """Rank of this process among those of its group, as it is now; None where there is one."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank()) if distributed.get_world_size() > 1 else None
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    own = os.environ.get("RANK", "")
    return int(own) if several and own.isdecimal() else None


def ranks() -> int:
    """How many processes are in the group of this one, as it is now; 1 where there is none."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_world_size())
    several = os.environ.get("WORLD_SIZE", "")
    return int(several) if several.isdecimal() and rank() is not None else 1


def environment() -> dict[str, str]:
    """What the process runs with, as far as it can be told without more libraries."""
    cuda = torch.cuda.is_available()
    values = {
        "device.class": "cuda" if cuda else "cpu",
        "device.name": torch.cuda.get_device_name() if cuda else platform.machine(),
        "machine.platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch.matmul_precision": torch.get_float32_matmul_precision(),
        "torch.threads": str(torch.get_num_threads()),
    }
    return {**values, **library_versions()}
