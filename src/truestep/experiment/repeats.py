"""What became of the generations after the one that was checked. Pure: no I/O, no torch.

An arm may change between two runs (a cache that fills, a counter, a library that picks another
kernel). Every result that is not, bit by bit, the checked one is judged for itself; the worst
counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from truestep.experiment.records import ArmName, CellResult, Repeat, Sample
from truestep.keys import FINALS
from truestep.verdict import Row, Verdict


def of_arm(repeats: Iterable[Repeat], *arms: ArmName) -> list[Repeat]:
    """Those of some arms that could be judged."""
    return [repeat for repeat in repeats if repeat.arm in arms and repeat.row is not None]


def failing(repeats: Iterable[Repeat]) -> Repeat | None:
    """The first that is not the same as the baseline."""
    return next((r for r in repeats if r.row is not None and not r.row.verdict.passed), None)


def verdict_with(checked: Verdict | None, repeats: Sequence[Repeat]) -> Verdict | None:
    """The verdict on the candidate's latents once its other results are judged too.

    Where the baseline or its control goes further off than the floor by itself, a repeat of the
    candidate that does the same proves nothing against it.
    """
    own = [row.verdict for row in _rows(of_arm(repeats, "candidate"))]
    trusted = of_arm(repeats, "baseline", "control")
    if failing(trusted) is not None:
        own = [Verdict.INCONCLUSIVE if found is Verdict.DRIFTED else found for found in own]
    elif trusted:  # the baseline is not one set of bits: nothing is identical to it
        own.append(Verdict.EQUIVALENT)
    if checked is None:
        return None
    return Verdict.worst([checked, *own])


def finals(repeats: Iterable[Repeat]) -> list[Row]:
    """Rows of the candidate's final latents."""
    return [r for r in _rows(of_arm(repeats, "candidate")) if r.name in FINALS]


def _rows(repeats: Iterable[Repeat]) -> list[Row]:
    return [repeat.row for repeat in repeats if repeat.row is not None]


def undecided(samples: Iterable[Sample], repeats: Sequence[Repeat]) -> list[str]:
    """What the other results leave open: arms that do not stay the same, results not judged."""
    said = []
    trusted: dict[ArmName, str] = {"baseline": "the baseline", "control": "the A/A control"}
    for arm, name in trusted.items():
        found = failing(of_arm(repeats, arm))
        if found is not None:
            said.append(
                f"{name} gives other latents from one run to the next, beyond the floor "
                f"({_place(found)})"
            )
    results: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for sample in samples:
        results.setdefault((sample.arm, sample.case), set()).add((sample.latent, sample.frames))
    for repeat in repeats:
        if repeat.row is not None:
            results.get((repeat.arm, repeat.case), set()).discard((repeat.latent, repeat.frames))
    for (owner, case), left in results.items():
        if len(left) > 1:  # one of them is the one that was checked
            said.append(
                f"{case}: {len(left) - 1} more results of the {owner} were not judged: give "
                "another --output to run it anew"
            )
    return said


def divergence(repeats: Iterable[Repeat]) -> str:
    """Where the candidate's repeats first are not the same; "" where they are."""
    found = failing(of_arm(repeats, "candidate"))
    return f"`{found.row.name}`, {_place(found)}" if found and found.row else ""


def _place(repeat: Repeat) -> str:
    return "warming up" if repeat.round is None else f"round {repeat.round}"


def notes(result: CellResult) -> list[str]:
    """One line an arm that did not always give the same."""
    said = []
    for arm, summary in result.arms.items():
        own = [repeat for repeat in result.repeats if repeat.arm == arm]
        of_case: dict[str, set[str]] = {}
        for repeat in own:
            of_case.setdefault(repeat.case, {repeat.checked}).add(repeat.latent)
        count = max(summary.results, *map(len, of_case.values()), 1)
        if count == 1 and not own:
            continue
        what = f"{count} different latents" if count > 1 else "one latent decoded to other frames"
        said.append(f"{arm}: repeats of one case gave {what}{_furthest(own)}")
    return said


def _furthest(repeats: Sequence[Repeat]) -> str:
    judged = [(r, r.row) for r in repeats if r.row is not None]
    if not judged:
        return ""
    worst = Verdict.worst(row.verdict for _, row in judged)
    repeat, row = max(
        ((r, row) for r, row in judged if row.verdict is worst), key=lambda pair: pair[1].ratio or 0
    )
    size = f"rel_l2 {row.metrics.rel_l2:.2g}" if row.metrics else "no numbers"
    ratio = f", {row.ratio:.2g} x floor" if row.ratio is not None else ""
    return f"; the furthest is {worst.value} ({size}{ratio}, {_place(repeat)})"
