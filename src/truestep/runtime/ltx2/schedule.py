"""The schedule: `1 - i/N` shifted by mu and stretched to its end, or a fixed list."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from truestep.controls import MU_CONSTANT
from truestep.runtime.ltx2 import sampler
from truestep.runtime.ltx2.plan import SIGMAS
from truestep.runtime.ltx2.settings import latent_shape, of
from truestep.runtime.pipeline import Pipeline, Schedule


def shift(tokens: int, config: Mapping[str, Any]) -> float:
    """mu for a number of video tokens, by the line that a scheduler's configuration gives."""
    low, high = config.get("base_image_seq_len", 1024), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.95), config.get("max_shift", 2.05)
    slope = (most - least) / (high - low)
    mu: float = tokens * slope + (least - slope * low)
    return mu


def make_schedule(pipe: Pipeline) -> Schedule:
    """Reset the scheduler: `1 - i/N` shifted by mu and stretched to its end, or a fixed list; with
    midpoints, if the sampler is `res2s`."""
    controls, scheduler = of(pipe), pipe.scheduler
    fixed = SIGMAS.get(controls.sigma_schedule)
    steps = pipe.settings.steps
    sigmas = np.linspace(1.0, 1 / steps, steps) if fixed is None else np.array(fixed)
    if controls.mu == "tokens":
        mu = shift(math.prod(latent_shape(pipe)), scheduler.config)
    else:
        mu = MU_CONSTANT if controls.mu == "constant" else float(controls.mu)
    scheduler.set_timesteps(sigmas=sigmas, device=pipe.device, mu=mu)
    scheduler.set_begin_index(0)
    if controls.sampler == "res2s":
        sampler.begin(pipe)
    experts = torch.ones(len(scheduler.timesteps), dtype=torch.int64)
    return Schedule(scheduler.sigmas, scheduler.timesteps, experts)
