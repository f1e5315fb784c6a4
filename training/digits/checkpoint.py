"""Save and restore training state so that a killed run continues as if nothing had happened."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

State = dict[str, object]


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that readers and crashes see the old content or the new, never a part.

    Args:
        path: Final location; its folder is created.
        write: Receives a temporary path beside `path` and writes the content there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_tensors(path: Path, state: object) -> None:
    """Save tensors and plain containers, readable with `weights_only=True`."""
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_tensors(path: Path) -> State:
    """Load what `save_tensors` wrote; nothing in the file can run code."""
    loaded: State = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


@dataclass
class Average:
    """Exponential moving average of parameters, with a short memory early on.

    Attributes:
        decay: Largest decay; step `n` uses `min(decay, (1 + n) / (10 + n))`, as TensorFlow's
            `ExponentialMovingAverage` does with `num_updates`.
        shadow: Averaged tensors by parameter name.
        updates: Number of updates so far.
    """

    decay: float
    shadow: dict[str, torch.Tensor] = field(default_factory=dict)
    updates: int = 0

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Move the average towards the module's parameters."""
        parameters = dict(module.named_parameters())
        if not self.shadow:
            self.shadow = {name: value.detach().clone() for name, value in parameters.items()}
        rate = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            [self.shadow[name] for name in parameters],
            [value.detach() for value in parameters.values()],
            rate,
        )
        self.updates += 1


@dataclass
class Run:
    """Everything that one training stage must keep to continue exactly.

    Attributes:
        module: The trained module.
        optimizer: Its optimizer.
        average: Its moving average.
        step: Number of finished steps.
        seconds: Training time spent so far, over all processes.
    """

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    average: Average
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically, with the state of every random generator."""
        numpy_state = np.random.get_state(legacy=False)
        assert isinstance(numpy_state, dict)
        save_tensors(
            path,
            {
                "module": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.shadow,
                "average_updates": self.average.updates,
                "step": self.step,
                "seconds": self.seconds,
                "torch_rng": torch.get_rng_state(),
                "numpy_rng": {
                    "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
                    "pos": int(numpy_state["state"]["pos"]),
                    "has_gauss": int(numpy_state["has_gauss"]),
                    "gauss": float(numpy_state["gauss"]),
                },
                "python_rng": _as_plain(random.getstate()),
            },
        )

    def resume(self, path: Path) -> bool:
        """Continue from a checkpoint.

        Args:
            path: Checkpoint written by `save`.

        Returns:
            Whether there was one.
        """
        if not path.exists():
            return False
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.shadow = state["average"]
        self.average.updates = state["average_updates"]
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["torch_rng"])
        numpy_state = state["numpy_rng"]
        np.random.set_state(
            (
                "MT19937",
                numpy_state["key"].numpy().astype(np.uint32),
                numpy_state["pos"],
                numpy_state["has_gauss"],
                numpy_state["gauss"],
            )
        )
        version, words, gauss = state["python_rng"]
        random.setstate((version, tuple(words), gauss))
        return True


@torch.no_grad()
def load_average(path: Path, module: torch.nn.Module) -> None:
    """Overwrite a module's parameters with the moving average of a checkpoint, finished or not."""
    average = torch.load(path, map_location="cpu", weights_only=True)["average"]
    for name, value in module.named_parameters():
        value.copy_(average[name])


def _as_plain(state: tuple[object, ...] | Mapping[str, object]) -> list[object]:
    version, words, gauss = state
    return [version, list(words), gauss]  # type: ignore[call-overload]
