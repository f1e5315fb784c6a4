"""ColorVideoVDP of two videos, by the package `cvvdp`, which ships its tables. Pure: no I/O."""

from __future__ import annotations

import torch

from truestep.errors import MissingExtraError, UsageError

DISPLAY = "standard_fhd"
"""The package's own name of a 24 inch screen of 1920 x 1080, 200 cd/m2, seen from 0.6 m."""


def require_perceptual() -> None:
    """Raise where the metric cannot be computed here, before anything else is.

    Raises:
        MissingExtraError: The package is not installed.
        UsageError: It is, and cannot be loaded: torchvision is of another torch build, say.
    """
    try:
        import pycvvdp  # noqa: F401
    except ImportError as error:
        if error.name not in (None, "pycvvdp"):
            _refuse(error)
        raise MissingExtraError("cvvdp", "perceptual", "ColorVideoVDP") from None
    except Exception as error:
        _refuse(error)


def _refuse(error: Exception) -> None:
    raise UsageError(
        "ColorVideoVDP is installed and cannot be loaded",
        measured=f"{type(error).__name__}: {str(error)[:160]}",
        likely="torchvision is built for another torch" if "torchvision" in str(error) else "",
    ) from None


def perceptual_jod(actual: torch.Tensor, reference: torch.Tensor, *, fps: float | None) -> float:
    """Quality in just-objectionable differences: 10 is no difference, 9 is seen by three of four.

    Args:
        actual, reference: `f h w c` uint8, sRGB, of one shape.
        fps: Frames a second; a single frame needs none, more are taken at 24 where it is None.

    Raises:
        MissingExtraError: The package is not installed.
        UsageError: It cannot be loaded.

    Source:
        Mantiuk et al. 2024, "ColorVideoVDP", ACM Transactions on Graphics 43(4); package cvvdp,
        its own parameters and display.
    """
    require_perceptual()
    import pycvvdp

    metric = pycvvdp.cvvdp(display_name=DISPLAY, device=torch.device("cpu"), quiet=True)
    rate = 0.0 if len(actual) == 1 else float(fps or 24)
    quality, _ = metric.predict(
        actual.numpy(), reference.numpy(), dim_order="FHWC", frames_per_second=rate
    )
    return float(quality)
