"""The training loop that both stages share: schedule, clipping, average, checkpoints, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from training.digits.checkpoint import Run


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of one stage.

    Attributes:
        steps: Number of optimizer steps.
        minutes: Time limit. A machine too slow for all steps follows the same learning-rate curve
            by time and stops early.
        peak: Largest learning rate.
        floor: Last learning rate, as a part of the peak.
        warmup: Steps of linear warm-up.
        clip: Largest gradient norm.
        save_every_s: Seconds between checkpoints.
    """

    steps: int
    minutes: float
    peak: float
    floor: float = 0.02
    warmup: int = 100
    clip: float = 1.0
    save_every_s: float = 60.0

    def progress(self, step: int, seconds: float) -> float:
        """Return the finished part of the stage, 0 to 1."""
        return min(1.0, max(step / self.steps, seconds / (60 * self.minutes)))

    def learning_rate(self, step: int, seconds: float) -> float:
        """Return the learning rate: linear warm-up, then half a cosine."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress(step, seconds)))
        warm = min(1.0, (step + 1) / self.warmup)
        return self.peak * warm * (self.floor + (1 - self.floor) * cosine)


def train(
    run: Run,
    schedule: Schedule,
    *,
    name: str,
    checkpoint: Path,
    loss_at: Callable[[int], torch.Tensor],
) -> None:
    """Run a stage to its end, from its checkpoint if there is one.

    Args:
        run: What is trained; changed in place.
        schedule: Length and learning rate.
        name: Shown in the progress bar.
        checkpoint: Where the state is kept.
        loss_at: Gives the loss of a step; randomness must come from the step or from the global
            generators, which the checkpoint restores.
    """
    if run.resume(checkpoint):
        tqdm.write(f"{name}: resumed at step {run.step}")
    saved = time.monotonic()
    smooth = 0.0
    with tqdm(total=schedule.steps, initial=run.step, desc=name, mininterval=5.0) as bar:
        while schedule.progress(run.step, run.seconds) < 1.0:
            begin = time.monotonic()
            for group in run.optimizer.param_groups:
                group["lr"] = schedule.learning_rate(run.step, run.seconds)
            loss = loss_at(run.step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(run.module.parameters(), schedule.clip)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.average.update(run.module)
            run.step += 1
            elapsed = time.monotonic() - begin
            run.seconds += elapsed
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"{name}: the loss of step {run.step} is {value}")
            smooth = value if smooth == 0.0 else 0.98 * smooth + 0.02 * value
            bar.set_postfix(loss=f"{smooth:.4f}", s_per_step=f"{elapsed:.2f}", refresh=False)
            bar.update()
            if time.monotonic() - saved > schedule.save_every_s:
                run.save(checkpoint)
                saved = time.monotonic()
    run.save(checkpoint)
