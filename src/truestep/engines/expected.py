"""What an engine's seams are set against, by their order; all but the predictions.

Schedule, noise and text are the reference's. Guidance is its arithmetic on the *engine's own*
predictions, an update the trusted scheduler's on the engine's own latent, decoding the trusted
decoder's of the engine's own end: none of these inherits anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from truestep.engines.conventions import (
    TIME_SCALES,
    as_shape,
    out_of_vae,
    text_as,
    with_closing_zero,
)
from truestep.engines.engine import SOUND, TIMES, Engine
from truestep.engines.run import COND, UNCOND, Pass, Run, Step, number_of, one_tensor
from truestep.engines.trusted import Denoiser, Trusted, schedule_of, solvers, stepped
from truestep.errors import FOREIGN, one_line
from truestep.floors import NoiseRun
from truestep.keys import Address, address, step_name
from truestep.measure.distance import distance, same_bits

SIGMAS, TIMESTEPS, GIVEN = "schedule/sigmas", "schedule/timesteps", "schedule/given"
ENTERING = "entering"
"""Begin of the name of a latent that enters a step, in a comparison of runs."""

RANKS = "ranks"
"""Begin of the name of what a rank should repeat of the first: `ranks/1/step/0000/guided`."""

SCALE = "guidance"
"""Begin of the name of a scale of guidance that a model is given: `guidance/guidance/cond`."""

DECODED = "entering/decoder"
"""The latent that a decoder is given."""

NOISE, FINAL, FRAMES = "latent/initial", "latent/final", "video/frames"

AGREES = 1e-4
"""Largest difference, relative to the latent, of a solver that is said to be the one that runs."""

FITTED = 1e-6
"""How exactly weights are fitted, of float32 predictions."""

NEAR = 0.1
"""Relative difference above which a noise is another draw, not another rounding."""


@dataclass(frozen=True)
class Predicted:
    """A prediction that was judged, and how the trusted model makes it.

    Attributes:
        one: The engine's.
        actual: Its output as the trusted model would return it; None where that would round more.
        expected: What the trusted model returns.
        denoiser: That model, called by name.
        given: What it is called with.
        time: Of the trusted model's schedule.
    """

    one: Pass
    actual: torch.Tensor | None
    expected: torch.Tensor
    denoiser: Denoiser
    given: Mapping[str, torch.Tensor]
    time: float | None = None

    @property
    def model(self) -> torch.nn.Module:
        """The trusted model."""
        return self.denoiser.model

    def forward(self) -> torch.Tensor:
        """Run it on the engine's inputs."""
        made: torch.Tensor = self.denoiser(**self.given)
        return made


