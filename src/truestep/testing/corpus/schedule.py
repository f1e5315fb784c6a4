"""Faults of time and guidance: schedules, shifts, timesteps, passes and how they are mixed."""

from __future__ import annotations

from typing import Any

from truestep.testing.corpus.editing import edit, source_of, with_function
from truestep.testing.corpus.entry import fault

_TIMES = "scheduler.set_timesteps *"
_MIXED = "scheduler.step in model_output"


@fault("flux", "kontext", "control", "qwen", "z-image", "lumina2", "ltx-i2v", "sd3", at=_TIMES)
def shift_of_one_resolution(pipe: Any) -> None:
    """The shift of time is that of another resolution."""
    with_function(pipe, "__call__", "calculate_shift", lambda *arguments: 1.15)


@fault("klein-kv", at=_TIMES)
def shift_of_other_steps(pipe: Any) -> None:
    """The shift of time is computed for another number of steps."""
    edit(pipe, "__call__", ("num_steps=num_inference_steps", "num_steps=50"))


@fault("flux", "qwen", "kontext", "lumina2", "ltx-i2v", at=_TIMES)
def sigmas_to_zero(pipe: Any) -> None:
    """The noise levels end at zero, one step too early."""
    old = "np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)"
    edit(pipe, "__call__", (old, "np.linspace(1.0, 0.0, num_inference_steps + 1)[1:]"))


@fault("flux", "qwen", at=_TIMES)
def shift_linear(pipe: Any) -> None:
    """The shift of time is linear, not exponential."""
    pipe.scheduler.register_to_config(time_shift_type="linear")


@fault("wan-i2v", "vace", "hunyuan", "mochi", at=_TIMES)
def shift_constant(pipe: Any) -> None:
    """The constant shift of time is another one."""
    pipe.scheduler.set_shift(pipe.scheduler.config.shift * 1.2)


@fault("mochi", at=_TIMES)
def threshold_of_noise(pipe: Any) -> None:
    """The schedule's linear part ends at another noise level."""
    edit(pipe, "__call__", ("threshold_noise = 0.025", "threshold_noise = 0.05"))


@fault("flux", "qwen", "kontext", "klein-kv", at="denoiser.forward in timestep")
def timestep_not_divided(pipe: Any) -> None:
    """The denoiser is given the timestep from 0 to 1000, not from 0 to 1."""
    edit(pipe, "__call__", ("timestep=timestep / 1000", "timestep=timestep"))


@fault("lumina2", at="denoiser.forward in timestep")
def time_not_reversed(pipe: Any) -> None:
    """The denoiser is given the time from noise, where it takes that from the picture."""
    old = "1 - t / self.scheduler.config.num_train_timesteps"
    edit(pipe, "__call__", (old, "t / self.scheduler.config.num_train_timesteps"))


@fault("z-image", at="denoiser.forward in t")
def time_from_noise(pipe: Any) -> None:
    """The denoiser is given the time from noise, where it takes that from the picture."""
    edit(pipe, "__call__", ("timestep = (1000 - timestep) / 1000", "timestep = timestep / 1000"))


@fault("sdxl", "svd", at=("scheduler.scale_model_input*", "denoiser.forward in sample"))
def input_not_scaled(pipe: Any) -> None:
    """The denoiser's input is not scaled by the noise level."""
    old = "self.scheduler.scale_model_input(latent_model_input, t)"
    edit(pipe, "__call__", (old, "latent_model_input"))


@fault("sdxl", at=("random.*", "scheduler.step *"))
def ancestral_without_generator(pipe: Any) -> None:
    """The scheduler draws its noise from the process's random numbers."""
    edit(pipe, "__call__", ("**extra_step_kwargs, ", ""))


@fault("inpaint", "controlnet", "img2img", "pixart", "audioldm2", at="scheduler.step out*")
def prediction_type(pipe: Any) -> None:
    """The prediction is taken as velocity, not as noise."""
    pipe.scheduler.register_to_config(prediction_type="v_prediction")


@fault("inpaint", "controlnet", "pixart", "audioldm2", "sdxl", "cogvideox-i2v", at=_TIMES)
def spacing(pipe: Any) -> None:
    """The timesteps are spaced otherwise."""
    other = "trailing" if pipe.scheduler.config.timestep_spacing == "leading" else "leading"
    pipe.scheduler.register_to_config(timestep_spacing=other)


@fault("inpaint", "controlnet", "pixart", "audioldm2", "cogvideox-i2v", "sana", at=_TIMES)
def betas_linear(pipe: Any) -> None:
    """The noise schedule was trained otherwise."""
    held = pipe.scheduler.config
    other = "linear" if held.get("beta_schedule") != "linear" else "scaled_linear"
    flow = {"use_flow_sigmas": False, "prediction_type": "epsilon"}
    more = flow if held.get("use_flow_sigmas") else {}
    pipe.scheduler = type(pipe.scheduler).from_config(held, beta_schedule=other, **more)


