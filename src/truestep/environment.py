"""Fingerprint of the machine, the libraries and the kernels a run really used.

Importing this module imports no torch; `Environment.current` does.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from typing import Any

from truestep.content import mapping_differences
from truestep.errors import UsageError
from truestep.text import pasteable, short
from truestep.verdict import Difference

LIBRARIES = ("truestep", "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy")

WATCHED_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "DIFFUSERS_ATTN_BACKEND",
    "MKL_CBWR",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
"""Environment variables that change numbers without changing code."""

_KERNELS = (
    ("flash_attention_for_cpu", "flash-cpu"),
    ("flash_attention", "flash"),
    ("flash_attn", "flash"),
    ("efficient_attention", "efficient"),
    ("cudnn_attention", "cudnn"),
    ("sage", "sage"),
    ("flex_attention", "flex"),
    ("overrideable", "override"),
)
"""Operator name part to the short name of an attention kernel. Without a fused operator a softmax
means the unfused `math` path."""


class Environment(Mapping[str, str]):
    """Read-only mapping from a dotted key (`library.torch`, `device.name`) to a value."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(sorted(values.items()))

    def __getitem__(self, key: str) -> str:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        told = ", ".join(f"{key} {value}" for key, value in self._values.items())
        return short(f"Environment({len(self)} keys: {told})")

    @classmethod
    def current(cls, device: str | None = None, *, attention: str | None = None) -> Environment:
        """Fingerprint this process.

        Args:
            device: Where the model runs (`cpu`, `cuda:0`); None is CUDA where there is one.
            attention: Attention kernels that were seen running, if any were.
        """
        import torch

        target = torch.device(device or default_device())
        values = {
            "device.class": device_class(str(target)),
            "device.name": _device_name(target),
            "machine.cpu": _cpu_model(),
            "machine.cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "machine.platform": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "torch.deterministic": str(torch.are_deterministic_algorithms_enabled()),
            "torch.matmul_precision": torch.get_float32_matmul_precision(),
            "torch.threads": str(torch.get_num_threads()),
            "torch.blas": "mkl" if torch.backends.mkl.is_available() else "other",
        }
        if target.type == "cuda":
            values["device.capability"] = ".".join(
                str(part) for part in torch.cuda.get_device_capability(target)
            )
            values["torch.cuda"] = str(torch.version.cuda or torch.version.hip)
            values["torch.cudnn"] = str(torch.backends.cudnn.version())
            values["torch.allow_tf32"] = str(torch.backends.cuda.matmul.allow_tf32)
        if attention:
            values["attention.kernel"] = attention
        for library in LIBRARIES:
            version = library_version(library)
            values[f"library.{library}"] = version or "(not installed)"
        for name in WATCHED_VARIABLES:
            if name in os.environ:
                values[f"variable.{name}"] = os.environ[name]
        return cls(values)

    def differences(self, reference: Mapping[str, str]) -> tuple[Difference, ...]:
        """Keys whose value differs from the reference's environment, sorted."""
        return mapping_differences(self, reference)


@lru_cache
def library_version(name: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def default_device() -> str:
    """`cuda` where torch has one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(device: str | None) -> str:
    """A device that is there: the one asked for, or the default.

    Raises:
        UsageError: torch has no such device here.
    """
    import torch

    if device is None:
        return default_device()
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"device {device!r} cannot be used here",
            measured=str(error).strip().splitlines()[0],
            hint="--set device=cpu  # or a torch build for the device",
        ) from None
    return device


def device_class(device: str) -> str:
    """Folder name for a device: `cpu`, or a slug of the GPU's product name."""
    import torch

    target = torch.device(device)
    if target.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", _device_name(target).lower()).strip("-")


def _device_name(device: object) -> str:
    import torch

    target = torch.device(str(device))
    if target.type == "cuda":
        return torch.cuda.get_device_name(target)
    return _cpu_model() if target.type == "cpu" else target.type


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:  # not Linux: the generic name has to do
        pass
    return platform.processor() or platform.machine()


@contextmanager
def watch_attention() -> Iterator[Callable[[], str | None]]:
    """Observe which attention kernels the code inside really dispatches to.

    Yields:
        A function that returns the short names seen so far, joined by `+` (`flash-cpu`, `math`), or
        None if no attention ran where the watch can see it (inside a compiled graph it cannot).
    """
    watch = _watch_class()()
    with watch:
        yield (
            lambda: "+".join(sorted({kernel for kernel in watch.known.values() if kernel})) or None
        )


@lru_cache
def _watch_class() -> Any:
    """The dispatch mode that sees every operator; made once, when torch is there."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.known: dict[Any, str | None] = {}

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func not in self.known:
                self.known[func] = _kernel_name(str(func))
            return func(*args, **(kwargs or {}))

    return Watch


def _kernel_name(operator: str) -> str | None:
    short = next((kernel for part, kernel in _KERNELS if part in operator), None)
    return short or ("math" if "softmax" in operator else None)


def attention_kernel(device: str | None = None, dtype: str = "float32") -> str | None:
    """Attention kernel that torch picks here for a plain call, by watching one small call."""
    import torch
    import torch.nn.functional as functional

    target = torch.device(device or default_device())
    query = torch.zeros(1, 2, 16, 32, dtype=getattr(torch, dtype), device=target)
    with torch.no_grad(), watch_attention() as seen:
        functional.scaled_dot_product_attention(query, query, query)
    return seen()


def command_line(words: Sequence[str] | None = None) -> str:
    """This process's command as a user would type it, with these words where they are given."""
    from pathlib import Path

    name = Path(sys.argv[0]).name
    given = sys.argv[1:] if words is None else words
    return pasteable(["truestep" if name == "__main__.py" else name, *given])
