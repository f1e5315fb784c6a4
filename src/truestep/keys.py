"""What a tensor of a recording is, as a value, and how that is written as a name. No torch.

========================  ==============  =========================================
name                      stage           what
========================  ==============  =========================================
`text/cond`               text            embeddings of the prompt
`text/uncond`             text            embeddings of the negative prompt
`schedule/...`            schedule        `sigmas`, `timesteps`, `experts`
`latent/initial`          latent          noise from the seed
`step/0007/latent`        update          latent entering step 7, made by step 6
`step/0007/input`         latent          what an engine's model is given of that latent
`step/0007/cond`          prediction      likewise `uncond`
`step/0007/guided`        guidance        what the scheduler is given
`latent/final`            update          latent after the last step
`connector/cond`          connector       text as the model is given it, where a connector makes it
`sample/0003/output/NAME` output          what a recorded function returned (or `input`)
`video/frames`            decoding        decoded frames in [-1, 1]
`audio/waveform`          decoding        decoded sound `b c n` in [-1, 1]
`audio/step/0007/cond`    as above        the audio part of `step/0007/cond`; likewise all others
`module/FQN/7/cond/out.0` module          one module's output (`in.0`: its input)
`module/FQN#1/7/...`      module          of its second call in that step and branch
`float32/...`             as above        the same stage, raised to float32 (16-bit cases)
`stats/...`               as above        its moments, in its place (levels `stats` and `sketch`)
`sketch/...`              as above        its projection to 1,024 floats (level `sketch`)
`samples/prediction`      prediction      mean over all predictions that were replayed
========================  ==============  =========================================
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from truestep.joint import AUDIO

RAISED = ("float32/", "float64/")
"""Prefixes of what a stage gives with weights and arithmetic raised to that precision."""

SAMPLES = "samples/prediction"
"""Name of the mean over all predictions, each weighted by the inverse of its noise."""

FREE_RUN = "run/final"
"""Name under which a run keeps the metrics of the final latent of a free generation."""

STAGES = (
    "text",
    "connector",
    "schedule",
    "latent",
    "prediction",
    "guidance",
    "update",
    "decoding",
)
"""Stages in the order in which a run goes through them."""

FINALS = ("latent/final", f"{AUDIO}latent/final")
"""Latents after the last step: the video's, and the sound's where there is one."""

KEPT = ("stats", "sketch")
PRECISIONS = ("float32", "float64")
_MEAN = "samples"
_AUDIO = AUDIO.removesuffix("/")
_PREFIXES = frozenset({*KEPT, *PRECISIONS, _MEAN, _AUDIO})
_OF_STEP = {"latent": "update", "guided": "guidance", "input": "latent"}
_OF_HEAD = {"schedule": "schedule", "video": "decoding", "waveform": "decoding"}
_OF_LATENT = {"initial": "latent", "final": "update"}
_TEXTS = ("text", "connector")


@dataclass(frozen=True)
class Key:
    """What a recorded tensor is, as a value: `key_of` reads its name, `str` writes it.

    Attributes:
        head: What it belongs to: `text`, `schedule`, `latent`, `step`, `sample`, `module`, `video`;
            empty for a name that says nothing of a run.
        name: What it is called there: `cond`, `sigmas`, `final`, `frames`; of a module, its slot:
            `out.0`.
        number: Of the step or the sample that its name says.
        part: Of a text `mask`, of a sample `input` or `output`, of a module the branch.
        fqn: A module's address, without the number of its call.
        call: Counts a module's calls inside one step and branch.
        prefixes: What stands before: the tensor's moments or sketch, a raised precision, audio.
        written: The whole name, where it is written in another way than here.
    """

    head: str = ""
    name: str = ""
    number: int | None = None
    part: str = ""
    fqn: str | None = None
    call: int = 0
    prefixes: tuple[str, ...] = ()
    written: str = ""

    def __str__(self) -> str:
        return self.written or self.text()

    def text(self, *, number: str | None = None) -> str:
        """The name, with something else in the place of its number where that is asked for."""
        own = "" if self.number is None else str(self.number)
        if self.head == "module":
            parts = [self.label, number or own, self.part, self.name]
        else:
            padded = own and (number or f"{self.number:04d}")
            parts = [padded, self.part, self.name]
        return "/".join(part for part in (*self.prefixes, self.head, *parts) if part)

    @property
    def stage(self) -> str:
        """Part of the run; empty where the name says none."""
        if self.head in ("step", "sample") and "/" in self.name:
            return ""
        if self.head == "step":
            if self.name == "latent":
                return "update" if self.number else "latent"
            return _OF_STEP.get(self.name, "prediction")
        if self.head == "latent":
            return _OF_LATENT.get(self.name, "")
        if self.head == "sample":
            return self.part
        return _OF_HEAD.get(self.head, self.head)

    @property
    def step(self) -> int | None:
        """Denoise step; of an update, the step that made the latent."""
        if self.head not in ("step", "module") or "/" in self.name:
            return None
        if self.head == "step" and self.name == "latent":
            return self.number - 1 if self.number else None
        return self.number

    @property
    def branch(self) -> str | None:
        """Pass of the guidance that it is of."""
        if self.head == "module":
            return self.part
        if self.head in _TEXTS or (self.head == "step" and self.stage == "prediction"):
            return self.name
        return None

    @property
    def modality(self) -> str | None:
        """`audio` for the audio part of a joint model's tensor, else None."""
        return _AUDIO if _AUDIO in self.prefixes else None

    @property
    def precision(self) -> str:
        """That it was raised to, if so."""
        return next((prefix for prefix in self.prefixes if prefix in PRECISIONS), "")

    @property
    def working(self) -> Key:
        """The same in the working precision."""
        return self.but(prefixes=tuple(p for p in self.prefixes if p not in PRECISIONS))

    def but(self, **changes: Any) -> Key:
        """The same key with other fields."""
        return replace(self, written="", **changes)

    @property
    def mean(self) -> bool:
        """Whether it is a mean over what was replayed."""
        return _MEAN in self.prefixes

    @property
    def label(self) -> str:
        """A module's call: its fqn, with `#1` for the second."""
        return f"{self.fqn}#{self.call}" if self.call else self.fqn or ""

    @property
    def inward(self) -> bool:
        """Whether it is what a module is given."""
        return self.name.startswith("in.")

    @property
    def outward(self) -> bool:
        """Whether it is what a module returns."""
        return self.name.startswith("out.")


