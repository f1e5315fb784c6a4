"""Is it still the same model? Record a trusted run, replay it, judge against measured noise.

Importing this package imports no torch; the names below load what they need when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from truestep.case import Case
    from truestep.checking import check
    from truestep.comparison.api import compare
    from truestep.comparison.latent_gate import check_latent
    from truestep.environment import Environment
    from truestep.errors import EquivalenceError
    from truestep.experiment.ablation import ablate
    from truestep.functions import check_function, record_function
    from truestep.recording.format import Recording
    from truestep.recording.record import record
    from truestep.runtime.accelerate import accelerate
    from truestep.tracing.batching import batch_invariance
    from truestep.tracing.comparing import compare_traces
    from truestep.tracing.hooks import capture
    from truestep.tracing.replaying import replay_trace
    from truestep.verdict import Comparison, Verdict, assert_equivalent

__all__ = [
    "Case",
    "Comparison",
    "Environment",
    "EquivalenceError",
    "Recording",
    "Verdict",
    "ablate",
    "accelerate",
    "assert_equivalent",
    "batch_invariance",
    "capture",
    "check",
    "check_function",
    "check_latent",
    "compare",
    "compare_traces",
    "record",
    "record_function",
    "replay_trace",
]

_HOMES = {
    "Case": "truestep.case",
    "Comparison": "truestep.verdict",
    "Environment": "truestep.environment",
    "EquivalenceError": "truestep.errors",
    "Recording": "truestep.recording.format",
    "Verdict": "truestep.verdict",
    "ablate": "truestep.experiment.ablation",
    "accelerate": "truestep.runtime.accelerate",
    "assert_equivalent": "truestep.verdict",
    "batch_invariance": "truestep.tracing.batching",
    "capture": "truestep.tracing.hooks",
    "check": "truestep.checking",
    "check_function": "truestep.functions",
    "check_latent": "truestep.comparison.latent_gate",
    "compare": "truestep.comparison.api",
    "compare_traces": "truestep.tracing.comparing",
    "record": "truestep.recording.record",
    "record_function": "truestep.functions",
    "replay_trace": "truestep.tracing.replaying",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'truestep' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
