"""The coverage of diffusers' pipelines: what is replayed, what is not, and the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.bench_coverage import Row, cover, document, read_rows, write_rows

SAMPLE = [
    "FluxPipeline",
    "StableDiffusionPipeline",
    "WanPipeline",
    "flux/FluxAutoBlocks/text2image",
]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_pipeline_is_recorded_and_replayed(name: str, tmp_path: Path) -> None:
    row = cover(name, tmp_path)
    assert (row.outcome, row.reason) == ("replayed", "")
    assert row.calls > 5
    assert row.components
    assert "scheduler" in row.components


def test_what_is_not_replayed_says_why(tmp_path: Path) -> None:
    row = cover("LEditsPPPipelineStableDiffusion", tmp_path)
    assert row.outcome == "no"
    assert "its call needs a picture" in row.reason


def test_a_fault_between_two_pipelines_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pipeline after the second has other weights."""
    from truestep.testing import tiny

    real, count = tiny.pipeline, iter(range(9))
    monkeypatch.setattr(tiny, "pipeline", lambda name: real(name, seed=int(next(count) > 1)))
    row = cover("StableDiffusionPipeline", tmp_path)
    assert row.outcome == "runs"
    assert "replayed live" in row.reason
    assert "differs" in row.reason


def test_rows_are_kept(tmp_path: Path) -> None:
    table = {"B": Row("B", "text to image", {"vae": "V"}, "replayed", "", 3, 0.5), "A": Row("A")}
    write_rows(tmp_path / "rows.jsonl", table)
    assert read_rows(tmp_path / "rows.jsonl") == {"A": table["A"], "B": table["B"]}


def test_the_table_lists_what_is_replayed_and_the_rest_with_its_reason() -> None:
    rows = [
        Row("FluxPipeline", "text to image", {"vae": "AutoencoderKL"}, "replayed", "", 12, 1.0),
        Row("flux/FluxAutoBlocks", "text to image", {"vae": "V"}, "replayed", "", 9, 1.0),
        Row("OddPipeline", outcome="built", reason="needs | a\nthing"),
    ]
    text = document(rows)
    assert "Of the 2 pipeline classes" in text
    assert "1 are built" in text
    assert "so are 1 of 1 configurations of modular pipelines" in text
    assert "| FluxPipeline | vae AutoencoderKL | 12 |" in text
    assert "| OddPipeline | built | needs / a thing |" in text
