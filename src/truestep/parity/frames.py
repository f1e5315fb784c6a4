"""What a viewer would see of a difference: frames of both sides, their PSNR and SSIM.

The verdict stays with the measured noise floor; these say how far apart the videos look.
"""

from __future__ import annotations

import torch

from truestep.judge.media import frame_media
from truestep.measure.frames import WINDOW, psnr, ssim
from truestep.parity.evidence import Frames
from truestep.parity.sides import Tensors
from truestep.verdict import Comparison


def with_frames(
    comparison: Comparison, actual: Tensors, reference: Tensors
) -> tuple[Comparison, Frames | None]:
    """Add the frames of the worst sample to a comparison, where an output is a video.

    Args:
        comparison: Of the outputs.
        actual, reference: Outputs by name. A video is `b 3 f h w`, floating-point, in [-1, 1].

    Returns:
        The comparison with its media, and the worst numbers of all samples; unchanged and None
        where no output is a video on both sides.
    """
    worst: tuple[Frames, str] | None = None
    for name, theirs in reference.items():
        ours = actual.get(name)
        if not _video(theirs) or ours is None or ours.shape != theirs.shape:
            continue
        found = frames_of(ours, theirs)
        if worst is None or not found.psnr_db >= worst[0].psnr_db:
            worst = found, name
    if worst is None:
        return comparison, None
    found, name = worst
    media = frame_media(actual[name], reference[name], name=name)
    return comparison.model_copy(update={"media": (*comparison.media, media)}), found


def frames_of(actual: torch.Tensor, reference: torch.Tensor) -> Frames:
    """PSNR, SSIM and largest difference of two videos `b 3 f h w` in [-1, 1].

    SSIM is left out where a side has fewer than 11 pixels.
    """
    return Frames(
        ssim=ssim(actual, reference) if min(reference.shape[-2:]) >= WINDOW else None,
        psnr_db=psnr(actual, reference),
        largest=float((actual.double() - reference.double()).abs().max()),
        count=reference.shape[2],
    )


def _video(tensor: torch.Tensor) -> bool:
    shape = tensor.shape
    return len(shape) == 5 and shape[1] == 3 and tensor.numel() > 0 and tensor.is_floating_point()
