"""Decoded tensors to measure on, and a file's cases as its source has them."""

from __future__ import annotations

import torch

GENERATOR = torch.Generator().manual_seed(5)
FRAMES = (torch.rand(1, 3, 5, 24, 32, generator=GENERATOR) * 1.6 - 0.8).cumsum(-1).sin() * 0.7
OTHER_FRAMES = (torch.rand(1, 3, 5, 24, 32, generator=GENERATOR) * 1.6 - 0.8).cumsum(-1).sin() * 0.7
WAVEFORM = torch.randn(1, 2, 4000, generator=GENERATOR) * 0.1

VACUOUS = {
    "clip_threshold": 0.55,
    "ssim_threshold": 0.29,
    "psnr_threshold": 11.7,
    "mean_abs_diff_threshold": 47.0,
}
"""The case `ltx_2_3_two_stage_ti2v_2gpus` of SGLang-Diffusion's h100.json."""
