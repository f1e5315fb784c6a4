"""Pictures and videos that came over the wire as tensors."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

from truestep.errors import MissingExtraError
from truestep.reading import reason

if TYPE_CHECKING:
    import torch

MOST_PIXELS = 2**26
"""Of one picture: 8192 by 8192."""

MOST_FRAMES = 4096


def picture(content: bytes) -> torch.Tensor:
    """A picture as `1 h w 3`, uint8; a transparent one without its transparency.

    Raises:
        ValueError: It is none, or too large.
        MissingExtraError: Pillow is not installed.
    """
    import numpy as np
    import torch

    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("pillow", "media", "reading pictures") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit on pixels is another
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as opened:
                if opened.width * opened.height > MOST_PIXELS:
                    raise ValueError(f"a picture of {opened.width} x {opened.height} is too large")
                array = np.array(opened.convert("RGB"))
    except ValueError:
        raise
    except Exception as error:  # a damaged picture makes decoders raise almost anything
        raise ValueError(f"it is no picture: {reason(error)}") from None
    return torch.from_numpy(array)[None]


def video(content: bytes) -> torch.Tensor:
    """A video as `f h w 3`, uint8.

    Raises:
        ValueError: It is none, or too large.
        MissingExtraError: PyAV is not installed.
    """
    import numpy as np
    import torch

    try:
        import av
    except ImportError:
        raise MissingExtraError("av", "media", "reading videos") from None
    frames: list[np.ndarray[Any, Any]] = []
    try:
        with av.open(io.BytesIO(content)) as container:
            stream = container.streams.video[0]
            if stream.width * stream.height > MOST_PIXELS:
                raise ValueError(f"a video of {stream.width} x {stream.height} is too large")
            for frame in container.decode(stream):
                if len(frames) == MOST_FRAMES:
                    raise ValueError(f"it has more than {MOST_FRAMES} frames")
                frames.append(frame.to_ndarray(format="rgb24"))
    except ValueError:
        raise
    except Exception as error:  # a damaged video makes decoders raise almost anything
        raise ValueError(f"it is no video: {reason(error)}") from None
    if not frames:
        raise ValueError("the video has no frames")
    return torch.from_numpy(np.stack(frames))
