"""Is `ab --quality` right: wrong passes at the margin, power, and ranks against the judge's truth.

    python -m bench.bench_quality [simulate] [truth] [rank] [report]

Every part goes on where it stopped; `report` writes `bench/results/quality.md` and the plot.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from truestep.case import Case
from truestep.experiment.quality import metrics, planning
from truestep.experiment.quality.records import Quality, QualityPlan
from truestep.experiment.quality.result import summarise
from truestep.experiment.quality.running import run_quality
from truestep.experiment.quality.statistics import MARGIN_SHARE, compare, margin_of
from truestep.experiment.quality.store import QualityStore
from truestep.experiment.records import PlannedCell

RESULTS = Path(__file__).parent / "results"
SIMULATED = RESULTS / "quality-simulated.jsonl"
TRUTH = RESULTS / "quality-truth.jsonl"
RANKS = RESULTS / "quality-ranks.json"
PLOT = RESULTS / "quality-frontier.svg"

TIMES = 2_000
PROMPTS, SEEDS = planning.PROMPTS, planning.SEEDS
Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, int, float], tuple[Array, Array]]


@dataclass(frozen=True)
class Shape:
    """A kind of scores.

    Attributes:
        draw: (generator, prompts, seeds, gap) to scores of baseline and candidate, `prompt seed`;
            the candidate's true mean is `gap` less.
        spread: The true spread between seeds.
        beyond: What no method can do with it, and why; empty of most.
    """

    draw: Draw
    spread: float
    beyond: str = ""


def _normal(rng: np.random.Generator, n: int, k: int, gap: float, *, same: float = 0.0) -> Any:
    shared = rng.standard_normal((n, k)) * math.sqrt(same)
    prompt = 2 * rng.standard_normal((n, 1))
    own = [shared + prompt + rng.standard_normal((n, k)) * math.sqrt(1 - same) for _ in "ab"]
    return own[0], own[1] - gap


def _losing(rng: np.random.Generator, n: int, k: int, gap: float, *, loss: Any) -> Any:
    """Arms of much the same noise; prompts lose by a law of mean 1 times the gap."""
    ours, theirs = _normal(rng, n, k, 0.0, same=0.8)
    return ours, theirs - gap * loss(rng, (n, 1))


def _one_in(rng: np.random.Generator, shape: tuple[int, int], *, p: float) -> Array:
    return (rng.random(shape) < p) / p


def _lognormal(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    drawn: Array = np.exp(rng.standard_normal(shape) - 0.5)
    return drawn


def _skewed(rng: np.random.Generator, n: int, k: int, gap: float) -> Any:
    return -rng.exponential(1, (n, k)), -rng.exponential(1, (n, k)) - gap


def _heavy(rng: np.random.Generator, n: int, k: int, gap: float) -> Any:
    return rng.standard_t(3, (n, k)), rng.standard_t(3, (n, k)) - gap


def _uneven(rng: np.random.Generator, n: int, k: int, gap: float) -> Any:
    """Prompts whose seeds differ little or much, and which lose in proportion."""
    scale = np.exp(0.8 * rng.standard_normal((n, 1)))
    ours, theirs = rng.standard_normal((n, k)) * scale, rng.standard_normal((n, k)) * scale
    return ours, theirs - gap * scale / math.exp(0.32)


def _right(rng: np.random.Generator, n: int, k: int, gap: float, *, p: float, same: bool) -> Any:
    ours = rng.random((n, k))
    theirs = ours if same else rng.random((n, k))
    return (ours < p).astype(float), (theirs < p - gap).astype(float)


def _ties(rng: np.random.Generator, n: int, k: int, gap: float) -> Any:
    """Scores in halves, of which seven prompts in ten stay as they are."""
    ours = np.round(2 * _normal(rng, n, k, 0.0)[0]) / 2
    moved = rng.random((n, 1)) < 0.3
    noise = rng.integers(-1, 2, (n, k)) / 2
    return ours, ours + moved * (noise - gap / 0.3)


def _constant(rng: np.random.Generator, n: int, k: int, gap: float) -> Any:
    ours = _normal(rng, n, k, 0.0)[0]
    return ours, ours - gap


def _exponential(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return rng.exponential(1, shape)


SHAPES: Mapping[str, Shape] = {
    "normal, arms unrelated": Shape(_normal, 1.0),
    "normal, same noise": Shape(partial(_normal, same=0.8), 1.0),
    "every prompt loses the same": Shape(_constant, 1.0),
    "exponential losses": Shape(partial(_losing, loss=_exponential), 1.0),
    "lognormal losses": Shape(partial(_losing, loss=_lognormal), 1.0),
    "one prompt of 4 loses": Shape(partial(_losing, loss=partial(_one_in, p=0.25)), 1.0),
    "one prompt of 10 loses": Shape(partial(_losing, loss=partial(_one_in, p=0.1)), 1.0),
    "one prompt of 20 loses": Shape(
        partial(_losing, loss=partial(_one_in, p=0.05)),
        1.0,
        "of 32 prompts none is such a one in 19 % of all draws: nothing can be seen in them",
    ),
    "skewed scores": Shape(_skewed, 1.0),
    "heavy tails (t, 3)": Shape(_heavy, math.sqrt(3)),
    "uneven prompts": Shape(_uneven, math.exp(0.64)),
    "right or wrong, 70 %": Shape(partial(_right, p=0.7, same=False), math.sqrt(0.21)),
    "right or wrong, 90 %": Shape(partial(_right, p=0.9, same=False), 0.3),
    "right or wrong, 90 %, same noise": Shape(partial(_right, p=0.9, same=True), 0.3),
    "right or wrong, 98 %": Shape(
        partial(_right, p=0.98, same=False),
        math.sqrt(0.0196),
        "two wrong of a hundred: 128 clips hold two or three",
    ),
    "ties": Shape(_ties, math.sqrt(1 + 1 / 48)),
}


def t_passes(psi: Array) -> bool:
    """Student's t, one-sided."""
    return float(psi.mean()) > float(
        stats.t.ppf(0.95, len(psi) - 1) * psi.std(ddof=1) / math.sqrt(len(psi))
    )


