"""Declare a component parity case: how both sides load, what they are fed, what limits apply.

A parity test hands a `Parity` to the fixture: `truestep.check_parity(PARITY)`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truestep.errors import UsageError

if TYPE_CHECKING:
    import torch

    from truestep.recording.format import Recording
    from truestep.verdict import Comparison

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Kind(str, Enum):
    """What a component is; decides the scaffold's inputs and the tolerance it starts from."""

    DIT = "dit"
    VAE = "vae"
    ENCODER = "encoder"
    SCHEDULER = "scheduler"
    CONDITIONER = "conditioner"
    UPSAMPLER = "upsampler"
    VOCODER = "vocoder"
    GENERIC = "generic"
    PIPELINE = "pipeline"

    __str__ = str.__str__


class Coverage(str, Enum):
    """Which load path of the port the test covers."""

    PRODUCTION_LOADER = "production_loader"
    IMPLEMENTATION_SUBCOMPONENT = "implementation_subcomponent"
    BOTH = "both"

    __str__ = str.__str__


START_TOLERANCE: Mapping[Kind, float] = {
    Kind.DIT: 1e-2,
    Kind.VAE: 5e-2,
    Kind.ENCODER: 1e-3,
    Kind.SCHEDULER: 1e-4,
    Kind.CONDITIONER: 1e-3,
    Kind.UPSAMPLER: 5e-2,
    Kind.VOCODER: 5e-2,
    Kind.GENERIC: 1e-4,
    Kind.PIPELINE: 5e-2,
}
"""Limit on rel_l2 where no noise floor could be measured: the values in use in the field (full DiT
with aligned kernels 1e-2, VAE decode in float32 5e-2, encoder wrapper 1e-3, single block 1e-4)."""


@dataclass(frozen=True)
class Loosened:
    """A limit on rel_l2 wider than the measured noise floor, and who answers for it until when.

    Args:
        rel_l2: The limit.
        reason: Why the floor cannot be met.
        owner: Who answers for it.
        expires: ISO date after which the test is red.
    """

    rel_l2: float
    reason: str
    owner: str
    expires: date | str

    def __post_init__(self) -> None:
        for name in ("reason", "owner"):
            if not str(getattr(self, name)).strip():
                raise UsageError(
                    f"a loosened tolerance needs a {name}",
                    hint="Loosened(rel_l2=..., reason=..., owner=..., expires='2027-01-31')",
                )
        if not self.rel_l2 > 0:
            raise UsageError(f"a loosened tolerance of {self.rel_l2:g} cannot judge anything")
        try:
            _ = self.until
        except ValueError:
            raise UsageError(
                f"expires={self.expires!r} is no date", hint="write it as expires='2027-01-31'"
            ) from None

    @property
    def until(self) -> date:
        """Last day on which it holds."""
        return self.expires if isinstance(self.expires, date) else date.fromisoformat(self.expires)

    def expired(self, today: date) -> bool:
        """Whether its last day is past."""
        return today > self.until


@dataclass(frozen=True)
class Loaded:
    """One side, loaded.

    Args:
        call: Called with the inputs by name; returns any nest of tensors. A `torch.nn.Module` is
            its own call.
        weights: Files that its weights came from, for their fingerprint.
        module: The module inside `call`, where `call` is a function around one; its rounding is
            measured against the next higher precision.
        state: Parameters by name, where there is no module: for key dumps.
        variants: The same side by means that must not matter, by what they are: another kernel,
            parameters moved by one rounding. Of the official side each adds to the noise floor.
        files: Further source files of this side, beside those that are found.
    """

    call: Callable[..., Any]
    weights: tuple[Path, ...] | list[Path] = ()
    module: torch.nn.Module | None = None
    state: Mapping[str, torch.Tensor] | None = None
    variants: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Parity:
    """A component of the port beside the official one.

    Args:
        family: Model family (`wan`).
        component: Component (`transformer`, `vae`).
        kind: One of `Kind`.
        coverage: One of `Coverage`.
        official: Loads the trusted side: a `Loaded`, a module or function, or a `Recording` (or its
            path) that was made in the official implementation's own environment.
        port: Loads the port.
        inputs: Makes one sample from a CPU generator: any nest of CPU tensors by argument name.
        seeds: One sample a seed.
        loosened: Limit on rel_l2 instead of the measured noise floor.
        judge: Compares the outputs of both sides instead, `(actual, reference)`: for a pipeline,
            `truestep.check_latent` or `truestep.compare`.
        allow_shared: End of a source file's path to the reason why both sides may use it.
        concerns: What a reader of the ledger should know.
    """

    family: str
    component: str
    kind: Kind | str
    coverage: Coverage | str
    official: Callable[[], Loaded | Callable[..., Any] | Recording | Path | str]
    port: Callable[[], Loaded | Callable[..., Any]]
    inputs: Callable[[torch.Generator], Mapping[str, Any]] | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    loosened: Loosened | None = None
    judge: Callable[[Any, Any], Comparison] | None = None
    allow_shared: Mapping[str, str] = field(default_factory=dict)
    concerns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for label in ("family", "component"):
            if not _NAME.fullmatch(getattr(self, label)):
                raise UsageError(
                    f"{label}={getattr(self, label)!r} cannot name anything",
                    hint="use letters, digits, dots, dashes and underscores",
                )
        object.__setattr__(self, "kind", _member(Kind, self.kind, "kind"))
        object.__setattr__(self, "coverage", _member(Coverage, self.coverage, "coverage"))
        if not self.seeds:
            raise UsageError("seeds is empty: a parity test needs at least one sample")
        for path, reason in self.allow_shared.items():
            if not reason.strip():
                raise UsageError(f"allow_shared[{path!r}] needs a reason")

    @property
    def name(self) -> str:
        """`family/component`."""
        return f"{self.family}/{self.component}"

    @property
    def start_tolerance(self) -> float:
        """Limit on rel_l2 where no noise floor can be measured."""
        return START_TOLERANCE[Kind(self.kind)]


def _member(kinds: type[Enum], value: object, label: str) -> Enum:
    names = [str(member.value) for member in kinds]
    if str(value) not in names:
        near = difflib.get_close_matches(str(value), names, n=1)
        raise UsageError(
            f"{label}={value!r} is not known",
            measured=f"there are: {', '.join(names)}",
            likely=f"did you mean {near[0]!r}?" if near else "",
        )
    return kinds(str(value))
