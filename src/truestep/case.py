"""Cases: what to generate. Case files, tiers and stable case ids. No torch.

A case file (`truestep.toml`) holds many cases; a table below a case is a quality tier, that is the
same case with other parameters::

    [case.red-three]
    model = "builtin:digits"
    prompt = "a red three moving left"
    steps = 20

    [case.red-three.full]
    steps = 50
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from truestep.call_case import (
    CALL_TABLES,
    PREPARATION,
    CallCase,
    CompileMode,
    is_call_case,
)
from truestep.content import case_differences, invalid_case, readable_id
from truestep.controls import AudioVideo, profiles
from truestep.errors import CaseError
from truestep.reading import parse_toml, read
from truestep.records import Shown, line_of
from truestep.text import nearest
from truestep.verdict import Difference

CASE_FILE = "truestep.toml"
DEFAULT_TIER = "default"

DType = Literal["float32", "bfloat16", "float16"]


class Settings(AudioVideo):
    """Controls beyond those every text-to-video case has. `None` means: as the model folder says.

    Those of audio-video models are in `truestep.controls.AudioVideo`.

    Attributes:
        text_recipe: How the prompt becomes embeddings. `pad_trim_zero`: pad to
            `max_sequence_length`, encode with mask, cut to the real length, pad with exact zeros.
            `keep_padding`: keep what the encoder makes of the padding. `per_branch_connector`:
            LTX-2's, and the default of a case that names a profile; a text connector replaces the
            padding, prompt by prompt.
        scheduler: diffusers scheduler class built from the folder's scheduler configuration.
        flow_shift: Timestep shift (`shift` of FlowMatchEuler, `flow_shift` of UniPC); above 0.
        device: `cpu`, `cuda`, `cuda:N`; None is CUDA where there is one. Not part of the case id.
        attention_backend: diffusers attention backend (`native`, `flash`, ...); None is diffusers'
            default. Not part of the case id: references are stored per backend really used.
        cfg: How the two guidance branches run. `sequential`: one forward each; `batched`: one
            forward of both; `parallel`: one each on two processes. Same result up to rounding.
        text_attention: `full`, or `collapsed`: padded text rows are one key. Same result up to
            rounding.
        text_cache: Keep keys and values of the text over the steps. Bit-equal.
        guidance_dtype: Precision of the combination: a dtype, or `model`, the transformer's own;
            None is that of the family's reference pipeline.
        guidance_rescale: Share, 0 to 1, by which the guided deviation is brought back; None is the
            family's: 0 for Wan and Cosmos, the profile's for LTX-2.
        adaptive_gate: Share of the steps, 0 to 1, after which the unconditional pass is skipped.
        adaptive_agreement: Relative distance of the two predictions from which on it is skipped.
        adaptive_reuse: What stands for it: the last `delta` of the two, or nothing (`drop`).
        compile: Whether the denoisers run through torch.compile, and in which of its modes; `on`
            is torch's default. Not part of the case id: it is a change under test.
        fps: Frames a second that a Cosmos or LTX-2 model is told; None is its pipeline's default,
            30 or 24.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    text_recipe: Literal["pad_trim_zero", "keep_padding", "per_branch_connector"] = "pad_trim_zero"
    scheduler: Literal["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"] | None = None
    flow_shift: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    device: str | None = Field(default=None, pattern=r"^(cpu|cuda(:\d+)?|mps|xpu(:\d+)?)$")
    attention_backend: str | None = None
    cfg: Literal["sequential", "batched", "parallel"] = "sequential"
    text_attention: Literal["full", "collapsed"] = "full"
    text_cache: bool = False
    guidance_dtype: DType | Literal["model"] | None = None
    guidance_rescale: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    adaptive_gate: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    adaptive_agreement: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    adaptive_reuse: Literal["delta", "drop"] = "delta"
    fps: int | float | None = Field(default=None, gt=0, allow_inf_nan=False)
    compile: CompileMode = "off"


LATER = (
    "cfg",
    "text_attention",
    "text_cache",
    "guidance_dtype",
    "guidance_rescale",
    "adaptive_gate",
    "adaptive_agreement",
    "adaptive_reuse",
    "fps",
    *AudioVideo.model_fields,
)
"""Settings that are left out of a recorded case where they have their default, so that recordings
from before there were any stay comparable."""


