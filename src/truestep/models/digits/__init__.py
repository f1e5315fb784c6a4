"""The demo model: text to video, trained on real handwritten digits."""

from pathlib import Path


def path() -> Path:
    """Return the folder of the weights, which `diffusers.WanPipeline.from_pretrained` loads."""
    return Path(__file__).parent / "weights"
