"""What harmless changes make of one prediction: truestep's kinds, and those of an accelerator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.accelerator.families import DTYPES, FAMILIES, Family, build, prediction_of, usual_call
from bench.accelerator.place import Budget, Here, first_line
from truestep.calls.benign import changes
from truestep.calls.keys import key_of
from truestep.calls.record import record
from truestep.calls.seen import Plan
from truestep.calls.subject import subject_of
from truestep.environment import watch_attention
from truestep.measure.distance import distance

Row = dict[str, Any]
COMPILING_S = 30.0
"""To compile one of these models took 20 to 30 s on a core of an EPYC 9004, tiny as it was."""

DEAD: tuple[type[Exception], ...] = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))
"""An error of a kernel, after which a device may do nothing more; torch 2.6 has no name for it."""

ELSEWHERE = "instructions"
"""Kind of the run that a process of other instructions makes; see `truestep.calls.elsewhere`."""


@dataclass(frozen=True)
class Change:
    """A harmless change of how a model is run.

    Attributes:
        kind, detail: What is changed.
        around: Changes it for a while; where another object runs then, it yields that.
        only: Devices that have it, if not all, and why.
    """

    kind: str
    detail: str
    around: Callable[[nn.Module], AbstractContextManager[Any]]
    only: tuple[str, str] | None = None


def rows(here: Here, budget: Budget) -> Iterator[Row]:
    """Every kind but `torch.compile`, of every model in every precision."""
    return _each("kinds", _kinds, here, budget)


def compiled_rows(here: Here, budget: Budget) -> Iterator[Row]:
    """`torch.compile`, which takes much longer than all others, as long as there is time."""
    return _each("torch.compile", _compiled, here, budget, expected=COMPILING_S)


def _each(
    kind: str,
    run: Callable[[Family, Here, str], Iterator[Row]],
    here: Here,
    budget: Budget,
    *,
    expected: float = 0.0,
) -> Iterator[Row]:
    for dtype in DTYPES:
        for family in FAMILIES:
            where = {"model": family.name, "dtype": dtype}
            what = f"{kind} of {family.name} in {dtype}"
            if not budget.allows(what, kind, expected=expected):
                continue
            with budget.spent(kind):
                try:
                    yield from ({**where, **row} for row in run(family, here, dtype))
                except Exception as error:  # whatever one model raises, the others go on
                    yield {**where, "kind": kind, "failed": first_line(error)}
            here.clear()


def _kinds(family: Family, here: Here, dtype: str) -> Iterator[Row]:
    model, given = _prediction(family, here, dtype)
    yield from _of_truestep(model, given, dtype)
    plain = _output(model, given)
    for change in accelerator_changes(here):
        yield _measured(change, model, given, plain, here)


def _compiled(family: Family, here: Here, dtype: str) -> Iterator[Row]:
    model, given = _prediction(family, here, dtype)
    plain = _output(model, given)

    @contextmanager
    def compiled(model: nn.Module) -> Iterator[Any]:
        torch.compiler.reset()
        try:
            yield torch.compile(model, dynamic=False)
        finally:
            torch.compiler.reset()

    yield _measured(Change("torch.compile", "inductor", compiled), model, given, plain, here)


def _prediction(family: Family, here: Here, dtype: str) -> tuple[nn.Module, dict[str, Any]]:
    pipe = build(family, here, dtype)
    return pipe.transformer, prediction_of(pipe, usual_call(family, here, steps=1))


def _output(model: Callable[..., Any], given: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model(**given)[0]
    return made


# --- what truestep knows --------------------------------------------------------------------------


def _of_truestep(model: nn.Module, given: Mapping[str, Any], dtype: str) -> Iterator[Row]:
    """Every run of a recording's own noise floor; of a kind without one, why."""
    subject = subject_of(model, **given)
    known = [each.kind for each in changes(subject, Plan(lambda call: True), dtype, lambda _: None)]
    recording = record(subject)
    assert recording.floor is not None
    notes = recording.recording.manifest.notes
    missing = dict.fromkeys((*known, ELSEWHERE))
    for run in recording.floor.runs:
        made = [found.rel_l2 for found in run.tensors if key_of(found.name).side == "out"]
        row = {"kind": run.kind, "detail": run.detail, "pair": run.pair, "by": "truestep"}
        if made:
            missing.pop(run.kind, None)
            yield {**row, "rel_l2": max(made)}
    for kind in missing:
        why = [note for note in notes if kind in note]
        yield {"kind": kind, "by": "truestep", "not_here": "; ".join(why or notes) or "no run"}


