"""What the corpus is run on. A subject is a plug: load it, record it, check it, show its output."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from bench.faults.draws import Draw
from truestep.case import Case
from truestep.joint import parts
from truestep.measure.distance import distance
from truestep.recording.format import Recording
from truestep.replay.check import check_pipeline
from truestep.replay.functions import check_function, record_function
from truestep.replay.raised import raised
from truestep.replay.record import FloorChoice, record_pipeline
from truestep.replay.stages import replay
from truestep.runtime.loading import load
from truestep.runtime.pipeline import generate
from truestep.runtime.precision import converted
from truestep.verdict import Comparison

__all__ = ["SUBJECTS", "Outputs", "Subject", "effect", "subjects"]


@dataclass(frozen=True)
class Outputs:
    """What gates that look at the end are shown: latents and, of a video model, frames.

    Other tools' gates look at these two; the sound `b c n` is kept to say whether a bit differs.
    """

    latent: torch.Tensor
    frames: torch.Tensor | None
    sound: torch.Tensor | None = None


class Subject(Protocol):
    """A model under test; `load` gives a fresh one that an entry of the corpus may change.

    Attributes:
        name: Shown in tables.
        kind: Which entries apply: `wan`, `ltx2` or `module`.
        dtypes: Working precisions that it is run in.
        depths: Depths at which truestep can check it.
    """

    name: str
    kind: str
    dtypes: tuple[str, ...]
    depths: tuple[str, ...]

    def load(self, draw: Draw, dtype: str) -> Any:
        """A fresh model for this draw."""

    def record(self, model: Any, draw: Draw, dtype: str) -> Recording:
        """The trusted run of an unchanged model, with its floor."""

    def check(
        self, model: Any, recording: Recording, draw: Draw, dtype: str, depth: str
    ) -> Comparison:
        """truestep's own verdict."""

    def outputs(self, model: Any, recording: Recording) -> Outputs:
        """The end of a free run."""

    def exact(self, model: Any, recording: Recording, *, free: bool) -> dict[str, torch.Tensor]:
        """What the model gives in float64, by name; `free` also runs it to the end."""


@dataclass(frozen=True)
class Wan:
    """A pipeline through the runtime: the digits model, or a tiny random Wan, Cosmos or LTX-2 one.

    Attributes:
        controls: Further settings of its case.
    """

    name: str
    model: Callable[[], str]
    settings: Mapping[str, Any]
    sizes: tuple[Mapping[str, Any], ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    kind: str = "wan"
    depths: tuple[str, ...] = ("steps", "final")
    controls: Callable[[], Mapping[str, Any]] = dict

    def case(self, draw: Draw, dtype: str) -> Case:
        """The case of a draw."""
        values = {**self.settings, **self.sizes[draw.size % len(self.sizes)]}
        return Case(
            model=self.model(),
            prompt=draw.prompt,
            seed=draw.seed,
            dtype=dtype,
            **values,
            settings={"device": "cpu", **self.controls()},
        )

    def load(self, draw: Draw, dtype: str) -> Any:
        """A fresh pipeline."""
        return load(self.case(draw, dtype))

    def record(self, model: Any, draw: Draw, dtype: str) -> Recording:
        """A full recording with floors for its depths."""
        floor: FloorChoice = "final" if "final" in self.depths else "steps"
        return record_pipeline(model, case=self.case(draw, dtype), floor=floor)

    def check(
        self, model: Any, recording: Recording, draw: Draw, dtype: str, depth: str
    ) -> Comparison:
        """truestep's own verdict."""
        case = self.case(draw, dtype)
        return check_pipeline(model, recording, case=case, depth=depth)  # type: ignore[arg-type]

    def outputs(self, model: Any, recording: Recording) -> Outputs:
        """Final latent and decoded frames of a free run."""
        latent = generate(model)
        with torch.no_grad():
            decoded = model.decode(model, latent)
        if not model.audio_video:
            return Outputs(latent.float(), decoded.float())
        from truestep.runtime.ltx2.latents import from_tokens

        frames, sound = (part.float() for part in decoded)
        return Outputs(from_tokens(model, latent.video).float(), frames, sound)

    def exact(self, model: Any, recording: Recording, *, free: bool) -> dict[str, torch.Tensor]:
        """Every stage on the recorded inputs, and the final latent of a free run."""
        with raised(model, "float64") as lifted:
            found = replay(lifted, recording)
            made = dict(found.outputs)
            made |= {f"effect/{name}": effect for name, (_, effect) in found.effects.items()}
            if free:
                made |= dict(parts("run/final", generate(lifted)))
        return made


@dataclass(frozen=True)
class Terrain:
    """A real consistency UNet, through the interface for any function."""

    name: str = "terrain-unet"
    kind: str = "module"
    dtypes: tuple[str, ...] = ("float32",)
    depths: tuple[str, ...] = ("steps",)

    def load(self, draw: Draw, dtype: str) -> Any:
        """Something with the torch module as `transformer`."""
        from bench.faults.terrain import load_port

        return SimpleNamespace(transformer=load_port())

    def record(self, model: Any, draw: Draw, dtype: str) -> Recording:
        """Three samples at different noise levels."""
        from bench.faults.terrain import inputs

        size = (64, 96)[draw.size % 2]
        samples = [
            inputs(draw.seed + index, size=size, strength=strength)
            for index, strength in enumerate((1.0, 0.9, 0.75))
        ]
        return record_function(model.transformer, samples)

    def check(
        self, model: Any, recording: Recording, draw: Draw, dtype: str, depth: str
    ) -> Comparison:
        """truestep's own verdict."""
        return check_function(_call(model), recording)

    def outputs(self, model: Any, recording: Recording) -> Outputs:
        """The heightfield of the first sample."""
        made = self._run(model, recording)
        return Outputs(next(iter(made.values())), None)

    def exact(self, model: Any, recording: Recording, *, free: bool) -> dict[str, torch.Tensor]:
        """All outputs in float64."""
        with converted(model.transformer, torch.float64):
            return self._run(model, recording, dtype=torch.float64)

    def _run(
        self, model: Any, recording: Recording, dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        made, call = {}, _call(model)
        with torch.no_grad():
            for index in range(3):
                head = f"sample/{index:04d}/input/"
                inputs = {
                    name.removeprefix(head): recording[name].to(dtype)
                    for name in recording
                    if name.startswith(head)
                }
                made[f"sample/{index:04d}/output/out"] = call(**inputs)
        return made


def _call(model: Any) -> Callable[..., torch.Tensor]:
    """The model, or what an entry put around it (`call`), as a function."""
    found: Callable[..., torch.Tensor] = getattr(model, "call", None) or model.transformer
    return found


@cache
def _tiny(kind: str) -> str:
    """Build a tiny pipeline once a process, in a folder that goes with it."""
    from bench.faults.tiny import build_tiny_cosmos, build_tiny_ltx2, build_tiny_wan

    folder = _folder(kind) / kind
    if kind.startswith("ltx2-"):
        return str(build_tiny_ltx2(folder, kind.removeprefix("ltx2-")))
    return str(build_tiny_cosmos(folder) if kind == "cosmos" else build_tiny_wan(folder, kind))


def _folder(kind: str) -> Path:
    holder = tempfile.TemporaryDirectory(prefix=f"truestep-{kind}-")
    _FOLDERS.append(holder)
    return Path(holder.name)


@cache
def _picture() -> str:
    """A picture of noise, once a process."""
    from PIL import Image

    pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0))
    path = _folder("picture") / "first.png"
    Image.frombytes("RGB", (64, 64), bytes(pixels.flatten().tolist())).save(path)
    return str(path)


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
_TINY = {"steps": 6, "guidance_scale": 4.0, "max_sequence_length": 8}
_TINY_SIZES: tuple[Mapping[str, Any], ...] = (
    {"height": 16, "width": 16, "num_frames": 5},
    {"height": 16, "width": 32, "num_frames": 9},
)
_COSMOS_SIZES: tuple[Mapping[str, Any], ...] = (
    {"height": 16, "width": 32, "num_frames": 9},
    {"height": 32, "width": 32, "num_frames": 13},
)
_LTX2 = {
    "steps": 4,
    "guidance_scale": 3.0,
    "max_sequence_length": 16,
    "negative_prompt": "a blue one",
}
_LTX2_SIZES: tuple[Mapping[str, Any], ...] = (
    {"height": 96, "width": 96, "num_frames": 17},  # as many tokens of video as of sound
    {"height": 64, "width": 128, "num_frames": 9},
)


