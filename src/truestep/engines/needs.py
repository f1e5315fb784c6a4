"""What record and check of a case take, told before it runs: memory, bytes and time.

The pipeline is loaded with its weights left in their files, and its run is foretold. Times are by
how fast this machine multiplies and reads memory (a roofline), measured here in a moment: what a
model does beside its products comes on top.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import torch

from truestep.call_case import CallCase
from truestep.calls.benign import changes
from truestep.calls.choosing import default_steps, made_at, repeats
from truestep.calls.foretelling import Foretold, Work, foretold
from truestep.calls.instructions import MOST_BYTES
from truestep.calls.recording import CallRecording, trees_of
from truestep.calls.seen import Plan
from truestep.calls.subject import Subject, subject_of
from truestep.calls.thinning import keeps
from truestep.calls.values import tensors
from truestep.case import AnyCase, Case
from truestep.environment import usable_device
from truestep.files import nearest_folder
from truestep.floors import EPSILON
from truestep.keys import key_of
from truestep.progress import resident_peak, told_by_linux
from truestep.recording.format import Recording
from truestep.recording.manifest import CALLS, CallEntry, Manifest
from truestep.replay.steps import FIRST_LATENT, floor_steps
from truestep.replay.thinning import kept_names
from truestep.replay.variations import Variation, variations
from truestep.runtime.lent import lending
from truestep.runtime.loading import load
from truestep.runtime.pipeline import MODELS, Observer, generate
from truestep.runtime.precision import HIGHER
from truestep.runtime.stored import in_files, large_apart

CHILD = 1_000_000_000
"""Bytes that the process takes which plays a run by other instructions."""


@dataclass(frozen=True)
class Needs:
    """What one verb takes.

    Attributes:
        memory: Bytes at its peak, about; on an accelerator `device` of them are its own.
        seconds: At this machine's speed.
    """

    memory: int
    device: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a case takes.

    Attributes:
        weights: Bytes of each model's weights.
        dtype: In which most of them are.
        steps, forwards, flops: Of one generation.
        generation, record, check: Of each verb.
        recording, whole: Bytes that a recording holds, thinned and with every step kept.
    """

    weights: Mapping[str, int]
    dtype: str
    steps: int
    forwards: int
    flops: int
    generation: Needs
    record: Needs
    check: Needs
    recording: int
    whole: int


_Held = Literal["all", "one model", "files"]
"""Weights in memory: all, those of the model that runs, or what is used now."""


def estimate(case: AnyCase, *, from_disk: bool = False, low_memory: bool = False) -> Estimate:
    """Tell what a case takes; its weights are not read, but for those below 1 MiB.

    Args:
        case: What would be recorded or checked.
        from_disk: Whether weights would stay in their files.
        low_memory: Whether those of the model that runs alone would be in memory.

    Raises:
        CaseError, ModelLoadError: The case cannot be run.
        UsageError: A model looks at numbers to decide what it does.
    """
    with large_apart(), lending():
        told = _of_calls(case) if isinstance(case, CallCase) else _of_stages(case)
    base = resident_peak() or 0
    run = foretold(told.subject)
    held: _Held = "files" if from_disk else "one model" if low_memory else "all"
    return _Sum(told, run, base, _Clock(told.device), held).estimate()


@dataclass(frozen=True)
class _Told:
    """What would run, with its weights in their files, and what differs between ways to run it.

    Attributes:
        subject, device: What runs, and where it would.
        sizes: Of a recording of the runtime: bytes of its tensors by name, once it has run.
        variations: Of the runtime: its benign changes.
    """

    subject: Subject
    device: str
    sizes: Mapping[str, int] | None = None
    variations: Sequence[Variation] = ()


def _of_calls(case: CallCase) -> _Told:
    from truestep.engines.diffusers import unread

    pipe, call = unread(case.model_copy(update={"device": "cpu"}))
    return _Told(subject_of(pipe, seed=case.seed, **call), usable_device(case.device))


def _of_stages(case: Case) -> _Told:
    with in_files():
        pipe = load(case.replace(device="cpu"))
    parts = {name: getattr(pipe, name) for name in (*MODELS, "scheduler")}
    held = {name: part for name, part in parts.items() if part is not None}
    shown = _Shown()
    subject = Subject(lambda: generate(pipe, observer=shown, output="frames"), held)
    device = usable_device(case.settings.device)
    return _Told(subject, device, shown.sizes, variations(pipe))


@dataclass
class _Shown(Observer):
    """Keeps how large what a run shows is."""

    sizes: dict[str, int] = field(default_factory=dict)

    def tensor(self, name: str, value: torch.Tensor) -> None:
        self.sizes[name] = value.numel() * value.itemsize


