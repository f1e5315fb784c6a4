"""Cost of a recording and of a verdict beside a full generation, on the 50-step digits case.

    python -m bench.bench_check [--large]

Samples of one round are taken one after the other; shares are medians of the rounds' own ratios.
`--large` tells what a check takes beyond its forwards, of a Wan of 161 M parameters too: whole
recordings and the thinned ones that are the default, one after the other in one process.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.bench_sizes import CONTENT, SIZE, build, fault
from bench.common import emit, paired, ratio, rounded
from truestep.case import Case
from truestep.replay.check import check_pipeline
from truestep.replay.record import record_pipeline
from truestep.replay.thinning import thinned
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Pipeline, generate

CHECK_BAR, BEYOND_BAR, RECORD_BAR = 0.20, 0.25, 1.8
BEYOND_BAR_LARGE = 0.20
DIGITS = Case(
    model="builtin:digits",
    prompt="a red three moving left",
    steps=50,
    settings={"device": "cpu"},
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a recording and a verdict cost.")
    parser.add_argument("--large", action="store_true")
    torch.set_num_threads(1)
    if parser.parse_args().large:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "wan"
            count = build(part, "float32", layers=9, heads=8, ffn_dim=4096)
            words = {**CONTENT, **SIZE, "max_sequence_length": 64, "settings": {"device": "cpu"}}
            large = Case(model=str(part), steps=50, **words)  # type: ignore[arg-type]
            _beyond_forwards("digits", DIGITS, None)
            _beyond_forwards("wan", large, count)
        return
    case = DIGITS
    pipe = load(case)
    start = time.perf_counter()
    recording = record_pipeline(pipe, case=case)
    first = time.perf_counter() - start
    samples = paired(
        {
            "generation": lambda: generate(pipe, output="frames"),
            "check": lambda: check_pipeline(pipe, recording, case=case),
            "record": lambda: record_pipeline(pipe, case=case),
        },
        rounds=9,
        warmup=2,
    )
    for name, seconds in samples.items():
        emit("digits_50_steps", contender=name, samples_s=rounded(seconds))
    result = check_pipeline(pipe, recording, case=case)
    assert result.cost is not None
    share = ratio(samples, "check", "generation")
    beyond = _beyond_models(pipe, lambda: check_pipeline(pipe, recording, case=case))
    emit(
        "check_cost_bar",
        share_of_generation_time=round(share, 3),
        bar=CHECK_BAR,
        share_of_forwards=round(result.cost.share, 3),
        beyond_models=round(beyond, 3),
        bar_beyond_models=BEYOND_BAR,
        met=share <= CHECK_BAR and beyond <= BEYOND_BAR,
    )
    generations = ratio(samples, "record", "generation")
    emit(
        "record_cost_bar",
        generations=round(generations, 2),
        generations_first_time=round(first / statistics.median(samples["generation"]), 2),
        bar=RECORD_BAR,
        met=generations <= RECORD_BAR,
    )


def _beyond_forwards(name: str, case: Case, parameters: int | None) -> None:
    """What checks by whole and by thinned recordings take beyond their forwards; of the model as
    it was recorded, and of one that drifts."""
    pipe = load(case)
    whole = record_pipeline(pipe, case=case)
    recordings = {"whole": whole, "thinned": thinned(pipe, whole)}
    for drifts, (kind, one) in itertools.product((False, True), recordings.items()):
        if drifts and kind == "whole":
            fault(pipe)
        shares = _shares_beyond(pipe, partial(check_pipeline, pipe, one, case=case))
        emit(
            "check_beyond_forwards",
            case=name,
            parameters=parameters,
            recording=kind,
            drifts=drifts,
            samples=rounded(shares),
            beyond_forwards=round(statistics.median(shares), 3),
            bar=BEYOND_BAR_LARGE,
            met=statistics.median(shares) <= BEYOND_BAR_LARGE,
        )


def _beyond_models(pipe: Pipeline, check: Callable[[], Any]) -> float:
    """Time outside forwards, text encoding and decoding over the time inside; median of nine."""
    return statistics.median(_shares_beyond(pipe, check))


def _shares_beyond(pipe: Pipeline, check: Callable[[], Any]) -> list[float]:
    """Nine times the time outside forwards, text encoding and decoding over that inside."""
    inside = 0.0
    stages = ("predict", "encode_text", "decode")
    originals = {name: getattr(pipe, name) for name in stages}

    def timed(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal inside
            start = time.perf_counter()
            try:
                return run(*args)
            finally:
                inside += time.perf_counter() - start

        return call

    for name, run in originals.items():
        setattr(pipe, name, timed(run))
    shares = []
    for _ in range(9):
        inside, start = 0.0, time.perf_counter()
        check()
        shares.append((time.perf_counter() - start) / inside - 1)
    for name, run in originals.items():
        setattr(pipe, name, run)
    return shares


if __name__ == "__main__":
    main()