@dataclass
class Seams:
    """What is set against what, by name; in the order of the run.

    Attributes:
        actual: The engine's, in the trusted convention.
        expected: What the trusted side makes of the engine's inputs.
        floor: Benign runs of the trusted model.
        conversions: What was done to the engine's values, by name.
        unjudged: Seams that nothing could be set against, and why.
        undecided: Of these, what leaves the whole run undecided.
        notes: What else there is to say.
        predictions: Those that were judged, by name.
    """

    actual: dict[str, torch.Tensor] = field(default_factory=dict)
    expected: dict[str, torch.Tensor] = field(default_factory=dict)
    floor: list[NoiseRun] = field(default_factory=list)
    conversions: dict[str, None] = field(default_factory=dict)
    unjudged: dict[str, str] = field(default_factory=dict)
    undecided: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    predictions: dict[str, Predicted] = field(default_factory=dict)

    def put(self, name: str, actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
        """Set two tensors against each other, the engine's in the shape of the other."""
        if actual is None or expected is None:
            return
        value, how = _fit(name, actual, expected)
        self.convert(how)
        self.actual[name], self.expected[name] = value, expected

    def convert(self, how: str) -> None:
        """Note a conversion."""
        if how:
            self.conversions[how] = None


def _fit(name: str, value: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, str]:
    return (text_as if name.startswith("text/") else as_shape)(value, like)


def fitted(name: str, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor of a seam in the shape of another's, as `Seams.put` sets them."""
    return _fit(name, value, like)[0]


def put_schedule(found: Seams, run: Run, known: Run | None, trusted: Trusted) -> None:
    if known is not None:
        sigmas, timesteps, why = known.sigmas, known.timesteps, ""
    else:
        sigmas, timesteps, why = schedule_of(trusted.scheduler_class(), run.count)
    _put_given(found, run, known)
    if why:
        found.unjudged["schedule"] = why
        return
    count = known.count if known is not None else run.count
    mine, theirs = with_closing_zero(run.sigmas, run.count), with_closing_zero(sigmas, count)
    if known is None and trusted.gives_sigmas() and not _agree(mine, theirs):
        why = "not the scheduler's own, and the pipeline may give it others: a reference tells"
        found.unjudged["schedule"] = found.undecided[SIGMAS] = why
        return
    if mine is not None and theirs is not None:
        if run.sigmas is not None and len(run.sigmas) == run.count:
            found.convert("a schedule without its closing zero")
        found.put(SIGMAS, mine.float(), theirs.float())
    elif mine is None and theirs is not None:
        found.unjudged["sigmas"] = "the run says none"
    if run.timesteps is not None and timesteps is not None and len(timesteps):
        scale = time_scale(float(run.timesteps[0]), float(timesteps[0]))
        found.convert(TIME_SCALES[scale])
        found.put(TIMESTEPS, (run.timesteps.double() * scale).float(), timesteps.float())


def _agree(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    if mine is None or theirs is None:
        return True
    return mine.shape == theirs.shape and distance(mine.float(), theirs.float()).rel_l2 <= AGREES


def _put_given(found: Seams, run: Run, known: Run | None) -> None:
    """What the model is given as time, against the engine's own schedule.

    A model may be given the time the other way: where the reference's is, it is right, and where
    there is none, it is not judged.
    """
    pairs = _given_times(run, known)
    if not pairs:
        found.unjudged["time"] = "nothing says what time the model is given"
        return
    if known is not None and _is_of_edm(known):
        found.convert("times of a flow as EDM writes it, sigma / (1 + sigma)")
        pairs = _of_edm(run)
    turned = _is_turned(pairs)
    if turned and known is None:
        found.unjudged["time"] = "the model is given 1 - t, and no reference was given"
        return
    if turned and known is not None and _is_turned(_given_times(known)):
        found.convert("times the other way, 1 - t")
        pairs = [(1.0 - given, time) for given, time in pairs]
    scale = time_scale(pairs[0][0], pairs[0][1])
    ours = (torch.tensor([a for a, _ in pairs], dtype=torch.float64) * scale).float()
    found.put(GIVEN, ours, torch.tensor([b for _, b in pairs], dtype=torch.float32))


def _of_edm(run: Run) -> list[tuple[float, float]]:
    """By prediction the time that its model is given, and sigma / (1 + sigma)."""
    sigmas = [(step, run.sigma(index)) for index, step in enumerate(run.steps)]
    return [
        (one.timestep, sigma / (1.0 + sigma))
        for step, sigma in sigmas
        for one in step.passes
        if sigma is not None and one.timestep is not None
    ]


def _is_of_edm(known: Run) -> bool:
    pairs = _of_edm(known)
    return bool(pairs) and all(abs(given - time) <= AGREES for given, time in pairs)


def _is_turned(pairs: Sequence[tuple[float, float]]) -> bool:
    """Whether a model is given 1 - t, of times in 0 to 1 or 0 to 1000."""
    unit = 1000.0 if max((time for _, time in pairs), default=0.0) > 1.0 else 1.0
    apart = [abs(given - (1.0 - time / unit)) for given, time in pairs]
    straight = [abs(given - time / unit) for given, time in pairs]
    return bool(apart) and max(apart) <= AGREES < max(straight)


def _given_times(run: Run, known: Run | None = None) -> list[tuple[float, float]]:
    """By prediction: what its model is given as time, and what time it is.

    A scheduler that is given the time says it; else it is the timestep, or the sigma, of the step,
    by the run's own schedule or, where it says none, the reference's.
    """
    own = run.timesteps if run.timesteps is not None else run.sigmas
    if own is None and known is not None:
        own = known.timesteps if known.timesteps is not None else known.sigmas
    if own is not None and len(run.steps) not in (len(own), len(own) - 1):
        own = None  # a solver that predicts more often than it steps
    pairs = []
    for index, step in enumerate(run.steps):
        time = step.time
        if time is None and own is not None:
            time = float(own[index])
        if time is not None:
            pairs += [(given, time) for one in step.passes for given in _times(one, run.adapter)]
    return pairs


def _times(one: Pass, adapter: Engine) -> list[float]:
    """All that a model is given as time: its timestep, and what an adapter says are others."""
    names = [name for name in adapter.called.values() if name.removeprefix(SOUND) in TIMES]
    values = (number_of(one_tensor(one.arguments.get(name))) for name in names)
    return [time for time in (one.timestep, *values) if time is not None]


def time_scale(engine: float, trusted: float) -> float:
    """The factor between two conventions of time that brings them nearest."""
    if not engine or not trusted:
        return 1.0
    return min(TIME_SCALES, key=lambda scale: abs(math.log(abs(engine * scale / trusted))))


def put_noise_and_text(found: Seams, run: Run, known: Run | None) -> None:
    if known is None:
        found.unjudged["noise"] = found.unjudged["text"] = "no reference was given"
        return
    found.put(NOISE, run.noise, known.noise)
    if NOISE in found.actual and found.actual[NOISE].shape == found.expected[NOISE].shape:
        a, b = (side[NOISE].reshape(-1).double() for side in (found.actual, found.expected))
        if float((a - b).norm()) > NEAR * float(b.norm()):
            alike = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
            found.notes.append(
                f"the noise is another draw (correlation {alike:.2f}, standard deviation "
                f"{float(a.std()):.3f} for {float(b.std()):.3f}): inject the reference's"
            )
    for branch, text in known.text.items():
        found.put(f"text/{branch}", run.text.get(branch), text)
        if branch not in run.text:
            found.unjudged[f"text/{branch}"] = "the run does not hold it: the reference's is taken"


def place_of(name: str) -> Address:
    """Where a seam belongs; a latent that enters a step is of the stage `latent`."""
    head, _, rest = name.partition("/")
    if name == DECODED:
        return Address(stage="decoding")
    if head == SCALE:
        return Address(stage="guidance", branch=rest.rpartition("/")[2])
    if head == RANKS:  # what a rank repeats of another
        return place_of(rest.partition("/")[2])
    if head == ENTERING:
        return Address(stage="latent", step=int(rest.partition("/")[0]))
    return address(name)


def in_model_space(found: Seams, run: Run, trusted: Trusted) -> Run:
    """A run whose end is the denoiser's latent, where the engine gives it in the VAE's space."""
    if not run.in_vae or run.final is None:
        return run
    final, how = out_of_vae(run.final, trusted.config("vae"))
    found.convert(how)
    if not how:
        found.unjudged["end"] = "it is in the space of a VAE, and the trusted folder has none"
    end = final if how else None
    if not run.steps:
        return replace(run, alone=end, in_vae=False)
    return replace(run, steps=(*run.steps[:-1], run.steps[-1].but(after=end)), in_vae=False)


def put_guidance(found: Seams, run: Run, known: Run | None) -> None:
    """Guidance as arithmetic on the run's own predictions, by the reference's weights."""
    if not any(step.combined and step.guided is not None for step in run.steps):
        return
    weights, whose = (known.weights, "the reference's") if known else ({}, "")
    if not weights:
        weights, whose = run.weights, "the run's own"
        found.unjudged["guidance scale"] = "no reference was given"
    if not weights:
        text = f"no affine combination of the predictions (residual {run.affine:.1e})"
        found.unjudged["guidance"] = text
        found.undecided[step_name(run.steps[0].number, "guided")] = text
        return
    named = known if whose.startswith("the reference") and known is not None else run
    aligned = len(named.steps) == len(run.steps)
    every = [
        _rounded(named.weights_at(index) if aligned else weights, named.affine)
        for index in range(len(run.steps))
    ]
    for rounded in {repr(each): each for each in every}.values():
        found.notes.append(f"guidance, by {whose} weights: {_formula(rounded)}")
    apart = [
        (own, rounded)
        for index, rounded in enumerate(every)
        if (own := _rounded(run.weights_at(index), run.affine)) and not _near(own, rounded)
    ]
    if apart:
        own, rounded = apart[0]
        how = _mistaken(own.get(COND), rounded.get(COND))
        found.notes.append(f"the run combines by other weights: {_formula(own)}{how}")
    for step, rounded in zip(run.steps, every, strict=True):
        outputs = step.combined
        if step.guided is None or not outputs:
            continue
        if {*outputs} < {*rounded}:
            continue  # `absent` has the trusted model predict what is not there
        if {*outputs} != {*rounded}:
            text = f"branches {', '.join(outputs)}, the reference has {', '.join(rounded)}"
            found.unjudged["guidance"] = text
            found.undecided[step_name(step.number, "guided")] = text
            continue
        parts = [weight * outputs[branch].double() for branch, weight in rounded.items()]
        expected = torch.stack(parts).sum(dim=0).to(step.guided.dtype)
        found.put(
            step_name(step.number, "guided"), step.guided, expected.reshape(step.guided.shape)
        )


def _rounded(weights: Mapping[str, float], residual: float) -> dict[str, float]:
    """The numbers that were meant: a fit says them but for its rounding, which its residual is."""
    slack = residual if FITTED < residual <= AGREES else FITTED
    return {branch: _round(weight, slack) for branch, weight in weights.items()}


def _round(weight: float, slack: float) -> float:
    meant = round(weight, 4)
    return meant if abs(meant - weight) <= slack * max(1.0, abs(weight)) else weight


def _near(own: Mapping[str, float], other: Mapping[str, float]) -> bool:
    apart = (abs(own.get(branch, 0.0) - weight) for branch, weight in other.items())
    return {*own} == {*other} and max(apart, default=0.0) < AGREES


def _formula(weights: Mapping[str, float]) -> str:
    if {*weights} == {COND, UNCOND} and abs(sum(weights.values()) - 1.0) < 1e-3:
        scale = weights[COND]
        return f"uncond {'-' if scale < 0 else '+'} {abs(scale):g} (cond - uncond)"
    return " + ".join(f"{weight:g} {branch}" for branch, weight in weights.items())


def _mistaken(actual: float | None, expected: float | None) -> str:
    """What the usual mistakes make of a scale."""
    if actual is None or expected is None:
        return ""
    if abs(actual + expected) < AGREES * abs(expected):
        return ": the sign of the guidance is turned"
    if abs(actual - (1.0 - expected)) < AGREES * abs(expected):
        return ": the branches are exchanged"
    return ""


def put_updates(found: Seams, run: Run, known: Run | None, trusted: Trusted) -> None:
    """Each update by the trusted scheduler, from the engine's latent; say which solver it is.

    Where nothing says what was stepped by, it is combined of the engine's predictions by the
    reference's weights: guidance and update are judged as one then.
    """
    if len(run.steps) != run.count:
        counts = f"{len(run.steps)} predictions for {run.count} steps"
        found.unjudged["update"] = f"{counts}: a solver of a higher order"
        return
    if any(step.stepped_by is None for step in run.steps):
        run = _combined(found, run, known)
    if any(step.stepped_by is None or step.after is None for step in run.steps):
        found.unjudged["update"] = "what is stepped by was not recorded"
        return
    cls = trusted.scheduler_class()
    if cls is None or cls[0] is None:
        found.unjudged["update"] = "the trusted folder has no scheduler"
        return
    config = {**cls[1], **_settings(known)}
    made = _steps_by(cls[0], config, run)
    if isinstance(made, str):
        found.unjudged["update"] = made
        return
    worst = max(_off(step, expected) for step, expected in zip(run.steps, made, strict=True))
    if worst > AGREES and _draws(made, _steps_by(cls[0], config, run)):
        found.unjudged["update"] = f"{cls[0].__name__} draws new noise in its steps"
        return
    for step, expected in zip(run.steps, made, strict=True):
        name = FINAL if step is run.steps[-1] else step_name(step.number + 1, "latent")
        found.put(name, step.after, expected)
    if worst > AGREES:
        found.notes += _other_solver(run, cls[0].__name__)


def _draws(made: Sequence[torch.Tensor | None], again: Any) -> bool:
    """Whether a scheduler's second run with all the same gives something else."""
    pairs = [] if isinstance(again, str) else zip(made, again, strict=True)
    return any(a is not None and b is not None and not same_bits(a, b) for a, b in pairs)


def _combined(found: Seams, run: Run, known: Run | None) -> Run:
    """A run whose steps are stepped by its own predictions, combined as the reference's are."""
    steps = []
    for index, step in enumerate(run.steps):
        weights = known.weights_at(index) if known else {}
        outputs = {
            one.branch: found.actual.get(step_name(step.number, one.branch)) for one in step.passes
        }
        known_parts = ((weight, outputs.get(branch)) for branch, weight in weights.items())
        parts = [weight * out.double() for weight, out in known_parts if out is not None]
        if step.stepped_by is None and step.latent is not None and len(parts) == len(outputs) > 0:
            guided = torch.stack(parts).sum(dim=0).to(step.latent.dtype)
            guided = guided.reshape(step.latent.shape)
            step = step.but(guided=guided)
        steps.append(step)
    return replace(run, steps=tuple(steps))


def _off(step: Step, expected: torch.Tensor | None) -> float:
    if step.after is None or expected is None:
        return 0.0
    return distance(step.after, expected.reshape(step.after.shape)).rel_l2


def _settings(known: Run | None) -> dict[str, Any]:
    """What the reference's scheduler was set to; what is not finite is null in a recording."""
    held = next(iter(known.schedulers.values()), {}) if known else {}
    return {key: value for key, value in held.items() if key != "class" and value is not None}


def _steps_by(cls: Any, config: Mapping[str, Any], run: Run) -> list[torch.Tensor | None] | str:
    try:
        scheduler = cls.from_config(dict(config))
        sigmas = with_closing_zero(run.sigmas, run.count)
        if getattr(scheduler.config, "use_dynamic_shifting", False):
            scheduler.set_timesteps(len(run.steps), mu=1.0)
        else:
            scheduler.set_timesteps(len(run.steps))
        return stepped(scheduler, run, sigmas)
    except FOREIGN as error:
        return f"{cls.__name__} does not take the run's steps: {one_line(error)}"


def _other_solver(run: Run, trusted: str) -> list[str]:
    """Name the solver that gives what the engine's updates are, if one of the usual ones does."""
    import diffusers

    for name, cls, settings in solvers():
        made = _steps_by(getattr(diffusers, cls), settings, run)
        if isinstance(made, str):
            continue
        worst = max(_off(step, value) for step, value in zip(run.steps, made, strict=True))
        if worst <= AGREES:
            return [f"the updates are those of {name}, to {worst:.1e}, not of {trusted}"]
    return []
