"""Measure a reference's noise floor: replay it under changes that are known to be harmless.

Each variation is a function on the pipeline, like a change under test. All run on the trusted side,
on the recorded inputs, so what they differ by is rounding and nothing else.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch

from truestep.case import Case
from truestep.comparison.distance import distance
from truestep.errors import TruestepError
from truestep.noise import FREE_RUN, NoiseFloor, NoiseRun, RunMetrics, pair_of
from truestep.recording.capture import Progress
from truestep.recording.replay import replay
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Branch, Pipeline, Step, generate

HIGHER = {"bfloat16": "float32", "float16": "float32", "float32": "float64"}
"""Next higher precision to measure a working dtype's own rounding against."""

OTHER = {"float32": "bfloat16", "bfloat16": "float32", "float16": "float32"}
"""The other precision that candidates of a reference commonly run in."""


Vary = Callable[[Pipeline], AbstractContextManager[Pipeline]]
"""A harmless change: yields the varied pipeline, then undoes what is global."""


@dataclass(frozen=True)
class Variation:
    """One harmless change.

    Attributes:
        kind: `repeat`, `batch`, `threads`, `jitter` or `precision`.
        detail: What exactly was varied.
        vary: The change.
        pair: Working precisions, candidate first.
    """

    kind: str
    detail: str
    vary: Vary
    pair: str


def variations(pipe: Pipeline) -> list[Variation]:
    """All harmless changes that this machine can make to a pipeline."""
    dtype = pipe.settings.dtype
    pair = pair_of(dtype, dtype)
    found = [Variation("repeat", "the same run again", _unchanged, pair)]
    found += [
        Variation("batch", f"row {row} in a batch of 2", in_batch(row), pair) for row in (0, 1)
    ]
    current, cores = torch.get_num_threads(), os.cpu_count() or 1
    found += [
        Variation("threads", f"{current} -> {count} threads", threads(count), pair)
        for count in sorted({1, min(2, cores), cores} - {current})
    ]
    found += [
        Variation("jitter", f"one ulp on the inputs, seed {seed}", _jitter(seed), pair)
        for seed in (0, 1)
    ]
    higher = HIGHER[dtype]
    found.append(Variation("precision", f"{dtype} against {higher}", _precision(higher), pair))
    return found


def measure(
    pipe: Pipeline,
    recording: Mapping[str, torch.Tensor],
    *,
    case: Case,
    steps: Iterable[int] | None = None,
    final: bool = False,
    progress: Progress | None = None,
) -> NoiseFloor:
    """Measure the noise floor of a recording on the pipeline that made it.

    Args:
        pipe: The trusted pipeline.
        recording: Its full recording.
        case: What was recorded; loaded once more in the other common precision.
        steps: Where predictions are replayed.
        final: Also generate freely under each variation, for the floor of the final latent.
        progress: Told about each variation.
    """
    todo = variations(pipe)
    runs = []
    total = len(todo) + 1
    for done, variation in enumerate(todo):
        with variation.vary(pipe) as varied:
            outputs = replay(varied, recording, steps=steps).outputs
            if final:
                outputs[FREE_RUN] = generate(varied).to("cpu")
        runs.append(_run(variation, outputs, recording))
        if progress:
            progress(f"noise floor: {variation.kind}", done + 1, total)
    runs += _other_precision(case, recording, steps=steps)
    if progress:
        progress("noise floor: precision", total, total)
    return NoiseFloor(runs=tuple(runs))


def _other_precision(
    case: Case, recording: Mapping[str, torch.Tensor], *, steps: Iterable[int] | None
) -> list[NoiseRun]:
    """The trusted model in the other precision: the floor for a candidate that runs in it."""
    dtype = OTHER[case.dtype]
    variation = Variation("precision", f"loaded in {dtype}", _unchanged, pair_of(dtype, case.dtype))
    try:
        other = load(case.replace(dtype=dtype))
        outputs = replay(other, recording, steps=steps).outputs
    except (TruestepError, RuntimeError):  # a device without this dtype: no floor for that pair
        return []
    return [_run(variation, outputs, recording)]


def _run(
    variation: Variation,
    outputs: Mapping[str, torch.Tensor],
    recording: Mapping[str, torch.Tensor],
) -> NoiseRun:
    rows = []
    for name, output in outputs.items():
        metrics = distance(output, recording["latent/final" if name == FREE_RUN else name])
        scale = metrics.rms_reference
        rows.append(
            RunMetrics(
                name=name,
                rel_l2=metrics.rel_l2,
                max_abs=metrics.max_abs / scale if scale else metrics.max_abs,
            )
        )
    return NoiseRun(
        kind=variation.kind, detail=variation.detail, pair=variation.pair, tensors=tuple(rows)
    )


