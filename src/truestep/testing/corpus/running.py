"""Run entries of the corpus under a gate: build twice, plant, run, ask, set against the truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Literal

import torch

from truestep.calls.check import check
from truestep.calls.keys import dotted, key_of
from truestep.calls.record import record
from truestep.calls.recording import CallRecording
from truestep.calls.subject import seed_all, subject_of
from truestep.errors import UsageError
from truestep.runtime.changes import thread_count
from truestep.testing.corpus.editing import denoiser_name
from truestep.testing.corpus.entry import Entry
from truestep.testing.corpus.subjects import SUBJECTS, Subject
from truestep.testing.outputs import leaves
from truestep.verdict import Comparison

Outputs = tuple[torch.Tensor, ...]
Gate = Callable[[Outputs, Outputs], bool]
"""Of what a trusted and a candidate pipeline give: whether the candidate passes."""

TRUESTEP: Literal["truestep"] = "truestep"
"""The name of truestep's own check, where a gate is asked for."""


@dataclass(frozen=True)
class Outcome:
    """What a gate said of an entry, and what is true.

    Attributes:
        subject, entry, kind, draw, dtype: Of the run.
        effect: rel_l2 between the outputs of free runs; infinite where the candidate raised or
            gives another shape. 0 of a fault: it has no effect on this subject. Of a twin under
            truestep's check, which sees no free run, it is not measured.
        passed: What the gate said.
        place: Of truestep's check: where it failed first, as `vae.decode in z`.
        named: Of truestep's check of a fault that it caught: whether that is the right place.
        sentence: What truestep's check says, or how the candidate raised.
    """

    subject: str
    entry: str
    kind: str
    draw: int
    dtype: str
    effect: float
    passed: bool
    place: str = ""
    named: bool | None = None
    sentence: str = ""

    @property
    def right(self) -> bool:
        """Whether the gate was right: it caught an effect, or let a harmless change pass."""
        return self.passed == (self.kind == "twin" or self.effect == 0)


@dataclass(frozen=True)
class Trusted:
    """The trusted side of a subject's draw: what it gives, and its recording."""

    subject: Subject
    draw: int
    dtype: str
    outputs: Outputs

    def recorded(self) -> CallRecording:
        """The recording with its noise floor, made when it is first asked for."""
        return _recorded(self.subject.name, self.draw, self.dtype)


def run(
    gate: Gate | Literal["truestep"],
    subject: Subject,
    entry: Entry,
    *,
    draw: int = 0,
    dtype: str = "float32",
) -> Outcome:
    """Plant an entry in a fresh pipeline and ask a gate.

    Args:
        gate: A function of trusted and candidate outputs (tuples of tensors) that says whether
            the candidate passes, or `TRUESTEP`.
        subject: One of `subjects()`.
        entry: One of `faults()` or `twins()` that names the subject.
        draw: Which weights, inputs and prompt: 0, 1, 2, ...
        dtype: Of the weights.

    Raises:
        UsageError: The entry is not for this subject, or two builds differ.
        NotApplicable: This version of diffusers has nothing that the entry could change.
    """
    if subject.name not in entry.subjects:
        raise UsageError(
            f"{entry.name!r} is not for {subject.name!r}",
            measured=f"it is for {', '.join(entry.subjects)}",
        )
    trusted = trusted_side(subject, draw, dtype)
    with thread_count(torch.get_num_threads()):  # a change may leave another number
        candidate = planted(subject, entry, draw, dtype)
        model = denoiser_name(candidate)
        effect = 0.0
        if gate != TRUESTEP or entry.kind == "fault":
            effect, raised, outputs = _effect(candidate, trusted)
            if gate != TRUESTEP:
                passed = outputs is not None and bool(gate(trusted.outputs, outputs))
                return _outcome(trusted, entry, effect, passed, sentence=raised)
            candidate = planted(subject, entry, draw, dtype)
        result = _checked(candidate, trusted)
    place = place_of(result)
    named = None
    if entry.kind == "fault" and not result.verdict.passed:
        named = is_named(entry, place, model)
    sentence = str(result).splitlines()[0] if not result.verdict.passed else result.verdict.value
    return _outcome(
        trusted, entry, effect, result.verdict.passed, place=place, named=named, sentence=sentence
    )


