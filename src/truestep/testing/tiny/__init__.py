"""Tiny random pipelines of any diffusers class, built from its own configuration classes.

No hub and no download: tokenizers are made locally, weights are drawn from a seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from truestep.text import quoted

__all__ = ["example_call", "modular_names", "names", "pipeline", "save"]


def names() -> list[str]:
    """Pipeline classes of the installed diffusers, whether they can be built or not."""
    from truestep.testing.tiny import building

    return building.names()


def modular_names() -> list[str]:
    """Configurations of modular pipelines, as `flux/FluxAutoBlocks/text2image`."""
    from truestep.testing.tiny import modular

    return modular.names()


def pipeline(name: str, *, seed: int = 0, dtype: str = "float32") -> Any:
    """Build a tiny pipeline with random weights, on the CPU.

    Args:
        name: A class of diffusers, as `FluxPipeline`, or a modular configuration.
        seed: Seed of the weights; the same seed gives the same bits.
        dtype: Type of the weights, as `float32` or `bfloat16`.

    Raises:
        UsageError: No such class or type, or a component that has no tiny configuration.
    """
    import torch

    from truestep.errors import UsageError
    from truestep.testing.tiny.building import build, pipeline_class

    kind = getattr(torch, dtype, None)
    if not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise UsageError(f"no floating-point type {dtype!r}", hint="--dtype bfloat16")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # tables that a class draws for itself, and never trains
        if "/" in name:
            from truestep.testing.tiny import modular

            return modular.build(name, seed=seed, dtype=kind)
        return build(pipeline_class(name), seed=seed, dtype=kind)


def example_call(name: str, *, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for a quick call: `pipe(**example_call("FluxPipeline"))`.

    Pictures, masks, videos and control inputs are drawn from the seed, and the generator is new
    at every call of this function.
    """
    from truestep.testing.tiny.building import pipeline_class
    from truestep.testing.tiny.calls import example_call

    if "/" in name:
        from truestep.testing.tiny import modular

        return modular.example_call(name, seed=seed)
    return example_call(pipeline_class(name), seed=seed)


def save(name: str, folder: Path | str, *, seed: int = 0, dtype: str = "float32") -> None:
    """Write a tiny pipeline to a new folder that `DiffusionPipeline.from_pretrained` loads; of a
    modular configuration, one that `ModularPipeline.from_pretrained` loads.

    Raises:
        UsageError: As `pipeline`; the folder exists; or what was written could not be loaded here.
    """
    from truestep.errors import UsageError
    from truestep.testing.tiny.building import pipeline_class
    from truestep.testing.tiny.processors import lacks_video

    folder = Path(folder)
    if folder.exists():
        other = quoted(f"{folder}-2")
        raise UsageError(f"the folder {folder} exists", hint=f"truestep tiny {name} {other}")
    if "/" not in name:
        pipeline_class(name, folder=str(folder))
    built = pipeline(name, seed=seed, dtype=dtype)
    for part, value in built.components.items():
        if lacks_video(value):
            raise UsageError(
                f"a folder of {name} could not be loaded here",
                where=f"{part} ({type(value).__name__}) reads videos by torchvision",
                hint="pip install torchvision",
            )
    if "/" in name:
        from truestep.testing.tiny import modular

        modular.save(built, name, folder)
    else:
        built.save_pretrained(folder)
