"""What a recording of a run says of its steps: which there are, which it keeps, what was given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import NoReturn

import torch

from truestep.errors import FileFormatError, UsageError
from truestep.joint import Value, each, gather
from truestep.keys import step_name
from truestep.measure.distance import same_bits
from truestep.runtime.pipeline import Pipeline, Schedule
from truestep.text import spans

_SCHEDULE = ("schedule/sigmas", "schedule/timesteps", "schedule/experts")

_WHOLE = ("text/cond", "latent/initial", "latent/final", *_SCHEDULE)

FIRST_LATENT = step_name(0, "latent")
"""End of a name under which a thinned recording holds nothing: it is the initial latent."""

KEPT_STEPS = "kept_steps"
"""Setting of a thinned recording: the steps of which it keeps everything."""


def kept_steps(recording: Mapping[str, torch.Tensor]) -> frozenset[int] | None:
    """Steps of which a thinned recording keeps everything; None of one that keeps every step.

    Raises:
        FileFormatError: What it says is no list of steps.
    """
    manifest = getattr(recording, "manifest", None)
    kept = manifest.settings.get(KEPT_STEPS) if manifest is not None else None
    if kept is None:
        return None
    if not isinstance(kept, list) or not all(type(step) is int for step in kept):
        raise FileFormatError(
            "the recording does not say which steps it keeps",
            where=str(recording.path),  # type: ignore[attr-defined]
            measured=f"{KEPT_STEPS}: {str(kept)[:80]}",
        )
    return frozenset(kept)


def keeps_step(recording: Mapping[str, torch.Tensor], step: int) -> bool:
    """Whether a recording keeps everything of a step."""
    kept = kept_steps(recording)
    return kept is None or step in kept


def left_out_steps(recording: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """Steps of which a thinned recording keeps at most what its scheduler needs."""
    kept = kept_steps(recording)
    if kept is None:
        return ()
    return tuple(step for step in range(steps_recorded(recording)) if step not in kept)


def named_steps(steps: Iterable[int]) -> str:
    """Steps in words, neighbours together: `steps 1 to 4, 8`."""
    told = sorted(steps)
    return f"step{'s' * (len(told) > 1)} {spans(told)}"


def steps_recorded(recording: Mapping[str, torch.Tensor]) -> int:
    """Number of denoise steps of the run that was recorded."""
    if kept_steps(recording) is not None:
        return len(recording["schedule/timesteps"])
    return sum(1 for name in recording if name.startswith("step/") and name.endswith("/latent"))


def stored_name(recording: Mapping[str, torch.Tensor], name: str) -> str:
    """What a recorded value is stored under: a thinned recording holds the latent of the first step
    once, as the initial one."""
    return _initial(name) if name.endswith(FIRST_LATENT) and name not in recording else name


def stored_twice(whole: Mapping[str, torch.Tensor]) -> set[str]:
    """The latent of the first step, where that is the initial one; see `stored_name`."""
    twice = {name for name in whole if name.endswith(FIRST_LATENT)}
    return twice if all(same_bits(whole[name], whole[_initial(name)]) for name in twice) else set()


def _initial(name: str) -> str:
    """The initial latent of the same modality as a first one."""
    return name.removesuffix(FIRST_LATENT) + "latent/initial"


def given(
    pipe: Pipeline,
    recording: Mapping[str, torch.Tensor],
    name: str,
    *,
    like: Value | None = None,
) -> Value:
    """A recorded value as a stage's input: a copy on the pipeline's device.

    Args:
        like: A value of the same shape whose order in memory the copy is given: tokens that are a
            view of frames may take another kernel than the same tokens in a row.
    """
    value = gather(recording, stored_name(recording, name))
    value = each(lambda tensor: tensor.to(pipe.device, copy=True), value)
    return value if like is None else _in_order_of(value, like)


def _in_order_of(value: Value, like: Value) -> Value:
    if isinstance(value, tuple) is not isinstance(like, tuple):
        return value

    def ordered(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        if tensor.shape != own.shape:
            return tensor
        return torch.empty_like(own, dtype=tensor.dtype, device=tensor.device).copy_(tensor)

    return each(ordered, value, like)


def recorded_schedule(recording: Mapping[str, torch.Tensor]) -> Schedule:
    """The schedule that a recording holds."""
    return Schedule(*(recording[name] for name in _SCHEDULE))


def require_run(recording: Mapping[str, torch.Tensor], *, where: str) -> None:
    """Refuse a recording that lacks what every run has, before anything is loaded or run.

    Raises:
        FileFormatError: The schedule, a latent, what a scheduler was given or the end is missing,
            or the schedule's parts are of other lengths than the steps that are there.
    """
    kept, lacks = kept_steps(recording), [name for name in _WHOLE if name not in recording]
    total = 0 if kept is not None and lacks else steps_recorded(recording)
    steps = {*range(total)} if kept is None or not total else {*kept, *default_steps(recording)}
    names = [step_name(step, what) for step in sorted(steps) for what in ("latent", "guided")]
    lacks += [name for name in names if stored_name(recording, name) not in recording]
    hint = "truestep record CASE --update  # records it again"
    if lacks or not total:
        more = f" and {len(lacks) - 3} more" if len(lacks) > 3 else ""
        raise FileFormatError(
            "the reference is not a whole run: it cannot be replayed",
            where=where,
            measured=f"it lacks {', '.join(lacks[:3])}{more}" if lacks else "it has no steps",
            hint=hint,
        )
    shapes = {name: tuple(recording[name].shape) for name in _SCHEDULE}
    fits = all(len(shape) == 1 and shape[0] >= total for shape in shapes.values())
    if not fits or len(recording[_SCHEDULE[1]]) != total:
        raise FileFormatError(
            "the reference's schedule is not that of its steps",
            where=where,
            measured=f"{total} steps; " + ", ".join(f"{n} {list(s)}" for n, s in shapes.items()),
            hint=hint,
        )


def floor_steps(recording: Mapping[str, torch.Tensor] | int) -> tuple[int, ...]:
    """First, middle and last step of a recording, or of so many: where benign runs predict."""
    total = recording if isinstance(recording, int) else steps_recorded(recording)
    return tuple(sorted({0, total // 2, total - 1}))


def default_steps(recording: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """First and last step of every expert, and three in a row: halfway, or beside a switch.

    What a model keeps from one step to the next acts only where a step follows its neighbour; of
    three in a row a cache that answers every other step answers one, whichever it begins with.
    """
    experts = recording["schedule/experts"].tolist()[: steps_recorded(recording)]
    switches = [step for step in range(1, len(experts)) if experts[step] != experts[step - 1]]
    ends = [0, *switches, len(experts)]
    chosen: set[int] = set()
    for begin, end in pairwise(ends):
        beside = begin if begin else end - 3
        row = (begin + end) // 2 - 1 if len(ends) == 2 else beside
        inside = (step for step in range(row, row + 3) if begin <= step < end)
        chosen |= {begin, end - 1, *inside}
    return tuple(sorted(chosen))


def chosen_steps(
    recording: Mapping[str, torch.Tensor], steps: Iterable[int] | None
) -> tuple[int, ...]:
    """Steps to predict at: the given ones, or `default_steps`.

    Raises:
        UsageError: A step is out of range.
    """
    if steps is None:
        return default_steps(recording)
    total, kept = steps_recorded(recording), kept_steps(recording)
    chosen = tuple(sorted(set(steps)))
    bad = [step for step in chosen if not 0 <= step < total]
    if bad or not chosen:
        raise UsageError(
            f"no step {bad[0]} in the reference" if bad else "no steps were chosen",
            measured=f"its steps are 0 to {total - 1}",
        )
    for step in chosen:
        if kept is not None and step not in kept:
            left_out(f"step {step} was left out of this recording", recording, keep=step)
    return chosen


def left_out(what: str, recording: Mapping[str, torch.Tensor], *, keep: int | str) -> NoReturn:
    """Refuse what needs a step that a recording does not keep."""
    kept = ", ".join(map(str, sorted(kept_steps(recording) or ())))
    raise UsageError(
        what,
        measured=f"it keeps steps {kept} of {steps_recorded(recording)}",
        hint=f"truestep record CASE --update --keep {keep}",
    )
