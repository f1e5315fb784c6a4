"""Write files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from truestep.errors import WriteError


@contextmanager
def replacing(path: str | Path, what: str) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move it into place when the block succeeds.

    Args:
        path: The file; its folder is made if need be.
        what: What is written, for the error: "the report".

    Raises:
        WriteError: The block or the move raised OSError; what was there before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise WriteError(
            f"{what} could not be written",
            where=str(path),
            measured=error.strerror or str(error),
            hint=f"df -h {path.parent}; ls -ld {path.parent}",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str, what: str) -> None:
    """Write UTF-8 text with a final newline; see `replacing`."""
    with replacing(path, what) as temporary:
        temporary.write_text(text if text.endswith("\n") else text + "\n", "utf-8")
