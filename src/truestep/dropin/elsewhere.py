"""Names of a repository's own module that nothing here replaces."""

from __future__ import annotations

from importlib import import_module
from logging import Logger
from typing import TYPE_CHECKING

from truestep.text import visible

if TYPE_CHECKING:
    from truestep.verdict import Comparison


def handed_on(module: str, name: str) -> object:
    """A name of a repository's own module, imported when it is asked for.

    Raises:
        AttributeError: There is no such name.
        ImportError: The repository is not installed.
    """
    if name.startswith("__"):  # what Python asks every module for
        raise AttributeError(f"no attribute {name!r}")
    found: object = getattr(import_module(module), name)
    return found


def tell(logger: Logger, comparison: Comparison, *, passed: bool) -> None:
    """Log our verdict beside the outcome of another check; a warning where that one let pass what
    ours does not.
    """
    sentence = visible(comparison.sentence)
    floors = (row.floor for row in comparison.rows if row.ratio)
    if any(floor and floor.source == "analytic" for floor in floors):
        sentence += " (by the floor of its dtype: none was measured)"
    if passed and comparison.verdict.exit_code == 1:
        logger.warning("truestep: %s; the check beside it passes", sentence)
    else:
        logger.info("truestep: %s", sentence)
