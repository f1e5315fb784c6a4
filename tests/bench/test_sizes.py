"""Memory of everything beside that of plain generation, on a model that outweighs the libraries;
bytes of a recording, and open files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import truestep
from bench.bench_sizes import BARS, build, ratios
from truestep.runtime import lent, stored
from truestep.testing import tiny


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


def test_a_recording_is_of_a_few_latents_beside_text_and_decoding() -> None:
    """50 steps: 25 times what the last one gives; every step with all that it is given was 112."""
    pipe = tiny.pipeline("FluxPipeline")
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "height": 64, "width": 64, "num_inference_steps": 50}
    recording = truestep.record(pipe, call=call, floor="none")
    sizes: dict[str, int] = {}
    for entry in recording.manifest.tensors:
        sizes[entry.kind] = sizes.get(entry.kind, 0) + recording[entry.name].nbytes
    final = recording["step/0049/update/scheduler/step/0/out/0"].nbytes
    assert sum(sizes.values()) - sizes["text"] - sizes["decoding"] <= 25 * final
    assert sizes["text"] + sizes["decoding"] < 10 * final


def test_files_are_open_for_as_long_as_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Record, check and a check from disk leave no file open, and open one at a time."""
    tiny.save("FluxPipeline", tmp_path / "flux")
    case = truestep.CallCase(
        model=str(tmp_path / "flux"),
        call={"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 2},
    )
    path = tmp_path / "reference.safetensors"
    truestep.record(case, path=path, floor="none")
    monkeypatch.setattr(lent, "LEAST", 1 << 10)
    monkeypatch.setattr(stored, "LEAST", 1 << 10)

    def opened() -> list[str]:
        files = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        return [file for file in files if file.startswith(str(tmp_path))]

    most = 0

    def progress(*told: object) -> None:
        nonlocal most
        most = max(most, len(opened()))

    for from_disk in (False, True):
        result = truestep.check(case, path, from_disk=from_disk, progress=progress)
        assert result.verdict.passed
        assert not opened()
    truestep.record(case, path=path, floor="none", progress=progress)
    assert not opened()
    assert most <= 2, "the reference, and the weight that is read"
