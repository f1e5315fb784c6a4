"""What is asked of the processes of a program, as an environment variable."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

VARIABLE = "TRUESTEP_ENGINE"


@dataclass(frozen=True)
class Request:
    """What is asked of the processes of a program.

    Attributes:
        output: The recording, an absolute path.
        engine: Name of the engine; empty: whichever is imported.
        largest: Bytes of a tensor above which only its shape is kept.
        inject: Folder of what is given in the place of the engine's own noise, text and schedule.
        modules: Whether the modules inside of models are kept, and what ranks exchange there.
    """

    output: str
    engine: str = ""
    largest: int = 1 << 29
    inject: str = ""
    modules: bool = False

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
    try:
        return Request(**content)
    except TypeError as error:
        raise ValueError(str(error)) from None
