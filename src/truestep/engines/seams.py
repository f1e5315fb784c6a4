"""A run as its seams: schedule, noise, text, predictions by branch, what is stepped, the end.

Read from a recording of calls alone, so the trusted pipeline's and an engine's are read alike.
What nobody names is told from the data: which argument is the latent, which calls of one step are
guidance branches and of which weight, which rows of one call are several of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from truestep.calls.classes import SET_TIMESTEPS, STEP, Kind
from truestep.calls.recording import CallRecording
from truestep.calls.values import Tree, leaves, parts, tensors
from truestep.engines.assembling import ENGINE, adapter_of
from truestep.engines.engine import Engine
from truestep.recording.manifest import CallEntry

COND, UNCOND = "cond", "uncond"

LATENTS = ("hidden_states", "sample", "latents", "latent_model_input", "x", "x_in", "img")
TIMES = ("timestep", "timesteps", "t", "sigma", "sigmas")
TEXTS = ("encoder_hidden_states", "context", "prompt_embeds", "txt", "prompt_emb", "text")
"""Usual names of a denoiser's arguments, where an adapter does not say them."""

SAMPLES = ("sample", "latents", "latent")
STEPPED = ("model_output", "noise_pred")
"""Usual names of what a scheduler steps from, and by."""

MOST_TIMES = 16
"""Elements up to which a tensor may be a time, and no latent."""

AFFINE = 1e-4
"""Largest residual, relative to what is stepped, of a combination that is taken for guidance."""


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
    """

    arguments: Mapping[str, Any]
    names: Mapping[str, str]
    output: torch.Tensor
    component: str
    branch: str = ""
    said: str = ""

    def role(self, role: str) -> torch.Tensor | None:
        """The tensor of an argument by its role."""
        value = self.arguments.get(self.names.get(role, ""))
        return _one(value)

    @property
    def timestep(self) -> float | None:
        """What the model was given as time."""
        return _number(self.arguments.get(self.names.get("timestep", "")))


@dataclass(frozen=True)
class Step:
    """One denoise step; what was not seen is None.

    Attributes:
        latent: What enters it.
        time: What the scheduler is given.
        passes: Predictions, in the order in which they were made.
        guided: What is stepped by.
        after: The latent after it.
    """

    number: int
    latent: torch.Tensor | None
    time: float | None
    passes: tuple[Pass, ...]
    guided: torch.Tensor | None
    after: torch.Tensor | None

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
        decoded_from, decoded: What a decoder was given and gave.
        alone: The end, of a run of which nothing else is known.
        environment: Where it ran.
        notes: What could not be told.
    """

    label: str
    adapter: Engine
    steps: tuple[Step, ...]
    sigmas: torch.Tensor | None = None
    timesteps: torch.Tensor | None = None
    schedulers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    affine: float = 0.0
    decoded_from: torch.Tensor | None = None
    decoded: torch.Tensor | None = None
    alone: torch.Tensor | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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


def seams(recording: CallRecording, *, label: str) -> Run:
    """Read a run from a recording of calls.

    Args:
        recording: Of an engine, or of the trusted pipeline.
        label: What it is called in results.
    """
    adapter = adapter_of(recording.recording.manifest.settings)
    reader = _Reader(recording, adapter)
    numbers = sorted({c.step for c in recording.calls if c.step is not None})
    steps = tuple(reader.step(number) for number in numbers)
    sigmas, timesteps = reader.schedule()
    steps = latents_between(steps)
    run = Run(
        label=label,
        adapter=adapter,
        steps=steps,
        sigmas=sigmas,
        timesteps=timesteps,
        schedulers=_schedulers(recording),
        environment=recording.recording.manifest.environment,
    )
    decoded = reader.decoding()
    run = replace(run, decoded_from=decoded[0], decoded=decoded[1])
    return with_branches(run)


def _schedulers(recording: CallRecording) -> dict[str, dict[str, Any]]:
    settings = recording.recording.manifest.settings
    known: Mapping[str, Any] = settings.get(ENGINE, {}).get("schedulers", {})
    owners = {c.component: c.owner for c in recording.calls if c.kind == Kind.SCHEDULER}
    held = settings.get("scheduler_config", {})
    return {
        name: {"class": owner.rpartition(".")[2], **(known.get(name) or held or {})}
        for name, owner in owners.items()
    }