def _outcome(trusted: Trusted, entry: Entry, effect: float, passed: bool, **fields: Any) -> Outcome:
    return Outcome(
        subject=trusted.subject.name,
        entry=entry.name,
        kind=entry.kind,
        draw=trusted.draw,
        dtype=trusted.dtype,
        effect=effect,
        passed=passed,
        **fields,
    )


def planted(subject: Subject, entry: Entry, draw: int = 0, dtype: str = "float32") -> Any:
    """A fresh pipeline with the entry's change in it."""
    pipe = subject.build(draw, dtype)
    changed = entry.apply(pipe)
    return pipe if changed is None else changed


def trusted_side(subject: Subject, draw: int = 0, dtype: str = "float32") -> Trusted:
    """The trusted side of a draw; the last few are kept.

    Raises:
        UsageError: Two builds do not give the same bits.
    """
    return _trusted(subject.name, draw, dtype)


@lru_cache(maxsize=2)
def _trusted(name: str, draw: int, dtype: str) -> Trusted:
    subject = SUBJECTS[name]
    first, second = (free_run(subject.build(draw, dtype), subject, draw) for _ in range(2))
    if _distance(first, second) != 0.0:
        raise UsageError(
            f"two builds of {name!r} from one seed differ",
            measured=f"rel_l2 {_distance(first, second):.2g}",
        )
    return Trusted(subject, draw, dtype, first)


@lru_cache(maxsize=2)
def _recorded(name: str, draw: int, dtype: str) -> CallRecording:
    subject = SUBJECTS[name]
    pipe = subject.build(draw, dtype)
    return record(subject_of(pipe, seed=draw, **subject.inputs(draw)))


def _checked(candidate: Any, trusted: Trusted) -> Comparison:
    inputs = trusted.subject.inputs(trusted.draw)
    recording = trusted.recorded()
    return check(subject_of(candidate, seed=trusted.draw, **inputs), recording)


def free_run(pipe: Any, subject: Subject, draw: int = 0) -> Outputs:
    """What a pipeline gives, as tensors."""
    seed_all(draw)
    runs = subject_of(pipe, seed=draw, **subject.inputs(draw))
    return tuple(tensor.detach() for tensor in leaves(runs.run()))


def _effect(candidate: Any, trusted: Trusted) -> tuple[float, str, Outputs | None]:
    """True size of a change, how the candidate raised, and what it gives."""
    try:
        outputs = free_run(candidate, trusted.subject, trusted.draw)
    except Exception as error:
        return math.inf, f"raised {type(error).__name__}: {error}"[:200], None
    return _distance(outputs, trusted.outputs), "", outputs


def _distance(actual: Outputs, expected: Outputs) -> float:
    """rel_l2 of all tensors together."""
    if len(actual) != len(expected):
        return math.inf
    difference = size = 0.0
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape or not bool(torch.isfinite(a).all()):
            return math.inf
        difference += float((a.double() - b.double()).square().sum())
        size += float(b.double().square().sum())
    return math.sqrt(difference / size) if size else float(difference > 0)


def place_of(result: Comparison) -> str:
    """Where a comparison failed first, as `transformer.forward in img_ids`."""
    if result.verdict.passed:
        return ""
    if result.first_divergence is not None:
        name = result.first_divergence.name
    else:
        name = next((row.name for row in result.rows if not row.verdict.passed), "")
    if not name:
        return ""
    key = key_of(name)
    return f"{key.component}.{key.method} {key.side} {dotted(key.path)}".strip()


def is_named(entry: Entry, place: str, model: str) -> bool:
    """Whether a place is one of those that are right for a fault."""
    patterns = (pattern.replace("denoiser", model) for pattern in entry.at)
    return any(fnmatchcase(place, pattern) for pattern in patterns)
