"""False alarms of a noise floor, measured: each benign run is judged by what the others make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from truestep.floors import NoiseFloor, NoiseRun
from truestep.judge.rule import judge_run
from truestep.verdict import Verdict

FOLDS = 5
_FLAGS = (Verdict.DRIFTED, Verdict.INCONCLUSIVE, Verdict.INVALID)


def false_alarms(
    before: NoiseFloor, new: Sequence[NoiseRun], dtypes: Mapping[str, str]
) -> tuple[int, float]:
    """How many of the new runs do not pass by the floor that all but a fifth of them make.

    Args:
        before: The floor so far.
        new: Benign runs that it does not have.
        dtypes: Of every tensor by name.

    Returns:
        Their number, and what their share is below with 95 % confidence (Clopper and Pearson,
        1934).
    """
    flagged = sum(_flagged(before, new, fold, dtypes) for fold in range(FOLDS))
    return flagged, _upper(flagged, len(new))


def _flagged(
    floor: NoiseFloor, new: Sequence[NoiseRun], fold: int, dtypes: Mapping[str, str]
) -> int:
    """Runs of one fold that do not pass by the floor of all others."""
    others = NoiseFloor(
        runs=(*floor.runs, *(run for at, run in enumerate(new) if at % FOLDS != fold))
    )
    own = [run for at, run in enumerate(new) if at % FOLDS == fold]
    return sum(any(o.verdict in _FLAGS for o in judge_run(run, others, dtypes)) for run in own)


def _upper(flagged: int, runs: int) -> float:
    from scipy.special import betaincinv

    return 1.0 if flagged >= runs else float(betaincinv(flagged + 1, runs - flagged, 0.95))
