"""One arm: a loaded pipeline with its settings, and one timed generation of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import xxhash

from truestep.case import Case
from truestep.environment import usable_device
from truestep.experiment.records import ArmName
from truestep.keys import FINALS
from truestep.progress import resident_peak
from truestep.recording.format import bytes_of
from truestep.runtime.applying import Apply, apply_change
from truestep.runtime.compiling import compile_pipeline
from truestep.runtime.loading import load
from truestep.runtime.pipeline import MODELS, Observer, Pipeline, generate

KEPT = (*FINALS, "video/frames", "audio/waveform")
"""What a generation leaves behind."""


@dataclass
class Arm:
    """A pipeline of its own, so that no arm's change reaches another's modules.

    Attributes:
        overrides: Settings that the change under test set; they go over every case's.
        weights_mib: Device memory that loading it took.
        backend: diffusers' process-wide attention backend, as this arm has set it.
        shared: Code of the whole process that its change replaced, by name.
    """

    name: ArmName
    pipe: Pipeline
    overrides: dict[str, Any]
    weights_mib: float = 0.0
    backend: Any = None
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One generation.

    Attributes:
        seconds: Wall time of the whole.
        stages_s: Of each stage; `step` has one entry a denoise step.
        memory_mib: Peak while it ran: on a device, of this arm alone; `resident` is the whole
            process with all arms' weights, None where the system cannot tell.
        forwards: Transformer forwards, counted per sample.
        tensors: Final latent `b c f h w` and frames `b c f h w` in [-1, 1], as they came.
    """

    seconds: float
    stages_s: dict[str, tuple[float, ...]]
    memory_mib: float | None
    memory_kind: Literal["device", "resident"]
    forwards: int
    tensors: dict[str, torch.Tensor]


def load_arm(
    name: ArmName, case: Case, *, apply: Apply | None = None, compiled: str = "off"
) -> Arm:
    """Load an arm, change it, and compile its denoisers as it is said (`off`: not at all).

    Raises:
        CaseError, ModelLoadError, UsageError: As `load` and `apply_change` do.
    """
    device = usable_device(case.settings.device)
    before = _allocated_mib(device)
    arm = Arm(name, load(case), {})
    plain = arm.pipe.settings.model_dump()
    code = shared_code(arm.pipe)
    with own_backend(arm):
        arm.pipe = apply_change(arm.pipe, apply)
    now = shared_code(arm.pipe)
    arm.shared = tuple(sorted(k for k, v in now.items() if k in code and code[k] is not v))
    arm.overrides = {k: v for k, v in arm.pipe.settings.model_dump().items() if v != plain[k]}
    compile_pipeline(arm.pipe, compiled)
    arm.weights_mib = _allocated_mib(device) - before
    return arm


def shared_code(pipe: Pipeline) -> dict[str, object]:
    """Functions that all arms share: of the classes of a pipeline's modules, and of torch."""
    owners: dict[Any, str] = {torch: "torch", torch.nn.functional: "torch.nn.functional"}
    for name in MODELS:
        model = getattr(pipe, name)
        for module in model.modules() if isinstance(model, torch.nn.Module) else ():
            for thing in (module, getattr(module, "processor", None)):
                for owner in type(thing).__mro__[:-1]:
                    owners.setdefault(owner, owner.__qualname__)
    return {
        f"{title}.{key}": value
        for owner, title in owners.items()
        for key, value in vars(owner).items()
        if callable(value)
    }


@contextmanager
def own_backend(arm: Arm) -> Iterator[None]:
    """Give an arm diffusers' process-wide attention backend as it left it, and put it back.

    `set_attention_backend` on one model changes it for every model that has not chosen one
    (diffusers 0.42.1, models/modeling_utils.py): without this the candidate's reaches the baseline.
    """
    from diffusers.models import attention_dispatch

    registry: Any = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    if not hasattr(registry, "_active_backend"):
        yield
        return
    before = registry._active_backend
    if arm.backend is not None:
        registry._active_backend = arm.backend
    try:
        yield
    finally:
        arm.backend, registry._active_backend = registry._active_backend, before


def choose(arm: Arm, case: Case) -> None:
    """Set an arm's pipeline to a case, keeping what its change has set."""
    wanted = {**case.run_settings().model_dump(), **arm.overrides}
    for key, value in wanted.items():
        if getattr(arm.pipe.settings, key) != value:
            setattr(arm.pipe.settings, key, value)


@dataclass
class _Glance(Observer):
    """Keeps the two results, without a copy inside the timed run."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensor(self, name: str, value: torch.Tensor) -> None:
        if name in KEPT:
            self.tensors[name] = value


def run(arm: Arm, case: Case) -> Run:
    """Generate once, timed, decoding included."""
    choose(arm, case)
    pipe = arm.pipe
    watch = _Glance()
    finish = _peak_memory(arm)
    before = pipe.forwards
    _synchronize(pipe.device)
    start = time.perf_counter()
    with own_backend(arm):
        generate(pipe, observer=watch, output="frames")
    _synchronize(pipe.device)
    seconds = time.perf_counter() - start
    memory, kind = finish()
    return Run(
        seconds=seconds,
        stages_s={stage: tuple(times) for stage, times in watch.seconds.items()},
        memory_mib=memory,
        memory_kind=kind,
        forwards=pipe.forwards - before,
        tensors={name: value.detach().cpu() for name, value in watch.tensors.items()},
    )


def digest(tensor: torch.Tensor) -> str:
    """Equal for equal shape, dtype and bits: `float32[1x8x5x8x8]:0123456789abcdef`."""
    shape = "x".join(map(str, tensor.shape))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype}[{shape}]:{xxhash.xxh3_64_hexdigest(bytes_of(tensor))}"


def _peak_memory(arm: Arm) -> Callable[[], tuple[float | None, Literal["device", "resident"]]]:
    """Begin to watch the peak; call the result when the run is over."""
    if arm.pipe.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(arm.pipe.device)
        before = _allocated_mib(arm.pipe.device)

        def device() -> tuple[float | None, Literal["device", "resident"]]:
            peak = torch.cuda.max_memory_allocated(arm.pipe.device) / 2**20
            return arm.weights_mib + peak - before, "device"

        return device
    reset = _reset_resident_peak()

    def resident() -> tuple[float | None, Literal["device", "resident"]]:
        peak = resident_peak() if reset else None
        return (None if peak is None else peak / 2**20), "resident"

    return resident


def _allocated_mib(device: str) -> float:
    if not device.startswith("cuda"):
        return 0.0
    return torch.cuda.memory_allocated(device) / 2**20


def _reset_resident_peak() -> bool:
    """Set the process's peak resident size to its present one (Linux, proc(5): clear_refs)."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:  # another system, or not allowed to
        return False
    return True


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
