"""Measure one generation of a loaded case: stages, steps, whole, memory."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone

import torch

from truestep.case import Case
from truestep.errors import ProcessEndedError, TruestepError, last_frame
from truestep.experiment.perf_records import Cohort, MemoryKind, PerfRun, cohort_values
from truestep.replay.capture import attention_observed, run_environment
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Observer, Pipeline, generate


@dataclass
class _Clock(Observer):
    """Also keeps when stages began and ended, so that the denoise stage has a time of its own.

    Attributes:
        marks: Of each stage, the last reading of the clock at its begin and end, in seconds.
    """

    marks: dict[str, tuple[float, float]] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str, device: str) -> Iterator[None]:
        with super().timed(stage, device):
            start = time.perf_counter()
            yield
        self.marks[stage] = (start, time.perf_counter())


@dataclass
class Session:
    """A loaded, warm case.

    Attributes:
        load_ms: Of loading the model.
        cohort: Known after the warm-up, which shows the attention kernel.
    """

    pipe: Pipeline
    load_ms: float
    cohort: Cohort


def start_session(case: Case, *, name: str) -> Session:
    """Load a case and generate it once, unmeasured.

    Raises:
        CaseError, ModelLoadError: As `load` does.
        TruestepError: The case raised.
    """
    start = time.perf_counter()
    pipe = load(case)
    load_ms = 1e3 * (time.perf_counter() - start)
    with attention_observed(pipe) as seen, raising(name, "warming up"):
        generate(pipe, output="frames")
    environment = run_environment(pipe, attention=seen())
    values = cohort_values(environment, cores=cores(), dtype=case.dtype)
    return Session(pipe, load_ms, Cohort(case_id=case.id, values=values))


def measure(session: Session, *, name: str) -> PerfRun:
    """Generate once, decoding included, and say what it took.

    Raises:
        TruestepError: The case raised.
    """
    pipe, clock = session.pipe, _Clock()
    on_device = pipe.device.startswith("cuda")
    if on_device:
        torch.cuda.reset_peak_memory_stats(pipe.device)
        torch.cuda.synchronize(pipe.device)
    started = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    start = time.perf_counter()
    with raising(name, "generating"):
        generate(pipe, observer=clock, output="frames")
    if on_device:
        torch.cuda.synchronize(pipe.device)
    e2e_ms = 1e3 * (time.perf_counter() - start)
    stages = {
        stage: 1e3 * sum(seconds) for stage, seconds in clock.seconds.items() if stage != "step"
    }
    if "latent" in clock.marks and "decode" in clock.marks:
        stages["denoise"] = 1e3 * (clock.marks["decode"][0] - clock.marks["latent"][1])
    memory, kind = _peak_memory(pipe.device)
    return PerfRun(
        started=started,
        e2e_ms=e2e_ms,
        stages_ms=stages,
        denoise_step_ms={str(i): 1e3 * s for i, s in enumerate(clock.seconds.get("step", []))},
        load_ms=session.load_ms,
        memory_mib=memory,
        memory_kind=kind,
    )


@contextmanager
def raising(name: str, doing: str) -> Iterator[None]:
    """Whatever a case raises, as one of our errors; a model is the user's code."""
    try:
        yield
    except TruestepError:
        raise
    except SystemExit as error:
        raise ProcessEndedError(
            f"{name} ended the process (SystemExit: {error.code})",
            where=f"{doing}: {last_frame(error)}",
            hint="truestep run CASE  # repeats it; runs measured before it are kept",
        ) from error
    except Exception as error:
        raise TruestepError(
            f"the case raised {type(error).__name__}: {error}",
            where=f"{name}, {doing}",
            hint="truestep run CASE  # repeats it; runs measured before it are kept",
        ) from error


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _peak_memory(device: str) -> tuple[float | None, MemoryKind]:
    """Peak in MiB: of a CUDA device since the run began, else resident size of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20, "device"
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None, "unknown"
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, "resident"
