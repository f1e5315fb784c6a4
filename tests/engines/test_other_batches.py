"""What is opened of a pipeline that batches its guidance passes otherwise."""

from __future__ import annotations

from typing import Any

from tests.calls.regrouping import COND, UNCOND, Change, both, scaled, wan_batched, wan_calls
from truestep.engines.subjects import check, record
from truestep.testing import tiny
from truestep.verdict import Comparison


def pipeline(change: Change | None = None) -> Any:
    pipe = tiny.pipeline("WanPipeline")
    pipe.set_progress_bar_config(disable=True)
    if change is not None:
        change(pipe)
    return pipe


def opened(change: Change) -> Comparison:
    call = {k: v for k, v in tiny.example_call("WanPipeline").items() if k != "generator"}
    reference = record(pipeline(), call=call, floor="none")
    faulty = pipeline(both(change, scaled("transformer")))
    return check(faulty, reference, depth="modules", trusted=pipeline(), tolerance=1e-4)


def test_other_batches_are_not_opened_and_a_note_says_why() -> None:
    result = opened(wan_batched())
    assert result.sentence.startswith("drifted: transformer.forward (cond) at step 0: output 0")
    assert result.notes == (
        "transformer: both passes in one batch, recorded in 2 calls",
        "no module named: its batches are others (both passes in one batch, recorded in 2 calls)",
    )


def test_calls_in_another_order_are_opened() -> None:
    result = opened(wan_calls(UNCOND, COND))
    module = "transformer.condition_embedder.time_embedder.linear_1"
    assert f"first divergence: `{module}`, step 0" in result.sentence
