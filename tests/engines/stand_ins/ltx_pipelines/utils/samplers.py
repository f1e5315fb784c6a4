"""The loop over all sigmas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def euler_denoising_loop(
    sigmas: torch.Tensor,
    video_state: torch.Tensor,
    audio_state: torch.Tensor,
    stepper: Any,
    transformer: torch.nn.Module,
    denoiser: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    for index in range(len(sigmas) - 1):
        video, audio = denoiser(transformer, video_state, audio_state, sigmas, index)
        video_state = stepper.step(video_state, video, sigmas, index)
        audio_state = stepper.step(audio_state, audio, sigmas, index)
    return video_state, audio_state
