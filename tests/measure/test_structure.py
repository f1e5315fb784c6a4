"""Structure statistics: each sees its own kind of residual, and pure noise has none."""

from __future__ import annotations

import math

import pytest
import torch

from truestep.measure.structure import bulk, sample_mean, structure


def video(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 8, 5, 8, 8, generator=torch.Generator().manual_seed(seed))


X = video()
NOISE = 1e-3 * video(1)


def test_noise_has_little_structure() -> None:
    found = structure(X + NOISE, X)
    assert abs(found["correlation"]) < 0.06
    assert abs(found["gain"]) < 1e-4
    assert found["channel_mean"] < 3e-4
    assert 1e-3 < found["frame_energy"] < 1.2e-3
    assert 1e-3 < found["row_energy"] < 1.2e-3
    assert found["token_energy"] < 3e-3


@pytest.mark.parametrize(
    ("damage", "statistic", "value"),
    [
        (lambda x: x * 1.01, "gain", 0.01),
        (lambda x: x * 0.99, "correlation", -1.0),
        (lambda x: x + 0.01 * (torch.arange(8) == 3).view(1, 8, 1, 1, 1), "channel_mean", 0.01),
        (lambda x: x + 0.01 * (torch.arange(5) == 2).view(1, 1, 5, 1, 1), "frame_energy", 0.01),
        (lambda x: x + 0.01 * (torch.arange(8) == 2).view(1, 1, 1, 8, 1), "row_energy", 0.01),
    ],
)
def test_each_statistic_reads_its_own_structure(damage, statistic: str, value: float) -> None:  # type: ignore[no-untyped-def]
    found = structure(damage(X), X)
    rms = float(X.square().mean().sqrt())
    scale = 1.0 if statistic in {"gain", "correlation"} else rms
    assert found[statistic] * scale == pytest.approx(value, rel=1e-3)


def test_one_token_is_seen() -> None:
    damaged = X.clone()
    damaged[:, :, 1, 2, 3] += 1.0
    assert structure(damaged, X)["token_energy"] == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((1, 4, 6, 6), {"gain", "correlation", "channel_mean", "row_energy", "token_energy"}),
        ((1, 7, 16), {"gain", "correlation", "channel_mean", "token_energy"}),
        ((7, 16), {"gain", "correlation", "channel_mean", "token_energy"}),
        ((7,), {"gain", "correlation"}),
    ],
)
def test_layouts(shape: tuple[int, ...], names: set[str]) -> None:
    x = torch.randn(shape)
    assert set(structure(x + 0.1 * torch.randn(shape), x)) == names | {"bulk"}


def test_no_residual_no_statistics() -> None:
    assert structure(X, X) == {}
    assert structure(X, torch.zeros_like(X)) == {}
    with pytest.raises(ValueError, match="shapes differ"):
        structure(X, X[:, :4])


def test_narrow_and_wide_dtypes() -> None:
    assert structure((X * 1.05).bfloat16(), X)["gain"] == pytest.approx(0.05, rel=0.1)
    tiny = structure(X.double() * (1 + 1e-12), X.double())
    assert tiny["gain"] == pytest.approx(1e-12, rel=1e-3)
    assert tiny["correlation"] == pytest.approx(1.0, rel=1e-3)


def test_the_mean_over_samples_shrinks_noise_and_keeps_a_fault() -> None:
    names = [f"step/{i:04d}/cond" for i in range(16)]
    reference = {name: video(10 + i) for i, name in enumerate(names)}
    noisy = {n: r + 1e-3 * video(50 + i) for i, (n, r) in enumerate(reference.items())}
    fault = 1e-3 * video(99)
    faulty = {n: r + fault for n, r in reference.items()}
    sizes = dict.fromkeys(names, 1e-3)

    def size(actual: dict[str, torch.Tensor]) -> float:
        mean = sample_mean(actual, reference, sizes)
        assert mean is not None
        return float((mean[0] - mean[1]).norm())

    assert 3 < size(faulty) / size(noisy) < 5  # the square root of 16 samples


