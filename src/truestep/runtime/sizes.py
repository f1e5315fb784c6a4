"""Sizes that a model does not make: refused, where diffusers would round them."""

from __future__ import annotations

from truestep.errors import CaseError
from truestep.runtime.pipeline import Pipeline


def require_multiple(pipe: Pipeline, key: str, multiple: int) -> None:
    """Refuse a height or width that diffusers would round silently."""
    value = getattr(pipe.settings, key)
    if value % multiple:
        raise CaseError(
            f"{key} {value} does not fit the model",
            measured=f"it must be a multiple of {multiple}",
            hint=f"--set {key}={max(round(value / multiple), 1) * multiple}",
        )


def wrong_frames(pipe: Pipeline, first: int, period: int, fitting: int) -> CaseError:
    """The error of a number of frames that the model does not make."""
    return CaseError(
        f"num_frames {pipe.settings.num_frames} does not fit the model",
        measured=f"it must be {first} more than a multiple of {period}",
        hint=f"--set num_frames={fitting}",
    )
