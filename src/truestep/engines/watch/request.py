"""What is asked of the processes of a program, as an environment variable."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

VARIABLE = "TRUESTEP_ENGINE"

FIRST_CALLS = (0, 1)
"""Calls of a denoiser that are looked into where none are named: both branches of a step."""


@dataclass(frozen=True)
class Looked:
    """Which calls of denoisers are looked into.

    Attributes:
        calls: Their numbers, of each denoiser and generation.
        select: Globs on names of modules, several by commas, `!glob` to leave out.
        largest: Bytes of all that is kept of a generation's modules and weights.
        operators: Whether each operator is kept, too, with its line of code.
    """

    calls: tuple[int, ...] = FIRST_CALLS
    select: str = "*"
    largest: int = 1 << 30
    operators: bool = False


@dataclass(frozen=True)
class Request:
    """What is asked of the processes of a program.

    Attributes:
        output: The recording, an absolute path.
        engine: Name of the engine; empty: whichever is imported.
        largest: Bytes of a tensor above which only its shape is kept.
        inject: Folder of what is given in the place of the engine's own noise, text and schedule.
        inside: Which calls of denoisers are looked into; none by default.
        command: The whole program, to be started again.
    """

    output: str
    engine: str = ""
    largest: int = 1 << 29
    inject: str = ""
    inside: Looked | None = None
    command: tuple[str, ...] = ()

    def text(self) -> str:
        """The value of TRUESTEP_ENGINE."""
        return json.dumps(asdict(self))


def parse(text: str) -> Request:
    """Read TRUESTEP_ENGINE.

    Raises:
        ValueError: It is not what `Request.text` writes.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("not a table")
    inside: Any = content.get("inside")
    try:
        if inside is not None:
            content["inside"] = Looked(**{**inside, "calls": tuple(inside["calls"])})
        return Request(**{**content, "command": tuple(content.get("command", ()))})
    except (TypeError, KeyError) as error:
        raise ValueError(str(error)) from None