@fault("img2img", at="scheduler.add_noise in timesteps")
def strength_one_step_off(pipe: Any) -> None:
    """The picture is noised for the step after the one that it should be."""
    old = "max(num_inference_steps - init_timestep, 0)"
    edit(pipe, "get_timesteps", (old, "max(num_inference_steps - init_timestep + 1, 0)"))


@fault(
    "sdxl", "sd3", "inpaint", "controlnet", "img2img", "pixart", "sana", "mochi", "svd",
    "cogvideox-i2v", "ltx-i2v", "audioldm2", "stable-audio",
    at=_MIXED,
)  # fmt: skip
def guidance_scale(pipe: Any) -> None:
    """The guidance scale is one in a hundred off."""
    for old in (
        "noise_pred_uncond + self.guidance_scale *",
        "noise_pred_uncond + guidance_scale *",
    ):
        if old in source_of(pipe, "__call__"):
            edit(pipe, "__call__", (old, old + " 1.01 *"))
            return
    edit(pipe, "__call__", ("+ guidance_scale * (", "+ 1.01 * guidance_scale * ("))


@fault("qwen", "qwen-edit", "hunyuan", at=_MIXED)
def guidance_scale_of_true_passes(pipe: Any) -> None:
    """The scale between two true passes is one in a hundred off."""
    edit(pipe, "__call__", ("+ true_cfg_scale *", "+ 1.01 * true_cfg_scale *"))


@fault("wan-i2v", "vace", at=_MIXED)
def guidance_scale_of_video(pipe: Any) -> None:
    """The guidance scale is one in a hundred off."""
    edit(pipe, "__call__", ("+ current_guidance_scale *", "+ 1.01 * current_guidance_scale *"))


@fault("sdxl", "sd3", "pixart", "sana", "mochi", "cogvideox-i2v", at=_MIXED)
def guidance_from_text(pipe: Any) -> None:
    """The difference is added to the guided pass, not to the unguided one."""
    edit(pipe, "__call__", ("noise_pred = noise_pred_uncond +", "noise_pred = noise_pred_text +"))


@fault("sdxl", "inpaint", "controlnet", "ltx-i2v", "audioldm2", at=_MIXED)
def passes_read_in_reverse(pipe: Any) -> None:
    """The halves of the batch are taken for each other."""
    old = "noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)"
    edit(pipe, "__call__", (old, "noise_pred_text, noise_pred_uncond = noise_pred.chunk(2)"))


@fault("qwen", "qwen-edit", at=_MIXED)
def norm_not_kept(pipe: Any) -> None:
    """The guided prediction does not keep the norm of the conditional one."""
    edit(
        pipe,
        "__call__",
        ("noise_pred = comb_pred * (cond_norm / noise_norm)", "noise_pred = comb_pred"),
    )


@fault("lumina2", at=_MIXED)
def norm_inverted(pipe: Any) -> None:
    """The ratio of norms of the guided prediction is inverted."""
    edit(pipe, "__call__", ("(cond_norm / noise_norm)", "(noise_norm / cond_norm)"))


@fault("z-image", "lumina2", at=_MIXED)
def sign_not_turned(pipe: Any) -> None:
    """The prediction's sign is not turned."""
    edit(pipe, "__call__", ("noise_pred = -noise_pred", "noise_pred = noise_pred"))


@fault("hunyuan", at="denoiser.forward in guidance")
def guidance_not_scaled(pipe: Any) -> None:
    """The embedded guidance scale is not given in thousandths."""
    edit(pipe, "__call__", ("device=device) * 1000.0", "device=device)"))


@fault("flux", at="denoiser.forward in guidance")
def guidance_embedding_of_one(pipe: Any) -> None:
    """The embedded guidance scale is left at one."""
    edit(pipe, "__call__", ("torch.full([1], guidance_scale,", "torch.full([1], 1.0,"))


@fault("svd", at=_MIXED)
def guidance_same_for_frames(pipe: Any) -> None:
    """All frames are guided as the last one."""
    old = "torch.linspace(min_guidance_scale, max_guidance_scale, num_frames)"
    edit(
        pipe,
        "__call__",
        (old, "torch.linspace(max_guidance_scale, max_guidance_scale, num_frames)"),
    )


@fault("pixart", at=_MIXED)
def variance_for_prediction(pipe: Any) -> None:
    """The half of the output that holds the variance is taken for the prediction."""
    edit(pipe, "__call__", ("noise_pred.chunk(2, dim=1)[0]", "noise_pred.chunk(2, dim=1)[1]"))
