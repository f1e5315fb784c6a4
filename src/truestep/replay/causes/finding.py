"""Try hypotheses in turn, from what is said exactly to what is read off; the first that holds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from truestep.replay.causes import modules, operators, outputs, weights
from truestep.replay.causes.scene import Hypothesis, Scene, outcome, scenes_of
from truestep.verdict import Cause

MOST_TRIED = 1_500
"""Hypotheses after which a module is left unexplained."""

MOST_OTHERS = 4
"""Modules beside the first about which everything is tried."""

MOST_SECONDS = 600.0
"""Likewise, by what one run of the module takes: a whole model is not run a thousand times."""


def causes_of(
    fqns: Sequence[str], sides: Any, *, first: str | None = None
) -> list[tuple[Cause | None, int]]:
    """Why modules are wrong, and how much was tried about each; None where nothing explains one.

    Args:
        fqns: What a drill named.
        sides: The `further.Sides` of that drill.
        first: A kind of cause: tried before all others, which are tried about few modules only.
    """
    scenes: dict[str, Scene] = {}
    with suppress(Exception):  # of code that nobody knows; what is named already stays named
        found = scenes_of(fqns, sides.place, sides.candidate, sides.trusted, sides.partners)
        scenes.update({scene.fqn: scene for scene in found})
    told, others = list[tuple[Cause | None, int]](), 0
    for fqn in fqns:
        scene, cause = scenes.get(fqn), None
        with suppress(Exception):
            if scene is not None and first is not None:
                cause = explained(scene, only=first)
            if scene is not None and cause is None and (first is None or others < MOST_OTHERS):
                others += 1
                cause = explained(scene)
        told.append((cause, scene.tried if scene is not None else 0))
    return told


def explained(scene: Scene, *, only: str | None = None) -> Cause | None:
    """The first hypothesis under which the trusted module gives what the candidate gave.

    Args:
        only: Of one kind.
    """
    start = time.perf_counter()
    plain = scene.run()
    most = most_tried(time.perf_counter() - start)
    before = scene.error(plain)
    if scene.agrees(plain) or before == float("inf"):
        return None
    for hypothesis in _in_turn(scene):
        if only is not None and hypothesis.kind != only and hypothesis.said is None:
            continue  # one that says its kind once it is accepted is tried in any case
        if scene.tried >= most:
            break
        made = outcome(scene, hypothesis)
        if made is not None and scene.explains(hypothesis, made, before):
            kind, text = (
                hypothesis.said() if hypothesis.said else (hypothesis.kind, hypothesis.text)
            )
            return Cause(
                kind=kind,
                text=text,
                patch=hypothesis.patch,
                line=hypothesis.line,
                error_before=before,
                error_after=scene.error(made),
                tried=scene.tried,
            )
    return None


def most_tried(seconds: float) -> int:
    """How many hypotheses are tried about a module that takes so long; those that are exact come
    first."""
    return min(MOST_TRIED, max(1, int(MOST_SECONDS / max(seconds, 1e-9))))


def _in_turn(scene: Scene) -> Iterator[Hypothesis]:
    for several in (
        weights.hypotheses,
        modules.attributes,
        modules.usual,
        modules.activations,
        modules.whole,
        outputs.hypotheses,
        operators.hypotheses,
        operators.inside,
    ):
        yield from several(scene)
