"""Test the tests: damage a recorded tensor in standard ways, and see which gates notice.

The share of damages that a gate notices is its mutation score. It says nothing of false alarms: a
gate that fails whatever is not equal bit for bit scores 100 %. Pure: no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from truestep.errors import UsageError
from truestep.floors import NoiseFloor
from truestep.gates.kinds import Domain, Gate
from truestep.judge.floor import Limits
from truestep.judge.rows import compare_tensors
from truestep.verdict import Float, Record, Side

Damage = Callable[[torch.Tensor], torch.Tensor]

SCHEMA_VERSION = 1

WIDTH = 100
"""Columns of the output."""


class Trial(Record):
    """One damage of one tensor, and whether the gate let it live."""

    damage: str
    tensor: str
    lives: bool


class Score(Record):
    """What a gate noticed.

    The three smallest changes are relative to the tensor, found by bisection between 1e-9 and 10,
    each of them the largest over the gate's tensors; inf where some tensor shows none.

    Attributes:
        gate: Name of the result.
        domain: What the gate judges.
        trials: Every damage tried; those that change nothing are not.
        smallest_noise: rel_l2 of added noise.
        smallest_gain: Distance of a factor from 1.
        smallest_shift: Offset in multiples of the rms.
    """

    gate: str
    domain: Domain
    trials: tuple[Trial, ...]
    smallest_noise: Float
    smallest_gain: Float
    smallest_shift: Float

    @property
    def survived(self) -> tuple[tuple[str, str], ...]:
        """Damages that the gate let live, with the tensor they live on."""
        return tuple((t.damage, t.tensor) for t in self.trials if t.lives)

    @property
    def caught(self) -> int:
        """Number of damages that the gate noticed."""
        return len(self.trials) - len(self.survived)

    @property
    def share(self) -> float:
        """Mutation score, 0 to 1."""
        return self.caught / len(self.trials) if self.trials else math.nan

    def cell(self, damage: str) -> str:
        """`caught`, `LIVES`, `LIVES 1/2` (on one of two tensors), or `-` if it was not tried."""
        tried = [t.lives for t in self.trials if t.damage == damage]
        if not any(tried):
            return "caught" if tried else "-"
        return "LIVES" if all(tried) else f"LIVES {sum(tried)}/{len(tried)}"


class Selftest(Record):
    """The scores of gates on one reference."""

    name: str
    sentence: str
    tensors: tuple[str, ...]
    reference: Side
    scores: tuple[Score, ...]


class Selftests(Record):
    """What `truestep gate selftest --json` writes."""

    schema_version: int = SCHEMA_VERSION
    tool_version: str = ""
    repeat: str = ""
    results: tuple[Selftest, ...]


def truestep_gate(floor: NoiseFloor | None, *, pair: str | None) -> Gate:
    """Our own verdict: `identical` and `equivalent` pass."""
    limits = Limits(floor, pair)

    def passes(name: str, actual: torch.Tensor, reference: torch.Tensor) -> bool:
        (row,) = compare_tensors({name: actual}, {name: reference}, limits=limits)
        return row.verdict.passed

    return Gate("truestep", passes, Domain.ANY)


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
"""Standard damages of a video latent, a prediction or decoded frames `b c f h w`, f >= 2."""


def suited(gate: Gate, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that a gate judges.

    Args:
        gate: The gate under test.
        tensors: Name to `b c f h w`, floating-point, finite, at least two frames; names that start
            with `video/` are decoded frames, all others latents.

    Raises:
        UsageError: There are none, or one is not like that.
    """
    found = {name: tensor for name, tensor in tensors.items() if gate.judges(name)}
    if not found:
        raise UsageError(
            f"gate {gate.name} has nothing to judge",
            measured=f"it judges {gate.domain}; the reference holds {', '.join(tensors) or 'none'}",
            hint="truestep record CASE --update  # with decoded frames",
        )
    for name, tensor in found.items():
        usable = tensor.ndim == 5 and tensor.shape[2] >= 2 and tensor.is_floating_point()
        if not usable or not bool(torch.isfinite(tensor).all()):
            raise UsageError(
                f"{name} cannot be damaged in the standard ways",
                measured=f"shape {tuple(tensor.shape)}, {tensor.dtype}; needed: b c f h w, "
                "2 frames, floating-point, finite",
            )
    return found


