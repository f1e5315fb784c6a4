"""Record and check any function of tensors: a module, an ONNX session, an engine behind a wrapper.

The function is called with named tensors and returns a tensor, a sequence or a mapping of them. Its
recording holds inputs and outputs of every sample, and the noise floor that benign changes of the
call measured; a candidate is fed the same inputs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from truestep.calls.batching import is_measured
from truestep.calls.instructions import Elsewhere, other_sets, prepare
from truestep.calls.values import in_real_numbers
from truestep.environment import Environment
from truestep.errors import FOREIGN, UsageError, one_line, surviving
from truestep.floors import NoiseFloor, NoiseRun
from truestep.judge.floor import Limits, pair_of
from truestep.judge.refusals import refuse_empty_content, refuse_unsteady
from truestep.judge.repeats import differing, said_unsteady, with_second_answers
from truestep.judge.rows import build_comparison, compare_tensors, measured_run
from truestep.judge.seen import with_seen
from truestep.keys import key_of
from truestep.measure.plain import plain
from truestep.progress import Progress
from truestep.randomness import own_randomness
from truestep.recording.format import Recording
from truestep.recording.table import manifest_of
from truestep.replay.check import build_side
from truestep.runtime.changes import (
    JITTERS,
    OtherFunctions,
    math_kernel,
    one_rounding,
    thread_count,
)
from truestep.runtime.precision import HIGHER, converted, working_dtype
from truestep.turns import taking_turns
from truestep.verdict import Comparison, Row, Side, Verdict

Tensors = Mapping[str, torch.Tensor]
Function = Callable[..., Any]
"""Called with the inputs by name; returns a tensor, a sequence of tensors or a mapping of them."""

Change = Callable[[Function], AbstractContextManager[Callable[[Tensors], dict[str, torch.Tensor]]]]


@taking_turns()
@surviving("the function")
@own_randomness()
def record_function(
    function: Function,
    samples: Sequence[Tensors],
    *,
    path: str | Path | None = None,
    floor: bool = True,
    progress: Progress | None = None,
) -> Recording:
    """Call a trusted function on every sample and keep inputs, outputs and the noise floor.

    Args:
        function: Called without gradients, with a sample's tensors by name. Of a `torch.nn.Module`
            the floor also includes its own rounding, against the next higher precision.
        samples: One or more mappings from input name to tensor, all with the same names.
        path: Where to write the recording; None keeps it in memory.
        floor: Measure the noise floor (about nine calls a sample).
        progress: Told (what, done, total).

    Returns:
        A recording with `sample/0000/input/<name>` and `sample/0000/output/<name>`; real and
        imaginary parts of a complex output are its last axis.

    Raises:
        UsageError: There are no samples, one is complex, their names differ, the function returns
            no tensor or nothing that could be judged, or something else when it is called again.
        WriteError: The recording cannot be written.
    """
    if not samples or any(set(sample) != set(samples[0]) for sample in samples):
        raise UsageError(
            "the samples cannot be recorded",
            measured="needed: at least one, all with the same input names",
        )
    odd = [name for sample in samples for name, value in sample.items() if value.is_complex()]
    if odd:
        raise UsageError(
            "the samples cannot be recorded",
            measured=f"{odd[0]} is complex",
            hint="give real numbers, and let the function make view_as_complex of them",
        )
    if floor:
        prepare()
    tensors: dict[str, torch.Tensor] = {}
    outputs = _run(_plain(function), samples)
    for index, sample in enumerate(samples):
        for name, value in sample.items():
            tensors[f"{_sample(index)}/input/{name}"] = _copy(value)
        tensors.update(outputs[index])
    made = {name: value for found in outputs for name, value in found.items()}
    refuse_empty_content(made, where="outputs of the function")
    measured = _measure(function, samples, tensors, progress) if floor else None
    manifest = manifest_of(
        tensors,
        Environment.current("cpu", attention=None),
        forwards=len(samples),
        noise_floor=measured[0] if measured else None,
        notes=measured[1] if measured else (),
    )
    return Recording.in_memory(tensors, manifest).kept(path)


@taking_turns()
@own_randomness()
def check_function(
    function: Function,
    reference: Recording | str | Path,
    *,
    tolerance: float | None = None,
    pair: str | None = None,
    label: str = "candidate",
) -> Comparison:
    """Call a candidate on a recording's inputs and judge its outputs.

    Args:
        function: Called as the recorded one was; see `record_function`.
        reference: A recording of a function, or its path.
        tolerance: Judge rel_l2 by this limit instead of the noise floor.
        pair: Declared working precisions, `candidate/reference`; default the reference's own for
            both, whatever dtype the candidate returns.
        label: What the candidate is called in the result.

    Returns:
        The comparison; a call that raises is `invalid`, with what it raised. Every sample is called
        twice, the second time in reverse order: an answer that is not given again is judged, too.

    Raises:
        FileFormatError: The reference cannot be read.
        UsageError: It is not a recording of a function.
    """
    recording = reference if isinstance(reference, Recording) else Recording.open(reference)
    samples = inputs_of(recording)
    if not samples:
        raise UsageError(
            "the reference is not a recording of a function",
            where=str(recording.path or "reference"),
            hint="truestep.record_function(function, samples) makes one",
        )
    failed: dict[str, str] = {}
    indices = range(len(samples))
    actual = _answers(function, samples, indices, failed)
    expected = {name: recording[name] for name in recording if "/output/" in name}
    again = {} if failed else _answers(function, samples, reversed(indices), failed)
    limits = Limits(floor=recording.manifest.noise_floor, pair=pair, tolerance=tolerance)
    rows = compare_tensors(actual, expected, limits=limits)
    otherwise = differing(actual, again, limits)
    rows = with_second_answers(rows, again, expected, otherwise, limits)
    rows = [_failed(row, failed) for row in rows]
    comparison = build_comparison(
        rows,
        actual=Side(label=label, environment=dict(Environment.current("cpu", attention=None))),
        reference=build_side(recording),
        looked_at=(f"outputs of {len(samples)} samples, each called again in reverse order",),
        notes=tuple(f"{sample}: {text}" for sample, text in failed.items()),
    )
    return with_seen(said_unsteady(comparison), actual, expected)


def _answers(
    function: Function, samples: Sequence[Tensors], order: Iterable[int], failed: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Outputs of samples, called in an order; what a call raises is its outcome."""
    outputs: dict[str, torch.Tensor] = {}
    for index in order:
        try:
            outputs.update(_run(_plain(function), [samples[index]], first=index)[0])
        except UsageError:
            raise
        except FOREIGN as error:  # whatever a candidate raises is its outcome
            failed[_sample(index)] = f"raised {one_line(error)}"
    return outputs


