"""Metrics of a pair of 100 MB float32 tensors beside what others use, and how exact they are."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import numpy as np
import torch

from bench.common import emit, paired, ratio, rounded
from truestep.measure.distance import distance

ELEMENTS = 25_000_000
BAR = 3.0


def polygraphy() -> Callable[[np.ndarray, np.ndarray], object] | None:  # type: ignore[type-arg]
    """Polygraphy's simple comparison, if it is installed."""
    try:
        from polygraphy.comparator import IterationResult, SimpleCompareFunc
        from polygraphy.logger import G_LOGGER
    except ImportError:
        return None
    G_LOGGER.module_severity = {"": G_LOGGER.CRITICAL}
    compare = SimpleCompareFunc(atol=1e-2, rtol=1e-2)

    def run(actual: np.ndarray, reference: np.ndarray) -> object:  # type: ignore[type-arg]
        return compare(IterationResult({"x": actual}), IterationResult({"x": reference}))

    return run


def exact(actual: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """The metrics in float64 throughout, from their definitions."""
    a, r = actual.double(), reference.double()
    norm_a, norm_r = a.norm(), r.norm()
    unit = a / norm_a - r / norm_r
    return {
        "rel_l2": float((a - r).norm() / norm_r),
        "max_abs": float((a - r).abs().max()),
        "cosine_distance": float(unit.square().sum() / 2),
        "norm_ratio": float(norm_a / norm_r),
        "gain": float(1 + (a - r).dot(r) / norm_r**2),
    }


def by_pair(reference: torch.Tensor) -> None:
    """Speed on other kinds of pairs: small angles and small gains need a second, float64 pass."""
    noise = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(1))
    kinds: dict[str, Callable[[], torch.Tensor]] = {
        "noise 1": lambda: reference + noise,
        "sign": lambda: -reference,
        "one NaN": lambda: torch.where(torch.arange(ELEMENTS) == 7, torch.nan, reference),
        "gain 1.01": lambda: reference * 1.01,
        "gain 1.01 and noise 1e-4": lambda: reference * 1.01 + 1e-4 * noise,
        "gain 0.1 and noise 1e-3": lambda: reference * 0.1 + 1e-3 * noise,
    }
    r = reference.numpy()
    for name, make in kinds.items():
        actual = make()
        a = actual.numpy()
        pair: dict[str, Callable[[], object]] = {
            "truestep": functools.partial(distance, actual, reference),
            "numpy.allclose": functools.partial(np.allclose, a, r, rtol=1e-2, atol=1e-2),
        }
        samples = paired(pair, rounds=5)
        faster = ratio(samples, "numpy.allclose", "truestep")
        emit(
            "compare_speed_by_pair",
            pair=name,
            times_faster_than_allclose=round(faster, 2),
            bar=BAR,
            met=faster >= BAR,
            samples_s={key: rounded(seconds) for key, seconds in samples.items()},
        )


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(ELEMENTS, generator=generator)
    actual = reference + 1e-3 * torch.randn(ELEMENTS, generator=generator)
    a, r = actual.numpy(), reference.numpy()
    contenders: dict[str, Callable[[], object]] = {
        "truestep": lambda: distance(actual, reference),
        "numpy.allclose": lambda: np.allclose(a, r, rtol=1e-2, atol=1e-2),
        "torch.assert_close": lambda: torch.testing.assert_close(
            actual, reference, rtol=1e-2, atol=1e-2
        ),
    }
    peer = polygraphy()
    if peer is not None:
        contenders["polygraphy"] = lambda: peer(a, r)
    samples = paired(contenders, rounds=7)
    for name, seconds in samples.items():
        median = statistics.median(seconds)
        emit(
            "compare_100MB_float32",
            contender=name,
            gb_per_s=round(ELEMENTS * 4 / median / 1e9, 3),
            median_s=round(median, 6),
            samples_s=rounded(seconds),
        )
    if peer is None:
        emit("compare_100MB_float32", contender="polygraphy", missing="pip install polygraphy")
    faster = ratio(samples, "numpy.allclose", "truestep")
    emit(
        "compare_speed_bar", times_faster_than_allclose=round(faster, 2), bar=BAR, met=faster >= BAR
    )
    found, wanted = distance(actual, reference), exact(actual, reference)
    by_pair(reference)
    errors = {k: abs(getattr(found, k) - v) / abs(v) for k, v in wanted.items()}
    emit("compare_accuracy_bar", relative_errors=errors, bar=1e-6, met=max(errors.values()) <= 1e-6)


if __name__ == "__main__":
    main()
