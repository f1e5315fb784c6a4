"""Memory of everything beside that of plain generation, on a model that outweighs the libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.bench_sizes import BARS, build, ratios


@pytest.mark.slow
def test_no_model_is_held_twice(tmp_path: Path) -> None:
    count = build(tmp_path / "model", "float32", layers=9, heads=8, ffn_dim=4096)
    assert count > 150e6
    found = ratios(tmp_path / "model", "float32", runtime=True, steps=4)
    over = {what: found[f"{what}_ratio"] for what, bar in BARS.items()}
    assert all(over[what] <= bar for what, bar in BARS.items()), found
    assert found["check_verdict"] == "identical"
    assert found["modules_verdict"] == "drifted"
    assert found["modules_at"] == "blocks.4.attn1.to_q"
