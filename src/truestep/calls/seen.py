"""How a run is forced, and what it showed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from traceback import FrameSummary
from typing import Any, Literal

import torch

from truestep.calls.keys import Key
from truestep.recording.manifest import CallEntry

Change = Callable[[torch.Tensor], torch.Tensor]
Number = tuple[str, str, int]
"""Component, method, and which of its calls in the run."""


END = "end"
"""Method name of what a free run ends with."""

Proceed = Callable[..., Any]
"""Makes a call."""


class EnoughError(BaseException):
    """Ends a run in which everything was seen; no pipeline catches it."""


class RunRaisedError(RuntimeError):
    """A run that was to come to its end raised; the message says what."""


def as_it_is(call: CallEntry, proceed: Proceed) -> Proceed:
    """A call is made by nothing but itself."""
    return proceed


@dataclass(frozen=True)
class Plan:
    """How a run is forced.

    Attributes:
        made: Which calls of models are made; all others are answered from the recording.
        given: Changes every recorded floating-point tensor that a call is given.
        handed: The same for those that are handed on.
        precision: That all floating-point numbers are raised to.
        raised: Precision that what is seen is named as raised to.
        again: After which calls earlier ones are made once more.
        by: What makes a recorded call, given what makes it otherwise.
        copies: Keep a copy of what came even where no bit differs from what was recorded.
    """

    made: Callable[[CallEntry], bool]
    given: Change | None = None
    handed: Change | None = None
    precision: torch.dtype | None = None
    raised: str = ""
    again: Mapping[Number, Sequence[CallEntry]] = field(default_factory=dict)
    by: Callable[[CallEntry, Proceed], Proceed] = as_it_is
    copies: bool = False


@dataclass
class Seen:
    """One tensor of a forced run, beside the recorded one.

    Attributes:
        key: Where it is.
        context: The guidance pass, where it was said.
        actual: A host copy; None where nothing came.
        recorded: Name in the recording, or a number; None where nothing was recorded.
        odd: Why the two cannot be set against each other: other sizes, no tensors at all, or a
            class that only its own code can read.
        effect: Whether its call was made with something that could not be replaced.
        note: What that was.
        block: Which blocks' code made it, in words, where that is not what the key says.
    """

    key: Key
    context: str | None
    actual: torch.Tensor | None
    recorded: str | float | None
    odd: Literal["", "shape", "words", "unreadable"] = ""
    effect: bool = False
    note: str = ""
    block: str = ""


@dataclass
class Forced:
    """What a forced run showed, in the order in which it happened.

    Attributes:
        seen: Tensors.
        again: What calls gave that were made once more, by the key's text.
        missing: Recorded calls that did not come.
        parts: By the identity of such a call, what came of it.
        unexpected: Component and method of calls that were not recorded.
        made: Calls of models that were made.
        raised: What the subject raised, and after which call.
        frames: Where it did, the innermost last.
    """

    seen: list[Seen] = field(default_factory=list)
    again: dict[str, torch.Tensor] = field(default_factory=dict)
    missing: list[CallEntry] = field(default_factory=list)
    parts: dict[int, str] = field(default_factory=dict)
    unexpected: list[tuple[str, str]] = field(default_factory=list)
    made: int = 0
    raised: str = ""
    frames: Sequence[FrameSummary] = ()


def number(value: float) -> torch.Tensor:
    """A number as a tensor: in float32, in which such numbers are used, unless it is whole."""
    narrow = value != round(value) if abs(value) < 1e30 else False
    return torch.tensor(float(value), dtype=torch.float32 if narrow else torch.float64)
