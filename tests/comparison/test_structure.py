"""Structure statistics: each sees its own kind of residual, and pure noise has none."""

from __future__ import annotations

import math

import pytest
import torch

from truestep.comparison.structure import sample_mean, structure


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
    assert set(structure(x + 0.1 * torch.randn(shape), x)) == names


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
