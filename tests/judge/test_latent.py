"""The latent gate: what the reproduced gate passes and what the full verdict says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep import check_latent, compare
from truestep.errors import UsageError
from truestep.judge.latent import (
    SLICES,
    SliceSpec,
)
from truestep.recording.format import Recording
from truestep.recording.manifest import Manifest
from truestep.recording.table import tensor_table
from truestep.verdict import Verdict

torch.manual_seed(0)
VIDEO = torch.randn(1, 16, 16, 12, 12)


def damaged(change: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    latent = VIDEO.clone()
    result = change(latent)
    return result if isinstance(result, torch.Tensor) else latent


def patch(latent: torch.Tensor) -> None:
    latent[0, :, 7, 4:8, 4:8] = torch.randn(16, 4, 4)


def repeat_last_frame(latent: torch.Tensor) -> None:
    latent[:, :, -1] = latent[:, :, -2]


DAMAGES: dict[str, tuple[Callable[[torch.Tensor], Any], bool]] = {
    # name: (damage, whether the reproduced gate passes it)
    "all NaN": (lambda x: x * float("nan"), True),
    "times 100": (lambda x: x * 100, True),
    "garbage patch in one of 16 frames": (patch, True),
    "last frame duplicated": (repeat_last_frame, False),
    "sign": (lambda x: -x, False),
    "another seed": (lambda x: torch.randn(1, 16, 16, 12, 12), False),
    "channels permuted": (lambda x: x.flip(1), False),
    "all zero": (lambda x: x * 0, False),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damages(name: str) -> None:
    change, gate_passes = DAMAGES[name]
    result = check_latent(damaged(change), VIDEO)
    assert result.gates[0].passed is gate_passes
    assert result.verdict.exit_code == 1


def test_a_nan_reference_accepts_nothing_here() -> None:
    result = check_latent(VIDEO, VIDEO * float("nan"))
    assert result.gates[0].passed
    assert "passes" in result.gates[0].note
    assert result.verdict is Verdict.INVALID


def test_float16_overflow_blinds_the_full_gate_only() -> None:
    latent = VIDEO.clone()
    latent[0, 0, 5, 5, 5] = 70_000
    result = check_latent(latent, latent * 1.5)
    assert "the full distance is NaN" in result.gates[0].note
    assert result.verdict is Verdict.DRIFTED


@pytest.mark.parametrize(
    ("latent", "kind"),
    [
        (VIDEO, "corner_3x3_first_frame"),
        (torch.randn(1, 8, 20), "audio_first_8_timesteps"),
        (torch.randn(1, 8, 9, 9), "corner_3x3"),
    ],
)
def test_slices_by_rank(latent: torch.Tensor, kind: str) -> None:
    result = check_latent(latent, latent.clone())
    assert result.verdict is Verdict.IDENTICAL
    assert f"signature {kind} v1" in result.looked_at[0]
    assert check_latent(latent * (1 + 1e-7), latent).verdict is Verdict.EQUIVALENT


def test_signatures_are_those_of_the_source() -> None:
    cut = SLICES["corner_3x3_first_frame"].cut(VIDEO.bfloat16())
    assert cut.dtype == torch.float32
    assert torch.equal(cut, VIDEO.bfloat16()[0, :, 0, :3, :3].float().flatten())
    audio = torch.randn(1, 4, 12)
    assert torch.equal(SLICES["audio_first_8_timesteps"].cut(audio), audio[0, :, :8].flatten())


def test_custom_slices_and_their_errors() -> None:
    spec = SliceSpec(kind="middle", version=3, ranges=((0, 1), (0, 2), (3, 5), (0, 2), (0, 2)))
    assert check_latent(VIDEO, VIDEO, slice_spec=spec).verdict is Verdict.IDENTICAL
    theirs = {"kind": "corner_3x3_first_frame", "version": 1}
    assert check_latent(VIDEO, VIDEO, slice_spec=theirs).verdict is Verdict.IDENTICAL
    with pytest.raises(UsageError, match="no signature slice named 'nope'"):
        check_latent(VIDEO, VIDEO, slice_spec="nope")
    with pytest.raises(UsageError, match="too small for signature slice"):
        check_latent(VIDEO[..., :2], VIDEO[..., :2])
    with pytest.raises(UsageError, match="does not fit the latent"):
        check_latent(VIDEO, VIDEO, slice_spec="corner_3x3")
    with pytest.raises(UsageError, match="no built-in signature slice for a latent of 2"):
        check_latent(torch.randn(3, 3), torch.randn(3, 3))


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.0])
def test_thresholds_that_cannot_gate(threshold: float) -> None:
    with pytest.raises(UsageError, match="cannot gate anything"):
        check_latent(VIDEO, VIDEO, slice_cosine_threshold=threshold)


def test_a_stricter_threshold_overrules_an_equivalent() -> None:
    torch.manual_seed(1)
    noisy = VIDEO.bfloat16()
    assert check_latent(VIDEO, noisy).verdict is Verdict.EQUIVALENT
    result = check_latent(VIDEO, noisy, full_cosine_threshold=1e-9)
    assert result.verdict is Verdict.DRIFTED
    assert "full_cosine" in result.rows[0].note


def test_a_bundle_keeps_its_slice(tmp_path: Path) -> None:
    path = tmp_path / "ref.safetensors"
    spec, latent = SLICES["corner_3x3_first_frame"], VIDEO.bfloat16()
    tensors = {"latent/final": latent, "signature": spec.cut(latent)}
    manifest = Manifest(
        tool_version="0",
        created="now",
        level="full",
        settings={"slice_spec": spec.model_dump(mode="json")},
        tensors=tensor_table(tensors),
    )
    Recording.in_memory(tensors, manifest).save(path)
    assert check_latent(VIDEO.bfloat16(), path).verdict is Verdict.IDENTICAL
    newer = spec.model_copy(update={"version": 2})
    result = check_latent(VIDEO.bfloat16(), path, slice_spec=newer)
    assert result.verdict is Verdict.INCOMPARABLE
    assert result.case_differences[0].key == "slice_spec.version"
    assert not result.gates


def test_fastvideo_bundles_judge(tmp_path: Path) -> None:
    path = tmp_path / "prompt.pt"
    content = {
        "latent": VIDEO.half(),
        "expected_slice": VIDEO[0, :, 0, :3, :3].float().flatten(),
        "slice_spec": {"kind": "corner_3x3_first_frame", "version": 1},
        "format_version": 1,
    }
    torch.save(content, path)
    assert check_latent(VIDEO, path).verdict is Verdict.EQUIVALENT
    assert check_latent(VIDEO * 1.05, path).verdict is Verdict.DRIFTED
    compared = compare(VIDEO, path)
    assert compared.gates[0].name == "fastvideo-latent/1"
    assert compared.verdict is Verdict.EQUIVALENT
    content["slice_spec"] = {"kind": "another", "version": 1}
    torch.save(content, path)
    assert check_latent(VIDEO, path).verdict is Verdict.INCOMPARABLE


def test_more_tensors_than_one_latent_is_an_error() -> None:
    with pytest.raises(UsageError, match="holds no single latent"):
        check_latent({"a": VIDEO, "b": VIDEO}, VIDEO)


def test_equal_zeros_pass_though_the_reproduced_gate_fails_them() -> None:
    corner = VIDEO.clone()
    corner[0, :, 0, :3, :3] = 0
    for latent in (VIDEO * 0, corner):
        result = check_latent(latent, latent.clone())
        assert not result.gates[0].passed
        assert "fails equal vectors of zeros" in result.gates[0].note
        assert result.verdict is Verdict.IDENTICAL
    assert check_latent(corner * (1 + 1e-7), corner).verdict is Verdict.EQUIVALENT


def test_a_gate_that_fails_decides_an_inconclusive_row() -> None:
    reference = VIDEO.bfloat16()
    noise = torch.randn(VIDEO.shape, generator=torch.Generator().manual_seed(2))
    noisy = (reference.float() + 1.5e-2 * noise).bfloat16()
    assert check_latent(noisy, reference).verdict is Verdict.INCONCLUSIVE
    result = check_latent(noisy, reference, slice_cosine_threshold=1e-6)
    assert (result.verdict, result.gates[0].passed) == (Verdict.DRIFTED, False)
    assert "fastvideo-latent/1: slice_cosine" in result.sentence


@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0, 30.0])
def test_the_gates_arithmetic_is_theirs(noise: float) -> None:
    actual = VIDEO + noise * torch.randn(VIDEO.shape, generator=torch.Generator().manual_seed(2))
    a, r = (t.half().float().reshape(1, -1) for t in (actual, VIDEO))
    theirs = 1.0 - float(torch.nn.functional.cosine_similarity(a, r, dim=1).item())
    found = check_latent(actual, VIDEO).gates[0].metrics
    assert found["full_cosine_distance"] == theirs
    assert found["max_abs_diff"] == float((a - r).abs().max())


@pytest.mark.parametrize("place", [(5, 5), (5, 2), (-1, None)])
def test_slices_that_hold_nothing(place: tuple[int, int | None]) -> None:
    ranges = ((0, 1), place, (0, 1), (0, 1), (0, 1))
    with pytest.raises(ValueError, match="holds nothing, or counts from the end"):
        SliceSpec(kind="e", ranges=ranges)
    with pytest.raises(UsageError, match="slice_spec is not a slice"):
        check_latent(VIDEO, VIDEO, slice_spec={"kind": "e", "ranges": ranges})


def test_a_stored_signature_of_another_length_is_incomparable(tmp_path: Path) -> None:
    content = {
        "latent": VIDEO.half(),
        "expected_slice": torch.ones(5),
        "slice_spec": {"kind": "corner_3x3_first_frame", "version": 1},
        "format_version": 1,
    }
    torch.save(content, tmp_path / "p.pt")
    result = check_latent(VIDEO.half(), tmp_path / "p.pt")
    assert result.verdict is Verdict.INCOMPARABLE
    assert result.sentence == "incomparable: signature length 144 against 5"
