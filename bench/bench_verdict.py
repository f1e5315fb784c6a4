"""Run the corpus: every fault and harmless twin, on every subject, under every gate.

    python -m bench.bench_verdict [--subject NAME] [--dtype DTYPE] [--entry NAME] [--output FOLDER]

Writes one JSON line a run to `verdict.jsonl` as it goes, and goes on where a killed run stopped;
then `bench.verdict_report` writes the table and the plot.

    python -m bench.bench_verdict --thinned [--steps 20]

judges truestep's own stages twice instead, by a recording that keeps every step and by the thinned
one that it makes of itself: `verdict-thinned.jsonl`, and its own table.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.common import RESULTS, read
from bench.faults.draws import DRAWS, Draw
from bench.faults.registry import BENIGN, FAULTS, Fault, NotApplicable
from bench.faults.subjects import Outputs, Subject, Wan, effect, subjects
from truestep.gates.kinds import Gate, parse_gate
from truestep.measure.distance import same_bits
from truestep.recording.format import Recording
from truestep.replay.steps import kept_steps
from truestep.replay.thinning import thinned
from truestep.verdict import Comparison

GATES = (
    "cosine:5e-3,1e-2",
    "allclose:1e-4",
    "cosine-one:1e-3",
    "slice:1e-4",
    "sglang",
    "ms-ssim:0.93",
)
"""Other tools' gates, with the thresholds that they ship with; all need a full generation."""


def main() -> None:
    options = _options()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / ("verdict-thinned.jsonl" if options.thinned else "verdict.jsonl")
    done = {_key(row) for row in read(path)}
    torch.set_num_threads(1)
    gates = [parse_gate(name) for name in GATES]
    run = _draw_thinned if options.thinned else _draw_alone if options.alone else _draw
    for subject in _subjects(options):
        for dtype in subject.dtypes:
            if options.dtype in (None, dtype):
                for draw in DRAWS[: options.draws]:
                    run(subject, dtype, draw, options.entry, gates, path, done)
    if not options.entry and options.report:
        from bench.verdict_report import write, write_thinned

        (write_thinned if options.thinned else write)(read(path), options.output)


def _subjects(options: Any) -> Iterator[Subject]:
    """Those that are asked for; of thinned recordings those with stages, at so many steps."""
    for subject in subjects(tuple(options.subject)):
        if not options.thinned:
            yield subject
        elif isinstance(subject, Wan):
            settings = {**subject.settings, "steps": options.steps}
            yield replace(subject, settings=settings, depths=("steps",))


def _options() -> Any:
    parser = argparse.ArgumentParser(description="Run the fault corpus against every gate.")
    parser.add_argument("--subject", action="append", default=[])
    parser.add_argument("--dtype")
    parser.add_argument("--entry", action="append", default=[])
    parser.add_argument("--draws", type=int, default=len(DRAWS), help="only the first so many")
    parser.add_argument(
        "--alone", action="store_true", help="truestep's gate only: no true sizes, no other gates"
    )
    parser.add_argument(
        "--thinned", action="store_true", help="judge by whole and by thinned recordings instead"
    )
    parser.add_argument("--steps", type=int, default=20, help="of a case that is thinned")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--no-report", dest="report", action="store_false")
    return parser.parse_args()


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in ("subject", "dtype", "draw", "entry"))


def _entries(subject: Subject, names: list[str], draw: Draw) -> Iterator[Fault]:
    for entry in (*FAULTS.values(), *BENIGN.values()):
        wanted = not names or entry.name in names
        first = draw == DRAWS[0] or draw == DRAWS[-1]
        if wanted and subject.kind in entry.subjects and (first or not entry.slow):
            yield entry


def _draw(
    subject: Subject,
    dtype: str,
    draw: Draw,
    names: list[str],
    gates: list[Gate],
    path: Path,
    done: set[tuple[str, ...]],
) -> None:
    todo = _todo(subject, dtype, draw, names, done)
    if not todo:
        return
    trusted = subject.load(draw, dtype)
    recording = subject.record(trusted, draw, dtype)
    plain = {
        free: subject.exact(subject.load(draw, dtype), recording, free=free)
        for free in (False, True)
    }
    reference = subject.outputs(subject.load(draw, dtype), recording)
    for entry in todo:
        start = time.perf_counter()
        row = _run(entry, subject, dtype, draw, recording, plain, reference, gates)
        _keep(row, start, path)


