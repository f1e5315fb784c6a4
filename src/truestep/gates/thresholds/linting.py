"""Find gates that cannot fail, by trying; and limits that nobody can say the origin of.

No I/O but what `read` already did: the file's content and the tensors are given.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from pydantic import Field, ValidationError

from truestep.errors import FileFormatError
from truestep.gates.selftest import CHANGES, DAMAGES
from truestep.gates.thresholds.file import (
    DEFAULT_KEYS,
    METRICS,
    OURS,
    Limits,
    Metric,
    Provenance,
    Thresholds,
    is_number,
)
from truestep.gates.thresholds.rule import FRAMES, WAVEFORM, lives, measure
from truestep.verdict import Float, Record

SCHEMA_VERSION = 1
AMOUNT = 0.1
"""Relative size of the gain and of the noise."""

GROSS = ("all NaN", "all zero", "scaled by 2", "sign flipped", "channels permuted")
"""Damages of `truestep.gates.selftest` that no gate of decoded frames may let live. The finer ones
(one patch, two frames swapped) are not seen by three key frames whatever the limits are."""

SEED = "another seed"
IN_SOUND = " in the sound"
DEFAULTS = ("(defaults, image)", "(defaults, video)")
"""Stand for the cases that a file has no entry of."""

Decoded = Mapping[str, torch.Tensor]


class Kind(str, Enum):
    """What is wrong."""

    VACUOUS = "vacuous"
    IMPOSSIBLE = "impossible"
    NOT_A_NUMBER = "not a number"
    UNKNOWN_KEY = "unknown key"
    NO_PROVENANCE = "no provenance"
    NO_COMMIT = "no commit"

    __str__ = str.__str__


class Finding(Record):
    """One thing that is wrong with a file.

    Attributes:
        kind: What. case: whose entry; `(file)` for a key of the file itself.
        text: In words, with the measured value and the limit.
        damage: That passed, of a vacuous gate. measured, limits: by metric.
    """

    kind: Kind
    case: str
    text: str
    damage: str = ""
    measured: dict[str, Float] = Field(default_factory=dict)
    limits: dict[str, Float] = Field(default_factory=dict)


class Lint(Record):
    """What the linter found in one file.

    Attributes:
        tried_on: What was damaged. tried: damages tried, by name.
        not_tried: What was not, and why.
    """

    schema_version: int = SCHEMA_VERSION
    tool_version: str = ""
    file: str
    sentence: str
    cases: tuple[str, ...]
    tried_on: str
    tried: tuple[str, ...]
    not_tried: tuple[str, ...] = ()
    findings: tuple[Finding, ...]
    repeat: str = ""


def lint(
    thresholds: Thresholds,
    reference: Decoded,
    *,
    tried_on: str,
    other: Decoded | None = None,
    only: Iterable[str] | None = None,
    fine: bool = True,
    sample_rate: int | None = None,
) -> Lint:
    """Look for what is wrong with a file's limits.

    Args:
        thresholds: The file.
        reference: Decoded tensors to damage: `video/frames`, and `audio/waveform` if any.
        tried_on: What they are, in words.
        other: Of another seed of the same case.
        only: Ids of the cases looked at; default all of them, and the defaults.
        fine: Also try a gain and noise of 10 %. How large those are in decoded frames depends on
            how bright they are, so they say nothing of another model's frames.
        sample_rate: Hz, of the reference's sound.
    """
    cases = list(thresholds.cases) if only is None else list(only)
    findings = list(_of_file(thresholds)) if only is None else []
    for case in cases:
        findings += _of_case(case, thresholds.cases.get(case, {}))
    defaults = DEFAULTS if only is None and DEFAULT_KEYS & set(thresholds.data) else ()
    judged = (*cases, *defaults)
    every = damaged(reference, other, fine=fine) if judged else ()
    trials = {name: actual for name, actual in every if not _same(actual, reference)}
    measured = {
        name: measure(actual, reference, sample_rate=sample_rate) for name, actual in trials.items()
    }
    for case in judged:
        video = reference[FRAMES].shape[2] > 1 if case not in DEFAULTS else case == DEFAULTS[1]
        try:
            limits = thresholds.limits(case, video=video, sound=WAVEFORM in reference)
        except FileFormatError:  # a finding already
            continue
        for name, values in measured.items():
            if lives(limits, values):
                findings.append(_vacuous(case, name, limits, values.values, values.not_judged))
    not_tried = [] if other is not None else [f"{SEED}: there is none"]
    if not fine:
        not_tried.append("a gain and noise of 10 %: they need the case's own reference")
    text = _sentence(thresholds.label, findings, len(cases))
    return Lint(
        file=thresholds.label,
        sentence=text,
        cases=tuple(cases),
        tried_on=tried_on,
        tried=tuple(trials),
        not_tried=tuple(not_tried),
        findings=tuple(findings),
    )


def damaged(
    reference: Decoded, other: Decoded | None, *, fine: bool
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Every damage, of the video alone and of the sound alone: its name and both tensors."""
    for key, noun in ((FRAMES, ""), (WAVEFORM, IN_SOUND)):
        if key not in reference:
            continue
        tensor = reference[key]
        if other is not None and key in other:
            yield f"{SEED}{noun}", {**reference, key: other[key]}
        for kind in ("gain", "noise") if fine or key == WAVEFORM else ():
            changed = CHANGES[kind](tensor, AMOUNT).to(tensor)
            yield f"{AMOUNT:.0%} {kind}{noun}".replace("%", " %"), {**reference, key: changed}
        for name in GROSS if key == FRAMES else ("all NaN", "all zero"):
            yield f"{name}{noun}", {**reference, key: DAMAGES[name](tensor)}


