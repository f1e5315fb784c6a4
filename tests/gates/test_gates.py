"""Every gate passes a pair and fails a pair, and does with NaN what its tool does."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from truestep.errors import MissingExtraError, UsageError
from truestep.gates import kinds as gates
from truestep.gates.kinds import Domain, parse_gate
from truestep.measure.frames import levels, psnr, ssim

GENERATOR = torch.Generator().manual_seed(3)
LATENT = torch.randn(1, 8, 5, 8, 8, generator=GENERATOR)
FRAMES = (torch.rand(1, 3, 5, 32, 40, generator=GENERATOR) * 1.6 - 0.8).cumsum(-1).sin()
BLACK, WHITE = torch.full_like(FRAMES, -1.0), torch.ones_like(FRAMES)
ASKED = {
    "cosine": "cosine:0.005,0.01",
    "allclose": "allclose:0.0001",
    "slice": "slice:0.0001",
    "cosine-one": "cosine-one:0.001",
    "ssim": "ssim:0.93",
    "ms-ssim": "ms-ssim:0.93",
    "psnr": "psnr:28",
    "mad": "mad:8",
    "sglang": "sglang:0.92,24,10",
}


def pair_of(gate: gates.Gate) -> tuple[str, torch.Tensor]:
    return ("video/frames", FRAMES) if gate.domain is Domain.FRAMES else ("latent/final", LATENT)


def with_nan(tensor: torch.Tensor, *at: int) -> torch.Tensor:
    damaged = tensor.clone()
    damaged[at] = math.nan
    return damaged


def test_every_gate_is_tested_here() -> None:
    assert list(ASKED) == list(gates.KINDS)


@pytest.mark.parametrize(("asked", "name"), ASKED.items())
def test_names_come_back_as_they_are_asked_for(asked: str, name: str) -> None:
    gate = parse_gate(asked)
    assert gate.name == name
    assert parse_gate(name).name == name


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_gate_passes_equals_and_fails_another_tensor(name: str, dtype: torch.dtype) -> None:
    gate = parse_gate(name)
    of, reference = pair_of(gate)
    reference = reference.to(dtype)
    assert gate.passes(of, reference.clone(), reference)
    assert gate.passes(of, reference * (1 + 1e-6), reference)
    assert not gate.passes(of, -reference, reference)


@pytest.mark.parametrize(
    ("name", "passes"),
    {"cosine": True, "allclose": False, "slice": False, "cosine-one": False}.items(),
)
def test_nan_in_a_latent(name: str, passes: bool) -> None:
    gate = parse_gate(name)
    nan = torch.full_like(LATENT, math.nan)
    assert gate.passes("latent/final", nan, LATENT) is passes
    assert gate.passes("latent/final", LATENT, nan) is passes


def test_the_slice_gate_sees_its_corner_alone() -> None:
    gate = parse_gate("slice:1e-4")
    assert gate.passes("x", with_nan(LATENT, 0, 0, 0, 0, 0), LATENT)
    assert not gate.passes("x", with_nan(LATENT, 0, -1, -1, -1, -3), LATENT)
    assert torch.equal(gates.corner(LATENT), LATENT[0, -1, -1, -3:, -3:].flatten())
    assert gates.corner(LATENT[0, 0]).numel() == 9


@pytest.mark.parametrize("name", ["ssim", "ms-ssim", "psnr", "mad", "sglang"])
def test_nan_in_frames_is_black(name: str) -> None:
    gate = parse_gate(name)
    nan = torch.full_like(FRAMES, math.nan)
    assert torch.equal(levels(nan), torch.zeros(5, 3, 32, 40))
    assert gate.passes("video/frames", nan, BLACK)
    assert not gate.passes("video/frames", nan, FRAMES)
    assert gate.passes("video/frames", with_nan(FRAMES, 0, 0, 0, 0, 0), FRAMES)


def test_cosine_one_is_float32_numpy() -> None:
    a, r = LATENT.numpy().ravel(), (LATENT + 0.1).numpy().ravel()
    expected = 1.0 - np.dot(a, r) / (np.linalg.norm(a) * np.linalg.norm(r))
    assert gates.cosine_one(LATENT, LATENT + 0.1) == pytest.approx(float(expected), rel=1e-6)
    assert math.isnan(gates.cosine_one(torch.zeros(3), torch.zeros(3)))
    assert parse_gate("cosine-one").passes("x", LATENT * 2, LATENT)


def test_levels_are_cut_down_not_rounded() -> None:
    shade = torch.tensor([-2.0, -1.0, 0.0, 1.0, math.inf, -math.inf])
    frames = shade.expand(1, 3, 1, 2, 6)
    assert levels(frames)[0, 0, 0].tolist() == [0, 0, 127, 255, 255, 0]


def test_psnr_does_not_wrap() -> None:
    assert psnr(BLACK, WHITE) == 0.0
    assert psnr(WHITE, BLACK) == 0.0
    assert psnr(FRAMES, FRAMES) == math.inf
    one_level = psnr(BLACK, BLACK + 2.1 / 255)
    assert one_level == pytest.approx(48.13, abs=0.01)


def test_mad_is_in_levels() -> None:
    assert gates.mad(BLACK, WHITE) == 255.0
    assert gates.mad(WHITE, BLACK) == 255.0
    assert gates.mad(BLACK + 16.1 / 255, BLACK) == 8.0
    assert parse_gate("mad:8").passes("video/frames", BLACK + 16.1 / 255, BLACK)
    assert not parse_gate("mad:7.9").passes("video/frames", BLACK + 16.1 / 255, BLACK)


def test_ssim_of_equal_frames_is_1() -> None:
    assert ssim(FRAMES, FRAMES) == pytest.approx(1.0, abs=1e-6)
    assert gates.ms_ssim(FRAMES, FRAMES) == pytest.approx(1.0, abs=1e-6)
    assert ssim(BLACK, WHITE) < 1e-3


def test_ms_ssim_enlarges_small_frames_and_says_so() -> None:
    gate = parse_gate("ms-ssim:0.93")
    assert gate.named is not None
    assert gate.named(FRAMES) == "ms-ssim:0.93@6x"
    assert [gates.enlargement(torch.empty(1, 3, 1, n, 500)) for n in (32, 160, 161, 480)] == [
        6,
        2,
        1,
        1,
    ]
    assert gate.named(torch.empty(1, 3, 1, 480, 832)) == "ms-ssim:0.93"
    assert 0.1 < gates.ms_ssim(FRAMES.roll(1, -1), FRAMES) < 0.9


def test_sglang_looks_at_three_frames_and_needs_all_three_limits() -> None:
    gate = parse_gate("sglang")
    assert [frame.index for frame in gates.key_frames(FRAMES, FRAMES)] == [0, 2, 4]
    for frame, seen in enumerate([True, False, True, False, True]):
        damaged = FRAMES.clone()
        damaged[:, :, frame] *= -1
        assert gate.passes("video/frames", damaged, FRAMES) is not seen
    noisy = FRAMES + 0.05 * torch.randn(FRAMES.shape, generator=GENERATOR)
    worst = [
        min(f.ssim for f in gates.key_frames(noisy, FRAMES)),
        min(f.psnr for f in gates.key_frames(noisy, FRAMES)),
        max(f.mad for f in gates.key_frames(noisy, FRAMES)),
    ]
    passing = [worst[0] - 1e-3, worst[1] - 1e-3, worst[2] + 1e-3]
    assert gates.sglang_gate(*passing).passes("video/frames", noisy, FRAMES)
    for i, tighter in enumerate((2e-3, 2e-3, -2e-3)):
        limits = [*passing[:i], passing[i] + tighter, *passing[i + 1 :]]
        assert not gates.sglang_gate(*limits).passes("video/frames", noisy, FRAMES)


def test_ssim_conventions_differ() -> None:
    """Both numbers are scikit-image 0.26's: its defaults, and a Gaussian window of sigma 1.5."""
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 1, 16, 16)
    bent = ramp**3
    (first, *_) = gates.key_frames(bent, ramp)
    assert first.ssim == pytest.approx(0.6479083807, abs=1e-9)
    assert ssim(bent, ramp) == pytest.approx(0.5016377, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("ssim:2", "ssim takes LIMIT, above 0 and below 1; got 2"),
        ("ssim:nan", "below 1; got nan"),
        ("ssim:", "below 1; got nothing"),
        ("ms-ssim:0", "above 0 and below 1"),
        ("psnr:-1", "psnr takes DB, above 0 and finite; got -1"),
        ("psnr:inf", "and finite; got inf"),
        ("mad:300", "mad takes LEVELS, above 0 and below 255"),
        ("sglang:0.9", "SSIM,PSNR,MAD, above 0 and in turn below 1, finite, below 255; got 0.9"),
        ("sglang:0.9,24,300", "got 0.9,24,300"),
        ("cosine:1", "cosine takes SLICE,FULL, each above 0 and below 1; got 1"),
        ("cosine:2,3", "below 1; got 2,3"),
        ("cosine-one:1", "below 1; got 1"),
        ("allclose:x", "allclose takes TOLERANCE, above 0 and finite; got x"),
        ("allclose:0", "got 0"),
        ("slice:1,2", "got 1,2"),
    ],
)
def test_limits_that_cannot_judge(text: str, allowed: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_gate(text)
    message = " ".join(str(caught.value).split())
    assert f"gate {text!r} cannot judge anything" in message
    assert allowed in message
    assert "hint: e.g. --gate " + ASKED[text.partition(":")[0]] in message


def test_unknown_gates() -> None:
    with pytest.raises(UsageError, match=r"unknown gate 'sim:0\.9'") as caught:
        parse_gate("sim:0.9")
    assert "did you mean 'ssim'?" in str(caught.value)
    assert "cosine:SLICE,FULL (FastVideo's two distances)" in " ".join(str(caught.value).split())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_msssim", None)
    with pytest.raises(MissingExtraError, match="gate ms-ssim needs the package 'pytorch-msssim'"):
        parse_gate("ms-ssim")
    with pytest.raises(MissingExtraError, match=r"pip install 'truestep\[media\]'"):
        parse_gate("ms-ssim")
    for name in ("sglang", "ssim"):
        assert parse_gate(name).passes("video/frames", FRAMES, FRAMES)


@pytest.mark.parametrize(
    ("actual", "reference", "message"),
    [
        (FRAMES[:, :1], FRAMES[:, :1], "a gate on frames needs decoded video"),
        (FRAMES.int(), FRAMES.int(), "floating-point"),
        (FRAMES[:, :, :1], FRAMES, "two videos of one shape are needed"),
        (FRAMES[..., :10], FRAMES[..., :10], "both sides must have 11 pixels or more"),
    ],
)
def test_frames_that_cannot_be_judged(
    actual: torch.Tensor, reference: torch.Tensor, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        ssim(actual, reference)
    assert message in " ".join(str(caught.value).split())


def test_domains() -> None:
    assert gates.domain_of("video/frames") is Domain.FRAMES
    assert gates.domain_of("latent/final") is Domain.LATENT
    assert parse_gate("ssim").judges("video/frames")
    assert not parse_gate("ssim").judges("latent/final")
    assert not parse_gate("cosine").judges("video/frames")
