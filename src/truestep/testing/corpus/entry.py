"""What an entry of the corpus is, and the decorators that make one of a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Change = Callable[[Any], Any]
"""Receives a fresh pipeline and changes it, or returns another: what `--apply` takes."""


class NotApplicable(Exception):  # noqa: N818 - it says that there is nothing to change, not an error
    """The pipeline, of this version of diffusers, has nothing that an entry could change."""


@dataclass(frozen=True)
class Entry:
    """One planted fault, or one harmless twin.

    Attributes:
        name: Unique, with dashes.
        kind: `fault` or `twin`.
        subjects: Names of the subjects that it changes.
        at: Of a fault: where it must be named, as `transformer.forward in img_ids` or
            `vae.decode out*`: patterns of component, method, side and argument, any of which is
            right. `denoiser` stands for the pipeline's own.
        note: What it does, in a line.
        apply: Plants it.
    """

    name: str
    kind: Literal["fault", "twin"]
    subjects: tuple[str, ...]
    at: tuple[str, ...]
    note: str
    apply: Change


def fault(*subjects: str, at: str | tuple[str, ...]) -> Callable[[Change], Change]:
    """Make a planted fault of a function."""

    def mark(function: Change) -> Change:
        return _marked(function, "fault", subjects, (at,) if isinstance(at, str) else at)

    return mark


def twin(*subjects: str) -> Callable[[Change], Change]:
    """Make a harmless twin of a function."""

    def mark(function: Change) -> Change:
        return _marked(function, "twin", subjects, ())

    return mark


def _marked(
    function: Change,
    kind: Literal["fault", "twin"],
    subjects: tuple[str, ...],
    at: tuple[str, ...],
) -> Change:
    name = function.__name__.replace("_", "-")
    note = (function.__doc__ or "").strip().partition("\n")[0]
    function.entry = Entry(name, kind, subjects, at, note, function)  # type: ignore[attr-defined]
    return function


def entries_of(module: Any) -> list[Entry]:
    """Entries of a module, in the order of their definitions."""
    marked = (getattr(value, "entry", None) for value in vars(module).values())
    return [entry for entry in marked if isinstance(entry, Entry)]
