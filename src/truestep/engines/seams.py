"""A run as its seams: schedule, noise, text, predictions by branch, what is stepped, the end.

Read from a recording of calls alone, so the trusted pipeline's and an engine's are read alike.
What nobody names is told from the data: which argument is the latent, which calls of one step are
guidance branches and of which weight, which rows of one call are several of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from truestep.calls.classes import SET_TIMESTEPS, STEP, Kind
from truestep.calls.recording import CallRecording
from truestep.calls.values import Tree, leaves, parts, tensors
from truestep.engines.assembling import ENGINE, adapter_of
from truestep.engines.branches import latents_between, with_branches
from truestep.engines.engine import LATENTS, TEXTS, TIMES, Engine
from truestep.engines.inside import insides
from truestep.engines.run import Pass, Place, Run, Step, number_of, one_tensor
from truestep.recording.manifest import CallEntry

SAMPLES = ("sample", "latents", "latent")
STEPPED = ("model_output", "noise_pred", "x0_pred", "denoised_sample")
"""Usual names of what a scheduler steps from, and by."""

CALLED_TIMESTEPS = "timesteps of 1 to 0, with the closing zero: sigmas"

MOST_TIMES = 16
"""Elements up to which a tensor may be a time, and no latent."""


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
    sigmas, timesteps, renamed = reader.schedule(steps)
    steps = latents_between(steps)
    run = Run(
        label=label,
        adapter=adapter,
        steps=steps,
        sigmas=sigmas,
        timesteps=timesteps,
        schedulers=_schedulers(recording),
        environment=recording.recording.manifest.environment,
        insides=insides(recording),
        command=_command(recording),
        notes=(f"converted: {CALLED_TIMESTEPS}",) if renamed else (),
    )
    if steps and steps[-1].after is None and (end := reader.end()) is not None:
        run = replace(
            run, steps=(*steps[:-1], steps[-1].but(after=end)), in_vae=adapter.ends_in_vae
        )
    decoded = reader.decoding()
    run = replace(run, decoded_from=decoded[0], decoded=decoded[1])
    if run.final is None and steps and steps[-1].passes and _fits(decoded[0], steps[-1].latent):
        run = replace(run, steps=(*run.steps[:-1], run.steps[-1].but(after=decoded[0])))
    return with_branches(run)


def _fits(end: torch.Tensor | None, latent: torch.Tensor | None) -> bool:
    return end is not None and latent is not None and end.shape == latent.shape


def _command(recording: CallRecording) -> tuple[str, ...]:
    told = recording.recording.manifest.settings.get(ENGINE, {}).get("command") or ()
    return tuple(map(str, told)) if isinstance(told, list | tuple) else ()


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
        self._roles: Mapping[str, str] = own.get("roles", {})
        self._by_step: dict[int, list[CallEntry]] = {}
        self._numbers: dict[int, int] = {}
        seen: Counter[tuple[str, str]] = Counter()
        for call in recording.calls:
            self._numbers[id(call)] = seen[call.component, call.method]
            seen[call.component, call.method] += 1
            if call.step is not None:
                self._by_step.setdefault(call.step, []).append(call)

    def step(self, number: int) -> Step:
        """One step: what its last update and its predictions were given and gave."""
        calls = self._by_step[number]
        told = [c for c in calls if self._role(c) in ("guided", "passes")]
        predictions = [
            c for c in calls if c.stage == "prediction" and c.kind == Kind.MODEL and c not in told
        ]
        if told:
            return self._denoised(number, told, predictions)
        updates = [c for c in calls if c.method == STEP and c.kind == Kind.SCHEDULER]
        latent = guided = after = None
        time = None
        update = self._of_predictions(updates, predictions)
        if update is not None:
            given = {name: self.value(tree) for name, tree in update.arguments.items()}
            latent, guided = self._stepped(given, predictions)
            after = self.first(update.output)
            time = next((_time(given[name]) for name in TIMES if name in given), None)
        passes = [one for call in predictions for one in self.passes(call, latent)]
        if latent is not None:  # models that make conditions are no denoisers
            passes = [one for one in passes if one.output.numel() == latent.numel()]
        return Step(number, latent, time, tuple(passes), guided, after)

    def _of_predictions(
        self, updates: Sequence[CallEntry], predictions: Sequence[CallEntry]
    ) -> CallEntry | None:
        """The last update of what models predict first: after video, sound may be stepped, too."""
        outputs = [self.first(call.output) for call in predictions]
        sizes = [output.numel() for output in outputs if output is not None]
        made = [(call, self.first(call.output)) for call in updates]
        fit = [
            call
            for call, after in made
            if after is not None and after.numel() and any(n % after.numel() == 0 for n in sizes)
        ]
        return next(reversed(_of_largest(fit, self.first) or updates), None)

    def _role(self, call: CallEntry) -> str:
        return self._roles.get(f"{call.component}.{call.method}", "")

    def _denoised(
        self, number: int, told: Sequence[CallEntry], predictions: Sequence[CallEntry]
    ) -> Step:
        """A step of functions that give denoised samples, `x - sigma v`, of what models predict.

        Which row of a model's call is which branch is told by which denoised sample it makes. Of a
        sampler that predicts twice a step the first counts: what follows is another step's.
        """
        named = [one for c in told if self._role(c) == "passes" for one in self.passes(c, None)]
        combined = next((c for c in told if self._role(c) == "guided"), None)
        latent = next((one.role("latent") for one in named), None)
        sigma = next((one.timestep for one in named), None)
        guided = self.first(combined.output) if combined else None
        parts = {one.said: one.output for one in named}
        stepped = None
        if guided is not None and latent is not None and sigma:
            stepped = (latent - guided) / sigma
        rows = [one for call in predictions for one in self.passes(call, latent)]
        passes = [replace(one, said=_made(one, parts, latent, sigma)) for one in rows]
        if {one.said for one in passes} != {*parts} or len(passes) != len(parts):
            passes = named
        return Step(number, latent, None, tuple(passes), guided, None, parts, stepped)

    def _stepped(
        self, given: Mapping[str, Any], predictions: Sequence[CallEntry]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What an update steps from and by: by usual names, else the latent is what models saw."""
        large = {name: t for name, value in given.items() if (t := one_tensor(value)) is not None}
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

    def schedule(
        self, steps: Sequence[Step]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, bool]:
        """Sigmas and timesteps: as the scheduler holds them, or as a function is given them; else
        the timesteps that it was given in the steps.

        Returns:
            Both, and whether the engine calls its sigmas timesteps.
        """
        found: dict[str, torch.Tensor] = {}
        for call in self._recording.calls:
            for name in ("sigmas", "timesteps"):
                trees = [call.state.get(name)] if call.kind == Kind.SCHEDULER else []
                trees += [call.arguments.get(name)] if call.kind == Kind.RUN else []
                for tree in trees:
                    tensor = self._series(tree)
                    first = call.method == SET_TIMESTEPS or name not in found
                    if first and tensor is not None and tensor.numel() > 1 and not _counts(tensor):
                        found[name] = tensor
        times = [step.time for step in steps]
        if "timesteps" not in found and times and None not in times:
            found["timesteps"] = torch.tensor(times, dtype=torch.float64)
        renamed = "sigmas" not in found and _are_sigmas(found.get("timesteps"), len(steps))
        if renamed:
            found["sigmas"] = found.pop("timesteps")
        return found.get("sigmas"), found.get("timesteps"), renamed

    def _series(self, tree: Tree) -> torch.Tensor | None:
        """A tensor, or the numbers of a list as one."""
        value = self.value(tree)
        if isinstance(value, list) and all(isinstance(n, int | float) for n in value):
            return torch.tensor(value, dtype=torch.float64)
        return self.first(tree)

    def end(self) -> torch.Tensor | None:
        """What the function returns that spans the steps, of the size of a latent."""
        for call in self._recording.calls:
            if self._role(call) == "run" and (end := self.first(call.output)) is not None:
                return end
        return None

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
            inside = tuple(self.value(part) for _, part in parts(tree))
            return list(inside) if tag == "list" and not any(tensors(tree)) else inside
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
        arguments = self._arguments(call)
        names = self.names(arguments, latent, outputs[0])
        told = self._branches.get(f"{call.component}.{call.method}", ())
        if told:  # several predictions are given as a list
            for branch, output in zip(told, outputs, strict=False):
                yield Pass(arguments, names, output, call.component, said=branch)
            return
        number = self._numbers[id(call)]
        lists = [value for value in arguments.values() if isinstance(value, tuple)]
        if len(outputs) > 1 and any(len(value) == len(outputs) for value in lists):
            many = len(outputs)  # a list of samples is given, and a list returned
        else:
            many = _rows(outputs[0], latent)
            outputs = [_part(outputs[0], row, many) for row in range(many)]
        for row in range(many):
            own = {name: _part(value, row, many) for name, value in arguments.items()}
            place = Place(f"{call.component}.{call.method}", number, row, many)
            said = call.context or ""
            yield Pass(own, names, outputs[row], call.component, said=said, place=place)

    def _arguments(self, call: CallEntry) -> dict[str, Any]:
        """Arguments of a call as the trusted model calls them; what is in a table or a dataclass
        as `argument/key`."""
        found: dict[str, Any] = {}
        for name, tree in call.arguments.items():
            if isinstance(tree, dict) and (tree.get("kind") == "dataclass" or "dict" in tree):
                inner = {f"{name}/{key}": self.value(part) for key, part in parts(tree)}
                found |= {self._adapter.called.get(key, key): each for key, each in inner.items()}
            else:
                found[self._adapter.called.get(name, name)] = self.value(tree)
        return found

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
                tensor = one_tensor(value)
                if tensor is not None and tensor.numel() == output.numel():
                    found.setdefault("latent", name)
        return found