def bootstraps(psi: Array, drawn: Array) -> tuple[bool, bool, bool]:
    """Percentile, BCa and studentised bootstrap, one-sided at 95 %."""
    resampled = psi[drawn]
    means, n = resampled.mean(axis=1), len(psi)
    percentile = float(np.quantile(means, 0.05)) > 0
    error = resampled.std(axis=1, ddof=1) / math.sqrt(n)
    own = float(psi.std(ddof=1)) / math.sqrt(n)
    kept = error > 0
    if not kept.any() or own == 0:
        return percentile, percentile, bool(psi.mean() > 0)
    t = (means[kept] - psi.mean()) / error[kept]
    studentised = float(psi.mean() - np.quantile(t, 0.95) * own) > 0
    below = float((means < psi.mean()).mean())
    z = float(stats.norm.ppf(min(max(below, 1e-4), 1 - 1e-4)))
    left_out = (psi.sum() - psi) / (n - 1)
    apart = left_out.mean() - left_out
    power = float((apart**2).sum()) ** 1.5
    a = float((apart**3).sum()) / (6 * power) if power else 0.0
    moved = z + (z - 1.645) / (1 - a * (z - 1.645))
    bca = float(np.quantile(means, float(stats.norm.cdf(moved)))) > 0
    return percentile, bca, studentised


METHODS = ("ours", "t, margin taken as known", "t", "percentile", "BCa", "studentised")


def simulate() -> None:
    """Passes of every method, at the margin and without a gap."""
    done = {(r["shape"], r["prompts"], r["gap"]) for r in _lines(SIMULATED)}
    for prompts in (PROMPTS, 12):
        for name, shape in SHAPES.items():
            for gap in (MARGIN_SHARE, 0.0):
                if (name, prompts, gap) in done:
                    continue
                found = _simulated(shape, prompts, gap, others=prompts == PROMPTS)
                _append(SIMULATED, {"shape": name, "prompts": prompts, "gap": gap, **found})


def _simulated(shape: Shape, prompts: int, gap: float, *, others: bool) -> dict[str, float]:
    rng = np.random.default_rng([7, prompts, int(10 * gap)])
    drawn = rng.integers(0, prompts, (500, prompts))
    passed = dict.fromkeys(METHODS if others else METHODS[:1], 0)
    degraded = 0
    for _ in range(TIMES):
        ours, theirs = shape.draw(rng, prompts, SEEDS, gap * shape.spread)
        margin = margin_of(ours)
        if margin.value == 0:
            continue  # no margin, no vote, no pass
        found = compare(ours, theirs, margin)
        passed["ours"] += found.not_worse
        degraded += found.p_degraded <= 0.05
        if others:
            allowed = MARGIN_SHARE * (ours.var(axis=1, ddof=1) + margin.spread**2)
            differences = (theirs - ours).mean(axis=1)
            psi = differences + allowed / (2 * margin.spread)
            passed["t, margin taken as known"] += t_passes(differences + margin.value)
            passed["t"] += t_passes(psi)
            for key, said in zip(METHODS[3:], bootstraps(psi, drawn), strict=True):
                passed[key] += said
    return {**{key: count / TIMES for key, count in passed.items()}, "degraded": degraded / TIMES}


SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "8 steps": {"steps": 8},
    "4 steps": {"steps": 4},
    "3 steps": {"steps": 3},
    "2 steps": {"steps": 2},
    "6 steps, no guidance": {"steps": 6, "guidance_scale": 1.0},
    "3 steps, no guidance": {"steps": 3, "guidance_scale": 1.0},
    "8 steps, guidance 12": {"steps": 8, "guidance_scale": 12.0},
    "8 steps, guidance 15": {"steps": 8, "guidance_scale": 15.0},
    "8 steps, guidance 20": {"steps": 8, "guidance_scale": 20.0},
    "8 steps, guidance 30": {"steps": 8, "guidance_scale": 30.0},
}
"""Ten settings of the digits model, from as good as the baseline to mostly wrong."""

TRUTH_SEED = 5_000_000
"""Of clips that no rank is made from."""

RANK_SEEDS = 3


def truth() -> None:
    """What the judge that knows nothing of truestep says: a support vector machine reads the digit.

    Every one of the 160 prompts once a setting, from seeds that no rank is made from.
    """
    from training.digits.data import Caption
    from training.digits.judge import score, train_reader
    from truestep.experiment.arms import load_arm, run
    from truestep.experiment.quality import digits_judge as judge
    from truestep.experiment.quality.running import frames_of

    done = {row["setting"] for row in _lines(TRUTH)}
    reader, arm = train_reader(), None
    for name, own in SETTINGS.items():
        if name in done:
            continue
        frames, captions = [], []
        for at, prompt in enumerate(judge.prompts()):
            case = Case(model="builtin:digits", prompt=prompt, seed=TRUTH_SEED + at)
            arm = arm or load_arm("baseline", case)
            made = run(arm, case.replace(**own))
            frames.append(frames_of(made.tensors["video/frames"]))
            asked = judge.asked(prompt)
            assert asked is not None
            captions.append(Caption(asked.digit, asked.colour, asked.direction))
        found = score(np.stack(frames), captions, reader)
        _append(TRUTH, {"setting": name, "clips": found.clips, "right": found.all_three})


def _experiment(
    folder: Path, cells: list[PlannedCell], *, seeds: int, frontier: bool = False
) -> Quality:
    """Run an experiment on the digits, or go on with it."""
    cases = planning.cases_of(
        planning.prompt_cases("builtin:digits", planning.prompts_for("builtin:digits")),
        most=PROMPTS,
    )
    chosen = metrics.chosen("builtin:digits", [])
    plan = QualityPlan(
        cases=cases,
        cells=tuple(cells),
        seeds=seeds,
        metrics={metric.name: "" for metric in chosen},
        margin=MARGIN_SHARE,
        broken=0.1,
        frontier=frontier,
    )
    planning.validate(plan)
    store = QualityStore(folder)
    begun = (folder / "plan.json").exists()
    if begun:  # whether it is drawn as a frontier decides only what a control run adds
        frontier, plan = plan.frontier, plan.model_copy(update={"frontier": store.plan().frontier})
    store.begin(plan, resume=begun)
    run_quality(plan, store, metrics=chosen)
    plan = plan.model_copy(update={"frontier": frontier})
    return summarise(plan, store.clips()[0], metrics=chosen)


def _cells(settings: Mapping[str, Mapping[str, Any]]) -> list[PlannedCell]:
    return [
        PlannedCell(name=name, folder=name.replace(" ", "-").replace(",", ""), candidate=dict(own))
        for name, own in settings.items()
    ]


def rank(work: Path) -> None:
    """The ten settings as `ab --quality` sees them."""
    found = _experiment(work / "ranks", _cells(SETTINGS), seeds=RANK_SEEDS, frontier=True)
    RANKS.write_text(found.model_copy(update={"clips": ()}).model_dump_json(indent=1) + "\n")


def kendall() -> dict[str, float]:
    """Tau-b with the truth, by the worst metric that reads the prompt, and by the worst of all."""
    right = {row["setting"]: row["right"] for row in _lines(TRUTH)}
    found = Quality.model_validate_json(RANKS.read_text())
    prompted = {metric.name for metric in metrics.builtin("builtin:digits") if metric.prompted}
    read = [cell for cell in found.candidates if cell.cell.name in right]
    names = [cell.cell.name for cell in read]
    every = {
        key: [
            min(r.difference / r.margin for r in cell.rows if r.metric in chosen) for cell in read
        ]
        for key, chosen in {"prompted": prompted, "all": {*prompted, "look"}}.items()
    }
    truths = [right[name] for name in names]
    return {key: float(stats.kendalltau(values, truths).statistic) for key, values in every.items()}


