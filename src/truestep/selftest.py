"""Test the tests: damage a recorded tensor in standard ways, and see which gates notice.

The share of damages that a gate notices is its mutation score. Pure: no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from truestep.comparison.latent_gate import FULL_THRESHOLD, SLICE_THRESHOLD, check_latent
from truestep.comparison.matching import compare_tensors
from truestep.errors import UsageError
from truestep.noise import NoiseFloor

Damage = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Gate:
    """A rule that lets a tensor pass or not.

    Attributes:
        name: As it is asked for: `truestep`, `cosine:0.005,0.01`, `allclose:0.0001`.
        passes: (name of the tensor, actual, reference) to whether the gate passes it.
    """

    name: str
    passes: Callable[[str, torch.Tensor, torch.Tensor], bool]


@dataclass(frozen=True)
class Score:
    """What a gate noticed.

    Attributes:
        survived: Names of the damages that passed, with the tensor they passed on.
        applied: Number of damages tried.
        smallest: Smallest rel_l2 of added noise that the gate notices; inf if none up to 10.
    """

    gate: str
    survived: tuple[tuple[str, str], ...]
    applied: int
    smallest: float


def truestep_gate(floor: NoiseFloor | None, *, pair: str | None) -> Gate:
    """Our own verdict: `identical` and `equivalent` pass."""

    def passes(name: str, actual: torch.Tensor, reference: torch.Tensor) -> bool:
        (row,) = compare_tensors({name: actual}, {name: reference}, floor=floor, pair=pair)
        return row.verdict.passed

    return Gate("truestep", passes)


def parse_gate(text: str) -> Gate:
    """A gate by its name: `cosine[:SLICE,FULL]` or `allclose[:TOLERANCE]`.

    Raises:
        UsageError: The gate is unknown or its numbers are not above 0.
    """
    kind, _, numbers = text.partition(":")
    try:
        values = [float(part) for part in numbers.split(",")] if numbers else []
    except ValueError:
        values = [-1.0]
    if kind == "cosine" and len(values) in (0, 2) and all(0 < v < 1 for v in values):
        return _cosine(*(values or [SLICE_THRESHOLD, FULL_THRESHOLD]))
    if kind == "allclose" and len(values) <= 1 and all(v > 0 for v in values):
        return _allclose(*(values or [1e-4]))
    raise UsageError(
        f"unknown gate {text!r}",
        measured="known: cosine:SLICE,FULL (FastVideo's two distances), allclose:TOLERANCE",
        hint="e.g. --gate cosine:5e-3,1e-2 --gate allclose:1e-4",
    )


def _cosine(slice_threshold: float, full_threshold: float) -> Gate:
    def passes(name: str, actual: torch.Tensor, reference: torch.Tensor) -> bool:
        result = check_latent(
            actual,
            reference,
            slice_cosine_threshold=slice_threshold,
            full_cosine_threshold=full_threshold,
        )
        return result.gates[0].passed

    return Gate(f"cosine:{slice_threshold:g},{full_threshold:g}", passes)


def _allclose(tolerance: float) -> Gate:
    def passes(name: str, actual: torch.Tensor, reference: torch.Tensor) -> bool:
        return torch.allclose(actual.float(), reference.float(), rtol=tolerance, atol=tolerance)

    return Gate(f"allclose:{tolerance:g}", passes)


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def _noise(tensor: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(20_240_229)
    return torch.randn(tensor.shape, generator=generator).to(tensor) * _rms(tensor)


def _one_nan(tensor: torch.Tensor) -> torch.Tensor:
    damaged = tensor.clone()
    damaged.view(-1)[tensor.numel() // 2] = math.nan
    return damaged


def _frames(order: Callable[[list[int]], list[int]]) -> Damage:
    return lambda tensor: tensor[:, :, order(list(range(tensor.shape[2])))]


def _patch(tensor: torch.Tensor) -> torch.Tensor:
    damaged = tensor.clone()
    frame = tensor.shape[2] // 2
    damaged[:, :, frame, -3:, -3:] = _noise(tensor)[:, :, frame, -3:, -3:]
    return damaged


DAMAGES: Mapping[str, Damage] = {
    "all NaN": lambda x: torch.full_like(x, math.nan),
    "one NaN": _one_nan,
    "all zero": torch.zeros_like,
    "scaled by 2": lambda x: x * 2,
    "scaled by 1.01": lambda x: x * 1.01,
    "sign flipped": lambda x: -x,
    "moved by 1 % of the rms": lambda x: x + 0.01 * _rms(x),
    "shifted by one column": lambda x: x.roll(1, dims=-1),
    "channels permuted": lambda x: x.roll(1, dims=1),
    "two frames swapped": _frames(lambda f: [*f[:-2], f[-1], f[-2]]),
    "last frame duplicated": _frames(lambda f: [*f[:-1], f[-2]]),
    "one patch of one frame": _patch,
    "another seed": _noise,
}
"""Standard damages of a video latent or prediction `b c f h w` with at least two frames."""


def score(gate: Gate, tensors: Mapping[str, torch.Tensor]) -> Score:
    """Apply every damage to every tensor.

    Args:
        gate: The gate under test.
        tensors: Name to `b c f h w`, floating-point, finite, at least two frames.

    Raises:
        UsageError: A tensor is not like that, or the gate fails even the undamaged one.
    """
    survived = []
    for name, tensor in tensors.items():
        if tensor.ndim != 5 or tensor.shape[2] < 2 or not bool(torch.isfinite(tensor).all()):
            raise UsageError(
                f"{name} cannot be damaged in the standard ways",
                measured=f"shape {tuple(tensor.shape)}; needed: b c f h w, 2 frames, finite",
            )
        if not gate.passes(name, tensor.clone(), tensor):
            raise UsageError(f"gate {gate.name} fails {name} undamaged: it notices nothing else")
        survived += [
            (damage, name)
            for damage, change in DAMAGES.items()
            if gate.passes(name, change(tensor), tensor)
        ]
    smallest = max(_smallest(gate, name, tensor) for name, tensor in tensors.items())
    return Score(gate.name, tuple(survived), len(DAMAGES) * len(tensors), smallest)


def _smallest(gate: Gate, name: str, tensor: torch.Tensor) -> float:
    """Smallest relative noise that fails the gate, to 2 %, by bisection of its logarithm."""
    noise = _noise(tensor).double()
    noise *= tensor.double().norm() / noise.norm()
    low, high = -9.0, 1.0

    def fails(exponent: float) -> bool:
        return not gate.passes(name, (tensor.double() + 10**exponent * noise).to(tensor), tensor)

    if not fails(high):
        return math.inf
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if fails(middle) else (middle, high)
    return float(10**high)


def table(scores: Sequence[Score]) -> list[str]:
    """Damages down, gates across; what survives is in capitals."""
    names = [score.gate for score in scores]
    width = max(len(name) for name in DAMAGES)
    lines = ["  ".join(["damage".ljust(width), *names])]
    for damage in DAMAGES:
        cells = [
            ("LIVES" if any(d == damage for d, _ in s.survived) else "caught").ljust(len(s.gate))
            for s in scores
        ]
        lines.append("  ".join([damage.ljust(width), *cells]).rstrip())
    cells = [f"{s.smallest:.1e}".ljust(len(s.gate)) for s in scores]
    lines.append("  ".join(["smallest noise seen".ljust(width), *cells]).rstrip())
    return lines