def _todo(
    subject: Subject, dtype: str, draw: Draw, names: list[str], done: set[tuple[str, ...]]
) -> list[Fault]:
    return [
        entry
        for entry in _entries(subject, names, draw)
        if (subject.name, dtype, draw.name, entry.name) not in done
    ]


def _keep(row: dict[str, Any], start: float, path: Path) -> None:
    row["seconds"] = round(time.perf_counter() - start, 2)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(_line(row), file=sys.stderr, flush=True)
    gc.collect()


def _draw_alone(
    subject: Subject,
    dtype: str,
    draw: Draw,
    names: list[str],
    gates: list[Gate],
    path: Path,
    done: set[tuple[str, ...]],
) -> None:
    """truestep's own verdicts only."""
    todo = _todo(subject, dtype, draw, names, done)
    if not todo:
        return
    recording = subject.record(subject.load(draw, dtype), draw, dtype)
    for entry in todo:
        start = time.perf_counter()
        changed = _changed(entry, subject, draw, dtype)
        row = _row(entry, subject, dtype, draw)
        with _globals_restored():
            row.update(_verdicts(subject, dtype, draw, changed, recording))
        _keep(row, start, path)


def _draw_thinned(
    subject: Subject,
    dtype: str,
    draw: Draw,
    names: list[str],
    gates: list[Gate],
    path: Path,
    done: set[tuple[str, ...]],
) -> None:
    """truestep's own verdicts by a whole recording, and by what is kept of it by default."""
    todo = _todo(subject, dtype, draw, names, done)
    if not todo:
        return
    trusted = subject.load(draw, dtype)
    whole = subject.record(trusted, draw, dtype)
    thin = thinned(trusted, whole)
    kept = sorted(kept_steps(thin) or ())
    for entry in todo:
        start = time.perf_counter()
        changed = _changed(entry, subject, draw, dtype)
        row = {**_row(entry, subject, dtype, draw), "kept": kept}
        with _globals_restored():
            row.update(_verdicts(subject, dtype, draw, changed, whole))
            if not row.get("not_applicable"):
                row["thinned"] = _verdicts(subject, dtype, draw, changed, thin)["steps"]
        _keep(row, start, path)


def _changed(entry: Fault, subject: Subject, draw: Draw, dtype: str) -> Callable[[], Any]:
    """Makes the subject anew with an entry of the corpus in it."""

    def changed() -> Any:
        torch.manual_seed(0)
        model = subject.load(draw, dtype)
        return entry.apply(model) or model

    return changed


def _run(
    entry: Fault,
    subject: Subject,
    dtype: str,
    draw: Draw,
    recording: Recording,
    plain: dict[bool, dict[str, torch.Tensor]],
    reference: Outputs,
    gates: list[Gate],
) -> dict[str, Any]:
    row = _row(entry, subject, dtype, draw)
    changed = _changed(entry, subject, draw, dtype)
    with _globals_restored():
        row.update(_judged(entry, subject, dtype, draw, changed, recording, plain))
        if not row.get("not_applicable"):
            made = _outputs(subject, changed, recording)
            row["gates"] = _gates(made, reference, gates)
            if row["steps"]["verdict"] == "identical" and _same(made, reference):
                row["effect_raised"], row["effect"] = row["effect"], 0.0  # no bit of this precision
    return row


def _row(entry: Fault, subject: Subject, dtype: str, draw: Draw) -> dict[str, Any]:
    return {
        "subject": subject.name,
        "dtype": dtype,
        "draw": draw.name,
        "held_out": draw.held_out,
        "entry": entry.name,
        "family": entry.family,
    }


def _judged(
    entry: Fault,
    subject: Subject,
    dtype: str,
    draw: Draw,
    changed: Callable[[], Any],
    recording: Recording,
    plain: dict[bool, dict[str, torch.Tensor]],
) -> dict[str, Any]:
    """True effect, and truestep's verdict at every depth."""
    try:
        size = _json(_effect(entry, subject, changed, recording, plain))
    except NotApplicable:
        return {"not_applicable": True}
    return {"effect": size, **_verdicts(subject, dtype, draw, changed, recording)}


