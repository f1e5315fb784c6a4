"""Train the video autoencoder."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from training.digits.checkpoint import Average, Run, load_average
from training.digits.data import sample_clips
from training.digits.loop import Schedule, train
from training.digits.models import build_vae, decode_unclamped

BATCH = 8
INK_WEIGHT = 6.0
ABSOLUTE_WEIGHT = 0.3
KL_WEIGHT = 1e-5
SCHEDULE = Schedule(steps=2900, minutes=19, peak=2e-3, warmup=50)
# Clips of training steps, statistics and validation never share a seed.
FIRST_SEED = 1_000_000


def reconstruction_loss(video: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compare a reconstruction with its target, ink counting more than the black background.

    The decoder's output is clamped to [-1, 1] in use, so overshooting a black or a saturated value
    costs nothing.

    Args:
        video: Unclamped reconstruction `b c f h w`.
        target: Clips `b c f h w` in [-1, 1].

    Returns:
        Scalar loss.
    """
    error = video - target
    harmless = ((target <= -1) & (error < 0)) | ((target >= 1) & (error > 0))
    error = error.masked_fill(harmless, 0.0)
    ink = (target.amax(dim=1, keepdim=True) + 1) / 2
    weight = 1 + INK_WEIGHT * ink
    return (weight * (ABSOLUTE_WEIGHT * error.abs() + error.square())).mean()


def use_channels_last(module: torch.nn.Module) -> None:
    """Store convolution weights channels-last, in which this model trains 1.8x faster on a CPU."""
    for parameter in module.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        elif parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def new_run() -> tuple[AutoencoderKLWan, Run]:
    """Create an untrained autoencoder and its training state."""
    vae = build_vae()
    use_channels_last(vae)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=SCHEDULE.peak, betas=(0.9, 0.99), weight_decay=0.0
    )
    return vae, Run(module=vae, optimizer=optimizer, average=Average(decay=0.998))


def train_vae(folder: Path, *, schedule: Schedule = SCHEDULE) -> None:
    """Train the autoencoder, or continue.

    Args:
        folder: Checkpoints are kept here.
        schedule: Length and learning rate.
    """
    torch.manual_seed(0)
    vae, run = new_run()

    def loss_at(step: int) -> torch.Tensor:
        target = sample_clips(BATCH, seed=FIRST_SEED + step).video
        posterior = vae.encode(target).latent_dist
        video = decode_unclamped(vae, posterior.sample())
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss: torch.Tensor = reconstruction_loss(video, target) + KL_WEIGHT * divergence
        return loss

    train(run, schedule, name="vae", checkpoint=folder / "vae.pt", loss_at=loss_at)


def load_vae(folder: Path) -> AutoencoderKLWan:
    """Load the averaged autoencoder from its checkpoint, finished or not."""
    vae = build_vae()
    load_average(folder / "vae.pt", vae)
    use_channels_last(vae)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def measure_vae(vae: AutoencoderKLWan, *, count: int = 64) -> dict[str, float]:
    """Measure the reconstruction of held-out clips.

    Args:
        vae: The autoencoder.
        count: Number of clips.

    Returns:
        Peak signal-to-noise ratio in dB, over all pixels and over ink alone (above 10 %).
    """
    video = sample_clips(count, seed=1, held_out=True).video
    decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample
    error = ((decoded - video) / 2).square()
    ink = (((video.amax(dim=1, keepdim=True) + 1) / 2) > 0.1).expand_as(error)
    return {
        "psnr_db": -10 * math.log10(error.mean().item()),
        "ink_psnr_db": -10 * math.log10(error[ink].mean().item()),
    }
