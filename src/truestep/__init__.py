"""Is it still the same model? Record a trusted run, replay it, judge against measured noise.

Importing this package imports no torch; the names below load what they need when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from truestep.call_case import CallCase
    from truestep.case import Case
    from truestep.engines.subjects import check, record
    from truestep.environment import Environment
    from truestep.errors import EquivalenceError
    from truestep.experiment.ablation import ablate
    from truestep.judge.compare import assert_equivalent, compare
    from truestep.judge.latent import check_latent
    from truestep.judge.weights import compare_weights
    from truestep.recording.format import Recording
    from truestep.replay.batching import batch_invariance
    from truestep.replay.functions import check_function, record_function
    from truestep.replay.hooks import capture
    from truestep.replay.ports import replay_trace
    from truestep.replay.traces import compare_traces
    from truestep.runtime.accelerate import accelerate
    from truestep.serving.watching import watch
    from truestep.training.checking import check_training
    from truestep.training.gap import log_probability_gap
    from truestep.training.recording import record_training
    from truestep.training.step import TrainingStep
    from truestep.verdict import Comparison, Verdict

__all__ = [
    "CallCase",
    "Case",
    "Comparison",
    "Environment",
    "EquivalenceError",
    "Recording",
    "TrainingStep",
    "Verdict",
    "ablate",
    "accelerate",
    "assert_equivalent",
    "batch_invariance",
    "capture",
    "check",
    "check_function",
    "check_latent",
    "check_training",
    "compare",
    "compare_traces",
    "compare_weights",
    "log_probability_gap",
    "record",
    "record_function",
    "record_training",
    "replay_trace",
    "watch",
]

_HOMES = {
    "CallCase": "truestep.call_case",
    "Case": "truestep.case",
    "Comparison": "truestep.verdict",
    "Environment": "truestep.environment",
    "EquivalenceError": "truestep.errors",
    "Recording": "truestep.recording.format",
    "TrainingStep": "truestep.training.step",
    "Verdict": "truestep.verdict",
    "ablate": "truestep.experiment.ablation",
    "accelerate": "truestep.runtime.accelerate",
    "assert_equivalent": "truestep.judge.compare",
    "batch_invariance": "truestep.replay.batching",
    "capture": "truestep.replay.hooks",
    "check": "truestep.engines.subjects",
    "check_function": "truestep.replay.functions",
    "check_latent": "truestep.judge.latent",
    "check_training": "truestep.training.checking",
    "compare": "truestep.judge.compare",
    "compare_traces": "truestep.replay.traces",
    "compare_weights": "truestep.judge.weights",
    "log_probability_gap": "truestep.training.gap",
    "record": "truestep.engines.subjects",
    "record_function": "truestep.replay.functions",
    "record_training": "truestep.training.recording",
    "replay_trace": "truestep.replay.ports",
    "watch": "truestep.serving.watching",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'truestep' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