def _verdicts(
    subject: Subject,
    dtype: str,
    draw: Draw,
    changed: Callable[[], Any],
    recording: Recording,
) -> dict[str, Any]:
    """truestep's verdict at every depth."""
    row: dict[str, Any] = {}
    try:
        for depth in subject.depths:
            if depth == "final" and draw != DRAWS[0]:
                continue
            result = subject.check(changed(), recording, draw, dtype, depth)
            worst = max(
                (r for r in result.rows if not r.verdict.passed),
                key=lambda r: r.ratio or 0.0,
                default=None,
            )
            row[depth] = {
                "verdict": result.verdict.value,
                "first": str(result.first_divergence or ""),
                **_place(result),
                "worst": _json(worst.ratio if worst and worst.ratio is not None else 0.0),
                "metric": worst.ratio_metric if worst else None,
                "tensor": worst.name if worst else None,
                "forwards": result.cost.share if result.cost else None,
                "unseen": _unseen(result),
            }
    except NotApplicable:
        row["not_applicable"] = True
    return row


def _unseen(result: Comparison) -> list[str]:
    """What a result says of steps that were not looked at."""
    return [text for text in (*result.not_looked_at, *result.notes) if "step" in text]


def _place(result: Comparison) -> dict[str, Any]:
    """Where a comparison first failed; of two modalities there, the one that is further off."""
    first = result.first_divergence
    if first is None:
        return {}
    place = {"stage": first.stage, "step": first.step, "branch": first.branch}
    if all(row.modality is None for row in result.rows):
        return place
    beside = [
        row
        for row in result.rows
        if all(getattr(row, key) == value for key, value in place.items())
        and not row.verdict.passed
    ]
    there = max(beside, key=lambda row: row.ratio or 0.0)
    ratio = _json(there.ratio) if there.ratio is not None else None
    return {**place, "modality": there.modality, "ratio": ratio}


@contextmanager
def _globals_restored() -> Iterator[None]:
    """Undo what an entry may set for the whole process."""
    threads, matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(matmul)
        torch._dynamo.reset()


def _effect(
    entry: Fault,
    subject: Subject,
    changed: Callable[[], Any],
    recording: Recording,
    plain: dict[bool, dict[str, torch.Tensor]],
) -> float:
    """True size in float64: of any stage on recorded inputs; of a free run if those show none."""
    if entry.family == "benign":
        return 0.0
    size = effect(subject.exact(changed(), recording, free=False), plain[False])
    if size >= 1e-6:
        return size
    return max(size, effect(subject.exact(changed(), recording, free=True), plain[True]))


def _outputs(subject: Subject, changed: Callable[[], Any], recording: Recording) -> Outputs | None:
    """The end of a free run; None if it died, which any gate sees."""
    try:
        return subject.outputs(changed(), recording)
    except (RuntimeError, ValueError, TypeError):
        return None


def _same(made: Outputs | None, reference: Outputs) -> bool:
    if made is None or not same_bits(made.latent, reference.latent):
        return False
    for own, theirs in ((made.frames, reference.frames), (made.sound, reference.sound)):
        if own is None or theirs is None:
            if own is not theirs:
                return False
        elif not same_bits(own, theirs):
            return False
    return True


def _gates(made: Outputs | None, reference: Outputs, gates: list[Gate]) -> dict[str, bool | None]:
    """Whether each of the other gates passes the end of a free run; None where it cannot look."""
    if made is None:
        return {gate.name: False for gate in gates}
    found: dict[str, bool | None] = {}
    for gate in gates:
        actual, expected = (
            (made.frames, reference.frames)
            if gate.domain == "frames"
            else (made.latent, reference.latent)
        )
        if (
            actual is None
            or expected is None
            or (gate.name.startswith("cosine:") and actual.ndim != 5)
        ):
            found[gate.name] = None
        elif actual.shape != expected.shape:
            found[gate.name] = False
        else:
            found[gate.name] = gate.passes("latent/final", actual, expected)
    return found


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _line(row: dict[str, Any]) -> str:
    head = f"{row['subject']:15s} {row['dtype']:8s} {row['entry']:34s}"
    if row.get("not_applicable"):
        return f"{head} not applicable"
    ours = row["steps"]
    gates = row.get("gates", {})
    others = " ".join("." if p is None else "p" if p else "F" for p in gates.values())
    return (
        f"{head} effect {float(row.get('effect', math.nan)):8.1e} {ours['verdict']:12s} "
        f"{float(ours['worst']):8.2e} {ours['metric'] or '':12s} {others} {row['seconds']}s"
    )


if __name__ == "__main__":
    main()