# --- what an accelerator has ----------------------------------------------------------------------


def accelerator_changes(here: Here) -> list[Change]:
    """Attention's back-ends, TF32, memory. `torch.compile` is apart: it takes much longer."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "math": SDPBackend.MATH,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    listed = [
        Change("attention", name, lambda _, chosen=backend: sdpa_kernel([chosen]))  # type: ignore[misc]
        for name, backend in backends.items()
    ]
    only = ("cuda", "TF32 is a format of CUDA's tensor cores")
    listed += [
        Change("TF32", "on" if on else "off", lambda _, on=on: tf32(on), only)
        for on in (True, False)
    ]  # type: ignore[misc]
    listed.append(Change("allocation", "fresh memory", elsewhere_in_memory))
    return listed + [
        Change("allocation", f"{places} past 64 elements", lambda m, n=places: displaced(m, n))  # type: ignore[misc]
        for places in (8, 1)
    ]


def _measured(
    change: Change,
    model: nn.Module,
    given: Mapping[str, Any],
    plain: torch.Tensor,
    here: Here,
) -> Row:
    """A prediction under a change beside the plain one; why there is none."""
    row: Row = {"kind": change.kind, "detail": change.detail, "by": "bench"}
    if change.only is not None and not here.device.startswith(change.only[0]):
        return {**row, "not_here": change.only[1]}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with change.around(model) as other:
                compiled = callable(other)  # no mode can watch it
                watch = nullcontext(lambda: None) if compiled else watch_attention()
                with watch as kernel:
                    made = _output(other if compiled else model, given)
                    here.wait()
                row["kernel"] = kernel()
        except torch.OutOfMemoryError as error:
            return {**row, "failed": first_line(error)}
        except DEAD:
            raise
        except (RuntimeError, NotImplementedError, ImportError) as error:
            why = [str(each.message).partition(" (Triggered")[0] for each in said]
            return {**row, "not_here": "; ".join(dict.fromkeys((first_line(error), *why)))[:600]}
    return {**row, "rel_l2": distance(made, plain).rel_l2}


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Let float32 products and convolutions have 10 bits of mantissa, or not."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = on
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextmanager
def displaced(model: nn.Module, places: int) -> Iterator[None]:
    """Let every weight lie so many elements past where an allocator would put it."""
    with _laid(model, lambda weight: _moved(weight, places)):
        yield


def _moved(weight: torch.Tensor, places: int) -> torch.Tensor:
    memory = torch.empty(64 + places + weight.numel(), dtype=weight.dtype, device=weight.device)
    return memory[64 + places :].view(weight.shape).copy_(weight)


@contextmanager
def elsewhere_in_memory(model: nn.Module) -> Iterator[None]:
    """Let weights lie in memory that the allocator asks for anew."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with _laid(model, torch.clone):
        yield


@contextmanager
def _laid(model: nn.Module, lay: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Put a copy of every weight in its place for a while."""
    held = [weight for weight in model.parameters() if weight.is_contiguous()]
    before = [weight.data for weight in held]
    try:
        for weight in held:
            weight.data = lay(weight.data)
        yield
    finally:
        for weight, data in zip(held, before, strict=True):
            weight.data = data
