"""Which metrics vote: those that call damaged clips of this very baseline degraded.

The rule, for every metric: it must kill `black` and `noise`, and where it judges by the prompt,
also the wrong prompt. To what else it is blind it may be, if another voter sees it: every mutation
must be killed by at least one voter, else there is no pass. Killed means what degraded means of a
candidate: shown to lose more than the margin, over the same prompts. Pure: no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truestep.experiment.quality.detectors import DETECTORS
from truestep.experiment.quality.metrics import Kind, nearness, scale_of
from truestep.experiment.quality.mutations import ALWAYS, WRONG_PROMPT, expected
from truestep.experiment.quality.records import Clip, Vote
from truestep.experiment.quality.statistics import (
    ALPHA,
    LARGEST,
    Margin,
    compare,
    margin_of,
    measurable,
)

Array = NDArray[np.float64]

LEAST_SHARE = 0.01
"""Of what a clip of nothing loses: less is too little to count, however steady seeds are. Without
it, the colour of the digits, right to six digits from every seed, would fail by the seventh."""

FALSE_FINDS = 0.05
"""Share of the baseline's clips as they are above which a detector has no vote."""


class Scorer:
    """Scores of one metric from readings; of a look, by the baseline's other seeds.

    Args:
        baseline: Readings of the baseline, `prompt seed number`.
        kind: Of the metric.
    """

    def __init__(self, baseline: Array, kind: Kind) -> None:
        self._baseline, self._kind = baseline, kind
        self._scale = scale_of(baseline) if kind == "look" else None
        self.baseline = self.scores(baseline)

    def scores(self, readings: Array) -> Array:
        """Scores `prompt seed` of readings `prompt seed number`."""
        if self._scale is None:
            found: Array = readings[:, :, 0]
            return found
        return nearness(readings, self._baseline, self._scale)


def table(clips: Sequence[Clip], prompts: int, seeds: int) -> list[list[Clip]]:
    """Clips by prompt and seed.

    Raises:
        ValueError: One is missing, or comes twice.
    """
    places = {(clip.case, clip.seed): clip for clip in clips}
    if len(places) != len(clips) or len(clips) != prompts * seeds:
        raise ValueError(f"{len(clips)} clips for {prompts} prompts of {seeds} seeds")
    return [[places[case, seed] for seed in range(seeds)] for case in range(prompts)]


def readings_of(rows: Sequence[Sequence[Clip]], metric: str, mutation: str = "") -> Array:
    """Numbers `prompt seed number` of a metric, as they are or under a mutation."""
    return np.array(
        [[(c.mutated[mutation] if mutation else c.readings)[metric] for c in row] for row in rows],
        dtype=np.float64,
    )


def vote(
    rows: Sequence[Sequence[Clip]],
    metric: str,
    *,
    kind: Kind,
    prompted: bool,
    share: float,
    declared: float | None = None,
) -> Vote:
    """Put a metric to the mutations of the baseline's clips.

    Args:
        rows: Clips of the baseline, by prompt and seed.
        kind, prompted: Of the metric.
        share, declared: Its margin.
    """
    readings = readings_of(rows, metric)
    if not np.isfinite(readings).all():
        return Vote(metric=metric, reason="it gives no number for a clip of the baseline")
    if not measurable(readings):
        most = float(np.abs(readings).max())
        return Vote(metric=metric, reason=f"its numbers are too large to be compared: {most:.1e}")
    scorer = Scorer(readings, kind)
    required = (*ALWAYS, *((WRONG_PROMPT,) if prompted else ()))
    drop = _least_drop(rows, metric, scorer, required)
    least = LEAST_SHARE * max(0.0, drop) if kind == "score" else 0.0
    margin = margin_of(scorer.baseline, share=share, declared=declared, least=least)
    known: dict[str, Any] = {"margin": margin.value, "spread": margin.spread, "share": margin.share}
    if not margin.value <= LARGEST:
        return Vote(metric=metric, reason=f"its margin is {margin.value:g}: nothing exceeds it")
    if margin.value <= 0:
        return Vote(
            metric=metric,
            reason="seeds of a prompt all score the same, so no margin can be measured: declare "
            f"one in its own units, --margin {metric}=VALUE",
            **known,
        )
    frames = min(clip.frames for row in rows for clip in row)
    tried = {
        name: killed(scorer, readings_of(rows, metric, name), margin)
        for name in expected(frames)
        if all(name in clip.mutated for row in rows for clip in row)
    }
    dead = tuple(name for name, is_dead in tried.items() if is_dead)
    alive = tuple(name for name, is_dead in tried.items() if not is_dead)
    missed = [name for name in required if name not in dead]
    return Vote(
        metric=metric,
        killed=dead,
        survived=alive,
        reason=f"it does not notice {', '.join(missed)}" if missed else "",
        lost_below=None if missed else _lost_below(scorer, drop),
        **known,
    )


def _least_drop(
    rows: Sequence[Sequence[Clip]], metric: str, scorer: Scorer, required: Sequence[str]
) -> float:
    """What a clip that shows nothing of what was asked for loses, on average, at least."""
    damaged = [
        readings_of(rows, metric, name)
        for name in required
        if all(name in clip.mutated for row in rows for clip in row)
    ]
    drops = [
        float((scorer.baseline - scorer.scores(readings)).mean())
        for readings in damaged
        if measurable(readings)
    ]
    return min(drops, default=0.0)


def _lost_below(scorer: Scorer, drop: float) -> float | None:
    """Where a clip counts as lost, unless clips of the baseline are there themselves."""
    below = float(scorer.baseline.mean()) - drop / 2
    return None if (scorer.baseline < below).mean() > FALSE_FINDS else below


def killed(scorer: Scorer, readings: Array, margin: Margin) -> bool:
    """Whether damaged clips are shown to be worse than the baseline by more than the margin."""
    if not measurable(readings):
        return True  # a number that is none, or none that can be compared, is named as such
    found = compare(scorer.baseline, scorer.scores(readings), margin)
    return found.p_degraded <= ALPHA


def unseen(rows: Sequence[Sequence[Clip]], votes: Sequence[Vote]) -> tuple[str, ...]:
    """Mutations that no voter kills."""
    frames = min(clip.frames for row in rows for clip in row)
    seen = {name for each in votes if each.votes for name in each.killed}
    return tuple(name for name in expected(frames) if name not in seen)


def voting_detectors(
    rows: Sequence[Sequence[Clip]],
) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Detectors that vote, and why the others do not."""
    clips = [clip for row in rows for clip in row]
    voters, refused = [], {}
    for name in DETECTORS:
        tried = [clip.planted[name] for clip in clips if name in clip.planted]
        wrong = sum(name in clip.broken for clip in clips)
        if not tried:
            continue  # pictures do not freeze
        if not all(tried):
            refused[name] = f"it finds {sum(tried)} of {len(tried)} planted"
        elif wrong > FALSE_FINDS * len(clips):
            refused[name] = f"it finds {wrong} of {len(clips)} clips of the baseline as they are"
        else:
            voters.append(name)
    return tuple(voters), refused
