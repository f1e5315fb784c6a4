"""Record what every module of a model, or of a pipeline, gives while a block of code runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from truestep.case import Case
from truestep.environment import Environment, library_version
from truestep.errors import UsageError, WriteError
from truestep.joint import Value
from truestep.nests import safe_fqn
from truestep.pairing.naming import Named, choose, named_modules, patterns, unwrapped
from truestep.progress import Progress
from truestep.recording.format import Recording
from truestep.recording.manifest import Level, Manifest
from truestep.recording.spool import Memory, Spool
from truestep.replay.capture import recorded_settings, run_environment
from truestep.replay.contexts import listening, said
from truestep.replay.operators import trace_operators
from truestep.replay.tracer import Tracer
from truestep.runtime.pipeline import Branch, Pipeline, Step

EXTRA_ROOTS = ("text_encoder", "vae")
"""Models of a pipeline that are traced only where a glob begins with their name."""


class Trace:
    """A trace in the making, and what came of it.

    Attributes:
        recording: The recording once the block has ended; None before.
        hooks: Modules that were hooked.
        fired: Modules among them that have run so far.
        names: Names of the tensors recorded so far.
        notes: What a reader must know.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self.recording: Recording | None = None

    @property
    def hooks(self) -> int:
        return self._tracer.hooks

    @property
    def fired(self) -> int:
        return self._tracer.fired

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tracer.names)

    @property
    def notes(self) -> tuple[str, ...]:
        return self._tracer.notes()

    def __repr__(self) -> str:
        return f"Trace({self.fired} of {self.hooks} hooks fired, {len(self.names)} tensors)"


@contextmanager
def capture(  # 10 parameters: the public way to trace, whose options are keywords
    target: torch.nn.Module | Pipeline,
    *,
    select: str = "*",
    steps: Collection[int] | None = None,
    level: Level = "stats",
    inputs: bool = False,
    path: str | Path | None = None,
    branch: str | None = None,
    progress: Progress | None = None,
    ops: str | None = None,
    case: Case | None = None,
) -> Iterator[Trace]:
    """Record the outputs of a model's modules while the block runs. Nothing stays afterwards.

    Args:
        target: A module, or a pipeline, of which both transformers are traced.
        select: Globs on module names, several by commas, `!glob` to leave out: `blocks.*,!*.norm*`.
            The root module is `(root)`. Of a pipeline, globs that begin with `text_encoder` or
            `vae` trace those, too.
        steps: Steps to record; None is all. The step is the denoise step where a pipeline, or
            diffusers' `cache_context(step_index=...)`, says it; else the number of calls of the
            root before this one, in the same branch.
        level: `stats` keeps moments, `sketch` also 1,024 floats a tensor that tell distances,
            `full` the tensors.
        inputs: Record what modules are given, too.
        path: Write the trace there; it is streamed to a folder beside it meanwhile. None keeps it
            in memory.
        branch: Name of the guidance pass where nothing says it; default `main`.
        progress: Told ("trace", calls done, calls expected) after each call of the root.
        ops: Globs on module names; in these, the output of each operator is recorded, too.
        case: What a pipeline generates, for the manifest.

    Yields:
        The trace; its `recording` is there when the block has ended.

    Where the block raises, what it had recorded is written as a partial trace, but never over a
    trace that is there: then, and after every other failure, the spool is left beside it, and
    `truestep trace recover` makes a trace of it.

    Raises:
        UsageError: A glob matches nothing; with the closest names. Another trace is being written
            to the path.
        WriteError: The trace cannot be written.
    """
    check_options(steps, branch)
    chosen = frozenset(steps) if steps is not None else None
    roots = _roots(target, select)
    fqns = choose((fqn for root in roots for fqn in root.named.modules), select)
    inside = choose((fqn for root in roots for fqn in root.named.modules), ops) if ops else []
    head = settings_of(
        target, case=case, select=select, steps=chosen, inputs=inputs, ops=ops, level=level
    )
    sink = Memory(level=level) if path is None else Spool(path, head=head, level=level)
    tracer = Tracer(sink, level=level, steps=chosen, inputs=inputs)
    trace = Trace(tracer)
    tell = partial(_tell, tracer, progress, max(chosen, default=0) + 1 if chosen else 0)
    try:
        with ExitStack() as stack:
            stack.callback(tracer.detach)
            for root in roots:
                install(tracer, root, fqns, inside, branch=branch, told=tell)
            if isinstance(target, Pipeline):
                stack.enter_context(_stages(tracer, target, tell))
            yield trace
    except BaseException as error:
        tracer.note(f"partial: the traced block raised {type(error).__name__}")
        try:
            trace.recording = close(tracer, head, replace=False)
        except WriteError as unwritten:  # the block's own error comes first; the spool stays
            if hasattr(error, "add_note"):  # from Python 3.11
                error.add_note(f"the trace was not written: {unwritten.hint}")
        raise
    trace.recording = close(tracer, head)


@dataclass(frozen=True)
class Root:
    """A model to trace. `drives`: its own calls say step and branch, not a pipeline's stage."""

    module: torch.nn.Module
    named: Named
    drives: bool = True


def _roots(target: torch.nn.Module | Pipeline, select: str) -> list[Root]:
    if not isinstance(target, Pipeline):
        return [Root(target, named_modules(target))]
    models = [model for model in (target.transformer, target.transformer_2) if model is not None]
    roots = [Root(model, named_modules(model), drives=False) for model in models]
    for name in EXTRA_ROOTS:
        model = getattr(target, name)
        if model is not None and wants(name, select):
            roots.append(Root(model, named_modules(model, name), drives=False))
    return roots


