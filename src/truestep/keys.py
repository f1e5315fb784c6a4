"""What a tensor name says: stage, step, branch and module. No torch.

========================  ==============  =========================================
name                      stage           what
========================  ==============  =========================================
`text/cond`               text            embeddings of the prompt
`text/uncond`             text            embeddings of the negative prompt
`schedule/...`            schedule        `sigmas`, `timesteps`, `experts`
`latent/initial`          latent          noise from the seed
`step/0007/latent`        update          latent entering step 7, made by step 6
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

_PREFIXES = {"stats", "sketch", "float32", "float64", "samples"}
_STEP_STAGES = {"latent": "update", "guided": "guidance"}
_FIRST_PARTS = {"schedule": "schedule", "video": "decoding", "waveform": "decoding"}
_TEXT_STAGES = ("text", "connector")


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


def address(name: str) -> Address:
    """Read a tensor name; unknown names give an empty address."""
    parts = name.split("/")
    if parts[0] in _PREFIXES:
        return address("/".join(parts[1:]))
    if name.startswith(AUDIO):
        return replace(address(name.removeprefix(AUDIO)), modality="audio")
    if name == "prediction":
        return Address("prediction")
    if parts[0] in _TEXT_STAGES and len(parts) in (2, 3):
        return Address(parts[0], branch=parts[-1])
    if parts[0] in _FIRST_PARTS:
        return Address(_FIRST_PARTS[parts[0]])
    if name == "latent/initial":
        return Address("latent")
    if name == "latent/final":
        return Address("update")
    if parts[0] == "step" and len(parts) == 3 and parts[1].isdecimal():
        step, what = int(parts[1]), parts[2]
        if what == "latent":
            return Address("update", step=step - 1) if step else Address("latent")
        if what in _STEP_STAGES:
            return Address(_STEP_STAGES[what], step=step)
        return Address("prediction", step=step, branch=what)
    if parts[0] == "sample" and len(parts) == 4:
        return Address(parts[2])
    if parts[0] == "module" and len(parts) == 5 and parts[2].isdecimal():
        fqn, call = split_call(parts[1])
        return Address("module", step=int(parts[2]), branch=parts[3], fqn=fqn, call=call)
    return Address()


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
    parts = name.split("/")
    at = sum(part + "/" in (*RAISED, "audio/") for part in parts[:2])
    if parts[at] in {"step", "sample"} and len(parts) > at + 2:
        return "/".join([*parts[: at + 1], "*", *parts[at + 2 :]])
    return name


def spread_key(name: str) -> str:
    """Names whose benign values share a spread: those of a stage, whatever the branch or step."""
    if name.startswith("module/"):  # module/<fqn>/<step>/<branch>/out.0
        return "module/" + name.rpartition("/")[2].partition(".")[0]
    key = stage_key(name)
    head, _, last = key.rpartition("/")
    if head.endswith("step/*"):
        return key if last in {"latent", "guided"} else f"{head}/prediction"
    final = "latent/final"
    return key.replace(final, "step/*/latent") if key.endswith(final) else head or key


def is_prediction(name: str) -> bool:
    """Whether a name is of a prediction in the working precision."""
    return spread_key(name) == "step/*/prediction"
