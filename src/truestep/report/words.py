"""Words for parts of a result that terminal, comment and page share."""

from __future__ import annotations

import re

from truestep.records import MediaFacts, RuleChange
from truestep.verdict import Comparison, Verdict

_COMMAND = re.compile(r"(truestep|pip|grep|ls|df|git) ")
"""How a hint begins that a shell can run."""

_OPENED = ("text", "connector", "prediction", "decoding")
"""Stages whose models `--depth modules` opens."""


def stage_label(stage: str, modality: str | None) -> str:
    """A stage as it is printed: `tensors` where files have none, with its modality if of one."""
    stage = stage or "tensors"
    return f"{stage} ({modality})" if modality else stage


def said(facts: MediaFacts) -> str:
    """What a file of media is, in words."""
    parts = []
    if facts.frames:
        count = f"{facts.frames} frames of " if facts.frames > 1 else ""
        parts.append(f"{count}{facts.width}x{facts.height}")
        parts += [f"{facts.fps:.5g} a second"] if facts.fps else []
    if facts.samples:
        parts.append(f"{facts.samples:,} samples at {facts.sample_rate} Hz")
    parts += [facts.form] * bool(facts.form)
    return ", ".join([*parts, *[facts.colours] * bool(facts.colours)])


def change_text(change: RuleChange) -> str:
    """Something that decides a verdict and was changed, in words."""
    before = f"{change.actual} (was {change.reference})"
    return f"{change.kind} {change.key}: {before}, in {change.file}"


def next_command(comparison: Comparison) -> str:
    """The command that comes next of a comparison that did not pass: its hint if it is one, or the
    same check with a deeper look; empty where there is none."""
    if comparison.exit_code == 0:
        return ""
    command = command_in(comparison.hint)
    if command:
        return command
    first, repeat = comparison.first_divergence, comparison.repeat
    drifted = comparison.verdict in (Verdict.DRIFTED, Verdict.INVALID)
    shallow = repeat.startswith("truestep check ") and "--depth" not in repeat.split()
    if not (drifted and shallow and (first is None or first.stage in _OPENED)):
        return ""
    return f"{repeat} --depth modules"


def command_in(hint: str) -> str:
    """The command that a hint is; empty where it is advice, or has a word to be filled in."""
    command = hint.partition("  # ")[0]
    advice = any(word in command for word in (" CASE", " FILE", " KEY=", "("))
    return command if _COMMAND.match(command) and not advice else ""
