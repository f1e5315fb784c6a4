"""Recordings small enough for an issue thread."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.commands import Captured, runner
from truestep.errors import UsageError
from truestep.judge.compare import compare
from truestep.recording.bundling import BUNDLED, LIMIT, bundled
from truestep.recording.format import Recording
from truestep.recording.manifest import Manifest
from truestep.recording.table import tensor_table
from truestep.verdict import Verdict


def run(steps: int, *, scale: float = 1.0) -> Recording:
    """A recording of so many steps, of which the last latents are scaled."""
    dice = torch.Generator().manual_seed(0)
    names = [f"step/{i:04d}/{what}" for i in range(steps) for what in ("cond", "uncond", "guided")]
    tensors = {name: torch.randn(1, 4, 16, 16, generator=dice) for name in names}
    tensors["latent/final"] = torch.randn(1, 4, 16, 16, generator=dice) * scale
    manifest = Manifest(tool_version="0", created="", level="full", tensors=tensor_table(tensors))
    return Recording.in_memory(tensors, manifest)


def test_a_short_run_is_bundled_whole(tmp_path: Path) -> None:
    recording, path = run(4), tmp_path / "bundle.safetensors"
    bundle = bundled(recording)
    assert len(bundle.manifest.tensors) == len(recording.manifest.tensors)
    assert BUNDLED not in bundle.manifest.settings
    bundle.save(path)
    assert path.stat().st_size < LIMIT


@pytest.mark.parametrize("steps", [80, 200])
def test_a_long_run_keeps_the_steps_that_fit(tmp_path: Path, steps: int) -> None:
    bundle, path = bundled(run(steps)), tmp_path / "bundle.safetensors"
    bundle.save(path)
    assert 0.5 * LIMIT < path.stat().st_size < LIMIT
    kept = bundle.manifest.settings[BUNDLED]
    assert {0, 1, steps - 1} <= {*kept}
    assert max(b - a for a, b in pairwise(kept)) <= 2 * steps / len(kept) + 2
    assert any(f"of {steps}" in note for note in bundle.manifest.notes)


def test_bundles_tell_what_recordings_do(tmp_path: Path) -> None:
    places = {}
    for name, scale in (("a", 1.0), ("same", 1.0), ("off", 1.01)):
        places[name] = tmp_path / f"{name}.safetensors"
        bundled(run(80, scale=scale)).save(places[name])
    assert compare(places["same"], places["a"]).verdict is Verdict.EQUIVALENT
    result = compare(places["off"], places["a"])
    assert result.verdict is Verdict.DRIFTED
    assert result.first_divergence is not None
    assert result.first_divergence.name == "latent/final"
    whole = tmp_path / "whole.safetensors"
    run(80, scale=1.01).save(whole)
    assert compare(places["off"], whole).verdict is Verdict.EQUIVALENT


def test_what_is_no_full_recording_or_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="no tensors to replay"):
        bundled(run(2).at_level("stats"))
    with pytest.raises(UsageError, match="does not fit into"):
        bundled(run(2), limit=5000)


def test_the_verb_says_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    path = tmp_path / "run.safetensors"
    run(60).save(path)
    bundle = runner(monkeypatch, capsys, "bundle")
    code, out, _ = bundle(str(path))
    assert code == 0
    assert "BUNDLED" in out
    assert (tmp_path / "run.bundle.safetensors").exists()
    assert "prompts, paths and the environment" in out
    code, _, err = bundle(str(path), "--output", str(path))
    assert code == 2
    assert "would replace the recording" in err
