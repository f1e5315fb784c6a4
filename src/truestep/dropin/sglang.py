"""SGLang-Diffusion's consistency check: its threshold files, its metrics, and our verdict.

`from truestep.dropin.sglang import compare_with_gt, get_consistency_thresholds` takes the place of
the same import from `sglang.multimodal_gen.test.test_utils`; names that are not here (ground truth,
CLIP, key frames of a video file) are handed on from there. Truestep's verdict on the frames or the
sound stands beside: it is printed, and the `comparison` of the result. It decides nothing.

Source:
    sglang 0.5.23, multimodal_gen/test/test_utils.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truestep.dropin.elsewhere import handed_on
from truestep.gates.thresholds.file import AUDIO_METRICS, IMAGE_METRICS, Metric, read
from truestep.text import say, visible

if TYPE_CHECKING:
    import numpy as np
    import torch

    from truestep.verdict import Comparison

ORIGINAL = "sglang.multimodal_gen.test.test_utils"

CONSISTENCY_PLATFORM_ENV = "SGLANG_DIFFUSION_CONSISTENCY_PLATFORM"
AUDIO_CONSISTENCY_SAMPLE_RATE = 16_000

_FOLDER = Path("multimodal_gen", "test", "server", "consistency_thresholds")
_BASE = "h100"
"""The platform whose file lies under that of every other."""

_PLATFORMS = {
    "h100": ("h100", "sm90", "hopper"),
    "b200": ("b200", "sm100", "blackwell"),
    "5090": ("5090", "sm120", "rtx5090"),
    "intel_xpu_b60": ("intelxpub60",),
}
"""A platform's file without `.json`, and what it is called, without dashes and underscores."""


@dataclass
class ConsistencyThresholds:
    """Limits of the pictures of a case; similarity, SSIM and PSNR at least, difference at most."""

    clip_threshold: float
    ssim_threshold: float
    psnr_threshold: float
    mean_abs_diff_threshold: float


@dataclass(frozen=True)
class AudioConsistencyThresholds:
    """Limits of the sound of a case; dB and seconds at most."""

    spectral_similarity_threshold: float
    waveform_correlation_threshold: float
    rms_db_diff_threshold: float
    duration_diff_threshold: float


@dataclass(frozen=True)
class AudioConsistencyResult:
    """What became of a sound; `comparison` is truestep's."""

    passed: bool
    spectral_similarity: float
    waveform_correlation: float
    rms_db_diff: float
    duration_diff: float
    thresholds: AudioConsistencyThresholds
    comparison: Comparison | None = None


@dataclass
class FrameConsistencyMetrics:
    """One frame's four numbers, and which of them hold."""

    frame_index: int
    clip_similarity: float
    ssim: float
    psnr: float
    mean_abs_diff: float
    clip_passed: bool
    ssim_passed: bool
    psnr_passed: bool
    mean_abs_diff_passed: bool

    @property
    def passed(self) -> bool:
        """Whether all four hold."""
        held = (self.clip_passed, self.ssim_passed, self.psnr_passed, self.mean_abs_diff_passed)
        return all(held)


@dataclass
class ConsistencyResult:
    """What became of a case's frames; `comparison` is truestep's."""

    case_id: str
    passed: bool
    similarity_scores: list[float]
    min_similarity: float
    threshold: float
    min_ssim: float
    min_psnr: float
    max_mean_abs_diff: float
    thresholds: ConsistencyThresholds
    frame_metrics: list[FrameConsistencyMetrics]
    comparison: Comparison | None = None


@dataclass
class LoadedConsistencyGT:
    """Pictures to compare with, `h w c` of 0 to 255, and their CLIP embeddings."""

    images: list[np.ndarray[Any, Any]]
    embeddings: list[np.ndarray[Any, Any]]


def __getattr__(name: str) -> object:
    return handed_on(ORIGINAL, name)


def get_consistency_platform() -> str:
    """The platform whose threshold file judges: by the variable, else by the accelerator.

    Raises:
        ValueError: The variable names none.
    """
    named = os.environ.get(CONSISTENCY_PLATFORM_ENV)
    return _platform(named) if named else _platform_here()


def get_consistency_threshold_path(platform: str | None = None) -> Path:
    """A platform's threshold file, in the installed sglang.

    Raises:
        ValueError: There is no such platform.
        ImportError: sglang is not installed.
    """
    name = get_consistency_platform() if platform is None else _platform(platform)
    return _folder() / f"{name}.json"


def get_consistency_thresholds(
    case_id: str, is_video: bool, metadata: dict[str, Any] | None = None
) -> ConsistencyThresholds:
    """A case's own limits, else its file's, else SGLang's.

    Args:
        metadata: Content of a threshold file; default the installed one of the platform.

    Raises:
        ValueError: A limit is no number.
        FileFormatError: The installed file is damaged.
        ImportError: sglang is not installed, and no metadata was given.
    """
    return ConsistencyThresholds(*_limits(IMAGE_METRICS, case_id, metadata, video=is_video))


