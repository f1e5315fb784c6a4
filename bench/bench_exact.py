"""Every exact setting on every pipeline of the fault corpus: is it still the same model?

    python -m bench.bench_exact [--subject NAME] [--dtype DTYPE]

A trusted pipeline is recorded with a floor for both depths; a second one with the setting is
checked against it at every stage and at the end of a free run. Then adaptive guidance, which is not
exact: how far its final latent drifts with the last delta reused, and with it dropped.
`cfg = parallel` needs two processes and has a test of its own (tests/runtime/test_ranks.py).
Results so far are kept; a subject that is asked for again is run anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.common import emit
from bench.faults.draws import HELD_OUT, TUNED
from bench.faults.subjects import Wan, subjects
from truestep.case import Case
from truestep.measure.distance import distance
from truestep.recording.format import Recording
from truestep.replay.check import check_pipeline
from truestep.replay.record import record_pipeline
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Pipeline, generate
from truestep.verdict import Comparison, Verdict

RESULTS = Path(__file__).parent / "results"
EXACT: dict[str, dict[str, Any]] = {
    "cfg=batched": {"cfg": "batched"},
    "text_attention=collapsed": {"text_attention": "collapsed"},
    "text_cache=true": {"text_cache": True},
    "all three": {"cfg": "batched", "text_attention": "collapsed", "text_cache": True},
}
DEPTHS = ("steps", "final")
DTYPES = ("float32", "bfloat16")
DRAWS = (TUNED[0], HELD_OUT[-1])
"""A prompt and a size each."""
GATE = 0.5
TEXT = 64
"""Text length of the random models: most of it padding. The trained one keeps its own, 8."""


def case_of(subject: Wan, number: int, dtype: str) -> Case:
    """The corpus's case of a draw, with room for padding."""
    case = subject.case(DRAWS[number], dtype)
    return case if subject.name == "digits" else case.replace(max_sequence_length=TEXT)


def exact(case: Case, recording: Recording) -> Iterator[dict[str, Any]]:
    """One row a setting and depth."""
    for name, values in EXACT.items():
        candidate = case.replace(**values)
        for depth in DEPTHS:
            pipe = load(candidate)
            result = check_pipeline(pipe, recording, case=case, candidate=candidate, depth=depth)
            assert not pipe.fallbacks, pipe.fallbacks
            yield {"setting": name, "depth": depth, **judged(result)}


def judged(result: Comparison) -> dict[str, Any]:
    """Verdict, the row that is nearest to its floor, and the largest distance of any."""
    worst = max(result.rows, key=lambda row: (not row.verdict.passed, row.ratio or 0.0))
    return {
        "verdict": result.verdict.value,
        "ratio": worst.ratio or 0.0,
        "metric": worst.ratio_metric or "",
        "tensor": worst.name,
        "rel_l2": max(row.metrics.rel_l2 if row.metrics else 0.0 for row in result.rows),
    }


def adaptive(case: Case) -> dict[str, float]:
    """Relative L2 drift of the final latent: the delta reused, dropped, and reused unscaled.

    The last is only there where a prediction is a multiple of the network's output (Cosmos: c_out).
    """

    def drift(reuse: str, *, scaled: bool = True) -> float:
        pipe: Pipeline = load(case.replace(adaptive_gate=GATE, adaptive_reuse=reuse))
        if not scaled:
            pipe.output_scale = lambda step: 1.0
        return distance(generate(pipe), plain).rel_l2

    pipe = load(case)
    plain = generate(pipe)
    found = {"delta": drift("delta"), "drop": drift("drop")}
    ends = {pipe.output_scale(pipe.make_schedule(pipe).step(i)) for i in (0, case.steps - 1)}
    return found if len(ends) == 1 else {**found, "unscaled": drift("delta", scaled=False)}