@dataclass(frozen=True)
class Address:
    """Where a tensor belongs. `step` of an update is the step that made the latent.

    `call` counts a module's calls inside one step and branch; `fqn` is without it. `modality` is
    `audio` for the audio part of a joint model's tensor, else None. What is `inner` is no output of
    a stage: it may hold one value everywhere, as the timestep of every sample does.
    """

    stage: str = ""
    step: int | None = None
    branch: str | None = None
    fqn: str | None = None
    call: int = 0
    modality: str | None = None
    inner: bool = False


@lru_cache(maxsize=1 << 14)
def key_of(name: str) -> Key:
    """Read a tensor's name; one that says nothing is but a `name`."""
    key = _read(name)
    return key if key.text() == name else replace(key, written=name)


def _read(name: str) -> Key:
    prefixes, parts = [], name.split("/")
    while parts[0] in _PREFIXES and len(parts) > 1:
        prefixes.append(parts.pop(0))
    head, count, before = parts[0], len(parts), tuple(prefixes)
    if head == "prediction" and count == 1:
        return Key(head, prefixes=before)
    if head in _TEXTS and count in (2, 3):
        return Key(head, parts[-1], part=parts[1] if count == 3 else "", prefixes=before)
    if head in _OF_HEAD:
        return Key(head, "/".join(parts[1:]), prefixes=before)
    if head == "latent" and count == 2 and parts[1] in _OF_LATENT:
        return Key(head, parts[1], prefixes=before)
    if head in ("step", "sample") and count > 2 and parts[1].isdecimal():
        part, rest = (parts[2], parts[3:]) if head == "sample" else ("", parts[2:])
        if rest:
            return Key(head, "/".join(rest), int(parts[1]), part, prefixes=before)
    if head == "module" and count == 5 and parts[2].isdecimal():
        fqn, call = split_call(parts[1])
        return Key(head, parts[4], int(parts[2]), parts[3], fqn, call, before)
    return Key(name="/".join(parts), prefixes=before)


def address(name: str) -> Address:
    """Where the tensor of a name belongs; an unknown name gives an empty address."""
    key = key_of(name)
    return Address(key.stage, key.step, key.branch, key.fqn, key.call, key.modality)


def without_modality(name: str) -> str:
    """The name that the video part of a tensor has, whichever part this is the name of."""
    return name.replace(AUDIO, "", 1)


def step_name(step: int, what: str) -> str:
    """`step/0007/cond` for step 7 and `cond`."""
    return f"step/{step:04d}/{what}"


def split_call(label: str) -> tuple[str, int]:
    """`blocks.0#1` to (`blocks.0`, 1); without a number the call is 0."""
    fqn, mark, number = label.rpartition("#")
    if mark and fqn and number.isdecimal():
        return fqn, int(number)
    return label, 0


def module_name(fqn: str, *, step: int, branch: str, slot: str, call: int = 0) -> str:
    """`module/blocks.0#1/7/cond/out.0` for the second call of `blocks.0` in step 7 and `cond`."""
    return (
        f"module/{fqn}#{call}/{step}/{branch}/{slot}"
        if call
        else (f"module/{fqn}/{step}/{branch}/{slot}")
    )


def stage_key(name: str) -> str:
    """Name without its step: floors of one stage are shared over steps (`step/*/cond`)."""
    key = key_of(name)
    if key.number is None or key.head == "module" or {*KEPT, _MEAN} & {*key.prefixes}:
        return name
    return key.text(number="*")


def spread_key(name: str) -> str:
    """Names whose benign values share a spread: those of a stage, whatever the branch or step."""
    own = key_of(name)
    if own.head == "module" and not own.prefixes:
        return f"module/{own.name.partition('.')[0]}"
    key = stage_key(name)
    head, _, last = key.rpartition("/")
    if head.endswith("step/*"):
        return key if last in {"latent", "guided"} else f"{head}/prediction"
    final = "latent/final"
    return key.replace(final, "step/*/latent") if key.endswith(final) else head or key


def is_prediction(name: str) -> bool:
    """Whether a name is of a prediction in the working precision."""
    return spread_key(name) == "step/*/prediction"