def get_audio_consistency_thresholds(
    case_id: str, metadata: dict[str, Any] | None = None
) -> AudioConsistencyThresholds:
    """The same for a case's sound."""
    return AudioConsistencyThresholds(*_limits(AUDIO_METRICS, case_id, metadata, video=True))


def compute_ssim(image: np.ndarray[Any, Any], gt_image: np.ndarray[Any, Any]) -> float:
    """SSIM of two pictures `h w c` as scikit-image has it by default.

    Raises:
        ValueError: They differ in shape, are smaller than 7 pixels, or are no RGB pictures.
    """
    from truestep.gates.kinds import ssim_uniform

    ours, theirs = _pair(image, gt_image)
    if min(ours.shape[:2]) < 7:
        raise ValueError(f"SSIM needs sides of 7 pixels or more, these are {ours.shape[:2]}")
    return ssim_uniform(*(_levels(side) for side in (ours, theirs)))


def compute_psnr(image: np.ndarray[Any, Any], gt_image: np.ndarray[Any, Any]) -> float:
    """PSNR of two pictures in dB; infinite where they are equal.

    Raises:
        ValueError: They differ in shape, or are no RGB pictures.
    """
    from truestep.measure.frames import psnr_of_levels

    return psnr_of_levels(*(_levels(side) for side in _pair(image, gt_image)))


def compute_mean_abs_diff(image: np.ndarray[Any, Any], gt_image: np.ndarray[Any, Any]) -> float:
    """Mean absolute difference of two pictures in levels from 0 to 255.

    Raises:
        ValueError: They differ in shape, or are no RGB pictures.
    """
    import numpy as np

    ours, theirs = (side.astype(np.float32) for side in _pair(image, gt_image))
    return float(np.abs(ours - theirs).mean())


def compute_clip_similarity(emb1: np.ndarray[Any, Any], emb2: np.ndarray[Any, Any]) -> float:
    """Cosine similarity of two embeddings of length 1."""
    return float(emb1 @ emb2)


def compare_with_gt(
    output_frames: list[np.ndarray[Any, Any]],
    gt_data: Any,
    thresholds: Any,
    case_id: str,
) -> ConsistencyResult:
    """Judge a picture, or the key frames of a video, by SGLang's four metrics, and print it.

    Args:
        output_frames: Pictures `h w c` of 0 to 255.
        gt_data: `images` and their CLIP `embeddings`; SGLang's own, or one of ours.
        thresholds: Likewise.

    Raises:
        ValueError: The two sides differ in number or shape, or are no RGB pictures.
        ImportError: sglang, which embeds the pictures, is not installed.
    """
    if len(output_frames) != len(gt_data.embeddings):
        raise ValueError(
            f"{len(output_frames)} frames cannot be compared with {len(gt_data.embeddings)}"
        )
    known = zip(output_frames, gt_data.images, gt_data.embeddings, strict=True)
    frames, pairs = [], []
    for index, (output, image, embedding) in enumerate(known):
        pairs.append(_pair(output, image, f"{case_id}, frame {index}: "))
        frames.append(_frame(index, *pairs[-1], embedding, thresholds))
    scores = [frame.clip_similarity for frame in frames]
    result = ConsistencyResult(
        case_id=case_id,
        passed=all(frame.passed for frame in frames),
        similarity_scores=scores,
        min_similarity=min(scores),
        threshold=thresholds.clip_threshold,
        min_ssim=min(frame.ssim for frame in frames),
        min_psnr=min(frame.psnr for frame in frames),
        max_mean_abs_diff=max(frame.mean_abs_diff for frame in frames),
        thresholds=thresholds,
        frame_metrics=frames,
        comparison=_of_pictures(pairs),
    )
    _print(result)
    return result


def compare_audio_with_gt(
    output_audio: np.ndarray[Any, Any],
    gt_audio: np.ndarray[Any, Any],
    thresholds: Any,
    sample_rate: int = AUDIO_CONSISTENCY_SAMPLE_RATE,
) -> AudioConsistencyResult:
    """Judge a sound by SGLang's four metrics.

    Args:
        output_audio, gt_audio: Samples of one channel in [-1, 1].
        thresholds: SGLang's own, or ours.
        sample_rate: Hz, of both.

    Raises:
        ValueError: A side is empty or not finite.
    """
    import numpy as np
    import torch

    from truestep.judge.compare import compare
    from truestep.measure.sound import sglang_sound

    sides = [np.asarray(side, dtype=np.float32).reshape(-1) for side in (output_audio, gt_audio)]
    if not all(side.size and np.isfinite(side).all() for side in sides):
        raise ValueError("a sound is empty or not finite, and cannot be compared")
    waves = [torch.from_numpy(side.copy())[None, None] for side in sides]
    # Nothing is resampled: the rate counts for the duration alone, as in the source.
    found = sglang_sound(*waves, sample_rate=AUDIO_CONSISTENCY_SAMPLE_RATE)
    duration = abs(sides[0].size - sides[1].size) / float(sample_rate)
    return AudioConsistencyResult(
        passed=found.spectral_similarity >= thresholds.spectral_similarity_threshold
        and found.waveform_correlation >= thresholds.waveform_correlation_threshold
        and found.rms_db_diff <= thresholds.rms_db_diff_threshold
        and duration <= thresholds.duration_diff_threshold,
        spectral_similarity=found.spectral_similarity,
        waveform_correlation=found.waveform_correlation,
        rms_db_diff=found.rms_db_diff,
        duration_diff=duration,
        thresholds=thresholds,
        comparison=compare(*({"audio/waveform": wave} for wave in waves)),
    )


