"""Calibrate a reference's noise floor: many more benign runs, and what they say of the rule.

Each run combines harmless changes at random, as real candidates do. Every run is then judged by the
floor that the others make, which measures the false alarms instead of assuming them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from truestep.errors import surviving
from truestep.floors import NoiseFloor, NoiseRun
from truestep.judge.alarms import false_alarms
from truestep.judge.floor import FloorLookup, pair_of, sample_sizes
from truestep.judge.rule import RATE
from truestep.judge.tail import Tail
from truestep.keys import address
from truestep.progress import Progress
from truestep.replay.floor import noise_run
from truestep.replay.variations import Variation, functions, jitter, variations
from truestep.runtime.pipeline import Pipeline
from truestep.turns import taking_turns

STAGES = ("text", "prediction", "decoding")
"""Stages with a model in them: the others are elementwise, and few runs say all of them."""

MIXED = frozenset({"batch", "threads", "attention", "functions"})
"""Kinds of harmless change that a run combines with jitter."""

CLOSE = 1.1
"""Enough runs make bounds within this factor of those that endless runs would make."""


@dataclass(frozen=True)
class StageTail:
    """How well the benign size of a stage's worst tensor is known.

    Attributes:
        runs: Benign runs of that tensor. needed: runs that bring the bound within `CLOSE` of what
            endless runs would make it; None where the analytic minimum judges.
        floor: Largest benign rel_l2; bound and before: multiple of it now and before.
        spread: Standard deviation of the logarithm.
        outcomes: 2 where a kernel flips between two results.
    """

    stage: str
    tensor: str
    runs: int
    needed: int | None
    floor: float
    bound: float
    before: float
    spread: float
    outcomes: int


@dataclass(frozen=True)
class Calibration:
    """What the new runs gave.

    Attributes:
        floor: The reference's floor with the new runs.
        added: Runs added.
        flagged: Of them, how many the others' floor calls drifted or inconclusive.
        flagged_below: That share is below this with 95 % confidence (Clopper and Pearson, 1934).
        stages: One row a stage.
    """

    floor: NoiseFloor
    added: int
    flagged: int
    flagged_below: float
    stages: tuple[StageTail, ...]


@taking_turns()
@surviving("the pipeline")
def calibrate(
    pipe: Pipeline,
    recording: Mapping[str, torch.Tensor],
    floor: NoiseFloor,
    *,
    runs: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Add benign runs to a floor.

    Args:
        pipe: The trusted pipeline that made the recording.
        recording: Its full recording.
        floor: The floor so far.
        runs: How many to add, at least 1.
        seed: Which harmless changes are drawn.
        progress: Told about each run.
    """
    dice = random.Random(seed)
    start = sum(run.kind == "mixed" for run in floor.runs)
    new: list[NoiseRun] = []
    for done in range(runs):
        variation = _mixed(pipe, dice, number=start + done, seed=seed)
        with variation.vary(pipe) as varied:
            outputs = variation.run(varied, recording)
        weights = sample_sizes((*floor.runs, *new))
        new.append(noise_run(variation, outputs, recording, weights=weights))
        if progress:
            progress("benign runs", done + 1, runs)
    both = NoiseFloor(runs=(*floor.runs, *new))
    dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in recording.items()}
    flagged, below = false_alarms(floor, new, dtypes)
    pair = new[0].pair
    return Calibration(
        floor=both,
        added=runs,
        flagged=flagged,
        flagged_below=below,
        stages=tuple(_stages(floor, both, pair=pair, dtypes=dtypes)),
    )


def _mixed(pipe: Pipeline, dice: random.Random, *, number: int, seed: int) -> Variation:
    """Jitter, and half of the time one more harmless change."""
    dtype = str(pipe.first_transformer.dtype).removeprefix("torch.")
    pair, drawn = pair_of(dtype, dtype), 10_000 * (seed + 1) + number
    known = [v for v in variations(pipe) if v.kind in MIXED]
    known = [functions(drawn, pair) if v.kind == "functions" else v for v in known]
    moved = jitter(drawn, pair)
    parts = [*([dice.choice(known)] if known and dice.random() < 0.5 else []), moved]

    @contextmanager
    def vary(inner: Pipeline) -> Iterator[Pipeline]:
        with ExitStack() as stack:
            for part in parts:
                inner = stack.enter_context(part.vary(inner))
            yield inner

    detail = " + ".join(part.detail for part in parts)
    return replace(moved, kind="mixed", detail=detail, vary=vary, stages=STAGES)


def _stages(
    before: NoiseFloor, after: NoiseFloor, *, pair: str, dtypes: Mapping[str, str]
) -> Iterator[StageTail]:
    earlier, lookup = FloorLookup(before, pair=pair), FloorLookup(after, pair=pair)
    level = RATE / max(len(dtypes), 1)
    for stage in STAGES:
        rows = []
        for name, dtype in dtypes.items():
            if address(name).stage != stage or name not in lookup:
                continue
            found = lookup.find(name, dtype=dtype, structure=False)
            if found is None:
                continue
            tail, used = found.tails["rel_l2"], found.used
            old = earlier.find(name, dtype=dtype, structure=False)
            old_bound = old.tails["rel_l2"].critical(level) / old.used.rel_l2 if old else 0.0
            rows.append(
                StageTail(
                    stage=stage,
                    tensor=name,
                    runs=used.runs,
                    needed=_needed(tail, used.runs, level),
                    floor=used.rel_l2,
                    bound=tail.critical(level) / used.rel_l2,
                    before=old_bound,
                    spread=tail.spread,
                    outcomes=2 if "two outcomes" in used.detail else 1,
                )
            )
        if rows:
            yield max(rows, key=lambda row: row.bound)


def _needed(tail: Tail, runs: int, level: float) -> int | None:
    """Runs after which the bound is within `CLOSE` of what endless runs would make it."""
    from scipy.special import ndtri, stdtrit

    if math.isinf(tail.freedom):
        return None
    per_run = tail.freedom / max(runs, 1)
    for count in (5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500):
        freedom = per_run * count
        wider = (1 + 1 / count) ** 0.5 * float(stdtrit(freedom, level)) - float(ndtri(level))
        if -tail.spread * wider <= math.log(CLOSE):
            return count
    return 1000
