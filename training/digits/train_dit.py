"""Train the denoiser and the text encoder together, on latents computed once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tqdm import tqdm
from transformers import UMT5EncoderModel

from training.digits.checkpoint import Average, Run, load_average, load_tensors, save_tensors
from training.digits.data import sample_clips
from training.digits.loop import Schedule, train
from training.digits.models import (
    SHIFT,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    encode_text,
)

CLIPS = 16_000
BATCH = 32
PROMPT_DROPOUT = 0.1
LOGIT_SCALE = 1.2
SCHEDULE = Schedule(steps=11000, minutes=56, peak=1e-3, warmup=200)


@dataclass(frozen=True)
class Latents:
    """The training set in latent space.

    Attributes:
        values: Normalised latents `n c f h w`.
        prompts: One per clip.
        mean: Mean per channel before normalisation.
        std: Standard deviation per channel before normalisation.
    """

    values: torch.Tensor
    prompts: list[str]
    mean: list[float]
    std: list[float]


@torch.no_grad()
def compute_latents(vae: AutoencoderKLWan, path: Path, *, count: int = CLIPS) -> Latents:
    """Encode the training clips, or load them if that was done before.

    `WanPipeline` decodes `latent * std + mean`, with the statistics of the VAE configuration; the
    same statistics are removed here.

    Args:
        vae: The trained autoencoder.
        path: Where the latents are kept.
        count: Number of clips.

    Returns:
        The latents.
    """
    if path.exists():
        state = load_tensors(path)
        return Latents(**state)  # type: ignore[arg-type]
    chunks: list[torch.Tensor] = []
    prompts: list[str] = []
    size = 100
    for index in tqdm(range(count // size), desc="latents", mininterval=5.0):
        clips = sample_clips(size, seed=10_000_000 + index)
        chunks.append(vae.encode(clips.video).latent_dist.mode().contiguous())
        prompts.extend(caption.prompt for caption in clips.captions)
    values = torch.cat(chunks)
    mean = values.mean(dim=(0, 2, 3, 4), dtype=torch.float64)
    std = (values - mean.float()[:, None, None, None]).double().pow(2).mean(dim=(0, 2, 3, 4)).sqrt()
    values = (values - mean.float()[:, None, None, None]) / std.float()[:, None, None, None]
    latents = Latents(values=values, prompts=prompts, mean=mean.tolist(), std=std.tolist())
    save_tensors(path, vars(latents))
    return latents


class Denoiser(torch.nn.Module):
    """The jointly trained parts, one module for the optimizer and the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.text_encoder: UMT5EncoderModel = build_text_encoder(len(self.tokenizer))
        self.transformer: WanTransformer3DModel = build_transformer()


def new_run() -> tuple[Denoiser, Run]:
    """Create an untrained denoiser and its training state."""
    denoiser = Denoiser()
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), lr=SCHEDULE.peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    return denoiser, Run(module=denoiser, optimizer=optimizer, average=Average(decay=0.999))


def draw_sigma(count: int) -> torch.Tensor:
    """Draw noise levels: logit-normal, then the timestep shift.

    Source:
        Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1 (logit-normal) and
        equation 23 (shift).
    """
    uniform = torch.sigmoid(LOGIT_SCALE * torch.randn(count))
    return SHIFT * uniform / (1 + (SHIFT - 1) * uniform)


def train_dit(
    latents: Latents, folder: Path, *, schedule: Schedule = SCHEDULE, compile_model: bool = True
) -> None:
    """Train the denoiser, or continue.

    Args:
        latents: The training set.
        folder: Checkpoints are kept here.
        schedule: Length and learning rate.
        compile_model: Use `torch.compile`, a fifth faster on a CPU.
    """
    torch.manual_seed(1)
    denoiser, run = new_run()
    forward = torch.compile(denoiser.transformer) if compile_model else denoiser.transformer

    def loss_at(step: int) -> torch.Tensor:
        rows = torch.randint(len(latents.prompts), (BATCH,))
        dropped = (torch.rand(BATCH) < PROMPT_DROPOUT).tolist()
        prompts = [
            "" if drop else latents.prompts[row]
            for row, drop in zip(rows.tolist(), dropped, strict=True)
        ]
        clean = latents.values[rows]
        noise = torch.randn_like(clean)
        sigma = draw_sigma(BATCH)
        level = sigma[:, None, None, None, None]
        velocity = forward(
            hidden_states=(1 - level) * clean + level * noise,
            timestep=1000 * sigma,
            encoder_hidden_states=encode_text(denoiser.text_encoder, denoiser.tokenizer, prompts),
            return_dict=False,
        )[0]
        loss: torch.Tensor = (velocity - (noise - clean)).square().mean()
        return loss

    train(run, schedule, name="dit", checkpoint=folder / "dit.pt", loss_at=loss_at)


def load_denoiser(folder: Path) -> Denoiser:
    """Load the averaged denoiser from its checkpoint, finished or not."""
    denoiser = Denoiser()
    load_average(folder / "dit.pt", denoiser)
    return denoiser.eval().requires_grad_(False)
