"""A runner that calls a pipeline of diffusers."""

from __future__ import annotations

from typing import Any


class xFuserModel:  # noqa: N801 (the engine's name)
    """Holds a pipeline."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def _run_pipe(self, input_args: dict[str, Any]) -> Any:
        return self.pipe(**input_args).frames
