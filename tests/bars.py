"""Bars over whole corpora: `make bars` runs all of each, `make test` a share of every kind."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

WHOLE = "TRUESTEP_BARS" in os.environ
"""Whether every bar is run in full."""

T = TypeVar("T")


def share(cases: Iterable[T], count: int) -> list[T]:
    """All cases of a bar where bars are run in full; else so many of them, evenly spread."""
    found = list(cases)
    if WHOLE or len(found) <= count:
        return found
    return [found[at * len(found) // count] for at in range(count)]
