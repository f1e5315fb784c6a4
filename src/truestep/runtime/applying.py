"""A change under test, applied to a pipeline of any kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from truestep.errors import ProcessEndedError, UsageError, last_frame, surviving
from truestep.runtime.pipeline import Pipeline

Apply = Callable[[Pipeline], "Pipeline | None"]
"""A change under test: receives the pipeline and changes it, or returns another."""


def call_change(
    pipe: Any,
    change: Callable[[Any], Any],
    *,
    likely: str = "",
    hint: str = "",
    what: str = "the change",
) -> Any:
    """What a change under test returns for a pipeline of any kind.

    Args:
        pipe: What it is given.
        change: The user's function.
        likely, hint: What its error says, where it raises.
        what: What it calls the function.

    Raises:
        UsageError: The function raised.
        ProcessEndedError: It called sys.exit.
    """
    name = change_name(change)
    try:
        with surviving(f"{what} {name}"):
            return change(pipe)
    except ProcessEndedError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(
            f"{what} {name} raised {type(error).__name__}: {error}",
            where=last_frame(error),
            likely=likely,
            hint=hint,
        ) from error


def change_name(change: Callable[[Any], Any]) -> str:
    """What errors call a change."""
    return getattr(change, "__qualname__", repr(change))


def not_a_pipeline(
    change: Callable[[Any], Any], result: object, *, what: str = "the change"
) -> UsageError:
    """The error of a change that returned something else."""
    return UsageError(
        f"{what} {change_name(change)} returned {type(result).__name__}, not a pipeline or None",
        hint="change the pipeline in place and return nothing, or return a Pipeline",
    )


def apply_change(pipe: Pipeline, change: Apply | None) -> Pipeline:
    """Let a change under test modify the pipeline, and check that what it asked for can be had.

    Raises:
        UsageError: The function raised, returned something else, or changed a setting that only
            loading can honour.
        ProcessEndedError: It called sys.exit.
    """
    if change is None:
        return pipe
    fixed = (pipe.settings.dtype, pipe.settings.device)
    changed = call_change(
        pipe,
        change,
        hint="it is called with the pipeline: transformer, transformer_2, text_encoder, "
        "tokenizer, vae, scheduler, settings and the stage functions",
    )
    result = pipe if changed is None else changed
    if not isinstance(result, Pipeline):
        raise not_a_pipeline(change, result)
    if (result.settings.dtype, result.settings.device) != fixed:
        raise UsageError(
            f"the change {change_name(change)} set dtype or device, which only loading can honour",
            hint="give --set dtype=... or --set device=... instead",
        )
    return result
