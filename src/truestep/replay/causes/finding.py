"""Try hypotheses in turn, from what is said exactly to what is read off; the first that holds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from truestep.pairing.partners import Partners
from truestep.replay.causes import modules, operators, outputs, weights
from truestep.replay.causes.scene import Hypothesis, Scene, outcome, scene_of
from truestep.verdict import Cause, Divergence

MOST_TRIED = 1_500
"""Hypotheses after which a module is left unexplained."""

MOST_SECONDS = 600.0
"""Likewise, by what one run of the module takes: a whole model is not run a thousand times."""


def cause_of(
    found: Divergence, candidate: Any, trusted: Any, partners: Partners | None
) -> tuple[Cause | None, int]:
    """Why a module is wrong, and how much was tried; None where nothing of it explains it.

    Args:
        found: What a drill named.
        candidate, trusted: The two `drill.Subject`s.
        partners: Which modules answer to which.
    """
    if found.fqn is None:
        return None, 0
    place = (found.fqn, found.step or 0, found.branch or "main")
    scene: Scene | None = None
    with suppress(Exception):  # of code that nobody knows; what is named already stays named
        scene = scene_of(place, candidate, trusted, partners)
        if scene is not None:
            return explained(scene), scene.tried
    return None, 0 if scene is None else scene.tried


def explained(scene: Scene) -> Cause | None:
    """The first hypothesis under which the trusted module gives what the candidate gave."""
    start = time.perf_counter()
    plain = scene.run()
    most = most_tried(time.perf_counter() - start)
    before = scene.error(plain)
    if scene.agrees(plain) or before == float("inf"):
        return None
    for hypothesis in _in_turn(scene):
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
