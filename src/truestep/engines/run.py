"""A run of an engine as values: its steps, and the predictions of each by guidance branch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from truestep.engines.engine import Engine
from truestep.engines.inside import Inside

COND, UNCOND = "cond", "uncond"


@dataclass(frozen=True)
class Place:
    """The call that a prediction is of.

    Attributes:
        model: Component and method: `WanModel.forward`.
        number: Of the call among that model's, from 0.
        row, rows: Of a batch of branches, which of how many.
    """

    model: str
    number: int
    row: int = 0
    rows: int = 1


@dataclass(frozen=True)
class Pass:
    """One prediction for one guidance branch.

    Attributes:
        arguments: Tensors (the rows of this branch) and plain values by name; a list as tuple.
        names: Which of them are `latent`, `timestep` and `text`.
        output: What was predicted, in the engine's own convention and layout.
        component: Of which model.
        branch: `cond`, `uncond`, or a number where that cannot be told.
        said: What the engine itself calls it.
        place: Of which call it is.
    """

    arguments: Mapping[str, Any]
    names: Mapping[str, str]
    output: torch.Tensor
    component: str
    branch: str = ""
    said: str = ""
    place: Place | None = None

    def role(self, role: str) -> torch.Tensor | None:
        """The tensor of an argument by its role."""
        value = self.arguments.get(self.names.get(role, ""))
        return one_tensor(value)

    @property
    def timestep(self) -> float | None:
        """What the model was given as time: of tokens with their own, what is noised most."""
        value = self.arguments.get(self.names.get("timestep", ""))
        tensor = one_tensor(value)
        return number_of(value if tensor is None or not tensor.numel() else tensor.max())


@dataclass(frozen=True)
class Step:
    """One denoise step; what was not seen is None.

    Attributes:
        latent: What enters it.
        time: What the scheduler is given.
        passes: Predictions, in the order in which they were made.
        guided: What guidance makes of the predictions.
        after: The latent after it.
        parts: By branch what it is made of, where that is not the predictions themselves.
        stepped: What is stepped by, where that is not `guided` itself.
    """

    number: int
    latent: torch.Tensor | None
    time: float | None
    passes: tuple[Pass, ...]
    guided: torch.Tensor | None
    after: torch.Tensor | None
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    stepped: torch.Tensor | None = None

    @property
    def combined(self) -> dict[str, torch.Tensor]:
        """What guidance combines, by branch."""
        return dict(self.parts) or {one.branch: one.output for one in self.passes}

    @property
    def stepped_by(self) -> torch.Tensor | None:
        """What a scheduler is given in this step."""
        return self.guided if self.stepped is None else self.stepped

    def but(self, **changes: Any) -> Step:
        """The same step with other fields."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Run:
    """A generation by its seams.

    Attributes:
        label: What it is called in results.
        adapter: Of its engine.
        steps: All that were seen.
        sigmas, timesteps: Of its schedule.
        schedulers: Class and settings by component.
        weights: Of each branch in what is stepped by; empty where none could be told.
        affine: Residual of that, relative.
        scales: Likewise by model, where two experts are guided otherwise.
        decoded_from, decoded: What a decoder was given and gave.
        alone: The end, of a run of which nothing else is known.
        in_vae: Whether the end is in the space of the VAE.
        environment: Where it ran.
        insides: Calls of models whose modules were recorded, by model and number.
        command: The program, as it was started.
        repeated: Of a run on several ranks what one of them should repeat of the first, and does
            not: its own and the first's, by the seam's name.
        notes: What was done to read it: conversions, and how one run was made of several ranks.
    """

    label: str
    adapter: Engine
    steps: tuple[Step, ...]
    sigmas: torch.Tensor | None = None
    timesteps: torch.Tensor | None = None
    schedulers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    affine: float = 0.0
    scales: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    decoded_from: torch.Tensor | None = None
    decoded: torch.Tensor | None = None
    alone: torch.Tensor | None = None
    in_vae: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    insides: Mapping[tuple[str, int], Inside] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    repeated: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def but(self, **changes: Any) -> Run:
        """The same run with other fields."""
        return replace(self, **changes)

    @property
    def dtype(self) -> torch.dtype:
        """Of its predictions."""
        outputs = (one.output.dtype for step in self.steps for one in step.passes)
        return next(outputs, torch.float32)

    @property
    def count(self) -> int:
        """Steps of its schedule; a solver may predict more often."""
        if self.timesteps is not None:
            return len(self.timesteps)
        if self.sigmas is not None and len(self.sigmas):
            return len(self.sigmas) - (float(self.sigmas[-1]) == 0.0)
        return len(self.steps)

    def sigma(self, index: int) -> float | None:
        """Sigma of a step; None where none is known, or the solver predicts more often."""
        known = self.sigmas is not None and len(self.steps) == self.count
        if not known or self.sigmas is None or index >= len(self.sigmas):
            return None
        return float(self.sigmas[index])

    def weights_at(self, index: int) -> Mapping[str, float]:
        """Of each branch in what a step is stepped by."""
        if not self.scales or index >= len(self.steps):
            return self.weights
        models = (one.component for one in self.steps[index].passes)
        return self.scales.get(next(models, ""), self.weights)

    @property
    def noise(self) -> torch.Tensor | None:
        """What the first step is given."""
        return self.steps[0].latent if self.steps else None

    @property
    def final(self) -> torch.Tensor | None:
        """The latent after the last step."""
        return self.steps[-1].after if self.steps else self.alone

    @property
    def text(self) -> dict[str, torch.Tensor]:
        """What each branch is given as text, at the first step that has predictions."""
        for step in self.steps:
            found = {one.branch: one.role("text") for one in step.passes}
            if found:
                return {branch: text for branch, text in found.items() if text is not None}
        return {}


def one_tensor(value: Any) -> torch.Tensor | None:
    """The tensor that a value is, or the only one in it."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, tuple):
        inside = [part for part in map(one_tensor, value) if part is not None]
        return inside[0] if len(inside) == 1 else None
    return None


def number_of(value: Any) -> float | None:
    """A number, or the first element of a tensor."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    tensor = one_tensor(value)
    return None if tensor is None or not tensor.numel() else float(tensor.reshape(-1)[0])