def test_a_mean_over_samples_needs_them_all() -> None:
    reference = {"a": X, "b": X}
    assert sample_mean({"a": X}, reference, {"a": 1.0, "b": 1.0}) is None
    assert sample_mean(reference, reference, {}) is None
    assert sample_mean({"a": X, "b": X * math.nan}, reference, {"a": 1.0, "b": 1.0}) is None


def beside_a_huge_one(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.tensor([1e9]), values])


ONES = torch.randn(32, generator=torch.Generator().manual_seed(5))
OTHER = torch.randn(32, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize(
    ("values", "distance", "gain"),
    [
        (-ONES, 2.0, -1.0),
        (ONES * 1.01, 0.01, 1.01),
        (ONES * 0.99, 0.01, 0.99),
        (ONES * 0, 1.0, 0.0),
        (ONES + 1e-3 * OTHER, None, None),
        (OTHER, None, None),
    ],
)
def test_the_bulk_is_seen_beside_a_huge_element(
    values: torch.Tensor, distance: float | None, gain: float | None
) -> None:
    found = bulk(beside_a_huge_one(values), beside_a_huge_one(ONES))
    assert found["bulk"] > 5e-4
    if distance is not None:
        assert found["bulk"] == pytest.approx(distance, rel=1e-5)
    assert found.get("bulk_gain") == (gain if gain is None else pytest.approx(gain, rel=1e-5))


def spectrum(samples: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(torch.fft.rfft(samples)).float()


@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0])
def test_noise_beside_large_values_is_no_gain(noise: float) -> None:
    """A tone's other bins, means taken off, projections that cancel: rounding of what was large."""
    tone = 1e4 * torch.cos(torch.arange(4096) * (100 * math.pi / 4096)) + noise * torch.randn(4096)
    far = torch.randn(200, 64) + 1e5
    exact = far.double()
    base, _ = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))
    loud = torch.outer(torch.full((50,), 1e6).double(), base[:, 0]) + torch.randn(50, 64).double()
    pairs = (
        (spectrum(tone), spectrum(tone.double())),
        (far - far.mean(-1, keepdim=True), (exact - exact.mean(-1, keepdim=True)).float()),
        (loud.float() @ base.float(), (loud @ base).float()),
        (loud.bfloat16() @ base.bfloat16(), (loud @ base).bfloat16()),
    )
    for actual, reference in pairs:
        assert bulk(actual, reference)["bulk"] > 1e-5
        assert "bulk_gain" not in bulk(actual, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_a_massive_channel_does_not_make_the_others_noisy(size: float, dtype: torch.dtype) -> None:
    """Each element of a product rounds by itself: what is small stays as exact as it was."""
    weight = torch.randn(256, 256)
    weight[7] *= size
    x = torch.randn(64, 256)
    actual = x.to(dtype) @ weight.to(dtype).T
    reference = (x.to(dtype).double() @ weight.to(dtype).double().T).to(dtype)
    epsilon = torch.finfo(dtype).eps
    assert bulk(actual, reference)["bulk"] < 3 * (32 if dtype is torch.float32 else 1) * epsilon


def test_the_bulk_of_large_sparse_and_extreme_tensors() -> None:
    large = torch.randn(300_000)
    noisy = large + 1e-3 * torch.randn(300_000)
    small = large.abs() <= large.abs().median()
    exactly = float((noisy - large)[small].norm() / large[small].norm())
    assert bulk(noisy, large)["bulk"] == pytest.approx(exactly, rel=0.03)
    assert bulk(torch.ones(3), torch.zeros(3)) == {}
    assert bulk(torch.tensor([0.0, 0, 3]), torch.tensor([0.0, 0, 2]))["bulk"] == 0.5
    for scale in (1e-300, 1e300):
        assert bulk(X.double() * scale * 1.5, X.double() * scale)["bulk"] == pytest.approx(0.5)
    assert bulk(X.double() * 1e300, X.double() * 1e-300)["bulk"] == math.inf