def check_options(steps: Collection[int] | None, branch: str | None) -> None:
    """Refuse steps and branches that no name can have.

    Raises:
        UsageError: No steps, a negative one, or a branch of other characters than letters, digits,
            `_`, `-` and `.`.
    """
    if steps is not None and (not steps or min(steps) < 0):
        raise UsageError(
            "no steps were chosen" if not steps else f"no step {min(steps)}",
            measured="steps count from 0",
        )
    if branch is not None and not (branch and branch.replace("_", "").replace("-", "").isalnum()):
        raise UsageError(
            f"{branch!r} cannot name a branch",
            measured="letters, digits, _ and - can",
            hint="branch='cond'",
        )


def wants(name: str, select: str) -> bool:
    """Whether a glob asks for one of `EXTRA_ROOTS`."""
    return any(glob.startswith(name) for glob in patterns(select)[0])


def settings_of(
    target: torch.nn.Module | Pipeline | None,
    *,
    case: Case | None = None,
    select: str,
    steps: frozenset[int] | None,
    inputs: bool,
    ops: str | None,
    level: Level,
) -> dict[str, Any]:
    """What the manifest says, but for tensors and notes; JSON values."""
    if isinstance(target, Pipeline):
        settings, environment = recorded_settings(target), run_environment(target, attention=None)
    else:
        place = next((p.device for p in target.parameters()), None) if target is not None else None
        settings = {"model": type(target).__name__} if target is not None else {}
        device = str(place) if place is not None and place.type != "meta" else "cpu"
        environment = Environment.current(device)
    settings["trace"] = {
        "select": select,
        "steps": sorted(steps) if steps is not None else None,
        "inputs": inputs,
        "ops": ops,
    }
    return {
        "tool_version": library_version("truestep") or "",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "level": level,
        "case_id": case.id if case else None,
        "case": case.canonical() if case else None,
        "settings": settings,
        "environment": dict(environment),
    }


def close(tracer: Tracer, head: dict[str, Any], *, replace: bool = True) -> Recording | None:
    """End a trace: its recording, written where a path was given; None in a forked child.

    Args:
        replace: Whether a file that is there may be replaced.
    """
    if not tracer.sink.owned():
        return None
    try:
        tracer.finish()
    except BaseException:
        tracer.sink.release()
        raise
    manifest = Manifest.model_validate(
        {**head, "notes": tracer.notes(), "forwards": tracer.calls, "tensors": ()}
    )
    return tracer.sink.close(manifest, replace=replace)


def install(
    tracer: Tracer,
    root: Root,
    fqns: Collection[str],
    inside: Collection[str] = (),
    *,
    branch: str | None = None,
    told: Callable[[], None] | None = None,
) -> None:
    """Hook a root's modules; its own call begins before all of them and ends after.

    Args:
        fqns: Modules to hook, among those of all roots.
        inside: Modules whose operators are watched.
        branch: Its guidance pass, whatever else may say one.
        told: Called after each call of the root.
    """
    own = root.named.modules
    if root.drives:
        tracer.around(root.module, _entering(tracer, root.module, branch), _ignore)
    tracer.attach(root.named, [fqn for fqn in fqns if fqn in own])
    for fqn in inside:
        if fqn in own:
            trace_operators(tracer, own[fqn], fqn)

    def end(*_: object) -> None:
        tracer.leave()
        if told:
            told()

    if root.drives:
        tracer.around(root.module, _ignore, end, always=True)


def _entering(tracer: Tracer, root: torch.nn.Module, branch: str | None) -> Callable[..., None]:
    """Take step and branch from diffusers' cache context, or by counting the root's calls."""
    inner, calls = unwrapped(root), dict[str, int]()
    if hasattr(root, "cache_context"):
        original: Any = root.cache_context
        tracer.replace(root, "cache_context", listening(inner, original))

    counting = threading.Lock()

    def begin(*_: object) -> None:
        name, step = said(inner) or ("main", None)
        name = branch or safe_fqn(name)
        with counting:
            count = calls.get(name, 0)
            calls[name] = count + 1
        tracer.enter(count if step is None else step, name)

    return begin


def _ignore(*_: object) -> None:
    """Runs where only the other end of a call matters."""


def _tell(tracer: Tracer, progress: Progress | None, expected: int) -> None:
    if progress:
        progress("trace", tracer.calls, max(expected, tracer.calls))


@contextmanager
def _stages(tracer: Tracer, pipe: Pipeline, told: Callable[[], None]) -> Iterator[None]:
    """Take step and branch from the pipeline's stages.

    Text is encoded before there are steps, and the prompt before the negative prompt; the decoder
    comes after. Both are recorded as step 0, whatever steps were chosen.
    """
    predict, encode, decode = pipe.predict, pipe.encode_text, pipe.decode
    prompts = iter(("cond", "uncond"))

    def predict_traced(
        inner: Pipeline, latent: Value, step: Step, text: Value, branch: Branch
    ) -> Value:
        with tracer.call(step.index, branch):
            prediction = predict(inner, latent, step, text, branch)
        told()
        return prediction

    def encode_traced(inner: Pipeline, texts: list[str]) -> Value:
        with tracer.call(0, next(prompts, "main"), stepless=True):
            return encode(inner, texts)

    def decode_traced(inner: Pipeline, latent: Value) -> Value:
        with tracer.call(0, "main", stepless=True):
            return decode(inner, latent)

    own = (predict_traced, encode_traced, decode_traced)
    pipe.predict, pipe.encode_text, pipe.decode = own
    try:
        yield
    finally:
        if (pipe.predict, pipe.encode_text, pipe.decode) == own:
            pipe.predict, pipe.encode_text, pipe.decode = predict, encode, decode
