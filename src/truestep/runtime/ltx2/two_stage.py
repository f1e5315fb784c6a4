"""Two stages: a clip is made at half the size, its latent upsampled, and a second run refines it.

The second run is a case like any other, recorded, checked and judged by itself. It starts from the
final latent of the first one's recording (`initial`), upsampled (`upsampler`) and noised to the
first sigma of its schedule, 0.909375 of `distilled_stage_2`; the sound is noised and refined
with it.

It is bit-equal to diffusers' LTX2Pipeline, LTX2LatentUpsamplePipeline and LTX2Pipeline again, with
one generator for all: noise goes on where the first stage's ended. Where references differ:
- The official repository mixes latent and noise with `torch.lerp`, does not denormalise the sound
  in between, and since 63fd9a4 (2026-07-07) keeps the sound of the first stage: that of `initial`.
- Its second stage runs with the distilled LoRA: give a model folder that has it in its weights.
- Given an image, the first frame is that of the image at the second size, as in the official
  repository; diffusers' LTX2ImageToVideoPipeline keeps the upsampled one.

Source:
    diffusers 0.42.1, pipelines/ltx2/pipeline_ltx2_latent_upsample.py, and pipeline_ltx2.py,
    `prepare_latents` and `prepare_audio_latents`; ltx_pipelines/ti2vid_two_stages.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from truestep.case import Case, RunSettings
from truestep.errors import CaseError, FileFormatError
from truestep.joint import AUDIO, Joint, gather
from truestep.reading import parse_json, read
from truestep.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from truestep.recording.format import Recording

SECOND_STAGE: dict[str, Any] = {
    "steps": 3,
    "sigma_schedule": "distilled_stage_2",
    "guidance_scale": 1.0,
    "audio_guidance_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_rescale": 0.0,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
}
"""What a second stage has that its first has not: a schedule of its own, and no guidance.

Source:
    ltx_pipelines/ti2vid_two_stages.py: STAGE_2_DISTILLED_SIGMAS and SimpleDenoiser.
