"""Quantised models: is a damaged tensor named, is a healthy one left alone, what does a list buy?

`python -m bench.bench_meant` goes on where it stopped, and writes bench/results/meant.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common import RESULTS, quiet
from bench.faults.draws import DRAWS, Draw
from bench.faults.quantised import DAMAGES, MAKERS, damaged, made
from bench.faults.subjects import Wan, subjects
from truestep.experiment.sensitivity import sensitivity
from truestep.experiment.trajectory import Trajectory, apart
from truestep.recording.format import Recording
from truestep.replay.check import check_pipeline
from truestep.replay.meant import with_meant
from truestep.replay.record import record_pipeline
from truestep.runtime.pipeline import models_of
from truestep.runtime.quantising import Layer, instead, layers_in, quantised
from truestep.verdict import Comparison

SUBJECTS = ("digits", "tiny-wan2.1", "tiny-wan2.2")
DTYPES = ("float32", "bfloat16")
CHANGES = ("gguf:Q4_0", "fp8", "gguf:Q4_K")
"""Of the lists to keep: those that move the end of a digits run."""

REFERENCE = ("int8", "int8-tensor", "fp8", "fp8-channel", "Q8_0", "Q4_0", "Q4_K")
"""Makers that do as the formats have it."""

RANDOM = 20
STEPS = 4

Row = dict[str, Any]
Place = tuple[Wan, Draw, str]


class Bench:
    """Recordings, and the runs that are done."""

    def __init__(self, output: Path) -> None:
        self.output = output
        lines = output.read_text().splitlines() if output.exists() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]
        self.done = {row["name"] for row in self.rows}
        self._recordings: dict[str, Recording] = {}

    def recording(self, place: Place) -> Recording:
        """What is trusted."""
        subject, draw, dtype = place
        name = f"{subject.name}/{dtype}/{draw.seed}"
        if name not in self._recordings:
            case = subject.case(draw, dtype)
            self._recordings[name] = record_pipeline(subject.load(draw, dtype), case=case)
        return self._recordings[name]

    def keep(self, row: Row) -> None:
        """Add a run to the file."""
        self.rows.append(row)
        self.done.add(row["name"])
        with self.output.open("a") as file:
            file.write(json.dumps(row) + "\n")


def places() -> Iterator[Place]:
    """Subjects and precisions."""
    for subject in subjects(SUBJECTS):
        for dtype in DTYPES:
            if isinstance(subject, Wan):
                short = {**subject.settings, "steps": STEPS}
                yield replace(subject, settings=short), DRAWS[0], dtype


def judged(bench: Bench, place: Place, pipe: Any, trusted: Any, name: str) -> Comparison:
    """What `check --meant` says of a loaded candidate."""
    subject, draw, dtype = place
    recording, case = bench.recording(place), subject.case(draw, dtype)
    check = partial(check_pipeline, pipe, recording, case=case, steps=(0,))
    sides = models_of(pipe), models_of(trusted)
    return with_meant(check(), *sides, name, check=check, locate=lambda rest: rest)


def run_healthy(bench: Bench, number: int, place: Place) -> None:
    """A healthy quantisation."""
    subject, draw, dtype = place
    kinds = [*MAKERS]
    kind = kinds[number % len(kinds)]
    maker = MAKERS[kind]
    declared = "auto" if number // len(kinds) % 2 == 0 else maker.family
    name = f"healthy/{number}/{kind}/{subject.name}/{dtype}/{declared}"
    if name in bench.done:
        return
    pipe, trusted = (subject.load(draw, dtype) for _ in range(2))
    made(pipe, maker)
    keep(bench, name, judged(bench, place, pipe, trusted, declared), kind=kind, where="")


def run_damaged(bench: Bench, number: int, place: Place) -> None:
    """A quantisation with one damaged tensor."""
    subject, draw, dtype = place
    kinds, turn = [*DAMAGES], number + number // len(DAMAGES)
    kind = kinds[number % len(kinds)]
    makers = [name for name in MAKERS if (name in REFERENCE) == bool(turn % 3)]
    maker = makers[turn % len(makers)]
    declared = "auto" if number % 2 else MAKERS[maker].family
    name = f"damaged/{number}/{kind}/{maker}/{subject.name}/{dtype}/{declared}"
    if name in bench.done:
        return
    pipe, trusted = (subject.load(draw, dtype) for _ in range(2))
    where = damaged(pipe, trusted, MAKERS[maker], kind, number)
    if where is None:
        bench.keep({"name": name, "kind": kind, "outcome": "no place"})
        return
    result = judged(bench, place, pipe, trusted, declared)
    keep(bench, name, result, kind=kind, where=where, maker=maker)


def keep(bench: Bench, name: str, result: Comparison, **fields: Any) -> None:
    """Add what was said."""
    meant = result.meant
    assert meant is not None
    bench.keep(
        {
            "name": name,
            **fields,
            "outcome": meant.outcome,
            "change": meant.change,
            "named": meant.faults[0].module if meant.faults else "",
            "ratio": meant.faults[0].ratio if meant.faults else None,
            "faults": len(meant.faults),
            "worst": meant.worst,
            "limit": meant.limit,
            "text": meant.text,
        }
    )


# --- lists to keep ------------------------------------------------------------------------------


def run_list(bench: Bench, change: str, draw: Draw) -> None:
    """The list of a change on digits, beside others of the same bytes."""
    name = f"list/{change}/{draw.seed}"
    if name in bench.done:
        return
    (subject,) = subjects(("digits",))
    assert isinstance(subject, Wan)
    case = subject.case(draw, "float32")
    found = sensitivity(case, change=change)
    ranked = draw is DRAWS[0] and change == CHANGES[0]  # every layer alone takes its time
    exact = sensitivity(case, change=change, exact=True) if ranked else None
    run = Trajectory.recorded(case)
    layers = layers_in(run.denoisers)
    changed = quantised(layers.values(), change)
    room = found.budget * found.total_bytes
    dice = random.Random(draw.seed)
    others = [filled(dice.sample([*changed], len(changed)), layers, room) for _ in range(RANDOM)]
    ends = first_and_last([*changed])
    bench.keep(
        {
            "name": name,
            "change": change,
            "seed": draw.seed,
            "nothing": [found.nothing_kept.final, found.nothing_kept.frames],
            "list": [found.list_kept.final, found.list_kept.frames],
            "random": [measured(run, layers, changed, other) for other in others],
            "ends": measured(run, layers, changed, filled(ends, layers, room)),
            "cost": found.forwards / found.forwards_generation,
            "spearman": spearman(found, exact) if exact else None,
            "estimated": spearman(estimates_alone(case, change), exact) if exact else None,
        }
    )


def estimates_alone(case: Any, change: str) -> Any:
    """The ranking with no layer measured: the estimate alone."""
    from truestep.experiment import sensitivity as module

    refined, module.REFINED = module.REFINED, 0
    try:
        return sensitivity(case, change=change)
    finally:
        module.REFINED = refined


def spearman(actual: Any, reference: Any) -> float:
    """Rank correlation of two rankings."""
    from scipy.stats import spearmanr

    own = {layer.name: layer.score for layer in actual.layers}
    theirs = {layer.name: layer.score for layer in reference.layers}
    return float(spearmanr([own[n] for n in own], [theirs[n] for n in own]).statistic)


def filled(order: Sequence[str], layers: Mapping[str, Layer], room: float) -> set[str]:
    """Layers in an order, as long as there is room."""
    kept = set[str]()
    for name in order:
        if layers[name].bytes <= room:
            kept.add(name)
            room -= layers[name].bytes
    return kept


def first_and_last(names: Sequence[str]) -> list[str]:
    """The first layer, the last, the second, the last but one, ..., in the order of the model."""
    order, left = [], [*names]
    while left:
        order.append(left.pop(0))
        if left:
            order.append(left.pop())
    return order


def measured(
    run: Trajectory,
    layers: Mapping[str, Layer],
    changed: Mapping[str, torch.Tensor],
    kept: set[str],
) -> list[float]:
    """rel_l2 of the final latent and of the frames, with some layers left as they are."""
    final, frames = run.final(), run.frames()
    with instead(layers, {name: t for name, t in changed.items() if name not in kept}):
        latent, decoded = run.free()
    return [apart(latent, final), apart(decoded, frames)]


# --- the table ----------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """The results as Markdown."""
    healthy = [row for row in rows if row["name"].startswith("healthy/")]
    broken = [
        row for row in rows if row["name"].startswith("damaged/") and row["outcome"] != "no place"
    ]
    accused = [row for row in healthy if row["outcome"] == "fault"]
    lines = [
        "# Faults under a meant change",
        "",
        "`check --meant` of quantised models: builtin digits and tiny random Wan 2.1 and 2.2, in "
        "float32 and bfloat16. `python -m bench.bench_meant` writes this.",
        "",
        f"- healthy quantisations accused: {len(accused)} of {len(healthy)} "
        f"(undecided: {sum(row['outcome'] == 'undecided' for row in healthy)})",
        *(
            f"- one damaged tensor named, {what}: {sum(r['named'] == r['where'] for r in own)} "
            f"of {len(own)}"
            for what, own in (
                (
                    "quantised as the formats have it",
                    [r for r in broken if r["maker"] in REFERENCE],
                ),
                ("by other makers", [r for r in broken if r["maker"] not in REFERENCE]),
            )
        ),
        "",
        "Kinds of damage (named / all). Those held out were written before the first run, and "
        "nothing was chosen by them. Makers held out were written after the limits were set: an "
        "earlier set, now counted as developed, was accused by limits that were too near what is "
        "explained.",
        "",
        "| damage | | named | healthy tensors accused beside it |",
        "|---|---|---|---|",
    ]
    for kind, damage in DAMAGES.items():
        own = [row for row in broken if row["kind"] == kind]
        hit = sum(row["named"] == row["where"] for row in own)
        beside = sum(max(row["faults"] - 1, 0) for row in own)
        word = "held out" if damage.held_out else "developed"
        lines.append(f"| {kind} | {word} | {hit} / {len(own)} | {beside} |")
    lines += [
        "",
        "| quantiser | | healthy: explained / all | accused | furthest, of its reach | taken for |",
        "|---|---|---|---|---|---|",
    ]
    for kind, maker in MAKERS.items():
        own = [row for row in healthy if row["kind"] == kind]
        good = sum(row["outcome"] == "explained" for row in own)
        bad = sum(row["outcome"] == "fault" for row in own)
        worst = max((row["worst"] or 0.0 for row in own), default=0.0)
        taken = Counter(row["change"] for row in own if row["name"].endswith("/auto"))
        word = "held out" if maker.held_out else "developed"
        names = ", ".join(taken)
        lines.append(f"| {kind} | {word} | {good} / {len(own)} | {bad} | {worst:.2f} | {names} |")
    return "\n".join([*lines, *lists(rows)]) + "\n"


def lists(rows: Sequence[Row]) -> Iterator[str]:
    """What lists to keep buy."""
    yield from (
        "",
        "## Lists to keep",
        "",
        f"A tenth of the bytes of digits' layers kept, rel_l2 of the final latent (and of the "
        f"decoded frames) from the trusted run's: `truestep sensitivity`, {RANDOM} random lists of "
        "the same bytes (median, best), and the first and last layers. Rank correlation is with "
        "every layer changed on its own: of the estimate alone, and with its foremost measured.",
        "",
        "| change | seed | nothing kept | the list | random, median | random, best "
        "| first and last | beats random | estimate | ranking | cost, generations |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    )
    for row in (row for row in rows if row["name"].startswith("list/")):
        finals = [final for final, _ in row["random"]]
        frames = [frame for _, frame in row["random"]]
        beaten = sum(row["list"][0] < final for final in finals)
        cells = [
            row["change"],
            str(row["seed"]),
            _pair(*row["nothing"]),
            _pair(*row["list"]),
            _pair(statistics.median(finals), statistics.median(frames)),
            _pair(min(finals), min(frames)),
            _pair(*row["ends"]),
            f"{beaten} of {len(finals)}",
            *("-" if row[key] is None else f"{row[key]:.2f}" for key in ("estimated", "spearman")),
            f"{row['cost']:.0f}",
        ]
        yield f"| {' | '.join(cells)} |"


def _pair(final: float, frames: float) -> str:
    return f"{final:.3f} ({frames:.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=165, help="of damage")
    parser.add_argument("--healthy", type=int, default=105)
    parser.add_argument("--lists", type=int, default=2, help="draws of lists to keep")
    parser.add_argument("--output", type=Path, default=Path("bench-output") / "meant.jsonl")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    quiet()
    torch.set_num_threads(1)
    bench, every = Bench(arguments.output), [*places()]
    for number in range(max(arguments.runs, arguments.healthy)):
        if number < arguments.healthy:
            run_healthy(bench, number, every[number // 2 % len(every)])
        if number < arguments.runs:
            run_damaged(bench, number, every[number // 3 % len(every)])
    for draw in DRAWS[: arguments.lists]:
        for change in CHANGES:
            run_list(bench, change, draw)
    (RESULTS / "meant.md").write_text(table(bench.rows))


if __name__ == "__main__":
    main()