def report() -> None:
    """Write the tables and the plot."""
    lines = ["# Quality: wrong passes, power, ranks", "", *_method_text(), *_simulation_tables()]
    if RANKS.exists() and TRUTH.exists():
        lines += _rank_table()
    if RANKS.exists():
        lines += _frontier_table()
    (RESULTS / "quality.md").write_text("\n".join(lines) + "\n")


def _method_text() -> list[str]:
    return [
        f"`make bench-quality`. {TIMES:,} simulated experiments a cell, {SEEDS} seeds a prompt, "
        f"margin {MARGIN_SHARE:g} of the spread between seeds, the margin measured anew in every "
        "one. A wrong pass is a pass whose true loss is exactly the margin: 5 % are allowed. "
        "Power is passes without any loss.",
        "",
    ]


def _simulation_tables() -> Iterator[str]:
    found = _lines(SIMULATED)
    for prompts in sorted({row["prompts"] for row in found}, key=lambda n: (n != PROMPTS, n)):
        rows = {(r["shape"], r["gap"]): r for r in found if r["prompts"] == prompts}
        methods = [m for m in METHODS if any(m in row for row in rows.values())]
        yield f"## {prompts} prompts"
        yield ""
        heads = ["scores", *(f"{m}: wrong" for m in methods), *(f"{m}: power" for m in methods)]
        yield "| " + " | ".join(heads) + " |"
        yield "|---" * len(heads) + "|"
        for name in SHAPES:
            at, none = rows.get((name, MARGIN_SHARE)), rows.get((name, 0.0))
            if at is None or none is None:
                continue
            cells = [f"{100 * at[m]:.1f} %" for m in methods]
            cells += [f"{100 * none[m]:.0f} %" for m in methods]
            yield "| " + " | ".join([name, *cells]) + " |"
        yield ""
    for name, shape in SHAPES.items():
        if shape.beyond:
            yield f"- {name}: {shape.beyond}"
    yield ""


def _rank_table() -> list[str]:
    right = {row["setting"]: row for row in _lines(TRUTH)}
    found = Quality.model_validate_json(RANKS.read_text())
    agreement = kendall()
    lines = [
        "## Settings against the judge's truth",
        "",
        f"{found.prompts} prompts, {RANK_SEEDS} seeds, {len(right)} settings. "
        "The truth is read by a support vector machine "
        "that shares only the training scans with the metrics, from other clips: every one "
        f"of the 160 prompts once. Tau-b: {agreement['prompted']:.2f} by the worst metric "
        f"that reads the prompt, {agreement['all']:.2f} with `look`, which asks for likeness.",
        "",
        "| setting | right (truth) | outcome | digit | direction | colour | look |",
        "|---|---|---|---|---|---|---|",
    ]
    read = [cell for cell in found.candidates if cell.cell.name in right]
    for cell in sorted(read, key=lambda c: -right[c.cell.name]["right"]):
        rows = {row.metric: f"{row.difference / row.margin:+.2f}" for row in cell.rows}
        values = [rows.get(name, "-") for name in ("digit", "direction", "colour", "look")]
        share = f"{right[cell.cell.name]['right']:.1%}".replace("%", " %")
        lines.append(
            "| " + " | ".join([cell.cell.name, share, cell.standing.value, *values]) + " |"
        )
    return [*lines, "", "Differences are in margins of the metric.", ""]


def _frontier_table() -> list[str]:
    from truestep.report.frontier import points_of, svg
    from truestep.report.quality import FRONTIER as HEADS
    from truestep.report.quality import frontier_rows

    found = Quality.model_validate_json(RANKS.read_text())
    PLOT.write_text(svg(points_of(found)))
    rows = ["| " + " | ".join(row) + " |" for row in frontier_rows(found)]
    return [
        "## Frontier of the digits model",
        "",
        f"25 steps are the baseline; {found.prompts} prompts, {RANK_SEEDS} seeds, one thread. "
        "Speed: "
        "times as fast; drift: rel_l2 of the final latent; quality: the worst metric in its "
        "margins. [Plot](quality-frontier.svg)",
        "",
        "| " + " | ".join(HEADS) + " |",
        "|---" * len(HEADS) + "|",
        *rows,
        "",
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


PARTS = ("simulate", "truth", "rank", "report")


def main() -> None:
    """Run the parts that are named, or all."""
    import torch

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=PARTS)
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    options = parser.parse_args()
    work: dict[str, Callable[[], None]] = {
        "simulate": simulate,
        "truth": truth,
        "rank": partial(rank, options.work),
        "report": report,
    }
    options.work.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        work[part]()


if __name__ == "__main__":
    main()
