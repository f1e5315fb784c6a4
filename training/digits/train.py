"""Train, export and judge the demo model: `python -m training.digits.train`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from training.digits.export import WEIGHTS, export
from training.digits.judge import judge, report
from training.digits.train_dit import compute_latents, load_denoiser, train_dit
from training.digits.train_vae import load_vae, measure_vae, train_vae

STAGES = ("vae", "latents", "dit", "export", "judge")


def export_checkpoints(folder: Path, weights: Path) -> None:
    """Export the averaged weights of the checkpoints, finished or not."""
    vae = load_vae(folder)
    latents = compute_latents(vae, folder / "latents.pt")
    vae.register_to_config(latents_mean=latents.mean, latents_std=latents.std)
    denoiser = load_denoiser(folder)
    export(vae, denoiser.transformer, denoiser.text_encoder, folder=weights)


def main() -> None:
    """Run the requested stages in their order; each continues from its checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".training/digits"))
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where to export to")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="do without a C++ compiler")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    if "vae" in options.stages:
        train_vae(options.folder)
        print(json.dumps(measure_vae(load_vae(options.folder))))
    if "latents" in options.stages or "dit" in options.stages:
        latents = compute_latents(load_vae(options.folder), options.folder / "latents.pt")
        if "dit" in options.stages:
            train_dit(latents, options.folder, compile_model=not options.no_compile)
    if "export" in options.stages:
        export_checkpoints(options.folder, options.weights)
    if "judge" in options.stages:
        sheet = options.weights.parent / "contact_sheet.png"
        print(report(judge(options.weights, sheet=sheet)))


if __name__ == "__main__":
    main()
