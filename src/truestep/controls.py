"""Controls of an audio-video (LTX-2) run, and profiles: what a reference does. No torch.

Engines that run LTX-2 disagree in a dozen choices. Each is a control here; a profile is one engine
at one commit: a value for every control, each with its source (`profiles.toml`). A control that a
case leaves out has its profile's value and is absent from the case, so that recordings from before
there was one stay comparable; a recording's settings hold them all.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from truestep.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MU_CONSTANT = 2.05
"""Shift of the one-stage entry of the official repository, whatever the size."""


def _numbers(value: object) -> object:
    """`28` or `28,29`, as a command line gives them, to a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.strip("[] ").split(",") if part.strip()]
    return value


Blocks = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_numbers)]
"""Numbers of transformer blocks, from 0."""

_Scale = Annotated[float, Field(allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class AudioVideo(BaseModel):
    """Controls of an LTX-2 case. None means: as the profile says.

    Attributes:
        profile: Which reference the run follows: `official@f4b06fb`, `diffusers-0.42.1`, ...;
            `truestep show profile` lists them. An LTX-2 case must name one.
        mu: Shift of the schedule: `constant` (2.05), `tokens` (from the number of video tokens, as
            the model folder's scheduler says), or a number.
        terminal_sigma: Last sigma before 0, in (0, 1); the schedule is stretched to end there.
        sigma_schedule: `shifted` by mu, or one of the two fixed lists of the distilled models:
            `distilled` (8 steps) and `distilled_stage_2` (3 steps).
        sampler: `euler`, or `res2s`, of second order: each step has two predictions, which are
            recorded as steps of their own, and one more ends the run.
        audio_guidance_scale: Classifier-free guidance of the sound; `guidance_scale` is the
            video's. 1 is off.
        audio_guidance_rescale: Share, 0 to 1, by which the guided deviation of the sound is brought
            back; `guidance_rescale` is the video's.
        stg_scale, audio_stg_scale: Spatio-temporal guidance, away from a prediction whose
            self-attention passes its values through in some blocks. 0 is off.
        stg_blocks, audio_stg_blocks: These blocks, from 0.
        modality_scale, audio_modality_scale: Guidance away from a prediction without attention
            between sound and video. 1 is off.
        skip_step: Steps after a guided one that keep its denoised estimate, without any forward.
        std_scope: Deviation for the rescale over the `whole` tensor, batch included, or of each
            `sample`.
        pass_gating: Which passes run, and what they perturb. `per_modality`: a pass runs where a
            modality has a scale for it (other than 1, or 0), and self-attention is perturbed in
            that modality only. `shared`: `uncond` always runs, and self-attention is perturbed in
            both modalities, each in its own blocks, where either has a scale. `shared_blocks`: as
            `per_modality` with scales above 1 (or 0), and self-attention is perturbed in both, in
            `stg_blocks`.
        pass_batching: `separate` forwards, `cond_uncond` in one, or `all` in one.
        connector: The text connector sees the prompts in `separate` calls, or in a `joint` one.
        av_adaln: Whose sigma modulates attention between sound and video: its `own` side's, the
            `cross` side's, or `own_cross_gate`, own for scale and shift and cross for the gate.
            They differ where sound and video have different sigmas, that is, given an image.
        conditioned_sigma: Sigma with which a token of the given image is denoised: the `token`'s
            own (0), or the step's (`scalar`).
        skip_v2a_cross_attn, skip_a2v_cross_attn: Leave out attention from video to audio, or from
            audio to video, in every forward.
        disable_autocast: Run the transformer without `torch.autocast`; False runs it under autocast
            of the case's dtype, which for float32 changes nothing.
        generator_device: Where noise is drawn: on the `cpu`, or on the run's `device`.
        videos_per_prompt: Clips that are made at once, each from noise of its own; 1 by default.
        initial: Recording whose clip the run starts from, upsampled and noised: a path. The second
            of two stages.
        upsampler: Folder of the latent upsampler that it goes through.
        image: Picture that is the first frame; a path.
        image_crf: H.264 quality, 1 to 51, through which it goes first, as the training data did; 0
            leaves it as it is.
    """

    profile: str | None = None
    mu: Literal["constant", "tokens"] | _Scale | None = None
    terminal_sigma: Annotated[float, Field(gt=0, lt=1)] | None = None
    sigma_schedule: Literal["shifted", "distilled", "distilled_stage_2"] | None = None
    sampler: Literal["euler", "res2s"] | None = None
    audio_guidance_scale: _Scale | None = None
    audio_guidance_rescale: _Share | None = None
    stg_scale: _Scale | None = None
    audio_stg_scale: _Scale | None = None
    stg_blocks: Blocks | None = None
    audio_stg_blocks: Blocks | None = None
    modality_scale: _Scale | None = None
    audio_modality_scale: _Scale | None = None
    skip_step: Annotated[int, Field(ge=0)] | None = None
    std_scope: Literal["whole", "sample"] | None = None
    pass_gating: Literal["per_modality", "shared_blocks", "shared"] | None = None
    pass_batching: Literal["separate", "cond_uncond", "all"] | None = None
    connector: Literal["separate", "joint"] | None = None
    av_adaln: Literal["own", "cross", "own_cross_gate"] | None = None
    conditioned_sigma: Literal["token", "scalar"] | None = None
    skip_v2a_cross_attn: bool | None = None
    skip_a2v_cross_attn: bool | None = None
    disable_autocast: bool | None = None
    generator_device: Literal["cpu", "device"] | None = None
    videos_per_prompt: Annotated[int, Field(ge=1)] | None = None
    initial: str | None = None
    upsampler: str | None = None
    image: str | None = None
    image_crf: Annotated[int, Field(ge=0, le=51)] | None = None


@dataclass(frozen=True)
class Controls:
    """Every control of a run, resolved; see `AudioVideo` and `truestep.case.Settings`."""

    profile: str
    mu: str | float
    terminal_sigma: float
    sigma_schedule: str
    sampler: str
    guidance_rescale: float
    audio_guidance_scale: float
    audio_guidance_rescale: float
    stg_scale: float
    audio_stg_scale: float
    stg_blocks: tuple[int, ...]
    audio_stg_blocks: tuple[int, ...]
    modality_scale: float
    audio_modality_scale: float
    skip_step: int
    guidance_dtype: str
    std_scope: str
    pass_gating: str
    pass_batching: str
    connector: str
    av_adaln: str
    conditioned_sigma: str
    skip_v2a_cross_attn: bool
    skip_a2v_cross_attn: bool
    disable_autocast: bool
    generator_device: str
    image_crf: int


NAMES = tuple(field.name for field in fields(Controls) if field.name != "profile")
"""What a profile has a value for."""


@dataclass(frozen=True)
class Cell:
    """One choice of a profile: its value, and where that can be read."""

    value: Any
    source: str


@dataclass(frozen=True)
class Profile:
    """A reference that runs can follow.

    Attributes:
        name: `official@f4b06fb`.
        about: What it is.
        model: What it runs.
        versions: Versions of that model: `2.0`, `2.3`.
        cells: A value and its source for each control.
        defaults: What a case that names the profile has where it says nothing.
    """

    name: str
    about: str
    model: str
    versions: tuple[str, ...]
    cells: Mapping[str, Cell]
    defaults: Mapping[str, Any]


@cache
def profiles() -> Mapping[str, Profile]:
    """All profiles by name."""
    text = resources.files("truestep").joinpath("profiles.toml").read_text("utf-8")
    tables = tomllib.loads(text)
    defaults = tables["defaults"]
    shared = {name: Cell(**cell) for name, cell in tables["shared"].items()}
    found = {}
    for name, table in tables["profile"].items():
        own = {key: Cell(**cell) for key, cell in table["cells"].items()}
        cells = {key: _frozen({**shared, **own}[key]) for key in NAMES}
        found[name] = Profile(
            name=name,
            about=table["about"],
            model=tables["model"],
            versions=tuple(table["versions"]),
            cells=cells,
            defaults=defaults,
        )
    return found


def _frozen(cell: Cell) -> Cell:
    return Cell(tuple(cell.value), cell.source) if isinstance(cell.value, list) else cell


def find_profile(name: str) -> Profile:
    """A profile by name.

    Raises:
        UsageError: There is none of this name.
    """
    known = profiles()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        bare = name.partition("@")[0] == "official" and "@" not in name
        raise UsageError(
            f"there is no profile {name!r}",
            measured=f"profiles: {', '.join(known)}",
            likely="the official repository changed its arithmetic: name a commit"
            if bare
            else (f"did you mean {near[0]!r}?" if near else ""),
            hint="truestep show profile",
        )
    return known[name]


def resolve(settings: Any) -> Controls:
    """The controls of a run: what its settings say, and its profile for the rest.

    Args:
        settings: `truestep.case.RunSettings`, with a profile.

    Raises:
        UsageError: The profile is unknown.
    """
    profile = find_profile(settings.profile)
    values = {
        name: cell.value if getattr(settings, name) is None else getattr(settings, name)
        for name, cell in profile.cells.items()
    }
    return Controls(profile=profile.name, **values)


def differences(first: str, second: str) -> dict[str, tuple[Cell, Cell]]:
    """Controls in which two profiles differ, in the order of `NAMES`.

    Raises:
        UsageError: A profile is unknown.
    """
    a, b = find_profile(first).cells, find_profile(second).cells
    return {name: (a[name], b[name]) for name in NAMES if a[name].value != b[name].value}


def value_text(value: object) -> str:
    """A control's value as `--set` takes it."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
