"""Cost of a recording and of a verdict beside a full generation, on the 50-step digits case.

Samples of one round are taken one after the other; shares are medians of the rounds' own ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.common import emit, paired, ratio, rounded
from truestep.case import Case
from truestep.replay.check import check_pipeline
from truestep.replay.record import record_pipeline
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Pipeline, generate

CHECK_BAR, BEYOND_BAR, RECORD_BAR = 0.20, 0.25, 1.8


def main() -> None:
    torch.set_num_threads(1)
    case = Case(
        model="builtin:digits",
        prompt="a red three moving left",
        steps=50,
        settings={"device": "cpu"},
    )
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


def _beyond_models(pipe: Pipeline, check: Callable[[], Any]) -> float:
    """Time outside forwards, text encoding and decoding over the time inside; median of nine."""
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
    return statistics.median(shares)


if __name__ == "__main__":
    main()