def _counts(times: torch.Tensor) -> bool:
    """Whether what is called times are the numbers of steps."""
    return not times.is_floating_point() and times.tolist() == [*range(times.numel())]


def _of_largest(
    updates: Sequence[CallEntry], first: Callable[[Tree], torch.Tensor | None]
) -> list[CallEntry]:
    """Of updates those of the largest latent."""
    sizes = [0 if (after := first(call.output)) is None else after.numel() for call in updates]
    return [call for call, size in zip(updates, sizes, strict=True) if size == max(sizes)]


def _time(value: Any) -> float | None:
    """The time that a scheduler is given; None where it is given its whole schedule."""
    tensor = one_tensor(value)
    if tensor is not None and tensor.numel() and bool((tensor != tensor.reshape(-1)[0]).any()):
        return None
    return number_of(value)


def _are_sigmas(times: torch.Tensor | None, steps: int) -> bool:
    """Whether times are what flow matching calls sigmas: one more than there are steps, to 0."""
    if times is None or times.numel() != steps + 1:
        return False
    return float(times[-1]) == 0.0 and 0.0 < float(times.max()) <= 1.0


def _made(
    one: Pass,
    parts: Mapping[str, torch.Tensor],
    latent: torch.Tensor | None,
    sigma: float | None,
) -> str:
    """The branch whose denoised sample a model's output makes."""
    if latent is None or not sigma or one.output.numel() != latent.numel():
        return ""
    value = latent.reshape(-1).double() - sigma * one.output.reshape(-1).double()
    sizes = {branch: float((value - x.reshape(-1)).norm()) for branch, x in parts.items()}
    return min(sizes, key=lambda branch: sizes[branch], default="")


def _all(value: Any) -> Iterator[torch.Tensor]:
    """Tensors of a value, a tuple's by themselves."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _all(part)


def _rows(output: torch.Tensor, latent: torch.Tensor | None) -> int:
    """How many branches one call is of: its rows over those of the latent that is stepped."""
    if latent is None or not latent.numel() or output.numel() % latent.numel():
        return 1
    many = output.numel() // latent.numel()
    return many if output.ndim and output.shape[0] % many == 0 else 1


def _part(value: Any, row: int, many: int) -> Any:
    """The rows of one branch: of tensors with as many rows as there are branches, or a multiple."""
    if isinstance(value, tuple | list) and len(value) == many > 1:
        return type(value)([value[row]])
    if many == 1 or not isinstance(value, torch.Tensor) or not value.ndim:
        return value
    if value.shape[0] % many or value.shape[0] < many:
        return value
    size = value.shape[0] // many
    return value[row * size : (row + 1) * size]
