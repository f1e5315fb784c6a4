"""Whether what is under test left everything as the case has it: such a check is no evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from truestep.call_case import CallCase

_SCHEDULER = ("scheduler", "scheduler_settings.")


def settings_idle(
    case: CallCase, candidate: CallCase, recorded: Mapping[str, Any], here: Mapping[str, Any]
) -> bool:
    """Whether a candidate's case says what the case says, in other words at most.

    A default of the pipeline that is given, a file of the same content under another name, a
    scheduler that the model has already: all these change nothing.

    Args:
        case, candidate: Their files' hashes are in them, where the files are there.
        recorded: What the recording says of its call, pipeline, scheduler and weights.
        here: The same of the candidate.
    """
    keys = {difference.key for difference in candidate.differences(case.canonical())}
    if candidate.device != case.device:
        keys.add("device")
    same = {key for key, value in recorded.items() if value and here.get(key) == value}
    if "call" in same:
        keys = {key for key in keys if not key.startswith(("call.", "input."))}
        keys |= _other_files(case, candidate)
    if "pipeline" in same:
        keys.discard("pipeline")
    if "scheduler" in same:
        keys = {key for key in keys if not key.startswith(_SCHEDULER)}
    if "weights" in same:
        keys -= {"model", "revision"}
    if _loras(case) and _loras(case) == _loras(candidate):
        keys.discard("lora")
    if _function(case) and _function(case) == _function(candidate):
        keys.discard("prepare")
    return not keys


def _other_files(case: CallCase, candidate: CallCase) -> set[str]:
    """Inputs whose content is not known to be the same."""
    names = {*case.input, *candidate.input}
    return {
        f"input.{name}"
        for name in names
        if case.input.get(name) != candidate.input.get(name)
        and not _same(case, candidate, f"input.{name}")
    }


def _same(case: CallCase, candidate: CallCase, name: str) -> bool:
    return name in case.sha256 and case.sha256[name] == candidate.sha256.get(name)


def _loras(case: CallCase) -> list[tuple[str, float]]:
    """Content and scale of the LoRAs, in order; nothing where a file is not there."""
    named = [(case.sha256.get(f"lora.{lora.path}", ""), lora.scale) for lora in case.loras]
    return named if all(content for content, _ in named) else []


def _function(case: CallCase) -> tuple[str, str] | None:
    content = case.sha256.get("prepare")
    return (content, case.prepare.rpartition(":")[2]) if case.prepare and content else None