def _same(actual: Decoded, reference: Decoded) -> bool:
    return all(torch.equal(actual[key], tensor) for key, tensor in reference.items())


def _vacuous(
    case: str,
    damage: str,
    limits: Limits,
    values: Mapping[str, float],
    not_judged: Mapping[str, str],
) -> Finding:
    by_name = {metric.name: metric for metric in METRICS}
    sound = damage.endswith(IN_SOUND)
    own = [name for name in limits.values if by_name[name].sound == sound]
    parts = [
        f"{name} {values[name]:.4g} {'>=' if by_name[name].at_least else '<='} "
        f"{limits.values[name]:g}"
        for name in own
        if name in values
    ]
    left = [name for name in own if name in not_judged]
    text = f"{damage} passes: {', '.join(parts) or 'nothing in the file judges it'}"
    return Finding(
        kind=Kind.VACUOUS,
        case=case,
        text=text + (f" (not judged: {', '.join(left)})" if left else ""),
        damage=damage,
        measured={n: v for n, v in values.items() if n in limits.values},
        limits=dict(limits.values),
    )


def _of_file(thresholds: Thresholds) -> Iterator[Finding]:
    """What is wrong with the keys beside the cases."""
    by_default = {m.default_key(video=v): m for m in METRICS for v in (True, False)}
    for key, value in thresholds.data.items():
        if key in by_default:
            yield from _of_value("(file)", key, value, by_default[key])
        elif key not in ("cases", OURS) and not key.startswith("_"):
            yield _unknown("(file)", key, [*by_default, "cases"])
    if set(by_default) & set(thresholds.data):
        yield from _of_provenance("(file)", thresholds.data)


def _of_case(case: str, entry: Mapping[str, Any]) -> Iterator[Finding]:
    """What is wrong with the keys of a case."""
    by_key = {metric.key: metric for metric in METRICS}
    for key, value in entry.items():
        if key in by_key:
            yield from _of_value(case, key, value, by_key[key])
        elif key != OURS and not key.startswith("_"):
            yield _unknown(case, key, list(by_key))
    if set(entry) & set(by_key):
        yield from _of_provenance(case, entry)


def _of_value(case: str, key: str, value: object, metric: Metric) -> Iterator[Finding]:
    if not is_number(value):
        text = f"{key} is {value!r}: no finite number, so it judges nothing or everything"
        yield Finding(kind=Kind.NOT_A_NUMBER, case=case, text=text)
        return
    number = float(value)  # type: ignore[arg-type]  # is_number says so
    low, high = metric.possible
    worst, best = (low, high) if metric.at_least else (high, low)
    sign = ">=" if metric.at_least else "<="
    if number != best and (number > best) == metric.at_least:
        text = f"{key} {number:g}: {metric.name} is never {sign} {number:g}; its best is {best:g}"
        yield Finding(kind=Kind.IMPOSSIBLE, case=case, text=text)
    elif number == worst or (number < worst) == metric.at_least:
        text = f"{key} {number:g}: {metric.name} is always {sign} {number:g}; worst is {worst:g}"
        yield Finding(kind=Kind.VACUOUS, case=case, text=text)


def _unknown(case: str, key: str, known: list[str]) -> Finding:
    near = difflib.get_close_matches(key, known, n=1)
    text = f"{key} is read by nobody" + (f"; did you mean {near[0]}?" if near else "")
    return Finding(kind=Kind.UNKNOWN_KEY, case=case, text=text)


def _of_provenance(case: str, entry: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether one can say how the limits came about."""
    if OURS not in entry:
        text = "no runs, date, environment or commit: who measured these limits, and on what?"
        yield Finding(kind=Kind.NO_PROVENANCE, case=case, text=text)
        return
    try:
        found = Provenance.model_validate(entry[OURS])
    except ValidationError as error:
        keys = [".".join(map(str, e["loc"])) or OURS for e in error.errors(include_url=False)]
        text = f"{OURS} is incomplete: {', '.join(dict.fromkeys(keys))}"
        yield Finding(kind=Kind.NO_PROVENANCE, case=case, text=text)
        return
    source = found.reference
    if not (source.commit or source.implementation):
        text = "the reference names neither a commit nor released versions of its code"
        yield Finding(kind=Kind.NO_COMMIT, case=case, text=text)
    if not source.weights:
        text = "the reference names no weights"
        yield Finding(kind=Kind.NO_COMMIT, case=case, text=text)


def _sentence(label: str, findings: list[Finding], cases: int) -> str:
    noun = "case" if cases == 1 else "cases"
    if not (cases or findings):
        return f"{label}: no case and no default: laid over another file, it changes nothing"
    if not findings:
        return f"{label}: {cases} {noun}, nothing wrong found"
    kinds = {kind: len({f.case for f in findings if f.kind is kind}) for kind in Kind}
    parts = [f"{count} {kind}" for kind, count in kinds.items() if count]
    return f"{label}: of {cases} {noun}: {', '.join(parts)}"
