"""What stands in a result about ranks: the first wrong place, and the collective before it."""

from __future__ import annotations

from truestep.engines.expected import place_of
from truestep.engines.ranks.events import Event, between
from truestep.engines.ranks.gathering import Gathered
from truestep.engines.ranks.locating import UNRECORDED, locate
from truestep.engines.run import Run
from truestep.engines.trusted import Trusted
from truestep.errors import FOREIGN, one_line


def explained(gathered: Gathered, known: Run | None, trusted: Trusted, first: str) -> list[str]:
    """Notes about the first seam that fails.

    Args:
        gathered: The run of all ranks.
        known: The trusted pipeline's run, if there is one.
        trusted: The trusted side.
        first: Name of the seam.
    """
    place = place_of(first)
    if place.stage == "prediction" and place.step is not None:
        try:
            located = locate(gathered, known, trusted, place.step, place.branch or "")
        except FOREIGN as error:
            return [f"not located inside of the prediction: {one_line(error)}"]
        return located.notes() if located else [f"not located: {UNRECORDED}"]
    return _outside(gathered, first, place.stage, place.step)


def _outside(gathered: Gathered, name: str, stage: str, step: int | None) -> list[str]:
    """The collective before a seam that lies outside of predictions."""
    if stage == "latent" and not step:
        events = between(gathered, None, first=True)
        where = "before the first prediction"
    elif stage in ("guidance", "latent", "update") and step is not None:
        step = step - 1 if stage == "latent" else step
        events = between(gathered, step, first=False)
        where = f"between the predictions of step {step} and its end"
    elif stage == "decoding":
        events = between(gathered, None, first=False)
        where = "after the last step"
    else:
        return []
    return [_said(events, f"`{name}`", where)]


def _said(events: list[Event], name: str, where: str) -> str:
    if not events:
        return f"no collective {where}: nothing makes {name} the same on all ranks"
    return f"the collective before it: {events[-1].label}"
