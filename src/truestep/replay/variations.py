"""Harmless changes of a pipeline that a noise floor is measured under.

Each is a function on the pipeline, like a change under test.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from truestep.joint import Encoded, Value, each, floating
from truestep.judge.floor import pair_of
from truestep.keys import STAGES, address
from truestep.replay.raised import raised
from truestep.replay.stages import replay
from truestep.replay.steps import floor_steps, steps_recorded
from truestep.runtime.changes import OtherFunctions, math_kernel, one_rounding, thread_count
from truestep.runtime.pipeline import Branch, Pipeline, Step, Texts, text_branch
from truestep.runtime.precision import HIGHER

Vary = Callable[[Pipeline], AbstractContextManager[Pipeline]]
"""A harmless change: yields the varied pipeline, then undoes what is global."""


@dataclass(frozen=True)
class Variation:
    """One harmless change.

    Attributes:
        kind: `precision`, `repeat`, `batch`, `threads`, `attention`, `jitter`, `functions` or
            `instructions`.
        detail: What exactly was varied.
        vary: The change.
        pair: Working precisions, candidate first.
        stages: Stages that it is run on.
        only: Which of the floor's steps it predicts at (0 the first); none named: all of them.
        pairwise: Also predict at the step after it, or after the middle one.
    """

    kind: str
    detail: str
    vary: Vary
    pair: str
    stages: tuple[str, ...] = STAGES
    only: tuple[int, ...] = ()
    pairwise: bool = False

    def run(
        self,
        pipe: Pipeline,
        recording: Mapping[str, torch.Tensor],
        *,
        steps: Iterable[int] | None = None,
        in_order: bool | None = None,
    ) -> dict[str, torch.Tensor]:
        """Replay a pipeline that the change was made to: predictions, guidance and update at the
        given steps, by default `floor_steps`, or at the one of them that the change is tried at."""
        return replay(
            pipe,
            recording,
            steps=self.at(recording, steps),
            only=self.stages,
            thinned=True,
            in_order=in_order,
        ).outputs

    def at(
        self, recording: Mapping[str, torch.Tensor], steps: Iterable[int] | None
    ) -> tuple[int, ...]:
        """Steps at which it predicts."""
        every = tuple(steps) if steps is not None else floor_steps(recording)
        chosen = {every[place % len(every)] for place in self.only or range(len(every))}
        if self.pairwise:
            middle = every[1 % len(every)]
            chosen.add(min(middle + 1, steps_recorded(recording) - 1))
        return tuple(sorted(chosen))

    def without_neighbour(
        self,
        outputs: Mapping[str, torch.Tensor],
        recording: Mapping[str, torch.Tensor],
        steps: Iterable[int] | None,
    ) -> dict[str, torch.Tensor]:
        """Its outputs without those of the neighbouring step, which no other change was tried at:
        a step's own floor is made of all of them."""
        alone = replace(self, pairwise=False).at(recording, steps)
        neighbour = set(self.at(recording, steps)) - set(alone)
        return {k: v for k, v in outputs.items() if address(k).step not in neighbour}


def variations(pipe: Pipeline) -> list[Variation]:
    """All harmless changes that this machine can make to a pipeline, in its working precision.

    What they cost is part of every recording, so that each runs where it says something: all steps
    for what tells how large rounding is, one step for what adds to the sample.
    """
    dtype = str(pipe.first_transformer.dtype).removeprefix("torch.")
    pair = pair_of(dtype, dtype)
    higher = HIGHER[dtype]
    found = [
        Variation("repeat", "the same run again", unchanged, pair, pairwise=True),
        Variation("precision", f"{dtype} against {higher}", _precision(higher), pair),
        Variation(
            "batch",
            "both passes in one batch, others beside a neighbour",
            batched,
            pair,
            only=(2,),
        ),
    ]
    current, cores = torch.get_num_threads(), os.cpu_count() or 1
    found += [
        Variation("threads", f"{current} -> {count} threads", threads(count), pair, AT_A_STEP, (1,))
        for count in sorted({1, min(2, cores), cores} - {current})
    ]
    found.append(
        Variation("attention", "math kernel", math_attention, pair, _BEFORE_DECODING, (1,))
    )
    found.append(replace(jitter(0, pair), only=(0,), stages=_ALL_BUT_DECODING))
    return [*found, functions(0, pair)]


_ALL_BUT_DECODING = tuple(stage for stage in STAGES if stage != "decoding")
_BEFORE_DECODING = ("text", "connector", "prediction")
AT_A_STEP = ("connector", "prediction")


def functions(seed: int, pair: str) -> Variation:
    """Elementary functions as another library computes them; at every step, as their noise is of a
    timestep's embedding, and is another at another step."""
    detail = f"exp, sin, ... as another library computes them, seed {seed}"

    @contextmanager
    def vary(pipe: Pipeline) -> Iterator[Pipeline]:
        with OtherFunctions(seed):
            yield replace(pipe)

    return Variation("functions", detail, vary, pair, AT_A_STEP)


def jitter(seed: int, pair: str) -> Variation:
    """Move some elements of every stage's input to a neighbouring number of their dtype."""
    return Variation("jitter", f"one rounding on the inputs, seed {seed}", _jitter(seed), pair)


@contextmanager
def unchanged(pipe: Pipeline) -> Iterator[Pipeline]:
    yield replace(pipe)


def threads(count: int) -> Vary:
    """Run on another number of torch threads."""

    @contextmanager
    def vary(pipe: Pipeline) -> Iterator[Pipeline]:
        with thread_count(count):
            yield replace(pipe)

    return vary


