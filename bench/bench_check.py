"""Cost of a verdict at depth steps beside a full generation, on the 20-step digits case."""

from __future__ import annotations

import statistics

import torch

from bench.common import emit, paired, rounded
from truestep.case import Case
from truestep.checking import check_pipeline
from truestep.recording.record import record_pipeline
from truestep.runtime.loading import load
from truestep.runtime.pipeline import generate

BAR = 0.25


def main() -> None:
    torch.set_num_threads(1)
    case = Case(
        model="builtin:digits",
        prompt="a red three moving left",
        steps=20,
        settings={"device": "cpu"},
    )
    pipe = load(case)
    recording = record_pipeline(pipe, case=case)
    samples = paired(
        {
            "generation": lambda: generate(pipe, output="frames"),
            "check": lambda: check_pipeline(pipe, recording, case=case),
        },
        rounds=9,
        warmup=2,
    )
    shares = [c / g for c, g in zip(samples["check"], samples["generation"], strict=True)]
    share = statistics.median(shares)
    for name, seconds in samples.items():
        emit("digits_20_steps", contender=name, samples_s=rounded(seconds))
    result = check_pipeline(pipe, recording, case=case)
    assert result.cost is not None
    emit(
        "check_cost_bar",
        share_of_generation_time=round(share, 3),
        share_of_forwards=round(result.cost.share, 3),
        bar=BAR,
        met=share <= BAR,
    )


if __name__ == "__main__":
    main()