@dataclass(frozen=True)
class _Sum:
    """A foretold run, added up."""

    told: _Told
    run: Foretold
    base: int
    clock: _Clock
    held: _Held

    def estimate(self) -> Estimate:
        run, narrow = self.run, self._narrow
        kept, whole = self._bytes
        active = max((work.activations for work in run.works.values()), default=0)
        largest = max((size for _, size in run.weights.values()), default=0)
        widened = 2 * active + 2 * largest
        generation = self.clock.of(run.works.values())
        record, check = self._stages if self.told.variations else self._calls
        return Estimate(
            weights={name: size for name, (size, _) in run.weights.items()},
            dtype=self._dtype,
            steps=run.steps,
            forwards=len(run.works),
            flops=sum(work.flops for work in run.works.values()),
            generation=self._needs(0, active, generation),
            record=self._needs(
                whole + CHILD * self._child,
                widened + 2 * active * narrow,
                generation + record,
            ),
            check=self._needs(0, widened if narrow else active, check),
            recording=kept,
            whole=whole,
        )

    def _needs(self, beside: int, activations: int, seconds: float) -> Needs:
        sizes = self.run.weights.values()
        held = {
            "all": self._weights,
            "one model": max((size for size, _ in sizes), default=0),
            "files": max((most for _, most in sizes), default=0),
        }
        own = held[self.held] + activations
        here = self.told.device == "cpu"
        return Needs(self.base + beside + own * here, own * (not here), seconds)

    @cached_property
    def _dtype(self) -> str:
        """Dtype of the models that compute most."""
        flops: dict[str, int] = {}
        for work in self.run.works.values():
            flops[work.dtype] = flops.get(work.dtype, 0) + work.flops
        return max(flops, key=lambda dtype: flops[dtype], default="float32")

    @cached_property
    def _narrow(self) -> bool:
        """Whether it is judged in float32, too."""
        return EPSILON.get(self._dtype, 0.0) > EPSILON["float32"]

    @cached_property
    def _child(self) -> bool:
        """Whether a process of its own plays the run by other instructions."""
        there = 0 < self._weights <= MOST_BYTES and self.held == "all"
        return there and self.told.device == "cpu"

    @cached_property
    def _weights(self) -> int:
        """Bytes of all weights."""
        return sum(size for size, _ in self.run.weights.values())

    @cached_property
    def _reference(self) -> CallRecording:
        """The calls, without their tensors."""
        manifest = Manifest(
            format_version=CALLS,
            tool_version="",
            created="",
            level="full",
            settings={},
            environment={},
            tensors=(),
            calls=self.run.calls,
            forwards=len(self.run.works),
        )
        return CallRecording(Recording.in_memory({}, manifest))

    @property
    def _bytes(self) -> tuple[int, int]:
        """Bytes that a recording holds: of what is kept by default, and of everything."""
        if self.told.sizes is not None:
            sizes, total = self.told.sizes, self.run.steps
            chosen = default_steps(self._reference) | set(floor_steps(total))
            once = (n for n in kept_names(sizes, chosen) if not n.endswith(FIRST_LATENT))
            return self._shown(once), self._shown(sizes)
        chosen = default_steps(self._reference)
        windows = chosen | {step - 1 for step in chosen}
        every = frozenset(range(self.run.steps))
        return self._kept(chosen, windows), self._kept(every, every)

    def _shown(self, names: Iterable[str]) -> int:
        """Bytes of what the runtime's stages showed, and of what is raised of it."""
        sizes, floor = self.told.sizes or {}, floor_steps(self.run.steps)
        own = sum(sizes[name] for name in names)
        places = {name: key_of(name) for name in sizes}
        raised = (n for n, key in places.items() if key.head != "step" or key.number in floor)
        return own + 2 * sum(sizes[name] for name in raised) * self._narrow

    def _kept(self, chosen: frozenset[int], windows: frozenset[int]) -> int:
        names: set[str] = set()
        raised: set[str] = set()
        for call in self.run.calls:
            given, gave = keeps(call, chosen, windows, self.run.steps)
            found = _names(call)
            names |= (found["in"] if given else set()) | (found["out"] if gave else set())
            raised |= found["out"] if gave else set()
        size = sum(self.run.sizes[name] for name in names)
        return size + 2 * sum(self.run.sizes[name] for name in raised) * self._narrow

    @property
    def _calls(self) -> tuple[float, float]:
        """Seconds of a floor and of a check, where calls are made."""
        reference, clock = self._reference, self.clock
        chosen = default_steps(reference)
        plan = Plan(made_at(chosen))
        works = {id(self.run.calls[at]): work for at, work in self.run.works.items()}
        made = [works[id(call)] for call in self.run.calls if id(call) in works and plan.made(call)]
        twice = [each for some in repeats(reference, chosen, ()).values() for each in some]
        again = [works[id(call)] for call in twice if id(call) in works]
        subject = self.told.subject
        kinds = [c.kind for c in changes(subject, plan, self._dtype, lambda text: None)]
        higher = kinds.count("precision")
        runs = len(kinds) - higher + kinds.count("batch") + self._child
        floor = runs * clock.of(made) + higher * clock.of(made, raised=1)
        check = clock.of(made) + clock.of(again)
        if self._narrow:
            floor += (runs - 1) * clock.of(made, raised=1) + higher * clock.of(made, raised=2)
            check += clock.of(made, raised=1)
        return floor, check

    @property
    def _stages(self) -> tuple[float, float]:
        """The same where truestep's runtime replays its stages."""
        by_stage: dict[str, list[Work]] = {"text": [], "prediction": [], "decoding": []}
        for at, work in self.run.works.items():
            by_stage.setdefault(self.run.calls[at].stage, []).append(work)

        def once(steps: int, stages: Iterable[str], raised: int = 0) -> float:
            spent = {stage: self.clock.of(some, raised=raised) for stage, some in by_stage.items()}
            spent["prediction"] *= steps / max(self.run.steps, 1)
            return sum(spent.get(stage, 0.0) for stage in stages)

        floor = once(3, by_stage) * (1 + self._child)  # in another dtype, and in another process
        for change in self.told.variations:
            steps = (len(change.only) or 3) + change.pairwise
            times = 2 if change.kind == "batch" else 1
            raised = int(change.kind == "precision")
            floor += times * once(steps, change.stages, raised)
            floor += times * once(steps, change.stages, 1) * self._narrow
        chosen = len(default_steps(self._reference))
        check = once(chosen + 2, by_stage) + once(3, by_stage, 1) * self._narrow
        return floor, check