class Generation(Shown, BaseModel):
    """The controls that every text-to-video case has; defaults are those of diffusers.WanPipeline.

    Attributes:
        height, width: Pixels; multiples of the model's patch times its VAE factor.
        num_frames: Frames; 1 more than a multiple of the VAE's temporal factor.
        steps: Denoise iterations.
        guidance_scale: Classifier-free guidance; off (one forward a step) at 1 or below.
        guidance_scale_2: Scale of the low-noise expert of a two-expert model; None is
            `guidance_scale`.
        max_sequence_length: Text length in tokens, padding included.
        dtype: What `from_pretrained(torch_dtype=...)` is given.
    """

    model_config = ConfigDict(extra="forbid")

    def __repr__(self) -> str:
        return line_of(self)

    prompt: str = Field(min_length=1)
    negative_prompt: str = ""
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: int = Field(default=50, ge=1, le=10_000)
    guidance_scale: float = Field(default=5.0, allow_inf_nan=False)
    guidance_scale_2: float | None = Field(default=None, allow_inf_nan=False)
    height: int = Field(default=480, ge=1)
    width: int = Field(default=832, ge=1)
    num_frames: int = Field(default=81, ge=1)
    max_sequence_length: int = Field(default=512, ge=1)
    dtype: DType = "float32"

    @property
    def guided(self) -> bool:
        """Whether a second, unconditional forward runs (diffusers: `guidance_scale > 1`)."""
        return self.guidance_scale > 1.0


class RunSettings(Generation, Settings):
    """Every control that a stage reads, flat and mutable: `pipeline.settings`."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


_DIGITS: dict[str, Any] = {
    "guidance_scale": 3.0,
    "height": 32,
    "max_sequence_length": 8,
    "num_frames": 9,
    "steps": 25,
    "width": 32,
}
"""Defaults of `builtin:digits`: the values its model card states."""

BUILTIN_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"builtin:digits": _DIGITS}


class Case(Generation):
    """What to generate: model, prompt, seed, size, steps, guidance and settings.

    `model` is `builtin:digits`, a diffusers folder, or a hub id (with `revision`). Defaults are
    those of `diffusers.WanPipeline`, the builtin model's own, or those of LTX-2 where the settings
    name a profile. Two cases with the same content
    have the same `id`; where and on which attention backend a case runs is not part of it.

    Raises:
        CaseError: A key is unknown or a value is out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1)
    revision: str | None = None
    settings: Settings = Field(default_factory=Settings)

    def __init__(self, **data: Any) -> None:
        if _named_profile(data.get("settings")) is not None and isinstance(data["settings"], dict):
            own = {"text_recipe": "per_branch_connector", **data["settings"]}
            data = {**data, "settings": own}
        merged = {
            **_profile_defaults(data.get("settings")),
            **BUILTIN_DEFAULTS.get(str(data.get("model")), {}),
            **data,
        }
        try:
            super().__init__(**merged)
        except ValidationError as error:
            raise invalid_case(error, likely=_meant) from None

    _base: Path | None = PrivateAttr(default=None)

    @field_validator("model")
    @classmethod
    def _known_builtin(cls, value: str) -> str:
        if value.startswith("builtin:") and value not in BUILTIN_DEFAULTS:
            raise ValueError(f"unknown builtin model; there is {', '.join(BUILTIN_DEFAULTS)}")
        return value

    @property
    def device(self) -> str | None:
        """Where it runs; None is CUDA where there is one."""
        return self.settings.device

    @property
    def model_path(self) -> Path:
        """The model as a path; one written relative in a case file counts from that file."""
        path = Path(self.model).expanduser()
        return self._base / path if self._base is not None else path

    @property
    def id(self) -> str:
        """Readable, collision-free and safe as a file name: slugs plus 12 digits of a SHA-256."""
        return readable_id(self.canonical(), self.model.removeprefix("builtin:"), self.prompt)

    def canonical(self) -> dict[str, Any]:
        """Content that the id hashes: everything but device, attention backend and compile."""
        content = self.model_dump(mode="json")
        for key in ("device", "attention_backend", "compile"):
            del content["settings"][key]
        for key in LATER:
            if content["settings"][key] == Settings.model_fields[key].default:
                del content["settings"][key]
        return content

    def run_settings(self) -> RunSettings:
        """The flat, mutable settings object that the runtime's stages read."""
        own = self.model_dump(exclude={"model", "revision", "settings"})
        return RunSettings(**own, **self.settings.model_dump())

    def replace(self, **changes: Any) -> Case:
        """A copy with other values; names may be those of the case or of its settings.

        Raises:
            CaseError: A name is neither, or a value is out of range.
        """
        own = {k: v for k, v in changes.items() if k in type(self).model_fields}
        inner = {k: v for k, v in changes.items() if k in Settings.model_fields}
        for key in changes:
            if key in PREPARATION:
                raise CaseError(
                    f"truestep's own stages take no {key}",
                    likely="plain pipelines are prepared",
                    hint="--subject diffusers",
                )
            if key not in own and key not in inner:
                near = difflib.get_close_matches(key, setting_names(), n=4, cutoff=0.5)
                raise CaseError(
                    f"unknown setting {key!r}",
                    where="--set" if key else "",
                    measured=f"the nearest are {', '.join(near)}" if near[1:] else "",
                    likely=nearest(key, setting_names()),
                    hint="truestep show settings  # lists all of them",
                )
        # what nobody set is a profile's to say; another model's own defaults are not asked for
        data = self.model_dump() if "model" in own else self._as_given()
        data.update(own)
        settings = data["settings"]
        data["settings"] = {
            **(settings if isinstance(settings, dict) else settings.model_dump()),
            **inner,
        }
        replaced = Case(**data)
        if "model" not in own:
            replaced._base = self._base
        return replaced

    def _as_given(self) -> dict[str, Any]:
        """What was set, without defaults."""
        data = self.model_dump(include=self.model_fields_set | {"model", "prompt"})
        data["settings"] = self.settings.model_dump(include=self.settings.model_fields_set)
        return data

    def differences(self, reference: Mapping[str, Any]) -> tuple[Difference, ...]:
        """Keys whose canonical value differs from a recorded case's."""
        return case_differences(self.canonical(), reference)