def run(subject: Wan, dtype: str) -> list[dict[str, Any]]:
    """All rows of one subject in one precision."""
    rows = []
    for number in range(len(DRAWS)):
        case = case_of(subject, number, dtype)
        place = {"subject": subject.name, "dtype": dtype, "draw": number}
        recording = record_pipeline(load(case), case=case, floor="final")
        rows += [{"kind": "exact", **place, **row} for row in exact(case, recording)]
        if dtype == "float32":
            rows.append({"kind": "adaptive", **place, **adaptive(case)})
    for row in rows:
        emit("exact", **row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Exact settings: the worst of both draws; adaptive guidance: each draw."""
    lines = [
        "# Exact settings on every pipeline of the corpus",
        "",
        "Verdict of truestep on a pipeline with the setting against the recording of one without, "
        "and in brackets the ratio to the noise floor of the statistic nearest to it (below 1 is "
        "within; up to the bound that the benign runs allow it is equivalent too) and the largest "
        "relative L2 of any tensor. `steps`: every stage on recorded inputs; `final`: the latent "
        f"of a free run. Worst of {len(DRAWS)} prompts and sizes; one CPU thread. No setting fell "
        "back.",
        "",
        "| model | precision | depth | " + " | ".join(EXACT) + " |",
        "|---|---|---|" + "---|" * len(EXACT),
    ]
    found = [row for row in rows if row["kind"] == "exact"]
    places = dict.fromkeys((row["subject"], row["dtype"], row["depth"]) for row in found)
    for place in places:
        own = [r for r in found if (r["subject"], r["dtype"], r["depth"]) == place]
        cells = [worst([r for r in own if r["setting"] == name]) for name in EXACT]
        lines.append(f"| {' | '.join(place)} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Adaptive guidance",
        "",
        f"Relative L2 drift of the final latent at `adaptive_gate={GATE}`, float32: what stands "
        "for the skipped pass is the last delta, or nothing. Never exact. Cosmos predicts x0, in "
        "which the network's output is scaled by c_out, which falls with sigma: the delta that is "
        "kept is the network's, scaled anew in each step; `unscaled` is without that.",
        "",
        "| model | prompt | delta reused | dropped | dropped / reused | unscaled |",
        "|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if row["kind"] == "adaptive"):
        ratio = row["drop"] / row["delta"]
        prompt = DRAWS[row["draw"]].prompt
        lines.append(
            f"| {row['subject']} | {prompt} | {row['delta']:.2e} | {row['drop']:.2e} "
            f"| {ratio:.1f} | {format(row['unscaled'], '.2e') if 'unscaled' in row else ''} |"
        )
    return "\n".join([*lines, ""])


def worst(rows: list[dict[str, Any]]) -> str:
    """A cell of the table."""
    verdict = Verdict.worst(Verdict(row["verdict"]) for row in rows)
    ratio = max(row["ratio"] for row in rows)
    apart = max(row["rel_l2"] for row in rows)
    return verdict.value + (f" ({ratio:.2f}, {apart:.0e})" if apart else "")


def store(rows: list[dict[str, Any]]) -> None:
    """Write results and table, in the order of the corpus."""
    names = [subject.name for subject in subjects()]
    rows = sorted(rows, key=lambda r: (names.index(r["subject"]), DTYPES.index(r["dtype"])))
    (RESULTS / "exact.md").write_text(table(rows), "utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (RESULTS / "exact.jsonl").write_text(lines, "utf-8")


def stored() -> list[dict[str, Any]]:
    """Results so far."""
    path = RESULTS / "exact.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact settings on every pipeline of the corpus.")
    parser.add_argument("--subject", nargs="*", default=[])
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES), choices=DTYPES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for subject in subjects(tuple(options.subject)):
        for dtype in options.dtype:
            if isinstance(subject, Wan) and subject.kind == "wan":
                made = run(subject, dtype)
                place = (subject.name, dtype)
                store([r for r in stored() if (r["subject"], r["dtype"]) != place] + made)


if __name__ == "__main__":
    main()