"""

_CLASS = "LTX2LatentUpsamplerModel"


def second_stage(case: Case, initial: str | Path, *, upsampler: str | Path) -> Case:
    """The case that refines a clip.

    Args:
        case: Of the first stage.
        initial: Its recording, of level `full`; it need not be there yet.
        upsampler: Folder of a latent upsampler, with config.json and weights.

    Returns:
        The same case at the size that the upsampler makes, without guidance, and with the three
        distilled steps.

    Raises:
        CaseError: It is no LTX-2 case, or the folder holds no such upsampler.
    """
    if case.settings.profile is None:
        raise CaseError(
            "only an LTX-2 case has a second stage",
            where=case.model,
            measured="the case names no profile",
            hint="--set profile=diffusers-0.42.1  # or another of truestep show profile",
        )
    scale = upsampler_scale(Path(upsampler))
    return case.replace(
        **SECOND_STAGE,
        height=round(case.height * scale),
        width=round(case.width * scale),
        initial=str(initial),
        upsampler=str(upsampler),
    )


def check_initial(pipe: Pipeline, *, sigma: float, audio_length: int) -> None:
    """Check what a run starts from, before any forward.

    Args:
        sigma: The first one of the schedule.
        audio_length: Latent frames of the sound.

    Raises:
        CaseError: `initial` or `upsampler` is missing, has no effect, or does not fit the case.
        FileFormatError: The recording is damaged, or lacks what a run could start from.
    """
    settings = pipe.settings
    if settings.initial is None or settings.upsampler is None:
        if settings.initial is None and settings.upsampler is None:
            return
        has, lacks = "initial", "upsampler"
        if settings.initial is None:
            has, lacks = lacks, has
        raise CaseError(
            f"{has} is set, and {lacks} is not",
            measured="a second stage starts from the recording of the first, upsampled",
            hint=f"give --set {lacks}=PATH, or drop {has}",
        )
    if sigma >= 1:
        raise CaseError(
            "initial has no effect",
            measured=f"the schedule starts at sigma {sigma:g}, where all is noise",
            hint="--set sigma_schedule=distilled_stage_2 --set steps=3",
        )
    folder = Path(settings.upsampler)
    scale, channels = upsampler_scale(folder), _config(folder).get("in_channels", 128)
    if channels != pipe.transformer.config.in_channels:
        raise CaseError(
            "the upsampler is not for this model",
            where=str(folder),
            measured=f"it has {channels} channels, the model {pipe.transformer.config.in_channels}",
            hint="give the upsampler of the model's own version",
        )
    recording = _opened(Path(settings.initial))
    _check_size(recording, settings, scale=scale)
    _check_sound(recording, settings, audio_length=audio_length)


def _opened(path: Path) -> Recording:
    from truestep.recording.format import Recording

    if not path.is_file():
        raise CaseError(
            "there is no recording to start from",
            where=str(path),
            hint="make the first stage with truestep run",
        )
    return Recording.open(path)


def _check_size(recording: Recording, settings: RunSettings, *, scale: float) -> None:
    made = recording.manifest.case
    if made is None:
        raise FileFormatError(
            "a run cannot start from this recording: it does not say of what case it is",
            where=str(recording.path),
            hint="make the first stage with truestep run, and an LTX-2 model",
        )
    names = ("height", "width", "num_frames")
    factors = (scale, scale, 1)
    found = {name: made.get(name) for name in names}
    if any(
        not isinstance(value, int) or value * factor != getattr(settings, name)
        for (name, value), factor in zip(found.items(), factors, strict=True)
    ):
        wanted = [getattr(settings, n) / f for n, f in zip(names, factors, strict=True)]
        raise CaseError(
            "the recording to start from is of another size",
            where=str(recording.path),
            measured=f"{found['width']}x{found['height']}, {found['num_frames']} frames; "
            f"needed: {wanted[1]:g}x{wanted[0]:g}, {wanted[2]:g} frames, "
            f"which the upsampler makes {scale:g} times as large",
        )


def _check_sound(recording: Recording, settings: RunSettings, *, audio_length: int) -> None:
    rows = {entry.name: entry.shape for entry in recording.manifest.tensors}
    names = [part + name for name in ("latent/final", "latent/initial") for part in ("", AUDIO)]
    missing = [name for name in names if name not in rows or name not in recording]
    if missing:
        raise FileFormatError(
            f"a run cannot start from this recording: it has no {missing[0]}",
            where=str(recording.path),
            measured=f"its level is {recording.manifest.level}; needed: full, of video and sound",
            hint="make the first stage with truestep run, and an LTX-2 model",
        )
    clips, length, _ = rows[AUDIO + "latent/final"]
    if (clips, length) != (settings.videos_per_prompt or 1, audio_length):
        raise CaseError(
            "the recording to start from is of another length, or of other clips",
            where=str(recording.path),
            measured=f"{clips} clips of {length} latent frames of sound; needed: "
            f"{settings.videos_per_prompt or 1} of {audio_length}",
            hint="set fps and videos_per_prompt as the first stage has them",
        )


def upsampler_scale(folder: Path) -> float:
    """How many times as wide and high a latent upsampler makes a clip.

    Raises:
        CaseError: The folder holds none, or one that makes more frames.
    """
    config = _config(folder)
    if config.get("temporal_upsample", False) or not config.get("spatial_upsample", True):
        raise CaseError(
            "the upsampler changes the number of frames",
            where=str(folder),
            hint="give one that upsamples height and width only",
        )
    rational = config.get("use_rational_resampler", True)
    return float(config.get("rational_spatial_scale", 2.0)) if rational else 2.0


def _config(folder: Path) -> dict[str, Any]:
    def parse(data: bytes) -> dict[str, Any]:
        config: dict[str, Any] = parse_json(data)
        found = config.get("_class_name") if isinstance(config, dict) else None
        if found != _CLASS:
            raise ValueError(f"its class is {found}, not {_CLASS}")
        if not any(folder.glob("*.safetensors")):
            raise ValueError("it has no weights (*.safetensors)")
        return config

    return read(
        folder / "config.json",
        "the latent upsampler cannot be used",
        parse,
        raises=CaseError,
        hint="give --set upsampler=FOLDER, such as latent_upsampler of Lightricks/LTX-2",
    )


def starting_point(pipe: Pipeline) -> Joint:
    """Final latents of the recording to start from, host copies: video and audio tokens."""
    tensors = _opened(Path(str(pipe.settings.initial)))
    return Joint(*(part.clone() for part in gather(tensors, "latent/final")))


def spent(pipe: Pipeline, generator: torch.Generator) -> None:
    """Draw what the first stage drew, so that the noise of this one is other noise."""
    tensors = _opened(Path(str(pipe.settings.initial)))
    for part in gather(tensors, "latent/initial"):
        torch.randn(part.shape, generator=generator, device=generator.device)


def upsampled(pipe: Pipeline, video: torch.Tensor) -> torch.Tensor:
    """A normalised latent `b c f h w` to the larger one, in the case's dtype."""
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    dtype, vae = getattr(torch, pipe.settings.dtype), pipe.vae
    model = LTX2LatentUpsamplerModel.from_pretrained(
        str(pipe.settings.upsampler), dtype=dtype, use_safetensors=True, local_files_only=True
    ).to(pipe.device)

    def statistics(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, deviation = (
            value.view(1, -1, 1, 1, 1).to(like.device, like.dtype)
            for value in (vae.latents_mean, vae.latents_std)
        )
        return mean, deviation

    mean, deviation = statistics(video)
    factor = vae.config.scaling_factor
    larger = model((video * deviation / factor + mean).to(model.dtype))
    mean, deviation = statistics(larger)
    made: torch.Tensor = (larger - mean) * factor / deviation
    return made


def renormalised(pipe: Pipeline, sound: torch.Tensor) -> torch.Tensor:
    """The sound's tokens, denormalised and normalised again, as diffusers hands them on."""
    deviation, mean = (
        value.to(sound) for value in (pipe.audio_vae.latents_std, pipe.audio_vae.latents_mean)
    )
    made: torch.Tensor = (sound * deviation + mean - mean) / deviation
    return made


def noised(latent: torch.Tensor, *, sigma: float, generator: torch.Generator) -> torch.Tensor:
    """`sigma noise + (1 - sigma) x`, in the dtype of x, as float32."""
    noise = torch.randn(
        latent.shape, generator=generator, device=generator.device, dtype=latent.dtype
    ).to(latent.device)
    return (sigma * noise + (1 - sigma) * latent).float()
