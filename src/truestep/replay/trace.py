"""Trace a case on the builtin runtime, and prove that tracing does not change what is traced."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from truestep.case import Case
from truestep.errors import TruestepError, surviving
from truestep.joint import Value, each
from truestep.measure.distance import same_bits
from truestep.nests import leaves
from truestep.progress import Progress
from truestep.randomness import own_randomness
from truestep.recording.format import Recording
from truestep.recording.manifest import Level
from truestep.replay.hooks import capture, wants
from truestep.runtime.applying import Apply, apply_change
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Observer, Pipeline, encode, generate
from truestep.turns import taking_turns
from truestep.verdict import Verdict


@dataclass(frozen=True)
class Verification:
    """Whether a traced call gave what an untraced one gives.

    Attributes:
        verdict: `identical`; `drifted` where tracing changed the output; `inconclusive` where two
            untraced calls differ already, or the output has no tensor.
        reason: One sentence.
    """

    verdict: Verdict
    reason: str


def verify(
    target: torch.nn.Module | Pipeline, call: Callable[[], Any], **options: Any
) -> Verification:
    """Run a call untraced and traced, and compare all tensors it returns bit for bit.

    Args:
        target: What is traced.
        call: Runs it and returns the output; the random state is the same each time.
        options: For `capture`: `select`, `level`, `inputs`, `ops`.

    Returns:
        The verdict. Where the two differ, a second untraced call says whose fault it is.
    """
    plain = _output(call)
    with capture(target, **options):
        traced = _output(call)
    if not plain:
        return Verification(Verdict.INCONCLUSIVE, "the output has no tensor to compare")
    if _same(plain, traced):
        return Verification(Verdict.IDENTICAL, f"{len(plain)} output tensors, bit for bit")
    if not _same(plain, _output(call)):
        return Verification(
            Verdict.INCONCLUSIVE, "two untraced calls differ: the model is not deterministic"
        )
    return Verification(Verdict.DRIFTED, "tracing changed the output of the model")


def _output(call: Callable[[], Any]) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        return {path: tensor.detach().clone() for path, tensor in leaves(call(), "out")}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[path].shape == b[path].shape
        and a[path].dtype == b[path].dtype
        and same_bits(a[path], b[path])
        for path in a
    )


class _DoneError(Exception):
    """All steps that were asked for are done."""


@dataclass
class _Until(Observer):
    last: int | None = None

    def step_done(self, index: int, total: int) -> None:
        if self.last is not None and index >= self.last:
            raise _DoneError


@taking_turns()
@surviving("the model")
@own_randomness()
def record_trace(  # 10 parameters: those of `capture`, and of the case to generate
    case: Case,
    *,
    path: str | Path,
    select: str = "*",
    steps: Collection[int] | None = None,
    level: Level = "stats",
    inputs: bool = False,
    ops: str | None = None,
    apply: Apply | None = None,
    check_untraced: bool = True,
    progress: Progress | None = None,
) -> tuple[Recording, Verification | None]:
    """Generate a case with tracing on; generation ends after the last step that is wanted.

    Args:
        case: What to generate.
        path: Where to write the trace.
        select, steps, level, inputs, ops, progress: See `capture`.
        apply: A change to the pipeline before it runs.
        check_untraced: Run the first prediction untraced and traced before, and compare.

    Returns:
        The trace, and what that comparison said.

    Raises:
        TruestepError: Tracing changes what the model computes; nothing was written.
        CaseError, ModelLoadError, UsageError, WriteError: See `truestep.record` and `capture`.
    """
    pipe = apply_change(load(case), apply)
    options: dict[str, Any] = {"select": select, "level": level, "inputs": inputs, "ops": ops}
    checked = verify(pipe, _first_prediction(pipe), **options) if check_untraced else None
    if checked and checked.verdict is Verdict.DRIFTED:
        raise TruestepError(
            checked.reason,
            where=f"case {case.id}, first prediction",
            likely="a module that keeps state between calls, or looks at its hooks",
            hint="--no-check-untraced  # records all the same",
        )
    last = max(steps) if steps and not wants("vae", select) else None
    with capture(pipe, steps=steps, path=path, case=case, progress=progress, **options) as trace:
        try:
            decoded = wants("vae", select)
            generate(pipe, observer=_Until(last=last), output="frames" if decoded else "latent")
        except _DoneError:
            pass
    assert trace.recording is not None
    return trace.recording, checked


def _first_prediction(pipe: Pipeline) -> Callable[[], Value]:
    """The first prediction of a run, to be made as often as one likes."""
    with torch.no_grad():
        pipe.prepare(pipe)
        text = encode(pipe, Observer())["cond"]
        step = pipe.make_schedule(pipe).step(0)
        latent = pipe.make_latent(pipe)

    def call() -> Value:
        with torch.no_grad():
            return pipe.predict(
                pipe, each(torch.clone, latent), step, each(torch.clone, text), "cond"
            )

    return call
