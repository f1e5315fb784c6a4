"""The gates of the field as plain functions, faithful to what their tools do. Pure: no I/O.

Each pair of functions is a measurement and the gate that limits it. Nothing is mended here: what
a tool lets through (NaN, black frames, the wrong half of a video) passes here too, and the
docstring says so. `truestep.gates.selftest` shows what that costs.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch

from truestep.errors import MissingExtraError, UsageError
from truestep.judge.latent import FULL_THRESHOLD, SLICE_THRESHOLD, check_latent
from truestep.keys import key_of
from truestep.measure.frames import both_levels, psnr, psnr_of_levels, ssim

if TYPE_CHECKING:
    from types import ModuleType

MS_SSIM_SIDE = 160
"""Sides must be longer than this: an 11-pixel window after 4 halvings, (11 - 1) * 2^4."""


class Domain(str, Enum):
    """What a gate judges: latents and predictions, decoded frames, or either."""

    LATENT = "latent"
    FRAMES = "frames"
    ANY = "any"

    __str__ = str.__str__


def domain_of(name: str) -> Domain:
    """Domain of a recorded tensor, by its name."""
    return Domain.FRAMES if key_of(name).head == "video" else Domain.LATENT


Passes = Callable[[str, torch.Tensor, torch.Tensor], bool]


@dataclass(frozen=True)
class Gate:
    """A rule that lets a tensor pass or not.

    Attributes:
        name: As it is asked for: `truestep`, `cosine:0.005,0.01`, `ssim:0.93`.
        passes: (name of the tensor, actual, reference) to whether the gate passes it.
        domain: What it judges: `latent` is any floating-point tensor; `frames` is `b c f h w` in
            [-1, 1], c = 3.
        named: Name of the result on a tensor, where the gate had to adapt itself to its size.
    """

    name: str
    passes: Passes
    domain: Domain = Domain.LATENT
    named: Callable[[torch.Tensor], str] | None = None

    def judges(self, name: str) -> bool:
        """Whether the tensor of this name is of the gate's domain."""
        return self.domain in (Domain.ANY, domain_of(name))


def cosine_gate(slice_limit: float = SLICE_THRESHOLD, full_limit: float = FULL_THRESHOLD) -> Gate:
    """FastVideo's latent gate: two cosine distances, of a 3x3 corner and of the whole in float16.

    NaN passes, on either side (NaN > limit is false); so does any scale.

    Source:
        FastVideo, `latent_similarity_utils`; see `truestep.judge.latent`.
    """

    def passes(name: str, actual: torch.Tensor, reference: torch.Tensor) -> bool:
        result = check_latent(
            actual,
            reference,
            slice_cosine_threshold=slice_limit,
            full_cosine_threshold=full_limit,
        )
        return result.gates[0].passed is True

    return Gate(f"cosine:{slice_limit:g},{full_limit:g}", passes)


def allclose_gate(tolerance: float = 1e-4) -> Gate:
    """`torch.allclose` in float32 with one number for rtol and atol. NaN fails."""

    def passes(name: str, actual: torch.Tensor, reference: torch.Tensor) -> bool:
        return torch.allclose(actual.float(), reference.float(), rtol=tolerance, atol=tolerance)

    return Gate(f"allclose:{tolerance:g}", passes)


def corner(tensor: torch.Tensor) -> torch.Tensor:
    """The last 3x3 corner of the last channel and frame of the first sample: up to 9 numbers.

    Args:
        tensor: `b ... h w`, any dtype.

    Source:
        diffusers, utils/testing_utils.py, `print_tensor_test`: `tensor[0, -3:, -3:, -1]` of
        channels-last images; the tests of models cut `output[0, -1, -3:, -3:]`.
    """
    return tensor[0].reshape(-1, *tensor.shape[-2:])[-1, -3:, -3:].flatten()


def slice_gate(tolerance: float = 1e-4) -> Gate:
    """The habit of diffusers' tests: `allclose(slice, expected, atol)` of one 3x3 corner.

    rtol stays at its default, 1e-5. NaN fails, but only where it lies in the corner; nothing is
    seen elsewhere.
    """

    def passes(name: str, actual: torch.Tensor, reference: torch.Tensor) -> bool:
        return torch.allclose(corner(actual.float()), corner(reference.float()), atol=tolerance)

    return Gate(f"slice:{tolerance:g}", passes)


