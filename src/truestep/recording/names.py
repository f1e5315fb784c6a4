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
`sample/0003/output/NAME` output          what a recorded function returned (or `input`)
`video/frames`            decoding        decoded frames in [-1, 1]
`module/FQN/7/cond/out.0` module          one module's output
`float32/...`             as above        the same stage, raised to float32 (16-bit cases)
`stats/...`               as above        its moments, in its place (levels `stats` and `sketch`)
`sketch/...`              as above        its projection to 1,024 floats (level `sketch`)
`samples/prediction`      prediction      mean over all predictions that were replayed
========================  ==============  =========================================
"""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("text", "schedule", "latent", "prediction", "guidance", "update", "decoding")
"""Stages in the order in which a run goes through them."""

_PREFIXES = {"stats", "sketch", "float32", "float64", "samples"}
_STEP_STAGES = {"latent": "update", "guided": "guidance"}
_FIRST_PARTS = {"text": "text", "schedule": "schedule", "video": "decoding", "audio": "decoding"}


@dataclass(frozen=True)
class Address:
    """Where a tensor belongs. `step` of an update is the step that made the latent."""

    stage: str = ""
    step: int | None = None
    branch: str | None = None
    fqn: str | None = None


def address(name: str) -> Address:
    """Read a tensor name; unknown names give an empty address."""
    parts = name.split("/")
    if parts[0] in _PREFIXES:
        return address("/".join(parts[1:]))
    if name == "prediction":
        return Address("prediction")
    if parts[0] == "text" and len(parts) == 2:
        return Address("text", branch=parts[1])
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
        return Address("module", step=int(parts[2]), branch=parts[3], fqn=parts[1])
    return Address()


def step_name(step: int, what: str) -> str:
    """`step/0007/cond` for step 7 and `cond`."""
    return f"step/{step:04d}/{what}"