def score(gate: Gate, tensors: Mapping[str, torch.Tensor]) -> Score:
    """Apply every damage to every tensor that the gate judges.

    Args:
        gate: The gate under test.
        tensors: As `suited` takes them; those of another domain are left out.

    Raises:
        UsageError: A tensor cannot be damaged, or the gate fails even the undamaged one.
    """
    judged = suited(gate, tensors)
    trials = []
    for name, tensor in judged.items():
        if not gate.passes(name, tensor.clone(), tensor):
            raise UsageError(f"gate {gate.name} fails {name} undamaged: it notices nothing else")
        for damage, change in DAMAGES.items():
            damaged = change(tensor)
            if not torch.equal(damaged, tensor):
                lives = gate.passes(name, damaged, tensor)
                trials.append(Trial(damage=damage, tensor=name, lives=lives))
    smallest = {
        kind: max(_smallest(gate, name, tensor, change) for name, tensor in judged.items())
        for kind, change in CHANGES.items()
    }
    first = next(iter(judged.values()))
    return Score(
        gate=gate.named(first) if gate.named else gate.name,
        domain=gate.domain,
        trials=tuple(trials),
        smallest_noise=smallest["noise"],
        smallest_gain=smallest["gain"],
        smallest_shift=smallest["shift"],
    )


def _added_noise(tensor: torch.Tensor, amount: float) -> torch.Tensor:
    exact, noise = tensor.double(), _noise(tensor).double()
    return exact + noise * (amount * float(exact.norm() / noise.norm()))


CHANGES: Mapping[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "noise": _added_noise,
    "gain": lambda tensor, amount: tensor.double() * (1 + amount),
    "shift": lambda tensor, amount: tensor.double() + amount * _rms(tensor),
}
"""Changes of a tensor by a relative amount, in float64."""


def _smallest(
    gate: Gate,
    name: str,
    tensor: torch.Tensor,
    change: Callable[[torch.Tensor, float], torch.Tensor],
) -> float:
    """Smallest relative change that fails the gate, to 2 %, by bisection of its logarithm."""
    low, high = -9.0, 1.0

    def fails(exponent: float) -> bool:
        return not gate.passes(name, change(tensor, 10**exponent).to(tensor), tensor)

    if not fails(high):
        return math.inf
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if fails(middle) else (middle, high)
    return float(10**high)


def table(scores: Sequence[Score]) -> list[str]:
    """Damages down, gates across; what survives is in capitals. Wide ones become several tables."""
    label = max(len(name) for name in [*DAMAGES, *_FOOTER])
    tables: list[list[list[str]]] = []
    room = 0
    for column in map(_column, scores):
        room -= 2 + len(column[0])
        if room < 0 or not tables:
            tables.append([])
            room = WIDTH - label - 2 - len(column[0])
        tables[-1].append(column)
    lines = []
    for columns in tables:
        rows = zip(["damage", "judges", *DAMAGES, *_FOOTER], *columns, strict=True)
        lines += ["  ".join([row[0].ljust(label), *row[1:]]).rstrip() for row in rows] + [""]
    return lines[:-1]


_FOOTER: Mapping[str, Callable[[Score], str]] = {
    "caught": lambda s: f"{s.caught} of {len(s.trials)}",
    "mutation score": lambda s: f"{s.share:.0%}".replace("%", " %"),
    "smallest noise seen": lambda s: amount(s.smallest_noise),
    "smallest gain seen": lambda s: amount(s.smallest_gain),
    "smallest shift seen": lambda s: amount(s.smallest_shift),
}


def amount(value: float) -> str:
    """A smallest change that is seen, in short."""
    return f"{value:.1e}" if math.isfinite(value) else "none"


def _column(found: Score) -> list[str]:
    cells = [
        found.gate,
        "both" if found.domain is Domain.ANY else found.domain.value,
        *(found.cell(damage) for damage in DAMAGES),
        *(text(found) for text in _FOOTER.values()),
    ]
    width = max(len(cell) for cell in cells)
    return [cell.ljust(width) for cell in cells]


def sentence(name: str, scores: Iterable[Score]) -> str:
    """What a person would repeat."""
    told = [f"{s.gate} {s.caught} of {len(s.trials)} ({s.share:.0%})" for s in scores]
    return f"{name}: damages caught: " + ", ".join(told).replace("%", " %")