def cosine_one(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """One cosine distance of two flattened tensors, in plain float32 numpy.

    Rounding is part of it: equal vectors may read below 0. NaN gives NaN, and so do zeros.

    Source:
        diffusers, utils/testing_utils.py, `numpy_cosine_similarity_distance`.
    """
    import numpy as np

    a, r = (t.detach().cpu().float().numpy().ravel() for t in (actual, reference))
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(a) * np.linalg.norm(r)
        return float(np.float32(1.0) - np.dot(a, r) / norms)


def cosine_one_gate(limit: float = 1e-3) -> Gate:
    """diffusers' `assert distance < limit` on one cosine distance. NaN fails; any scale passes."""
    return Gate(f"cosine-one:{limit:g}", lambda name, a, r: cosine_one(a, r) < limit)


def ssim_gate(limit: float = 0.93) -> Gate:
    """Mean SSIM of the frames, `>= limit`. NaN never reaches it: it is black by then."""
    return Gate(f"ssim:{limit:g}", lambda name, a, r: ssim(a, r) >= limit, Domain.FRAMES)


def enlargement(frames: torch.Tensor) -> int:
    """Smallest whole factor that makes both sides longer than MS-SSIM needs."""
    return MS_SSIM_SIDE // min(frames.shape[-2:]) + 1


def ms_ssim(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Multi-scale SSIM of RGB at 8 bits, mean over frames and channels; 1 is equal.

    Convention: five scales with the published weights, each like `ssim`. Both sides must be longer
    than 160 pixels; smaller frames are first enlarged by `enlargement`, unfiltered. NaN is black.

    Raises:
        MissingExtraError: pytorch-msssim is not installed.
        UsageError: Not two videos of one shape.

    Source:
        Wang et al. 2003, computed by pytorch-msssim's `ms_ssim`, as FastVideo does (tests/utils.py,
        `compute_video_ssim_torchvision`). FastVideo reads an MP4, and compares the shorter length
        where two videos differ in it; both are left out here.
    """
    package = _msssim("MS-SSIM")
    factor = enlargement(reference)
    values = []
    for pair in zip(*both_levels(actual, reference), strict=True):
        a, r = (f.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[None] for f in pair)
        values.append(float(package.ms_ssim(a, r, data_range=255)))
    return math.fsum(values) / len(values)


def ms_ssim_gate(limit: float = 0.93) -> Gate:
    """FastVideo's gate on videos: mean MS-SSIM, `>= limit`. NaN is black by then.

    The name of a result on enlarged frames says so: `ms-ssim:0.93@6x`.
    """
    _msssim("gate ms-ssim")
    name = f"ms-ssim:{limit:g}"

    def named(frames: torch.Tensor) -> str:
        factor = enlargement(frames)
        return f"{name}@{factor}x" if factor > 1 else name

    return Gate(name, lambda _, a, r: ms_ssim(a, r) >= limit, Domain.FRAMES, named)


def psnr_gate(limit_db: float = 28.0) -> Gate:
    """PSNR of the whole video, `>= limit_db`. 28 dB is SGLang-Diffusion's limit for images."""
    return Gate(f"psnr:{limit_db:g}", lambda name, a, r: psnr(a, r) >= limit_db, Domain.FRAMES)


def mad(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean absolute difference of all 8-bit values of the video, in levels from 0 to 255.

    NaN is black.

    Source:
        SGLang-Diffusion, multimodal_gen/test/test_utils.py, `compute_mean_abs_diff`.
    """
    a, r = both_levels(actual, reference)
    return float((a - r).abs().double().mean())


def mad_gate(limit: float = 8.0) -> Gate:
    """Mean absolute difference, `<= limit` levels. 8 is SGLang-Diffusion's limit for images."""
    return Gate(f"mad:{limit:g}", lambda name, a, r: mad(a, r) <= limit, Domain.FRAMES)


@dataclass(frozen=True)
class KeyFrame:
    """SGLang-Diffusion's three measurements of one frame.

    Attributes:
        index: Of the frame.
        ssim: skimage's default convention (`ssim_uniform`), not that of `measure.frames`.
        psnr: dB. mad: levels.
    """

    index: int
    ssim: float
    psnr: float
    mad: float


def key_frames(actual: torch.Tensor, reference: torch.Tensor) -> list[KeyFrame]:
    """Measure the first, the middle (n // 2) and the last frame as SGLang-Diffusion does.

    Left out: its CLIP score, and the lossy MP4 that it decodes its frames from.

    Source:
        SGLang-Diffusion, multimodal_gen/test/test_utils.py, `extract_key_frames_from_video` and
        `compare_with_gt`.
    """
    total = reference.shape[2]
    found = []
    for index in (0, total // 2, total - 1):
        a, r = both_levels(actual[:, :, [index]], reference[:, :, [index]], side=7)
        difference = float((a - r).abs().double().mean())
        found.append(KeyFrame(index, ssim_uniform(a, r), psnr_of_levels(a, r), difference))
    return found


def sglang_gate(
    ssim_limit: float = 0.92, psnr_limit_db: float = 24.0, mad_limit: float = 10.0
) -> Gate:
    """SGLang-Diffusion's default limits for videos: all three must hold on all three key frames.

    NaN is black by then. Frames between the key frames are not seen.

    Source:
        SGLang-Diffusion, multimodal_gen/test/test_utils.py, `DEFAULT_*_THRESHOLD_VIDEO`.
    """

    def passes(name: str, actual: torch.Tensor, reference: torch.Tensor) -> bool:
        return all(
            f.ssim >= ssim_limit and f.psnr >= psnr_limit_db and f.mad <= mad_limit
            for f in key_frames(actual, reference)
        )

    name = f"sglang:{ssim_limit:g},{psnr_limit_db:g},{mad_limit:g}"
    return Gate(name, passes, Domain.FRAMES)


def ssim_uniform(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """SSIM as skimage's `structural_similarity` has it by default: 7x7 uniform, sample covariance.

    Args:
        actual, reference: `n c h w`, 0 to 255.

    Source:
        Wang et al. 2004, equation 13; scikit-image 0.26, metrics/_structural_similarity.py.
    """
    a, r = actual.double(), reference.double()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def local(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(values, 7, stride=1)

    mean_a, mean_r = local(a), local(r)
    sample = 49 / 48  # of 49 values, unbiased
    variances = sample * (local(a * a) - mean_a**2 + local(r * r) - mean_r**2)
    covariance = sample * (local(a * r) - mean_a * mean_r)
    luminance = (2 * mean_a * mean_r + c1) / (mean_a**2 + mean_r**2 + c1)
    return float((luminance * (2 * covariance + c2) / (variances + c2)).mean())


def _msssim(purpose: str) -> ModuleType:
    try:
        import pytorch_msssim
    except ImportError:
        raise MissingExtraError("pytorch-msssim", "media", purpose) from None
    module: ModuleType = pytorch_msssim
    return module


@dataclass(frozen=True)
class _Kind:
    """How a gate is asked for.

    Attributes:
        build: Takes all the limits, or none for the tool's own.
        numbers: Names of the limits.
        most: Each limit lies strictly between 0 and this.
        source: Whose gate it is, and what its limits mean.
    """

    build: Callable[..., Gate]
    numbers: str
    most: tuple[float, ...]
    source: str

    @property
    def usage(self) -> str:
        spans = [f"below {m:g}" if math.isfinite(m) else "finite" for m in self.most]
        if len(set(spans)) > 1:
            return f"{self.numbers}, above 0 and in turn {', '.join(spans)}"
        return f"{self.numbers}, {'each ' if len(spans) > 1 else ''}above 0 and {spans[0]}"


KINDS: Mapping[str, _Kind] = {
    "cosine": _Kind(cosine_gate, "SLICE,FULL", (1, 1), "FastVideo's two distances"),
    "allclose": _Kind(allclose_gate, "TOLERANCE", (math.inf,), "torch.allclose"),
    "slice": _Kind(slice_gate, "TOLERANCE", (math.inf,), "diffusers' 3x3 corner"),
    "cosine-one": _Kind(cosine_one_gate, "LIMIT", (1,), "diffusers' one distance"),
    "ssim": _Kind(ssim_gate, "LIMIT", (1,), "SSIM of decoded frames"),
    "ms-ssim": _Kind(ms_ssim_gate, "LIMIT", (1,), "FastVideo's MS-SSIM of frames"),
    "psnr": _Kind(psnr_gate, "DB", (math.inf,), "dB over decoded frames"),
    "mad": _Kind(mad_gate, "LEVELS", (255,), "mean absolute difference of 8-bit frames"),
    "sglang": _Kind(sglang_gate, "SSIM,PSNR,MAD", (1, math.inf, 255), "three key frames"),
}
"""Gates by the name they are asked for with."""


def parse_gate(text: str) -> Gate:
    """A gate by its name and limits: `ssim:0.93`, `cosine:5e-3,1e-2`, or `sglang` for the usual.

    Raises:
        UsageError: The gate is unknown, or its numbers cannot judge anything.
        MissingExtraError: The gate needs a package that is not installed.
    """
    key, colon, numbers = text.partition(":")
    kind = KINDS.get(key)
    if kind is None:
        near = difflib.get_close_matches(key, KINDS, n=1)
        raise UsageError(
            f"unknown gate {text!r}",
            measured="known: "
            + ", ".join(f"{n}:{k.numbers} ({k.source})" for n, k in KINDS.items()),
            likely=f"did you mean {near[0]!r}?" if near else "",
            hint="e.g. --gate cosine:5e-3,1e-2 --gate ssim:0.93",
        )
    values = _floats(numbers) if colon else []
    fits = len(values) == len(kind.most) and all(
        0 < value < most for value, most in zip(values, kind.most, strict=True)
    )
    if colon and not fits:
        raise UsageError(
            f"gate {text!r} cannot judge anything",
            measured=f"{key} takes {kind.usage}; got {numbers or 'nothing'}",
            hint=f"e.g. --gate {kind.build().name}",
        )
    return kind.build(*values)


def _floats(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return []
