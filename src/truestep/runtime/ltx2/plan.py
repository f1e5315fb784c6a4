"""What the controls ask for: the schedule, the passes, and what they perturb."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from truestep.controls import Controls
from truestep.runtime.pipeline import Branch

ORDER: tuple[Branch, ...] = ("cond", "uncond", "perturbed", "modality")
"""Guidance passes, in the order of the official repository."""

SIGMAS: Mapping[str, tuple[float, ...]] = {
    "distilled": (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875),
    "distilled_stage_2": (0.909375, 0.725, 0.421875),
}
"""Fixed schedules of the distilled models, without the 0 at their end.

Source:
    ltx-pipelines utils/constants.py; diffusers pipelines/ltx2/utils.py.
"""

LAST = 0.0011
"""Sigma before 0 of the sampler `res2s`; from there the estimate is taken.

Source:
    ltx_pipelines/utils/samplers.py, `res2s_audio_video_denoising_loop`.
"""


def configured_scheduler(scheduler: Any, controls: Controls) -> Any:
    """The folder's scheduler with the controls' shift and end; itself where it has them."""
    wanted: dict[str, Any] = {}
    if controls.sigma_schedule != "shifted":
        wanted = {"use_dynamic_shifting": False, "shift": 1.0, "shift_terminal": None}
    elif controls.mu != "tokens":
        wanted = {
            "use_dynamic_shifting": True,
            "time_shift_type": "exponential",
            "shift_terminal": controls.terminal_sigma,
        }
    elif scheduler.config.shift_terminal is not None:
        wanted = {"shift_terminal": controls.terminal_sigma}
    if all(scheduler.config.get(key) == value for key, value in wanted.items()):
        return scheduler
    return type(scheduler).from_config(scheduler.config, **wanted)


def one_list(controls: Controls) -> bool:
    """Whether both modalities are perturbed in the video's blocks."""
    return controls.pass_gating == "shared_blocks"


def wanted_passes(scale: float, controls: Controls) -> tuple[Branch, ...]:
    """Passes of a step, by the scales.

    Args:
        scale: Classifier-free guidance of the video.
        controls: All other scales and `pass_gating`.

    Returns:
        `cond` and those of `uncond`, `perturbed`, `modality` that some scale asks for.

    Source:
        `per_modality`: ltx-pipelines utils/denoisers.py; `shared_blocks`: diffusers 0.42.1,
        pipeline_ltx2.py, whose conditions are `>`; `shared`: sglang 0.5.23, uncond always.
    """
    c = controls
    text = (scale, c.audio_guidance_scale)
    perturbed = (c.stg_scale, c.audio_stg_scale)
    modality = (c.modality_scale, c.audio_modality_scale)
    if c.pass_gating == "shared_blocks":
        asked = (max(text) > 1, max(perturbed) > 0, max(modality) > 1)
    else:
        asked = (
            any(not math.isclose(value, 1.0) for value in text),
            any(not math.isclose(value, 0.0, abs_tol=1e-9) for value in perturbed),
            any(not math.isclose(value, 1.0) for value in modality),
        )
    if c.pass_gating == "shared":
        asked = (True, *asked[1:])
    return ("cond", *(name for name, on in zip(ORDER[1:], asked, strict=True) if on))


def perturbed_blocks(controls: Controls) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Blocks whose self-attention passes values through in the perturbed pass: video's, audio's."""
    c = controls
    own = c.pass_gating == "per_modality"
    video_on, audio_on = c.stg_scale, c.audio_stg_scale
    if not own:
        video_on = audio_on = video_on or audio_on
    video = c.stg_blocks if video_on else ()
    audio = (video if one_list(c) else c.audio_stg_blocks) if audio_on else ()
    return video, audio