@contextmanager
def math_attention(pipe: Pipeline) -> Iterator[Pipeline]:
    """Run with `math_kernel`."""
    with math_kernel():
        yield replace(pipe)


@contextmanager
def batched(pipe: Pipeline) -> Iterator[Pipeline]:
    """Run both guidance passes as one batch, or apart where a pipeline batches them already; text
    and decoding beside a neighbour, and predictions where there are no two passes to join."""
    settings, passes = pipe.settings, pipe.passes(pipe)
    joined = not pipe.audio_video and len(passes) == 2 and settings.text_recipe == "pad_trim_zero"
    with in_batch(0)(pipe) as varied:
        if joined:
            plan = "batched" if settings.cfg == "sequential" else "sequential"
            other = settings.model_copy(update={"cfg": plan})
            varied = replace(varied, settings=other, predict=pipe.predict)
        yield varied


def in_batch(row: int) -> Vary:
    """Run every model call with a neighbour in the batch, and take the sample's own row."""

    def beside(sample: torch.Tensor) -> torch.Tensor:
        neighbour = sample.roll(1, dims=-1)
        return torch.cat([sample, neighbour] if row == 0 else [neighbour, sample])

    def twice(sample: torch.Tensor) -> torch.Tensor:
        return torch.cat([sample, sample])

    def own(batch: Value) -> Value:
        return each(lambda tensor: tensor.chunk(2)[row], batch)

    @contextmanager
    def vary(pipe: Pipeline) -> Iterator[Pipeline]:
        def encode_text(inner: Pipeline, prompts: list[str]) -> Value:
            batch = [*prompts, "a neighbour"] if row == 0 else ["a neighbour", *prompts]
            return own(pipe.encode_text(inner, batch))

        def predict(
            inner: Pipeline, latent: Value, step: Step, text: Value, branch: Branch
        ) -> Value:
            both = pipe.predict(inner, each(beside, latent), step, each(twice, text), branch)
            return own(both)

        def decode(inner: Pipeline, latent: Value) -> Value:
            return own(pipe.decode(inner, each(beside, latent)))

        yield replace(
            pipe,
            encode_text=encode_text,
            connect=_each_connected(pipe, twice, own),
            predict=predict,
            predict_passes=_one_by_one(pipe),
            decode=decode,
        )

    return vary


def _each_connected(
    pipe: Pipeline,
    change: Callable[[torch.Tensor], torch.Tensor],
    back: Callable[[Value], Value],
) -> Callable[[Pipeline, Texts], Texts] | None:
    """The connector stage on changed texts, where a model has one."""
    original = pipe.connect
    if original is None:
        return None

    def connect(inner: Pipeline, texts: Texts) -> Texts:
        changed = {}
        for branch, text in texts.items():
            embeds = change(text.embeds)
            times = embeds.shape[0] // text.mask.shape[0]
            changed[branch] = Encoded(embeds, text.mask.repeat(times, 1))
        return {branch: back(value) for branch, value in original(inner, changed).items()}

    return connect


def _one_by_one(pipe: Pipeline) -> Callable[..., dict[Branch, Value]]:
    """Passes as separate forwards of the varied `predict`, whatever the plan; a plan is varied by
    being left."""

    def predict_passes(
        inner: Pipeline, latent: Value, step: Step, texts: Texts, wanted: Sequence[Branch]
    ) -> dict[Branch, Value]:
        return {
            branch: inner.predict(inner, latent, step, texts[text_branch(branch)], branch)
            for branch in wanted
        }

    return predict_passes if pipe.audio_video else pipe.predict_passes


def _jitter(seed: int) -> Vary:
    """Round every stage's input once more, in the working precision; see `one_rounding`."""

    @contextmanager
    def vary(pipe: Pipeline) -> Iterator[Pipeline]:
        generator = torch.Generator("cpu").manual_seed(seed)
        working = pipe.first_transformer.dtype

        def rounded(tensor: torch.Tensor) -> torch.Tensor:
            narrower = tensor.itemsize < working.itemsize
            return one_rounding(tensor.to(working) if narrower else tensor, generator)

        def moved(value: Value) -> Value:
            return each(floating(rounded), value)

        def encode_text(inner: Pipeline, prompts: list[str]) -> Value:
            with _embeddings_through(pipe.text_encoder, rounded):
                return pipe.encode_text(inner, prompts)

        def predict(
            inner: Pipeline, latent: Value, step: Step, text: Value, branch: Branch
        ) -> Value:
            return pipe.predict(inner, moved(latent), step, moved(text), branch)

        def combine(inner: Pipeline, step: Step, *predictions: Value) -> Value:
            return pipe.combine(inner, step, *(moved(value) for value in predictions))

        def update(inner: Pipeline, step: Step, guided: Value, latent: Value) -> Value:
            return pipe.update(inner, step, moved(guided), moved(latent))

        def decode(inner: Pipeline, latent: Value) -> Value:
            return pipe.decode(inner, moved(latent))

        yield replace(
            pipe,
            encode_text=encode_text,
            connect=_each_connected(pipe, rounded, lambda value: value),
            predict=predict,
            predict_passes=_one_by_one(pipe),
            combine=combine,
            update=update,
            decode=decode,
        )

    return vary


@contextmanager
def _embeddings_through(
    encoder: Any, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Pass a text encoder's token embeddings through a function, where it says which they are."""
    find = getattr(encoder, "get_input_embeddings", None)
    if find is None:
        yield
        return
    handle = find().register_forward_hook(lambda module, inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def _precision(higher: str) -> Vary:
    """Run the same weights in a higher precision."""

    def vary(pipe: Pipeline) -> AbstractContextManager[Pipeline]:
        return raised(pipe, higher)

    return vary