def setting_names() -> list[str]:
    """What --set changes of a case of truestep's own runtime."""
    return sorted({*Case.model_fields, *Settings.model_fields} - {"settings"})


AnyCase = Case | CallCase
"""A case of truestep's own runtime, or the call of a pipeline."""


def _profile_defaults(settings: object) -> Mapping[str, Any]:
    """What a case has by the profile that its settings name; an unknown one is found later."""
    name = _named_profile(settings)
    known = profiles().get(str(name)) if name is not None else None
    return known.defaults if known else {}


def _named_profile(settings: object) -> object:
    if isinstance(settings, Settings):
        return settings.profile
    return settings.get("profile") if isinstance(settings, Mapping) else None


def load_cases(path: Path, *, tier: str = DEFAULT_TIER) -> dict[str, Case]:
    """Read those cases of a case file that truestep's own runtime runs; see `read_cases`."""
    every = read_cases(path, tier=tier)
    return {name: case for name, case in every.items() if isinstance(case, Case)}


def read_cases(path: Path, *, tier: str = DEFAULT_TIER) -> dict[str, AnyCase]:
    """Read a case file.

    Args:
        path: A TOML file with `[case.NAME]` tables.
        tier: `default`, or a table below the cases (`[case.NAME.TIER]`) laid over them.

    Returns:
        Name to case, in file order. A model folder that begins with a dot counts from the file.

    Raises:
        CaseError: The file is unreadable, holds no case, or a case in it is not valid.
    """
    tables = read(
        path,
        "the case file cannot be read",
        parse_toml,
        raises=CaseError,
        hint="write one with a table [case.NAME] that has model and prompt",
    )
    unknown = sorted(set(tables) - {"case", "references"})
    if unknown or not isinstance(tables.get("case"), dict) or not tables["case"]:
        raise CaseError(
            f"unknown table {unknown[0]!r} in the case file" if unknown else "no case in the file",
            where=str(path),
            hint="a case file holds [case.NAME] tables, and [references] with store = 'URL'",
        )
    return {
        name: _case_of(name, table, path=path, tier=tier) for name, table in tables["case"].items()
    }


def _case_of(name: str, table: object, *, path: Path, tier: str) -> AnyCase:
    where = f"{path}: [case.{name}]"
    if not isinstance(table, dict):
        raise CaseError("a case must be a table", where=where)
    of_calls = is_call_case(table)
    inner = CALL_TABLES if of_calls else ("settings",)
    for key in inner:
        if not isinstance(table.get(key, {}), dict):
            raise CaseError(f"{key} must be a table", where=where)
    tiers = {k: v for k, v in table.items() if isinstance(v, dict) and k not in inner}
    base = {k: v for k, v in table.items() if k not in tiers}
    if tier != DEFAULT_TIER and tier not in tiers:
        raise CaseError(
            f"the case has no tier {tier!r}",
            where=where,
            measured=f"tiers: {', '.join([DEFAULT_TIER, *tiers])}",
            hint=f"add a table [case.{name}.{tier}] with the values that differ",
        )
    over = tiers.get(tier, {})
    for key in inner:
        if not isinstance(over.get(key, {}), dict):
            raise CaseError(f"{key} must be a table", where=f"{path}: [case.{name}.{tier}]")
    laid = {key: {**base.get(key, {}), **over.get(key, {})} for key in inner}
    merged = {**base, **over, **laid}
    try:
        case = CallCase(**merged) if of_calls else Case(**merged)
    except CaseError as error:
        error.where = where
        raise
    if isinstance(case, CallCase):
        return case.counted_from(path.parent)
    if case.model.startswith("."):
        case._base = path.parent
    return case


def _meant(key: str) -> str:
    """What may have been meant by a key that there is not."""
    if key in PREPARATION:
        return f'{key} is of a plain pipeline: subject = "diffusers", and a table [case.NAME.call]'
    return nearest(key.rsplit(".", 1)[-1], [*Case.model_fields, *Settings.model_fields])


def case_from(content: Mapping[str, Any]) -> AnyCase:
    """The case that a recording is of, from its content."""
    return CallCase(**content) if is_call_case(content) else Case(**content)
