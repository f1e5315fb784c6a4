"""Words for parts of a result that terminal, comment and page share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from truestep.records import MediaFacts, RuleChange
from truestep.text import listed
from truestep.verdict import Cause, Comparison, Divergence, Elsewhere, Recheck, Verdict

_COMMAND = re.compile(r"(truestep|pip|grep|ls|df|git) ")
"""How a hint begins that a shell can run."""

_OPENED = ("text", "connector", "prediction", "decoding")
"""Stages whose models `--depth modules` opens."""

_EXPLAINED = re.compile(r"(audio/)?(step/\d+/(guided|latent)|latent/\w+|schedule/\w+)")
"""What stages without one give, whose causes `--depth cause` looks for."""

_HANDED = re.compile(
    r"(\w+/)?(step/\d+/)?(\w+/[^/]+/[^/]+/\d+/in/.+|(schedule|update)/[^/]+/[^/]+/\d+/out/?.*)"
)
"""What a plain pipeline hands to a call, or its scheduler gives: no module holds that code."""


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
        return command if command != comparison.repeat else ""  # who follows it must come to an end
    first, repeat = comparison.first_divergence, comparison.repeat
    drifted = comparison.verdict in (Verdict.DRIFTED, Verdict.INVALID)
    if not drifted or not repeat.startswith("truestep check "):
        return ""
    depth = _DEPTH.findall(repeat)
    if depth and depth[-1] == "modules":
        named = first is not None and first.stage == "module" and first.fqn and not first.cause
        named = named or (first is not None and bool(_HANDED.fullmatch(first.name)))
        return _deeper(repeat, "cause") if named else ""
    if depth:  # the end of a free run says nothing of where
        return _deeper(repeat, "modules") if depth[-1] == "final" else ""
    if first is not None and (_EXPLAINED.fullmatch(first.name) or _HANDED.fullmatch(first.name)):
        return f"{repeat} --depth cause"
    return f"{repeat} --depth modules" if first is None or first.stage in _OPENED else ""


_DEPTH = re.compile(r"(?<= )--depth[ =](\w+)")


def _deeper(command: str, depth: str) -> str:
    """The command with another depth in place of its own; of several options the last one
    counts, so it is put at the end where the words are not plain."""
    words = command.split(" ")
    plain = not re.search(r"['\"\\$]", command) and words.count("--depth") == 1
    if not plain:
        return f"{command} --depth {depth}"
    at = words.index("--depth") + 1
    return " ".join([*words[:at], depth, *words[at + 1 :]])


def command_in(hint: str) -> str:
    """The command that a hint is; empty where it is advice, or has a word to be filled in."""
    command = hint.partition("  # ")[0]
    advice = any(word in command for word in (" CASE", " FILE", " KEY=", "("))
    return command if _COMMAND.match(command) and not advice else ""


def also_lines(first: Divergence) -> list[str]:
    """What else is wrong beside the first module: what has its cause, other causes, what has
    none."""
    own = _without_name(first.cause, first.fqn)
    groups: dict[tuple[str, str] | None, list[Elsewhere]] = {}
    for each in first.also:
        groups.setdefault(_without_name(each.cause, each.fqn), []).append(each)
    lines = []
    for what, modules in groups.items():
        names = [f"`{each.fqn}`" for each in modules]
        cause = modules[0].cause
        if what is None or cause is None:
            lines.append(f"wrong by {_selves(names)}, too: {listed(names, _NAMED)}")
        elif what == own:
            lines.append(f"the same in {listed(names, _NAMED)}")
        else:
            more = f"; the same in {listed(names[1:], _NAMED)}" if names[1:] else ""
            lines.append(f"{cause.text}{more}")
    return sorted(lines, key=lambda line: not line.startswith("the same in"))


def reasons(first: Divergence) -> Iterator[tuple[str, str]]:
    """What explains a divergence, labelled; what stands behind a cause has no label."""
    cause = first.cause
    if cause is not None:
        yield "cause", cause.text
        apart = f"{cause.error_before:.1e} without it, {cause.error_after:.1e} with it"
        yield "", f"the trusted module so changed gives the same: {apart}"
        if cause.patch:
            yield "mend", cause.patch
    for line in also_lines(first):
        yield "also", line
    if first.recheck is not None:
        yield "recheck", recheck_line(first.recheck)
    if first.operator:
        yield "at", first.operator


def _selves(names: Sequence[str]) -> str:
    return "itself" if len(names) == 1 else "themselves"


def _without_name(cause: Cause | None, fqn: str | None) -> tuple[str, str] | None:
    """What a cause says of any module."""
    if cause is None:
        return None
    text, names = cause.text, (fqn or "", (fqn or "").partition(".")[2])  # of a component, or not
    for name in names:
        text = text.replace(name, "") if name else text
    return cause.kind, text


_NAMED = 3
"""Modules that are named of many alike."""


def recheck_line(recheck: Recheck) -> str:
    """What is left once every module that is named gives what it should."""
    count = recheck.modules
    these = "this module" if count == 1 else f"these {count} modules"
    start = f"with {these} as the reference has {'it' if count == 1 else 'them'},"
    left = f"{recheck.error_after:.1e} of {recheck.error_before:.1e}"
    with_all = f"; with all inside {listed([f'`{name}`' for name in recheck.whole], _NAMED)}"
    with_all = with_all if recheck.whole else ""
    if recheck.passed and not recheck.error_after:
        return f"{start} the model agrees bit for bit{with_all}"
    if recheck.passed:
        return f"{start} {left} is left, within the model's floor{with_all}"
    times = f" ({recheck.ratio:.3g} x the floor)" if recheck.ratio is not None else ""
    return f"{start} {left} is left{times}: something else is wrong, too"
