"""Schedulers at their own defaults, but for what pipelines insist on."""

from __future__ import annotations

from typing import Any

ANY = "DDIMScheduler"
"""The scheduler of pipelines that take any of the usual ones."""

_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {
        **_DIFFUSION,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
    "PNDMScheduler": {**_DIFFUSION, "skip_prk_steps": True, "steps_offset": 1},
    "EulerDiscreteScheduler": {**_DIFFUSION, "timestep_spacing": "leading", "steps_offset": 1},
    "DDIMParallelScheduler": {
        **_DIFFUSION,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
    "LMSDiscreteScheduler": _DIFFUSION,
    "LCMScheduler": {**_DIFFUSION, "clip_sample": False, "set_alpha_to_one": False},
    "DPMSolverMultistepScheduler": {},
    "DDIMInverseScheduler": {**_DIFFUSION, "clip_sample": False, "steps_offset": 1},
    "UnCLIPScheduler": {"prediction_type": "sample", "clip_sample_range": 10.0},
    "HeunDiscreteScheduler": {
        "beta_schedule": "exp",
        "num_train_timesteps": 1024,
        "prediction_type": "sample",
        "use_karras_sigmas": True,
        "clip_sample": True,
    },
    "CMStochasticIterativeScheduler": {
        "num_train_timesteps": 40,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
    },
}
