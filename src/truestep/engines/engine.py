"""What an engine is to truestep: where its code is cut, and what its numbers mean. No torch.

Adding an engine is one file in `engines/adapters` that holds an `ENGINE`, and its name in
`ADAPTERS`. Nothing else knows any engine by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Literal

from truestep.errors import UsageError

Role = Literal[
    "generation", "run", "guided", "passes", "prediction", "update", "noise", "text", "decode"
]
"""What a boundary is. A `generation` has everything from text to pictures, a `run` the steps;
`guided` gives what is stepped by, `passes` several predictions at once. What is inside these is
watched too; all others hide what they call. An `update` is called as a scheduler's `step` is."""

LATENTS = ("hidden_states", "sample", "latents", "latent_model_input", "x", "x_in", "img")
TIMES = ("timestep", "timesteps", "t", "sigma", "sigmas")
TEXTS = (
    "encoder_hidden_states",
    "context",
    "prompt_embeds",
    "txt",
    "prompt_emb",
    "text",
    "cap_feats",
)
"""Usual names of a denoiser's arguments, where an adapter does not say them."""

SOUND = "audio_"
"""Begin of the names of what a model that makes video and sound together is given for sound."""

SCALES = ("guidance",)
"""Usual names of a scale of guidance that a model is given, and has learned to follow."""

ADAPTERS = (
    "comfyui",
    "cosmos_predict2",
    "diffsynth",
    "fastvideo",
    "flux",
    "hunyuan",
    "ltx2",
    "sglang",
    "vllm_omni",
    "wan",
    "xdit",
)


@dataclass(frozen=True)
class Boundary:
    """A function of an engine that is watched.

    Attributes:
        at: `package.module:function` or `package.module:Class.method`.
        role: What it is.
        branches: Of `passes`, the guidance branches of its outputs, in order.
    """

    at: str
    role: Role
    branches: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Module that defines it."""
        return self.at.partition(":")[0]

    @property
    def path(self) -> tuple[str, ...]:
        """Names that lead to it inside the module."""
        return tuple(self.at.partition(":")[2].split("."))

    @property
    def open(self) -> bool:
        """Whether what it calls is watched, too."""
        return self.role in ("generation", "run", "guided", "passes")


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        name: As `--engine` takes it.
        packages: Modules whose import tells that the engine runs.
        boundaries: Its functions; denoisers (`torch.nn.Module`) and schedulers (classes with `step`
            and `set_timesteps`) need none.
        latent, timestep, text: Names of a prediction's arguments, first match counts; empty: told
            from the data.
        called: Other arguments of a prediction by the engine's name, and the trusted model's.
        ends_in_vae: Whether the latent that a `run` returns is in the space of the VAE.
        notes: What one has to know of its runs.
    """

    name: str
    packages: tuple[str, ...]
    boundaries: tuple[Boundary, ...] = ()
    latent: tuple[str, ...] = ()
    timestep: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    called: Mapping[str, str] = field(default_factory=dict)
    ends_in_vae: bool = False
    notes: tuple[str, ...] = ()


GENERIC = Engine(name="generic", packages=())
"""Any program: modules and schedulers alone."""


def engine(name: str) -> Engine:
    """An engine by name.

    Raises:
        UsageError: There is none of that name.
    """
    if name == GENERIC.name:
        return GENERIC
    if name not in ADAPTERS:
        near = get_close_matches(name, ADAPTERS, n=1)
        raise UsageError(
            f"no engine {name!r}",
            measured=f"engines: {', '.join((*ADAPTERS, GENERIC.name))}",
            hint=f"truestep engine run --engine {near[0] if near else GENERIC.name} -- python x.py",
        )
    found: Engine = import_module(f"truestep.engines.adapters.{name}").ENGINE
    return found


def engines() -> tuple[Engine, ...]:
    """All engines that have an adapter."""
    return tuple(map(engine, ADAPTERS))


def running(modules: Collection[str], candidates: Collection[Engine]) -> list[Engine]:
    """Engines of which a module has been imported."""
    return [one for one in candidates if any(name in modules for name in one.packages)]