def _failed(row: Row, failed: Mapping[str, str]) -> Row:
    """What a call that raised should have given is `invalid`, not only missing."""
    text = failed.get(row.name.partition("/output/")[0])
    return row.model_copy(update={"verdict": Verdict.INVALID, "note": text}) if text else row


def _sample(index: int) -> str:
    return f"sample/{index:04d}"


def inputs_of(recording: Recording) -> list[dict[str, torch.Tensor]]:
    """The inputs of a function that a recording holds."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name in recording:
        key = key_of(name)
        if key.head == "sample" and key.part == "input":
            found.setdefault(key.number or 0, {})[key.name] = recording[name]
    return [found[key] for key in sorted(found)]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return plain(tensor).to("cpu", copy=True).contiguous()


def _named(result: Any) -> dict[str, torch.Tensor]:
    """The tensors of a result, by name."""
    if isinstance(result, torch.Tensor):
        return {"out": result}
    items: dict[Any, Any] = {}
    if isinstance(result, Mapping):
        items = dict(result)
    elif isinstance(result, Sequence) and not isinstance(result, str):
        items = {f"out.{i}": value for i, value in enumerate(result)}
    found = {str(k): torch.as_tensor(v) for k, v in items.items() if v is not None}
    if not found:
        raise UsageError(
            f"the function returned {type(result).__name__}, which holds no tensor",
            hint="return a tensor, a sequence of tensors or a mapping of them",
        )
    return found


def _run(
    call: Callable[[Tensors], dict[str, torch.Tensor]],
    samples: Sequence[Tensors],
    *,
    first: int = 0,
) -> list[dict[str, torch.Tensor]]:
    made = []
    with torch.no_grad():
        for index, sample in enumerate(samples, start=first):
            outputs = call({name: value.clone() for name, value in sample.items()})
            copies = {k: in_real_numbers(_copy(v)) for k, v in outputs.items()}
            made.append({f"{_sample(index)}/output/{k}": v for k, v in copies.items()})
    return made


def _plain(function: Function) -> Callable[[Tensors], dict[str, torch.Tensor]]:
    return lambda sample: _named(function(**sample))


def _measure(
    function: Function,
    samples: Sequence[Tensors],
    recorded: Tensors,
    progress: Progress | None,
) -> tuple[NoiseFloor, tuple[str, ...]]:
    """Benign runs, and which kinds the function cannot do."""
    runs: list[NoiseRun] = []
    notes: list[str] = []
    todo = _changes(function)
    dtype = _working_dtype(function, recorded)

    def measured(kind: str, detail: str, made: Tensors) -> NoiseRun:
        pairs = {name: (value, recorded[name]) for name, value in made.items()}
        return measured_run(kind, detail, pair_of(dtype, dtype), pairs)

    def told(note: str) -> None:
        if note not in notes:  # one for each set of instructions
            notes.append(note)

    with ExitStack() as stack:
        machines = [stack.enter_context(Elsewhere(told, chosen=chosen)) for chosen in other_sets()]
        for done, (kind, detail, change) in enumerate(todo):

            def again(change: Change = change) -> dict[str, torch.Tensor]:
                with change(function) as call:
                    return {k: v for out in _run(call, samples) for k, v in out.items()}

            try:
                given = [value for sample in samples for value in sample.values()]
                taped = machines if kind == "repeat" else ()
                begun = [machine.start(again, recorded, given) for machine in taped]
                made = begun[0] if begun else again()
                same_shapes = all(v.shape == recorded[k].shape for k, v in made.items())
            except FOREIGN as error:  # what a function cannot do is no benign change of it
                notes.append(f"noise floor without {kind} ({detail}): {type(error).__name__}"[:200])
                continue
            if not same_shapes:
                notes.append(f"noise floor without {kind} ({detail}): other shapes")
                continue
            runs.append(measured(kind, detail, made))
            refuse_unsteady(runs[-1:], model=function)
            if progress:
                progress(f"noise floor: {kind}", done + 1, len(todo))
        for machine in machines:
            other = machine.run(partial(measured, "instructions", machine.detail))
            runs += [] if other is None else [other]
    return NoiseFloor(runs=tuple(runs)), tuple(notes)


def _working_dtype(function: Function, recorded: Tensors) -> str:
    """Working dtype of a module; of any other function, of its first output."""
    outputs = (tensor for name, tensor in recorded.items() if "/output/" in name)
    found = (tensor.dtype for tensor in outputs if tensor.is_floating_point())
    return str(working_dtype(function) or next(found, torch.float32)).removeprefix("torch.")


def _changes(function: Function) -> list[tuple[str, str, Change]]:
    found: list[tuple[str, str, Change]] = []
    if isinstance(function, torch.nn.Module):
        higher = HIGHER.get(str(working_dtype(function) or torch.float32).removeprefix("torch."))
        if higher:
            found.append(("precision", f"against {higher}", _raised(higher)))
    found.append(("repeat", "the same call again", _repeat))
    found += [("batch", f"row {row} in a batch of 2", _in_batch(row)) for row in (0, 1)]
    current = torch.get_num_threads()
    found += [
        ("threads", f"{current} -> {count} threads", _threads(count))
        for count in sorted({1, min(2, os.cpu_count() or 1)} - {current})
    ]
    found.append(("attention", "math kernel", _math_attention))
    found.append(("functions", "exp, sin, ... as another library computes them", _functions))
    found += [
        ("jitter", f"one rounding on the inputs, seed {seed}", _jitter(seed))
        for seed in range(JITTERS)
    ]
    return found


@contextmanager
def _repeat(function: Function) -> Iterator[Callable[[Tensors], dict[str, torch.Tensor]]]:
    yield _plain(function)


def _raised(precision: str) -> Change:
    @contextmanager
    def change(function: Function) -> Iterator[Callable[[Tensors], dict[str, torch.Tensor]]]:
        dtype = getattr(torch, precision)

        def call(sample: Tensors) -> dict[str, torch.Tensor]:
            return _named(
                function(
                    **{k: v.to(dtype) if v.is_floating_point() else v for k, v in sample.items()}
                )
            )

        with converted(function, dtype):
            yield call

    return change


def _in_batch(row: int) -> Change:
    @contextmanager
    def change(function: Function) -> Iterator[Callable[[Tensors], dict[str, torch.Tensor]]]:
        def both(value: torch.Tensor) -> torch.Tensor:
            if not value.ndim or value.shape[0] != 1:
                raise ValueError("an input without a batch axis of 1")
            neighbour = value.roll(1, dims=-1) if is_measured(value) else value
            return torch.cat([value, neighbour] if row == 0 else [neighbour, value])

        def call(sample: Tensors) -> dict[str, torch.Tensor]:
            outputs = _named(function(**{k: both(v) for k, v in sample.items()}))
            return {k: v[row : row + 1] for k, v in outputs.items()}

        yield call

    return change


def _threads(count: int) -> Change:
    @contextmanager
    def change(function: Function) -> Iterator[Callable[[Tensors], dict[str, torch.Tensor]]]:
        with thread_count(count):
            yield _plain(function)

    return change


@contextmanager
def _math_attention(function: Function) -> Iterator[Callable[[Tensors], dict[str, torch.Tensor]]]:
    with math_kernel():
        yield _plain(function)


@contextmanager
def _functions(function: Function) -> Iterator[Callable[[Tensors], dict[str, torch.Tensor]]]:
    with OtherFunctions():
        yield _plain(function)


def _jitter(seed: int) -> Change:
    def change(
        function: Function,
    ) -> AbstractContextManager[Callable[[Tensors], dict[str, torch.Tensor]]]:
        generator = torch.Generator("cpu").manual_seed(seed)

        def call(sample: Tensors) -> dict[str, torch.Tensor]:
            moved = {
                k: one_rounding(v, generator) if v.is_floating_point() else v
                for k, v in sample.items()
            }
            return _named(function(**moved))

        return nullcontext(call)

    return change
