"""Give an engine the noise, text and schedule of a reference in the place of its own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from truestep.engines.engine import Boundary

NOISE, SIGMAS, TIMESTEPS = "noise", "sigmas", "timesteps"
TEXTS = ("text/cond", "text/uncond")
"""Names in the file; an engine encodes the prompt first, then the negative one."""


INDEX = "index.json"


def write(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write what is given, for processes that may have nothing but torch.

    Args:
        folder: Is there, and empty.
        tensors: Of `noise`, `text/cond`, `text/uncond`, `sigmas`, `timesteps` as many as there are.
    """
    index = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        (folder / f"{number}.bin").write_bytes(flat.view(torch.uint8).numpy().tobytes())
        index[name] = {
            "file": f"{number}.bin",
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
        }
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def _read(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name, entry in json.loads((folder / INDEX).read_text(encoding="utf-8")).items():
        data = bytearray((folder / entry["file"]).read_bytes())
        dtype = getattr(torch, entry["dtype"])
        found[name] = torch.frombuffer(data, dtype=dtype).reshape(entry["shape"])
    return found


class Injection:
    """What is given, and how often it was.

    Args:
        folder: See `write`.
    """

    def __init__(self, folder: Path) -> None:
        self._tensors = _read(folder)
        self.used: Counter[str] = Counter()

    def watch_noise(self) -> Callable[[], None]:
        """Answer `torch.randn` in the latent's shape; returns what undoes it."""
        original, noise = torch.randn, self._tensors.get(NOISE)

        def randn(*size: Any, **options: Any) -> torch.Tensor:
            own: torch.Tensor = original(*size, **options)
            if noise is None or self.used[NOISE] or _bare(own.shape) != _bare(noise.shape):
                return own
            self.used[NOISE] += 1
            given: torch.Tensor = noise.reshape(own.shape).to(own.device, own.dtype, copy=True)
            return given

        torch.randn = randn

        def undo() -> None:
            if torch.randn is randn:
                torch.randn = original

        return undo

    def begin(self) -> None:
        """A new generation is given everything again."""
        self.used.clear()

    def given(self, boundary: Boundary, output: Any) -> Any:
        """What a boundary returns instead of its own output."""
        if boundary.role == "noise" and NOISE in self._tensors and torch.is_tensor(output):
            noise = self._tensors[NOISE]
            if _bare(noise.shape) == _bare(output.shape):
                self.used[NOISE] += 1
                return noise.reshape(output.shape).to(output.device, output.dtype, copy=True)
        if boundary.role == "text":
            name = TEXTS[self.used["text"] % len(TEXTS)]
            if name in self._tensors:
                self.used["text"] += 1
                return _in_place_of(output, self._tensors[name])
        return output

    def schedule(self, scheduler: Any) -> None:
        """Set a scheduler's sigmas and timesteps, where it has as many steps."""
        sigmas, timesteps = self._tensors.get(SIGMAS), self._tensors.get(TIMESTEPS)
        own = getattr(scheduler, TIMESTEPS, None)
        if timesteps is None or not torch.is_tensor(own) or len(own) != len(timesteps):
            return
        scale = 1.0 if not len(own) or float(own.abs().max()) > 2.0 else 1e-3
        scheduler.timesteps = (timesteps.double() * scale).to(own.device, own.dtype)
        held = getattr(scheduler, SIGMAS, None)
        if sigmas is not None and torch.is_tensor(held) and len(held) <= len(sigmas):
            scheduler.sigmas = sigmas[: len(held)].to(held.device, held.dtype)
        self.used["schedule"] += 1


def _bare(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _in_place_of(output: Any, text: torch.Tensor) -> Any:
    """Text embeddings in the nest, rank, dtype and padding of an engine's own."""
    if isinstance(output, list | tuple):
        return type(output)(
            _in_place_of(part, text) if index == 0 else part for index, part in enumerate(output)
        )
    if not torch.is_tensor(output):
        return output
    while text.ndim > output.ndim:
        text = text[0]
    if text.ndim < output.ndim:
        text = text[(None,) * (output.ndim - text.ndim)]
    rows = text.shape[-2]
    if output.shape[-2] < rows:  # an engine that does not pad
        used = text.reshape(-1, *text.shape[-2:]).ne(0).any(dim=-1).any(dim=0).nonzero()
        text = text[..., : int(used.max()) + 1 if len(used) else 1, :]
    return text.to(output.device, output.dtype, copy=True)
