"""Component parity: is a ported component the same as the official one, and what proves it?

Names that a parity test uses; importing them imports no torch.
"""

from __future__ import annotations

from truestep.parity.component import Coverage, Kind, Loaded, Loosened, Parity
from truestep.parity.missing import Family, MissingKind, missing
from truestep.parity.stubs import stub

__all__ = [
    "Coverage",
    "Family",
    "Kind",
    "Loaded",
    "Loosened",
    "MissingKind",
    "Parity",
    "missing",
    "stub",
]