@contextmanager
def _unchanged(pipe: Pipeline) -> Iterator[Pipeline]:
    yield replace(pipe)


def threads(count: int) -> Vary:
    """Run on another number of torch threads."""

    @contextmanager
    def vary(pipe: Pipeline) -> Iterator[Pipeline]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield replace(pipe)
        finally:
            torch.set_num_threads(before)

    return vary


def in_batch(row: int) -> Vary:
    """Run every model call with a neighbour in the batch, and take the sample's own row."""

    def beside(sample: torch.Tensor) -> torch.Tensor:
        neighbour = sample.roll(1, dims=-1)
        return torch.cat([sample, neighbour] if row == 0 else [neighbour, sample])

    @contextmanager
    def vary(pipe: Pipeline) -> Iterator[Pipeline]:
        def encode_text(inner: Pipeline, prompts: list[str]) -> torch.Tensor:
            batch = [*prompts, "a neighbour"] if row == 0 else ["a neighbour", *prompts]
            return pipe.encode_text(inner, batch)[row : row + 1]

        def predict(
            inner: Pipeline, latent: torch.Tensor, step: Step, text: torch.Tensor, branch: Branch
        ) -> torch.Tensor:
            both = pipe.predict(inner, beside(latent), step, torch.cat([text, text]), branch)
            return both[row : row + 1]

        def decode(inner: Pipeline, latent: torch.Tensor) -> torch.Tensor:
            return pipe.decode(inner, beside(latent))[row : row + 1]

        yield replace(pipe, encode_text=encode_text, predict=predict, decode=decode)

    return vary


def _jitter(seed: int) -> Vary:
    """Move every element of every stage's input to a neighbouring number of its dtype."""

    @contextmanager
    def vary(pipe: Pipeline) -> Iterator[Pipeline]:
        generator = torch.Generator("cpu").manual_seed(seed)

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return one_ulp(tensor, generator)

        def predict(
            inner: Pipeline, latent: torch.Tensor, step: Step, text: torch.Tensor, branch: Branch
        ) -> torch.Tensor:
            return pipe.predict(inner, moved(latent), step, moved(text), branch)

        def combine(
            inner: Pipeline, step: Step, cond: torch.Tensor, uncond: torch.Tensor
        ) -> torch.Tensor:
            return pipe.combine(inner, step, moved(cond), moved(uncond))

        def update(
            inner: Pipeline, step: Step, guided: torch.Tensor, latent: torch.Tensor
        ) -> torch.Tensor:
            return pipe.update(inner, step, moved(guided), moved(latent))

        def decode(inner: Pipeline, latent: torch.Tensor) -> torch.Tensor:
            return pipe.decode(inner, moved(latent))

        yield replace(pipe, predict=predict, combine=combine, update=update, decode=decode)

    return vary


_INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def one_ulp(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each non-zero element one unit in the last place up or down, at random; zeros stay.

    Args:
        tensor: Any shape; float64, float32, bfloat16 or float16, finite.
        generator: A CPU generator.
    """
    bits = tensor.contiguous().view(_INTEGER[tensor.dtype])
    signs = torch.randint(0, 2, bits.shape, generator=generator, dtype=bits.dtype) * 2 - 1
    return torch.where(tensor == 0, tensor, (bits + signs.to(bits.device)).view(tensor.dtype))


def _precision(higher: str) -> Vary:
    """Run the same weights in a higher precision."""

    @contextmanager
    def vary(pipe: Pipeline) -> Iterator[Pipeline]:
        dtype = getattr(torch, higher)

        def raised(model: torch.nn.Module | None) -> torch.nn.Module | None:
            return None if model is None else torch.nn.Module.to(copy.deepcopy(model), dtype)

        def combine(
            inner: Pipeline, step: Step, cond: torch.Tensor, uncond: torch.Tensor
        ) -> torch.Tensor:
            return pipe.combine(inner, step, cond.to(dtype), uncond.to(dtype))

        def update(
            inner: Pipeline, step: Step, guided: torch.Tensor, latent: torch.Tensor
        ) -> torch.Tensor:
            return pipe.update(inner, step, guided.to(dtype), latent.to(dtype))

        yield replace(
            pipe,
            text_encoder=raised(pipe.text_encoder),
            transformer=raised(pipe.transformer),
            transformer_2=raised(pipe.transformer_2),
            vae=raised(pipe.vae),
            combine=combine,
            update=update,
        )

    return vary
