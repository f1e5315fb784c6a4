"""Sketches of a 100 MB float32 tensor on one thread, and how near their distances are."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable

import torch

from bench.common import emit, paired, rounded
from truestep.measure.sketch import Estimate, estimate, sketch

ELEMENTS = 25_000_000
BAR_GB_PER_S = 1.0
BAR_SHARE = 0.95
TOLERANCE = 0.05
CASES_PER_KIND = 40
SIZES = (2_000, 5_000_000)
LEVELS = (1e-6, 1.0)

Residual = Callable[[torch.Tensor, random.Random], torch.Tensor]
"""From a flat reference, a residual of any scale."""


def noise(r: torch.Tensor, dice: random.Random) -> torch.Tensor:
    return torch.randn(len(r), generator=torch.Generator().manual_seed(dice.getrandbits(32)))


def column(period: int) -> Residual:
    def build(r: torch.Tensor, dice: random.Random) -> torch.Tensor:
        residual, chosen = torch.zeros(len(r)), dice.randrange(period)
        residual[chosen::period] = noise(r, dice)[chosen::period]
        return residual

    return build


def constant_column(r: torch.Tensor, dice: random.Random) -> torch.Tensor:
    residual = torch.zeros(len(r))
    residual[dice.randrange(128) :: 128] = 1.0
    return residual


def frame(r: torch.Tensor, dice: random.Random) -> torch.Tensor:
    residual, length = torch.zeros(len(r)), max(len(r) // 21, 1)
    place = slice(start := dice.randrange(len(r) - length), start + length)
    residual[place] = noise(r, dice)[place]
    return residual


def gradient(r: torch.Tensor, dice: random.Random) -> torch.Tensor:
    return torch.linspace(dice.uniform(-1, 0), dice.uniform(0, 1), len(r))


def wave(r: torch.Tensor, dice: random.Random) -> torch.Tensor:
    return torch.sin(torch.arange(len(r)) * (2 * math.pi / dice.uniform(2, 2000)))


def spikes(count: int) -> Residual:
    def build(r: torch.Tensor, dice: random.Random) -> torch.Tensor:
        residual = torch.zeros(len(r))
        residual[dice.sample(range(len(r)), count)] = 1.0
        return residual

    return build


def channels_permuted(r: torch.Tensor, dice: random.Random) -> torch.Tensor:
    whole = r[: len(r) // 16 * 16].view(16, -1)
    order = dice.sample(range(16), 16)
    return torch.cat((whole[order].reshape(-1), r[whole.numel() :])) - r


RESIDUALS: dict[str, Residual] = {
    "noise": noise,
    "column of 64": column(64),
    "column of 128": column(128),
    "column of 1021": column(1021),
    "column of 1024": column(1024),
    "constant column of 128": constant_column,
    "frame": frame,
    "constant": lambda r, dice: torch.ones(len(r)),
    "gradient": gradient,
    "wave": wave,
    "gain": lambda r, dice: r.clone(),
    "1 spike": spikes(1),
    "2 spikes": spikes(2),
    "5 spikes": spikes(5),
    "rounding to bfloat16": lambda r, dice: r.bfloat16().float() - r,
    "rolled by 1": lambda r, dice: r.roll(1) - r,
    "rolled by a frame": lambda r, dice: r.roll(len(r) // 21) - r,
    "channels permuted": channels_permuted,
}


def between(low: float, high: float, dice: random.Random) -> float:
    """A random number, uniform in its logarithm."""
    return math.exp(dice.uniform(math.log(low), math.log(high)))


def one_case(residual: Residual, dice: random.Random) -> tuple[float, Estimate]:
    """The exact distance of a random pair, and the estimate."""
    size = int(between(*SIZES, dice))
    reference = noise(torch.empty(size), dice) * 3 + dice.choice((0, 1))
    change = residual(reference, dice)
    norm = float(reference.double().norm())
    # In float64, for the residual to be the one asked for at every level.
    scale = between(*LEVELS, dice) * norm / float(change.double().norm())
    actual = reference.double() + scale * change.double()
    truth = float((actual - reference.double()).norm()) / norm
    return truth, estimate(sketch(actual), sketch(reference), norm=norm)


def accuracy() -> None:
    dice = random.Random(0)
    ratios: list[float] = []
    covered = 0
    for kind, residual in RESIDUALS.items():
        cases = [one_case(residual, dice) for _ in range(CASES_PER_KIND)]
        found = [case.rel_l2 / truth for truth, case in cases]
        inside = sum(case.low <= truth <= case.high for truth, case in cases)
        ratios += found
        covered += inside
        emit(
            "sketch_accuracy",
            residual=kind,
            cases=len(found),
            within_5_percent=round(share(found), 4),
            in_interval=round(inside / len(found), 4),
            mean_ratio=round(statistics.mean(found), 4),
            standard_error=round(statistics.pstdev(found, 1.0), 4),
            worst=round(max(abs(value - 1) for value in found), 4),
        )
    emit(
        "sketch_accuracy_bar",
        cases=len(ratios),
        within_5_percent=round(share(ratios), 4),
        in_interval=round(covered / len(ratios), 4),
        bar=BAR_SHARE,
        met=share(ratios) >= BAR_SHARE,
    )


def share(ratios: list[float]) -> float:
    return sum(abs(value - 1) <= TOLERANCE for value in ratios) / len(ratios)


def speed() -> None:
    tensor = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(0))
    kinds = {"float32": tensor, "bfloat16": tensor.bfloat16(), "float64": tensor.double()}
    contenders: dict[str, Callable[[], object]] = {
        f"sketch {name}": lambda tensor=kind: sketch(tensor)  # type: ignore[misc]
        for name, kind in kinds.items()
    }
    contenders["torch.sum float32"] = tensor.sum  # about what reading alone takes
    for name, seconds in paired(contenders, rounds=7).items():
        size = kinds[name.split()[1]].nbytes
        speed_gb = size / statistics.median(seconds) / 1e9
        verdict = {"bar": BAR_GB_PER_S, "met": speed_gb >= BAR_GB_PER_S}
        emit(
            "sketch_100MB_float32" if name == "sketch float32" else "sketch_other",
            contender=name,
            gb_per_s=round(speed_gb, 3),
            samples_s=rounded(seconds),
            **(verdict if name == "sketch float32" else {}),
        )


def far_and_near() -> None:
    """Two tensors of 100 MB that differ by 1e-6, in float32."""
    reference = noise(torch.empty(ELEMENTS), random.Random(1))
    actual = reference + 1e-6 * noise(reference, random.Random(2))
    norm = float(reference.double().norm())
    truth = float((actual.double() - reference.double()).norm()) / norm
    found = estimate(sketch(actual), sketch(reference), norm=norm)
    error = abs(found.rel_l2 / truth - 1)
    emit("sketch_100MB_1e-6", relative_error=error, bar=TOLERANCE, met=error <= TOLERANCE)


def main() -> None:
    torch.set_num_threads(1)
    speed()
    far_and_near()
    accuracy()


if __name__ == "__main__":
    main()