def _names(call: CallEntry) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"in": set(), "out": {name for _, name in call.random}}
    for side, tree in trees_of(call):
        found[side] |= {name for _, name in tensors(tree)}
    return found


class _Clock:
    """How long calls take, by how fast a device multiplies and reads."""

    def __init__(self, device: str) -> None:
        self._device = device

    def of(self, works: Iterable[Work], *, raised: int = 0) -> float:
        """Seconds for calls, in their own dtype or in one that is so many times higher."""
        return sum(self._one(work, raised) for work in works)

    def _one(self, work: Work, raised: int) -> float:
        dtype, size = work.dtype, work.weights
        for _ in range(raised):
            if dtype in HIGHER:
                dtype, size = HIGHER[dtype], size * 2
        products = work.flops / _products(self._device, dtype)
        return max(products, size / _reading(self._device))


@cache
def _products(device: str, dtype: str) -> float:
    """Floating-point operations a second of matrix products."""
    side = 1024 if device == "cpu" else 8192
    a = torch.randn(side, side, device=device).to(getattr(torch, dtype, torch.float32))
    return 2 * side**3 / _median(lambda: torch.mm(a, a), device)


@cache
def _reading(device: str) -> float:
    """Bytes a second that memory is read at."""
    a = torch.ones(1 << 24, device=device)
    return a.nbytes / _median(a.sum, device)


def _median(run: Callable[[], object], device: str, rounds: int = 5) -> float:
    samples = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - start)
    return max(statistics.median(samples[1:]), 1e-9)


def free_memory() -> int | None:
    """Bytes that this process may still take: of the machine, its control group and its limits."""
    found = [_meminfo(), _control_group(), *_limits()]
    return min((size for size in found if size is not None), default=None)


def free_device_memory(device: str) -> int | None:
    """Bytes that are free on an accelerator."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.startswith("cuda") else None


def free_disk(path: Path) -> int:
    """Bytes that are free where a file would be written."""
    return shutil.disk_usage(nearest_folder(path.absolute())).free


def _meminfo() -> int | None:
    return told_by_linux("/proc/meminfo", "MemAvailable")


def _control_group() -> int | None:
    """What a control group of version 2 leaves."""
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        return None if most == "max" else max(int(most) - used, 0)
    except (OSError, ValueError):
        return None


def _limits() -> list[int | None]:
    """What limits of the process leave; its own address space is larger than its memory."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return []
    used = pages * os.sysconf("SC_PAGE_SIZE")
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [] if soft == resource.RLIM_INFINITY else [max(soft - used, 0)]
