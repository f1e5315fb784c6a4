"""The whole story on the builtin model: record, harmless changes, port bugs, other gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from truestep.case import Case
from truestep.judge.latent import check_latent
from truestep.judge.media import frame_media
from truestep.recording.format import Recording
from truestep.replay.capture import Capture
from truestep.replay.check import check_pipeline
from truestep.replay.variations import in_batch, threads
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Pipeline, generate
from truestep.verdict import Comparison, GateResult

CASE = Case(
    model="builtin:digits",
    prompt="a red three moving left",
    seed=0,
    steps=20,
    settings={"device": "cpu"},
)

PROMPTS = (
    "a red three moving left",
    "a green seven moving up",
    "a blue zero moving right",
    "a yellow eight moving down",
)


@dataclass(frozen=True)
class Change:
    """One change under test: harmless, or a bug that ports really had."""

    name: str
    harmless: bool
    vary: Callable[[Pipeline], AbstractContextManager[Pipeline]]


@dataclass(frozen=True)
class Outcome:
    """What truestep and the usual cosine gate said of a change."""

    change: Change
    comparison: Comparison
    gate: GateResult


def text_padded(pipe: Pipeline) -> None:
    """Bug: text padded to 9 tokens instead of the 8 the model was trained with."""
    pipe.settings.max_sequence_length += 1


def shift_scale_swapped(pipe: Pipeline) -> None:
    """Bug: one block unpacks its modulation as scale, shift instead of shift, scale."""
    block = pipe.transformer.blocks[2]
    order = [1, 0, 2, 3, 4, 5]
    block.scale_shift_table.data = block.scale_shift_table.data[:, order].clone()

    def swap(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, text, modulation, *rest = args
        return (hidden, text, modulation[:, order], *rest)

    block.register_forward_pre_hook(swap)


def guidance_changed(pipe: Pipeline) -> None:
    """Bug: guidance 3.1 instead of 3.0."""
    pipe.settings.guidance_scale = 3.1


def _bug(
    apply: Callable[[Pipeline], None],
) -> Callable[[Pipeline], AbstractContextManager[Pipeline]]:
    @contextmanager
    def vary(_: Pipeline) -> Iterator[Pipeline]:
        broken = load(CASE)
        apply(broken)
        yield broken

    return vary


def changes() -> list[Change]:
    """Two harmless changes and three bugs."""
    other = 1 if torch.get_num_threads() > 1 else 2
    return [
        Change(f"{torch.get_num_threads()} -> {other} threads", True, threads(other)),
        Change("sample in a batch of two", True, in_batch(1)),
        Change("text padded to 9, not 8", False, _bug(text_padded)),
        Change("shift/scale swapped, block 2", False, _bug(shift_scale_swapped)),
        Change("guidance 3.1, not 3.0", False, _bug(guidance_changed)),
    ]


def try_change(change: Change, pipe: Pipeline, reference: Recording) -> Outcome:
    """Check a change at depth steps; run the cosine gate on the latent of a full generation.

    The frames of the report are those of the full generation.
    """
    run = Capture()
    with change.vary(pipe) as varied:
        comparison = check_pipeline(varied, reference, case=CASE, label=change.name)
        frames = generate(varied, observer=run, output="frames")
    gate = check_latent(run.tensors["latent/final"], reference["latent/final"]).gates[0]
    media = frame_media(frames.cpu(), reference["video/frames"], name="Frames of a full generation")
    shown = comparison.model_copy(
        update={"gates": (gate,), "case_id": change.name, "media": (media,)}
    )
    return Outcome(change, shown, gate)


def write_clips(folder: Path, pipe: Pipeline) -> Path:
    """Generate a clip of each prompt and write them side by side: as a video where PyAV is there,
    as an animated GIF where it is not."""
    from truestep.errors import MissingExtraError
    from truestep.report.video import write_animation, write_video

    clips = []
    before = pipe.settings.prompt
    for prompt in PROMPTS:
        pipe.settings.prompt = prompt
        clips.append(generate(pipe, output="frames"))
    pipe.settings.prompt = before
    frames = torch.cat(clips, dim=-1)
    try:
        path = folder / "clips.mp4"
        write_video(path, frames, fps=6)
    except MissingExtraError:
        path = folder / "clips.gif"
        write_animation(path, frames, fps=6)
    return path
