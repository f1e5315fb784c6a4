"""`truestep tiny`: a small random pipeline of any diffusers class, to try things on."""

from __future__ import annotations

from pathlib import Path

import click

from truestep.cli.common import print_screen


@click.command("tiny")
@click.argument("pipeline", metavar="CLASS")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the weights.")
@click.option("--dtype", default="float32", show_default=True, help="Type of the weights.")
def command(pipeline: str, folder: Path, seed: int, dtype: str) -> None:
    """Write a tiny pipeline with random weights to a new FOLDER, without any download.

    CLASS is a pipeline of diffusers, as FluxPipeline, or a modular configuration, as
    flux/FluxAutoBlocks/text2image. The folder is loaded as any other:
    diffusers.DiffusionPipeline.from_pretrained(FOLDER), or ModularPipeline.
    """
    from truestep.engines.folders import still
    from truestep.runtime.loading import quiet
    from truestep.testing import tiny

    with quiet(), still("transformers"):
        tiny.save(pipeline, folder, seed=seed, dtype=dtype)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print_screen(
        f"{pipeline}, random weights of seed {seed}, {dtype}, {size / 1e6:.1f} MB",
        ending=[f"folder: {folder}"],
    )
