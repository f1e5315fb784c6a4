"""Runs as files of tensors named by stage: what a node, a script or truestep's own runtime writes.

============================================  ===================================================
`schedule/sigmas`, `schedule/timesteps`       also without `schedule/`
`latent/initial`, `latent/final`              also `noise`, `final`, ComfyUI's `latent_tensor`
`text/cond`, `text/uncond`                    also `cond`, `uncond` alone
`step/0000/latent`, `/guided`, `/next`        of each step; `/sigma` or `/timestep`
`step/0000/cond`, `/uncond`                   predictions, also with `/pred` behind
============================================  ===================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from truestep.calls.recording import CallRecording
from truestep.engines.branches import latents_between, with_branches
from truestep.engines.engine import GENERIC
from truestep.engines.run import Pass, Run, Step
from truestep.engines.seams import seams
from truestep.errors import UsageError
from truestep.recording.format import Recording
from truestep.recording.manifest_reading import read_recording
from truestep.recording.readers import load

_OF_STEP = re.compile(r"step/(\d+)/(.+)")
_NOT_BRANCHES = ("latent", "guided", "next", "sigma", "timestep", "denoised", "x")
_NAMES = {
    "sigmas": ("schedule/sigmas", "sigmas"),
    "timesteps": ("schedule/timesteps", "timesteps"),
    "noise": ("latent/initial", "noise"),
    "final": ("latent/final", "final", "raw", "latent_tensor", "latent"),
}


def run_of(path: Path, *, label: str = "") -> Run:
    """Read a run from any file that holds one.

    Args:
        path: A recording of calls, or a file of tensors with the names above.
        label: What it is called; default the path.

    Raises:
        FileFormatError: It cannot be read.
        UsageError: Nothing in it is a seam of a run.
    """
    label = label or str(path)
    recording = calls_of(path)
    if recording is not None:
        return seams(recording, label=label)
    tensors = load(path, label=label).tensors
    run = _named({name: tensors[name] for name in tensors}, label)
    if run is None:
        raise UsageError(
            "no seam of a run is in the file",
            where=str(path),
            measured=f"tensors: {', '.join(list(tensors)[:8])}",
            likely="its tensors have other names than schedule/sigmas, step/0000/latent, ...",
            hint="truestep engine run -- python run.py",
        )
    return run


def calls_of(path: Path) -> CallRecording | None:
    """The recording of calls that a file is, if it is one."""
    if path.suffix.lower() != ".safetensors":
        return None
    header, manifest = read_recording(path)
    if manifest is None or not manifest.calls:
        return None
    return CallRecording(Recording.opened(header, manifest))


def _named(tensors: Mapping[str, torch.Tensor], label: str) -> Run | None:
    own = {
        role: next((tensors[name] for name in names if name in tensors), None)
        for role, names in _NAMES.items()
    }
    texts = {
        branch: tensors[name]
        for branch in ("cond", "uncond")
        for name in (branch, f"text/{branch}")
        if name in tensors
    }
    numbers = sorted({int(m[1]) for m in map(_OF_STEP.fullmatch, tensors) if m})
    steps = tuple(_step(tensors, number, texts) for number in numbers)
    if not steps and all(value is None for value in own.values()):
        return None
    steps = latents_between(steps)
    if steps and own["noise"] is not None and steps[0].latent is None:
        steps = (steps[0].but(latent=own["noise"]), *steps[1:])
    if steps and own["final"] is not None and steps[-1].after is None:
        steps = (*steps[:-1], steps[-1].but(after=own["final"]))
    return with_branches(
        Run(
            label=label,
            adapter=GENERIC,
            steps=steps,
            sigmas=own["sigmas"],
            timesteps=own["timesteps"],
            alone=None if steps else own["final"],
            in_vae="latent_tensor" in tensors,
        )
    )


def _step(
    tensors: Mapping[str, torch.Tensor], number: int, texts: Mapping[str, torch.Tensor]
) -> Step:
    at = {
        m[2]: t
        for name, t in tensors.items()
        if (m := _OF_STEP.fullmatch(name)) and int(m[1]) == number
    }
    times = (at[name] for name in ("timestep", "sigma") if name in at)
    time = next((float(t.reshape(-1)[0]) for t in times if t.numel()), None)
    latent = at.get("latent")
    passes = []
    for name, output in at.items():
        branch = name.removesuffix("/pred")
        if branch in _NOT_BRANCHES or "/" in branch:
            continue
        given = {"latent": latent, "timestep": time, "text": texts.get(branch)}
        arguments = {role: value for role, value in given.items() if value is not None}
        names = {role: role for role in arguments}
        passes.append(Pass(arguments, names, output, "", said=branch))
    given_to_scheduler = time if "next" in at else None
    return Step(number, latent, given_to_scheduler, tuple(passes), at.get("guided"), at.get("next"))