def _ltx2(**more: Any) -> Callable[[], Mapping[str, Any]]:
    """Controls with which no choice is without effect: what both modalities have, differs.

    Passes are run apart, so that entries which change one are seen.
    """
    return lambda: {
        "profile": "official@f4b06fb",
        "pass_batching": "separate",
        "stg_blocks": [1],
        "audio_stg_blocks": [2],
        "audio_guidance_rescale": 0.5,
        "fps": 16,
        **{key: value() if callable(value) else value for key, value in more.items()},
    }


def _of_ltx2(name: str, version: str = "2.3", **more: Any) -> Wan:
    return Wan(
        name,
        lambda: _tiny(f"ltx2-{version}"),
        _LTX2,
        _LTX2_SIZES,
        kind="ltx2",
        depths=("steps",),
        controls=_ltx2(**more),
    )


SUBJECTS: tuple[Subject, ...] = (
    Wan(
        "digits",
        lambda: "builtin:digits",
        {"steps": 20},
        ({}, {"num_frames": 13}),
    ),
    Wan("tiny-wan2.1", lambda: _tiny("wan21"), _TINY, _TINY_SIZES),
    Wan(
        "tiny-wan2.2",
        lambda: _tiny("wan22"),
        {**_TINY, "guidance_scale_2": 3.0},
        _TINY_SIZES,
    ),
    Wan("tiny-wan2.2-5b", lambda: _tiny("wan22-ti2v"), _TINY, _TINY_SIZES),
    Wan("tiny-cosmos", lambda: _tiny("cosmos"), _TINY, _COSMOS_SIZES),
    _of_ltx2("tiny-ltx2"),
    _of_ltx2("tiny-ltx2-image", image=_picture, image_crf=0),
    _of_ltx2("tiny-ltx2-clips", videos_per_prompt=2),
    _of_ltx2("tiny-ltx2.0", "2.0"),
    Terrain(),
)


def subjects(names: tuple[str, ...] = ()) -> tuple[Subject, ...]:
    """Subjects by name; all without names."""
    return tuple(s for s in SUBJECTS if not names or s.name in names)


def effect(changed: Mapping[str, torch.Tensor], plain: Mapping[str, torch.Tensor]) -> float:
    """Largest true relative change of any output; inf where shapes or finiteness change."""
    largest = 0.0
    for name, reference in plain.items():
        actual = changed.get(name)
        if actual is None or actual.shape != reference.shape:
            largest = float("inf")
            continue
        found = distance(actual, reference)
        size = found.rel_l2 if found.count == reference.numel() else float("inf")
        largest = max(largest, size)
    return largest