def _platform(name: str) -> str:
    plain = name.strip().lower().replace("_", "").replace("-", "")
    found = next((key for key, names in _PLATFORMS.items() if plain in names), None)
    if found is None:
        raise ValueError(f"no platform is called {name!r}; known: {', '.join(sorted(_PLATFORMS))}")
    return found


def _platform_here() -> str:
    import torch

    if torch.version.cuda and torch.cuda.is_available():
        generation, _ = torch.cuda.get_device_capability()
        return {10: "b200", 12: "5090"}.get(generation, _BASE)
    return "intel_xpu_b60" if torch.xpu.is_available() else _BASE


def _folder() -> Path:
    """Where the installed sglang has its threshold files; it is not imported."""
    from importlib.util import find_spec

    found = find_spec("sglang")
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            "sglang is not installed, whose threshold files are needed", name="sglang"
        )
    return Path(next(iter(found.submodule_search_locations))) / _FOLDER


def _limits(
    metrics: Sequence[Metric], case_id: str, metadata: Mapping[str, Any] | None, *, video: bool
) -> list[float]:
    known = _installed() if metadata is None else metadata
    case = known.get("cases", {}).get(case_id, {})
    values = []
    for metric in metrics:
        usual = metric.video if video else metric.image
        default = known.get(metric.default_key(video=video), usual)
        values.append(float(case.get(metric.key, default)))
    return values


def _installed() -> Mapping[str, Any]:
    """The threshold file of the platform laid over that of all; what is not there is empty."""
    paths = [get_consistency_threshold_path(name) for name in (_BASE, get_consistency_platform())]
    files = [read(path) for path in dict.fromkeys(paths) if path.exists()]
    if not files:
        return {}
    return files[0].data if len(files) == 1 else files[0].overlaid(files[1]).data


def _picture(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An RGB picture `h w c` of whole numbers from 0 to 255; others are cut off and down."""
    import numpy as np

    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"a picture is h w 3, and this has shape {image.shape}")
    return image if image.dtype == np.uint8 else np.clip(image, 0, 255).astype(np.uint8)


def _pair(
    image: np.ndarray[Any, Any], gt_image: np.ndarray[Any, Any], where: str = ""
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    ours, theirs = _picture(image), _picture(gt_image)
    if ours.shape != theirs.shape:
        raise ValueError(f"{where}a picture of {ours.shape} against one of {theirs.shape}")
    return ours, theirs


def _levels(image: np.ndarray[Any, Any]) -> torch.Tensor:
    """A picture as `1 c h w`."""
    import torch

    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()


def _frame(
    index: int,
    output: np.ndarray[Any, Any],
    image: np.ndarray[Any, Any],
    embedding: np.ndarray[Any, Any],
    thresholds: Any,
) -> FrameConsistencyMetrics:
    embed: Any = handed_on(ORIGINAL, "compute_clip_embedding")
    clip = compute_clip_similarity(embed(output), embedding)
    ssim, psnr = compute_ssim(output, image), compute_psnr(output, image)
    difference = compute_mean_abs_diff(output, image)
    return FrameConsistencyMetrics(
        frame_index=index,
        clip_similarity=clip,
        ssim=ssim,
        psnr=psnr,
        mean_abs_diff=difference,
        clip_passed=clip >= thresholds.clip_threshold,
        ssim_passed=ssim >= thresholds.ssim_threshold,
        psnr_passed=psnr >= thresholds.psnr_threshold,
        mean_abs_diff_passed=difference <= thresholds.mean_abs_diff_threshold,
    )


def _of_pictures(
    pairs: Sequence[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]],
) -> Comparison:
    from truestep.judge.pictures import compare_pictures

    sides = zip(*pairs, strict=True)
    return compare_pictures(*([_levels(image)[0] for image in side] for side in sides))


def _print(result: ConsistencyResult) -> None:
    limits = result.thresholds
    say(f"[Consistency Check] {result.case_id}: {'PASSED' if result.passed else 'FAILED'}")
    say(
        f"  limits   clip>={limits.clip_threshold}, ssim>={limits.ssim_threshold}, "
        f"psnr>={limits.psnr_threshold}, mean_abs_diff<={limits.mean_abs_diff_threshold}"
    )
    for frame in result.frame_metrics:
        say(
            f"  frame {frame.frame_index}  clip={frame.clip_similarity:.4f} "
            f"ssim={frame.ssim:.4f} psnr={frame.psnr:.4f} "
            f"mean_abs_diff={frame.mean_abs_diff:.4f} {'PASS' if frame.passed else 'FAIL'}"
        )
    if result.comparison is not None:
        say(f"  truestep {visible(result.comparison.sentence)}")
