"""The published list of prompts, seeds and sizes that the benchmark runs on.

The rule's constants (`truestep.judge.floor`, `truestep.judge.rule`) were chosen looking at `TUNED`
only; `HELD_OUT` was drawn at the same time and not looked at. Prompts are those of the digits
model; for other subjects the text is only text.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DRAWS", "HELD_OUT", "TUNED", "Draw"]


@dataclass(frozen=True)
class Draw:
    """One generation: prompt, seed, and which of a subject's sizes (0, 1, ...)."""

    prompt: str
    seed: int
    size: int = 0
    held_out: bool = False

    @property
    def name(self) -> str:
        """Short and unique."""
        return f"{'held-out' if self.held_out else 'tuned'}/{self.prompt}/{self.seed}/{self.size}"


TUNED = (
    Draw("a red three moving left", 0),
    Draw("a green seven moving up", 5),
)

HELD_OUT = (
    Draw("a blue zero moving right", 11, held_out=True),
    Draw("a yellow eight moving down", 23, held_out=True),
    Draw("a red five moving up", 42, size=1, held_out=True),
)

DRAWS = (*TUNED, *HELD_OUT)
