"""Write the trained parts as a diffusers folder of half-precision safetensors."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5EncoderModel

from training.digits.models import SHIFT, build_tokenizer

WEIGHTS = Path(__file__).parents[2] / "src" / "truestep" / "models" / "digits" / "weights"


def replace_folder(folder: Path, new: Path) -> None:
    """Put a finished folder in the place of another, which is deleted last."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def as_half(module: torch.nn.Module) -> torch.nn.Module:
    """Copy a module to float16 with dense weights, which safetensors needs."""
    half = copy.deepcopy(module).to(torch.float16)
    for parameter in half.parameters():
        parameter.data = parameter.data.contiguous(memory_format=torch.contiguous_format)
    return half


def name_tokenizer_portably(folder: Path) -> None:
    """Name the tokenizer class as transformers 4 and 5 both know it.

    transformers 5 saves `TokenizersBackend`, which version 4 lacks; the older name is an alias.
    """
    for path in (folder / "model_index.json", folder / "tokenizer" / "tokenizer_config.json"):
        config = json.loads(path.read_text())
        if "tokenizer_class" in config:
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        else:
            config["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
        path.write_text(json.dumps(config, indent=2) + "\n")


def export(
    vae: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
    *,
    folder: Path = WEIGHTS,
) -> None:
    """Write a folder that `WanPipeline.from_pretrained` loads.

    Args:
        vae: The autoencoder, with `latents_mean` and `latents_std` in its configuration.
        transformer: The denoiser.
        text_encoder: The text encoder.
        folder: Replaced as a whole once everything is written.

    Raises:
        OverflowError: A weight does not fit in float16.
    """
    halves = [as_half(module) for module in (vae, transformer, text_encoder)]
    for module in halves:
        for name, value in module.named_parameters():
            if not torch.isfinite(value).all():
                raise OverflowError(f"{type(module).__name__}.{name} does not fit in float16")
    pipeline = WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=halves[2],
        vae=halves[0],
        transformer=halves[1],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".weights.", dir=folder.parent))
    try:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        name_tokenizer_portably(temporary)
        for path in temporary.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        temporary.chmod(0o755)
        replace_folder(folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
