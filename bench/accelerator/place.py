"""Where the bench runs, and how long: the device, its clock and memory, the time that is left."""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from truestep.environment import Environment


@dataclass(frozen=True)
class Here:
    """Where it runs.

    Attributes:
        device: As torch names it.
        real: Transformers have their real width; else everything is tiny.
    """

    device: str
    real: bool

    @property
    def is_cuda(self) -> bool:
        """Whether it is a CUDA device, whose kernels and memory can be asked for."""
        return torch.device(self.device).type == "cuda"

    def wait(self) -> None:
        """Return when the device has done all that it was given."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def answers(self) -> bool:
        """Whether the device does what it is told."""
        try:
            torch.ones(1, device=self.device).add_(1)
            self.wait()
        except RuntimeError:
            return False
        return True

    def clear(self) -> None:
        """Hold nothing that nobody uses, and forget peaks of memory."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


@dataclass
class Budget:
    """Seconds that something may take, and what was cut because they were over.

    Attributes:
        seconds: From now on.
        clock: Tells the time in seconds.
        cuts: What was left out, in words.
    """

    seconds: float
    clock: Callable[[], float] = time.monotonic
    cuts: list[str] = field(default_factory=list)
    _longest: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._until = self.clock() + self.seconds

    def left(self) -> float:
        """Seconds that are left."""
        return self._until - self.clock()

    def allows(self, what: str, kind: str = "", *, expected: float = 0.0) -> bool:
        """Whether there is time for one more of a kind: for the longest so far. Else it is cut.

        Args:
            what: What is cut, in words.
            kind: As in `spent`.
            expected: Seconds that the first of a kind may take.
        """
        if self.left() > self._longest.get(kind, expected):
            return True
        self.cuts.append(what)
        return False

    @contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Remember how long one of a kind takes."""
        start = self.clock()
        try:
            yield
        finally:
            self._longest[kind] = max(self._longest.get(kind, 0.0), self.clock() - start)

    def part(self, share: float) -> Budget:
        """A share of what is left; what it cuts, this one has cut."""
        return Budget(self.left() * share, self.clock, self.cuts, self._longest)


def environment(here: Here) -> dict[str, str]:
    """What decides about numbers and times on this machine."""
    found = dict(Environment.current(here.device))
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    found |= {
        "torch.cudnn_deterministic": str(cudnn.deterministic),
        "torch.cudnn_benchmark": str(cudnn.benchmark),
        "torch.cudnn_allow_tf32": str(cudnn.allow_tf32),
        "torch.matmul_allow_tf32": str(matmul.allow_tf32),
        "torch.bf16_reduced_sums": str(matmul.allow_bf16_reduced_precision_reduction),
        "torch.fp16_reduced_sums": str(matmul.allow_fp16_reduced_precision_reduction),
    }
    found.setdefault("variable.CUBLAS_WORKSPACE_CONFIG", "(not set)")
    if here.is_cuda:
        properties: Any = torch.cuda.get_device_properties(here.device)
        found["device.memory_mib"] = str(properties.total_memory // 2**20)
        found["device.driver"] = _driver()
    return found


def _driver() -> str:
    """Version of the driver; what is wrong where it does not say it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.split("\n")[0].strip()
    return "(nvidia-smi does not say)"


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else ''}"[:300]
