"""What a hypothesis about a stage without a model is: what it makes of each failing tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from truestep.verdict import Cause

if TYPE_CHECKING:
    from truestep.runtime.pipeline import Pipeline

LEAST = 1e-6
"""Relative distance that is the floor where less was measured: fits are of rounded numbers."""

GAIN = 10.0
"""A hypothesis must bring the candidate nearer by this factor."""

VALUES = 16
"""Different values that each fitted number of a hypothesis has to explain."""

PRECISIONS = (torch.bfloat16, torch.float16)
"""What a stage may be computed or kept in by mistake."""


@dataclass(frozen=True)
class Failing:
    """A tensor of the stage that fails.

    Attributes:
        name: As it is recorded.
        actual, reference: What the candidate gave, and the reference, in float64.
        limit: Relative distance within which a hypothesis explains it.
    """

    name: str
    actual: torch.Tensor
    reference: torch.Tensor
    limit: float


@dataclass(frozen=True)
class Scene:
    """What is known of a stage.

    Attributes:
        failing: Its tensors that fail, in order of execution.
        recording: The reference.
        trusted: The reference's pipeline.
    """

    failing: Sequence[Failing]
    recording: Mapping[str, torch.Tensor]
    trusted: Pipeline

    def recorded(self, name: str) -> torch.Tensor | None:
        """A recorded tensor in float64; None where there is none."""
        return self.recording[name].double() if name in self.recording else None


@dataclass(frozen=True)
class Guess:
    """A hypothesis.

    Attributes:
        made: What it makes of each failing tensor, in their order.
        numbers: How many numbers of it were fitted to the candidate's tensors.
    """

    kind: str
    text: str
    made: Sequence[torch.Tensor]
    patch: str = ""
    numbers: int = 0


def explains(guess: Guess, failing: Sequence[Failing]) -> bool:
    """Whether a hypothesis gives every failing tensor, to its floor and much nearer than without.

    What has as many numbers to choose as there are values to explain explains nothing.
    """
    for made, one in zip(guess.made, failing, strict=True):
        after, before = apart(made, one.actual), apart(one.reference, one.actual)
        if not (after <= one.limit and after * GAIN <= before):
            return False
    if not guess.numbers:
        return True
    values = torch.cat([one.actual.flatten() for one in failing]).unique()
    return len(values) >= VALUES * guess.numbers


def cause_of(guess: Guess, failing: Sequence[Failing], tried: int) -> Cause:
    """The cause that an accepted hypothesis is, with its error at the first failing tensor."""
    first = failing[0]
    return Cause(
        kind=guess.kind,
        text=guess.text,
        patch=guess.patch,
        error_before=apart(first.reference, first.actual),
        error_after=apart(guess.made[0], first.actual),
        tried=tried,
    )


def apart(made: torch.Tensor, actual: torch.Tensor) -> float:
    """rel_l2 of what was made from what the candidate gave; infinite where they are of other
    sizes."""
    if made.shape != actual.shape:
        return float("inf")
    size = float(actual.norm())
    return float((made - actual).norm()) / size if size else float(made.norm())


def number(value: float) -> str:
    """A fitted number as one would write it."""
    return f"{value:.4g}"


def rounded_to(scene: Scene, what: str) -> Iterator[Guess]:
    for dtype in PRECISIONS:
        made = [one.reference.to(dtype).double() for one in scene.failing]
        name = str(dtype).removeprefix("torch.")
        yield Guess("precision", f"{what} in {name}, the reference's not", made)


def least_squares(reference: torch.Tensor, actual: torch.Tensor) -> float:
    """The factor by which a reference comes nearest; 1 of one that is 0."""
    size = float(reference.square().sum())
    return float((actual * reference).sum()) / size if size else 1.0


def scaled(scene: Scene, what: str) -> Iterator[Guess]:
    """All failing tensors by one factor."""
    factor = least_squares(scene.failing[0].reference, scene.failing[0].actual)
    made = [factor * other.reference for other in scene.failing]
    yield Guess("scaled", f"{what} {number(factor)} times the reference's", made)
