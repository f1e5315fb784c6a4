"""Cost of a recording and of a verdict of plain pipelines, beside a run of 50 steps.

The pipelines are tiny ones whose denoiser is made wide enough that a forward takes 50 ms or more,
as little as any real one does: what is measured is what truestep adds, not how small a model is.
Samples of one round are taken one after the other; shares are medians of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from bench.common import emit, paired, ratio, rounded
from truestep.calls.check import check
from truestep.calls.forcing import Forcing
from truestep.calls.record import record
from truestep.calls.recorder import recorded
from truestep.calls.recording import CallRecording
from truestep.calls.seen import Plan
from truestep.calls.subject import Subject, subject_of
from truestep.testing import tiny

RECORDED_BAR, PLAYBACK_BAR, CHECK_BAR, FORWARDS_BAR = 1.10, 0.20, 0.25, 0.20
STEPS = 50

WIDE: dict[str, dict[str, Any]] = {
    "FluxPipeline": {
        "num_attention_heads": 48,
        "num_layers": 2,
        "num_single_layers": 4,
    },
    "StableDiffusionXLPipeline": {
        "block_out_channels": (96, 192),
        "attention_head_dim": 8,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "transformer_layers_per_block": 2,
    },
    "WanPipeline": {
        "num_attention_heads": 48,
        "ffn_dim": 2048,
        "num_layers": 8,
    },
}
"""Settings of the denoiser that differ from the tiny pipeline's."""


def widened(name: str) -> tuple[Any, Any]:
    """A pipeline and its denoiser, made anew with the settings of `WIDE`."""
    pipe = tiny.pipeline(name)
    slot = "unet" if hasattr(pipe, "unet") else "transformer"
    small = getattr(pipe, slot)
    settings = {k: v for k, v in small.config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    wide = type(small).from_config({**settings, **WIDE[name]}).eval()
    setattr(pipe, slot, wide)
    pipe.set_progress_bar_config(disable=True)
    return pipe, wide


def measured(name: str, rounds: int) -> None:
    """Emit the samples of one pipeline, and its bars."""
    pipe, denoiser = widened(name)
    forwards = [0]

    def count(*_: Any) -> None:
        forwards[0] += 1

    denoiser.register_forward_pre_hook(count)
    call = {**tiny.example_call(name), "num_inference_steps": STEPS}
    subject = subject_of(pipe, **call)
    subject.run()
    of_run, forwards[0] = forwards[0], 0
    reference = record(subject)
    forwards[0] = 0
    result = check(subject, reference)
    of_check = forwards[0]
    samples = paired(
        {
            "run": subject.run,
            "recorded": lambda: recorded(subject),
            "playback": lambda: playback(subject, reference),
            "check": lambda: check(subject, reference),
        },
        rounds=rounds,
    )
    for contender, seconds in samples.items():
        emit("plain_50_steps", pipeline=name, contender=contender, samples_s=rounded(seconds))
    share = {contender: ratio(samples, contender, "run") for contender in samples}
    emit(
        "plain_cost_bar",
        pipeline=name,
        verdict=result.verdict.value,
        ms_a_forward=round(1000 * statistics.median(samples["run"]) / of_run, 1),
        recorded=round(share["recorded"], 3),
        bar_recorded=RECORDED_BAR,
        playback=round(share["playback"], 3),
        bar_playback=PLAYBACK_BAR,
        check=round(share["check"], 3),
        bar_check=CHECK_BAR,
        share_of_forwards=round(of_check / of_run, 3),
        bar_share_of_forwards=FORWARDS_BAR,
        met=share["recorded"] <= RECORDED_BAR
        and share["playback"] <= PLAYBACK_BAR
        and share["check"] <= CHECK_BAR
        and of_check <= FORWARDS_BAR * of_run,
    )


def playback(subject: Subject, reference: CallRecording) -> None:
    """A run in which every call of a model gives what was recorded."""
    Forcing(reference, Plan(lambda call: False)).run(subject)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time recordings and checks of plain pipelines.")
    parser.add_argument("pipelines", nargs="*", default=list(WIDE))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.pipelines:
        measured(name, options.rounds)


if __name__ == "__main__":
    main()
