"""What modules make of masked text alone, which reaches no prediction.

Implementations differ there and are right: a fused kernel leaves the rows of padding among
themselves where another lets them look at the text. Which rows these are is found by trying: masked
text is changed, and where the trusted prediction stays as it is to the bit, nothing of what changed
inside is part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from truestep.engines.engine import TEXTS
from truestep.engines.expected import Predicted
from truestep.measure.distance import same_bits
from truestep.replay.isolation import flow


def unread(predicted: Predicted, place: tuple[int, str]) -> dict[str, torch.Tensor]:
    """By name of a module's tensor the elements that the prediction does not depend on.

    Args:
        predicted: A prediction of the trusted model, on an engine's inputs.
        place: Step and branch of the names.

    Returns:
        Nothing where no text is masked, or where masked text is read all the same.
    """
    for name, kept in _masked(predicted.given):
        text = predicted.given[name]
        dice = torch.Generator().manual_seed(0)
        noise = torch.randn(text.shape, generator=dice).to(text.dtype)
        other = {**predicted.given, name: torch.where(kept[..., None], text, text + noise)}
        right, inside = _run(predicted, predicted.given, place)
        changed, inside_changed = _run(predicted, other, place)
        if same_bits(right, changed):
            pairs = {k: (a, inside_changed[k]) for k, a in inside.items() if k in inside_changed}
            return {
                key: a != b
                for key, (a, b) in pairs.items()
                if a.shape == b.shape and bool((a != b).any())
            }
    return {}


def _run(
    predicted: Predicted, given: Mapping[str, torch.Tensor], place: tuple[int, str]
) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """The trusted prediction, and what its modules are given and give."""
    made: list[torch.Tensor] = []

    def forward() -> torch.Tensor:
        made.append(predicted.denoiser(**given))
        return made[0]

    inside = flow(predicted.model, forward, place=place).tensors
    return made[0], inside


def _masked(given: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Texts of which something is masked, and what is not: zeros and ones, one a token."""
    for name in (name for name in TEXTS if name in given):
        for other in given.values():
            if other.shape != given[name].shape[:-1] or other.ndim < 2:
                continue
            if bool(((other == 0) | (other == 1)).all()) and bool((other == 0).any()):
                yield name, other != 0
