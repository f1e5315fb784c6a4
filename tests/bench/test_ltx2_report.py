"""The table of models of video and sound: counts, and places that an entry does not declare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# The benchmarks are not installed with the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.ltx2_report import markdown, misplaced


def row(
    entry: str, verdict: str = "drifted", family: str = "joint", **place: Any
) -> dict[str, Any]:
    steps = {"verdict": verdict, "ratio": 12.5, **place}
    start = {"subject": "tiny-ltx2", "dtype": "float32", "family": family}
    return {**start, "entry": entry, "steps": steps}


def test_a_place_that_is_not_the_declared_one_is_told() -> None:
    assert not misplaced(row("v2a-skipped", stage="prediction", modality="audio"))
    wrong = row("v2a-skipped", stage="prediction", modality="video")
    assert misplaced(wrong) == "declared modality audio"
    wrong = row("stg-blocks-shared", stage="guidance", branch=None, modality="audio")
    assert misplaced(wrong) == "declared stage prediction, branch perturbed"
    assert not misplaced(row("v2a-skipped", "identical"))  # missed, not misplaced


def test_the_table_counts_what_was_caught_and_flagged() -> None:
    text = markdown(
        [
            row("v2a-skipped", stage="prediction", step=0, branch="cond", modality="audio"),
            row("a2v-skipped", stage="prediction", modality="audio"),
            row("mu-from-tokens", "identical"),
            {**row("contexts-swapped"), "not_applicable": True},
            row("rerun", "identical", "benign"),
            row("passes-all-in-one", "drifted", "benign", stage="prediction"),
        ]
    )
    assert "| float32 | 2 of 3 | 1 of 2 | 1 of 2 |" in text
    assert "| bfloat16 | 0 of 0 | 0 of 0 | 0 of 0 |" in text
    assert (
        "| `v2a-skipped` | tiny-ltx2 | float32 | drifted | prediction | 0 | cond | audio | 12.5 |"
        in text
    )
    assert "contexts-swapped" not in text