class _Reader:
    """Tensors of a recording's calls, as roles."""

    def __init__(self, recording: CallRecording, adapter: Engine) -> None:
        self._recording = recording
        self._adapter = adapter
        own = recording.recording.manifest.settings.get(ENGINE, {})
        self._branches: Mapping[str, Sequence[str]] = own.get("branches", {})
        self._by_step: dict[int, list[CallEntry]] = {}
        for call in recording.calls:
            if call.step is not None:
                self._by_step.setdefault(call.step, []).append(call)

    def step(self, number: int) -> Step:
        """One step: what its last update and its predictions were given and gave."""
        calls = self._by_step[number]
        predictions = [c for c in calls if c.stage == "prediction" and c.kind == Kind.MODEL]
        updates = [c for c in calls if c.method == STEP and c.kind == Kind.SCHEDULER]
        latent = guided = after = None
        time = None
        if updates:
            given = {name: self.value(tree) for name, tree in updates[-1].arguments.items()}
            latent, guided = self._stepped(given, predictions)
            after = self.first(updates[-1].output)
            time = _number(next((given[name] for name in TIMES if name in given), None))
        passes = [one for call in predictions for one in self.passes(call, latent)]
        if latent is not None:  # models that make conditions are no denoisers
            passes = [one for one in passes if one.output.numel() == latent.numel()]
        return Step(number, latent, time, tuple(passes), guided, after)

    def _stepped(
        self, given: Mapping[str, Any], predictions: Sequence[CallEntry]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What an update steps from and by: by usual names, else the latent is what models saw."""
        large = {name: t for name, value in given.items() if (t := _one(value)) is not None}
        large = {name: tensor for name, tensor in large.items() if tensor.numel() > MOST_TIMES}
        latent = next((large[name] for name in SAMPLES if name in large), None)
        guided = next((large[name] for name in STEPPED if name in large), None)
        if latent is not None and guided is not None:
            return latent, guided
        seen = [self.value(tree) for call in predictions for tree in call.arguments.values()]
        known = [t.reshape(-1) for value in seen for t in _all(value)]
        for name, tensor in large.items():
            flat = tensor.reshape(-1)
            if any(len(t) >= len(flat) and torch.equal(t[: len(flat)], flat) for t in known):
                others = [other for key, other in large.items() if key != name]
                return tensor, others[0] if len(others) == 1 else None
        return latent, guided

    def schedule(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Sigmas and timesteps: as the scheduler holds them, or as a function is given them."""
        found: dict[str, torch.Tensor] = {}
        for call in self._recording.calls:
            for name in ("sigmas", "timesteps"):
                trees = [call.state.get(name)] if call.kind == Kind.SCHEDULER else []
                trees += [call.arguments.get(name)] if call.kind == Kind.RUN else []
                for tree in trees:
                    tensor = self.first(tree)
                    first = call.method == SET_TIMESTEPS or name not in found
                    if first and tensor is not None and tensor.numel() > 1:
                        found[name] = tensor
        if "timesteps" not in found:
            times = [self.step(number).time for number in sorted(self._by_step)]
            if times and None not in times:
                found["timesteps"] = torch.tensor(times, dtype=torch.float64)
        return found.get("sigmas"), found.get("timesteps")

    def decoding(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        for call in self._recording.calls:
            if call.stage == "decoding" and call.kind == Kind.MODEL:
                given = next(iter(call.arguments.values()), None)
                taken, made = self.first(given), self.first(call.output)
                if taken is not None and made is not None:
                    return taken, made
        return None, None

    def first(self, tree: Tree) -> torch.Tensor | None:
        """The first tensor of a tree that is kept."""
        for _, name in tensors(tree):
            if name in self._recording.recording:
                return self._recording.recording[name]
        return None

    def value(self, tree: Tree) -> Any:
        """What a tree holds: a tensor, a plain value, a tuple of them; None of all else."""
        if not isinstance(tree, dict):
            return tree
        tag = next(iter(tree))
        if tag == "tensor":
            return self.first(tree)
        if tag in ("list", "tuple"):
            return tuple(self.value(part) for _, part in parts(tree))
        numbers = [leaf.value for _, leaf in leaves(tree) if leaf.kind == "number"]
        return numbers[0] if tag == "float" else None

    def passes(self, call: CallEntry, latent: torch.Tensor | None) -> Iterator[Pass]:
        """Predictions that a call holds: its rows where it is a batch of branches."""
        outputs = [
            self._recording.recording[name]
            for _, name in tensors(call.output)
            if name in self._recording.recording
        ]
        if not outputs:
            return
        arguments = {name: self.value(tree) for name, tree in call.arguments.items()}
        names = self.names(arguments, latent, outputs[0])
        told = self._branches.get(f"{call.component}.{call.method}", ())
        if told:  # several predictions are given as a list
            for branch, output in zip(told, outputs, strict=False):
                yield Pass(arguments, names, output, call.component, said=branch)
            return
        lists = [value for value in arguments.values() if isinstance(value, tuple)]
        if len(outputs) > 1 and any(len(value) == len(outputs) for value in lists):
            many = len(outputs)  # a list of samples is given, and a list returned
        else:
            many = _rows(outputs[0], latent)
            outputs = [_part(outputs[0], row, many) for row in range(many)]
        for row in range(many):
            own = {name: _part(value, row, many) for name, value in arguments.items()}
            yield Pass(own, names, outputs[row], call.component, said=call.context or "")

    def names(
        self, arguments: Mapping[str, Any], latent: torch.Tensor | None, output: torch.Tensor
    ) -> dict[str, str]:
        """Which arguments are latent, timestep and text."""
        adapter = self._adapter
        found: dict[str, str] = {}
        for role, own, usual in (
            ("latent", adapter.latent, LATENTS),
            ("timestep", adapter.timestep, TIMES),
            ("text", adapter.text, TEXTS),
        ):
            for name in (*own, *usual):
                if arguments.get(name) is not None:
                    found.setdefault(role, name)
        if latent is not None and "latent" not in found:
            for name, value in arguments.items():
                tensor = _one(value)
                if tensor is not None and tensor.numel() == output.numel():
                    found.setdefault("latent", name)
        return found


def _one(value: Any) -> torch.Tensor | None:
    """The tensor that a value is, or the only one in it."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, tuple):
        inside = [part for part in map(_one, value) if part is not None]
        return inside[0] if len(inside) == 1 else None
    return None


def _all(value: Any) -> Iterator[torch.Tensor]:
    """Tensors of a value, a tuple's by themselves."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _all(part)


def _number(value: Any) -> float | None:
    """A number, or the first element of a tensor."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    tensor = _one(value)
    return None if tensor is None or not tensor.numel() else float(tensor.reshape(-1)[0])


def _rows(output: torch.Tensor, latent: torch.Tensor | None) -> int:
    """How many branches one call is of: its rows over those of the latent that is stepped."""
    if latent is None or not latent.numel() or output.numel() % latent.numel():
        return 1
    many = output.numel() // latent.numel()
    return many if output.ndim and output.shape[0] % many == 0 else 1


def _part(value: Any, row: int, many: int) -> Any:
    """The rows of one branch: of tensors with as many rows as there are branches, or a multiple."""
    if isinstance(value, tuple) and len(value) == many > 1:
        return (value[row],)
    if many == 1 or not isinstance(value, torch.Tensor) or not value.ndim:
        return value
    if value.shape[0] % many or value.shape[0] < many:
        return value
    size = value.shape[0] // many
    return value[row * size : (row + 1) * size]


def latents_between(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Latents of runs without a scheduler: what the first prediction of a step is given."""
    known = [
        step
        if step.latent is not None or not step.passes
        else replace(step, latent=step.passes[0].role("latent"))
        for step in steps
    ]
    return tuple(
        replace(step, after=known[index + 1].latent)
        if step.after is None and index + 1 < len(known)
        else step
        for index, step in enumerate(known)
    )


def with_branches(run: Run) -> Run:
    """Name the passes: by their weights in what is stepped by, else as the engine says."""
    counts = {len(step.passes) for step in run.steps if step.passes}
    if counts == {1}:
        alone = [s.but(passes=tuple(replace(p, branch=COND) for p in s.passes)) for s in run.steps]
        return replace(run, steps=tuple(alone), weights={COND: 1.0})
    most = max(counts, default=0)
    weights, residual = _weights(run, most)
    labels = [str(index) for index in range(most)] if weights is None else _labels(weights)
    steps = []
    for step in run.steps:
        passes = []
        for index, one in enumerate(step.passes):
            told = one.said if one.said in (COND, UNCOND) and weights is None else ""
            passes.append(replace(one, branch=told or labels[index]))
        steps.append(step.but(passes=tuple(passes)))
    named_weights = {} if weights is None else dict(zip(labels, weights, strict=True))
    return replace(run, steps=tuple(steps), weights=named_weights, affine=residual)


def _labels(weights: Sequence[float]) -> list[str]:
    """Guidance moves away from `uncond`: the branch of the largest weight is `cond`."""
    largest = max(range(len(weights)), key=lambda i: weights[i])
    if len(weights) == 2:
        return [COND if index == largest else UNCOND for index in range(2)]
    return [COND if index == largest else str(index) for index in range(len(weights))]


def _weights(run: Run, most: int) -> tuple[list[float] | None, float]:
    """Weights of the passes in what is stepped by, over all steps that have all of them.

    Returns:
        None, and the residual, where it is not an affine combination of them.
    """
    rows, wanted = [], []
    for step in run.steps:
        outputs = [one.output.reshape(-1).double() for one in step.passes]
        fits = step.guided is not None and len(outputs) == most > 1
        if fits and step.guided is not None and step.guided.numel() == outputs[0].numel():
            rows.append(torch.stack(outputs, dim=1))
            wanted.append(step.guided.reshape(-1).double())
    if not rows or most < 2:
        return None, float("nan")
    matrix, target = torch.cat(rows), torch.cat(wanted)
    solved = torch.linalg.lstsq(matrix.T @ matrix, (matrix.T @ target)[:, None]).solution[:, 0]
    size = float(target.norm())
    residual = float((matrix @ solved - target).norm()) / size if size else float("inf")
    return ([float(w) for w in solved], residual) if residual <= AFFINE else (None, residual)
