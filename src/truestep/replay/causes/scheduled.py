"""Hypotheses about the schedule, the initial noise and the scheduler's update."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from truestep.keys import address
from truestep.replay.causes.guesses import (
    PRECISIONS,
    Failing,
    Guess,
    Scene,
    number,
    rounded_to,
    scaled,
)

if TYPE_CHECKING:
    from truestep.runtime.pipeline import Pipeline

SHIFTS = (0.02, 50.0)
HALVINGS = 40
"""Flow shifts that are tried, and how closely one is found."""

SEEDS = 16
"""Seeds to either side of the case's that the noise is drawn from."""


def schedule(scene: Scene) -> Iterator[Guess]:
    (one,) = scene.failing
    what = one.name.partition("/")[2]
    actual, reference = one.actual, one.reference
    if what == "experts":
        yield _experts(actual, reference)
        return
    if len(actual) > 1:
        only_last = torch.equal(actual[:-1], reference[:-1])
        if only_last:
            last = f"{number(float(actual[-1]))}, the reference's {number(float(reference[-1]))}"
            yield Guess(f"last {what[:-1]}", f"the last of the {what} is {last}", [actual])
        for offset, word in ((1, "late"), (-1, "early")):
            made = reference.roll(-offset).clone()
            made[-1 if offset > 0 else 0] = actual[-1 if offset > 0 else 0]
            yield Guess("off by one", f"the {what} are one step {word}", [made])
    yield from rounded_to(scene, f"the {what} are")
    if what == "sigmas":
        yield from _by_own_schedule(scene, actual)
        yield from _between_ends(scene, actual)
        yield from _shifted(scene, actual, reference)
    truncated = reference.floor()
    yield Guess("truncated", f"the {what} are cut off to whole numbers", [truncated])
    yield from scaled(scene, f"the {what} are")


def _experts(actual: torch.Tensor, reference: torch.Tensor) -> Guess:
    """Which expert predicts at which step: read off, as it is the stage's own output."""

    def second(experts: torch.Tensor) -> str:
        steps = [step for step, expert in enumerate(experts.tolist()) if expert == 2]
        return f"step {steps[0]}" if steps else "no step"

    if torch.equal(actual, 3 - reference):
        text, kind = "the two experts are exchanged", "exchanged"
    else:
        text, kind = "the second expert begins at ", "boundary"
        text += f"{second(actual)}, the reference's at {second(reference)}"
    return Guess(kind, text, [actual])


def _by_own_schedule(scene: Scene, actual: torch.Tensor) -> Iterator[Guess]:
    """The trusted side's own schedule with another flow shift, found by bisection: the middle sigma
    grows with it."""
    trusted, shift = scene.trusted, _own_shift(scene.trusted)
    if shift is None or not hasattr(trusted.settings, "flow_shift"):
        return

    def sigmas(value: float) -> torch.Tensor:
        settings = trusted.settings.model_copy(update={"flow_shift": value})
        made = trusted.make_schedule(replace(trusted, settings=settings))
        return made.sigmas.double().cpu()

    middle, low, high = len(actual) // 2, *SHIFTS
    try:
        for _ in range(HALVINGS):
            value = math.sqrt(low * high)
            found = sigmas(value)
            if found.shape != actual.shape:
                return
            low, high = (value, high) if found[middle] < actual[middle] else (low, value)
        near = [float(number(value)), value]
        for chosen in near:
            text = f"the flow shift is {number(chosen)}, the reference's {number(shift)}"
            if abs(chosen - 1) < 1e-4:
                text = f"no flow shift is applied, the reference's is {number(shift)}"
            yield Guess("flow shift", text, [sigmas(chosen)], f"flow_shift = {number(shift)}")
    finally:
        trusted.make_schedule(trusted)


def _between_ends(scene: Scene, actual: torch.Tensor) -> Iterator[Guess]:
    """Another largest or smallest sigma, or another curve between them.

    Source:
        arXiv:2206.00364, equation 5.
    """
    config: Any = getattr(scene.trusted.scheduler, "config", {})
    ends = [config.get(name) for name in ("sigma_max", "sigma_min", "rho")]
    if not all(isinstance(value, int | float) and value > 0 for value in ends) or len(actual) < 5:
        return
    inner, tail = actual[:-1], actual[-1:]

    def curve(most: float, least: float, rho: float) -> torch.Tensor:
        ramp = torch.linspace(0, 1, len(inner), dtype=torch.float64)
        high, low = most ** (1 / rho), least ** (1 / rho)
        return torch.cat([(high + ramp * (low - high)) ** rho, tail])

    most, least, rho = (float(value) for value in ends)
    own = {"sigma_max": float(inner[0]), "sigma_min": float(inner[-1])}
    fitted = _exponent(lambda value: curve(most, least, value), inner)
    for name, value, made in (
        ("sigma_max", own["sigma_max"], curve(own["sigma_max"], least, rho)),
        ("sigma_min", own["sigma_min"], curve(most, own["sigma_min"], rho)),
        ("rho", fitted, curve(most, least, fitted)),
    ):
        theirs = number(float(config[name]))
        text = f"{name} of the schedule is {number(value)}, the reference's {theirs}"
        yield Guess(name.replace("_", " "), text, [made], f"{name} = {theirs}")


def _exponent(curve: Callable[[float], torch.Tensor], actual: torch.Tensor) -> float:
    """The exponent of a curve through the candidate's middle sigma: that falls as it grows."""
    low, high, middle = 0.5, 50.0, len(actual) // 2
    for _ in range(HALVINGS):
        value = (low + high) / 2
        low, high = (value, high) if curve(value)[middle] > actual[middle] else (low, value)
    return float(number((low + high) / 2))


def _shifted(scene: Scene, actual: torch.Tensor, reference: torch.Tensor) -> Iterator[Guess]:
    """Sigmas of flow matching by another shift, or on another grid.

    Source:
        arXiv:2403.03206, section 5.3.2: shift * s / (1 + (shift - 1) * s).
    """
    inner = (reference > 1e-6) & (reference < 1 - 1e-6) & (actual > 1e-6) & (actual < 1 - 1e-6)
    if float(reference.max()) > 1 + 1e-6 or not bool(inner.any()):
        return
    shift = _own_shift(scene.trusted)
    mine, theirs = actual[inner], reference[inner]
    more = float((mine * (1 - theirs) / (theirs * (1 - mine))).median())
    made = more * reference / (1 + (more - 1) * reference)
    if shift is not None:
        total = more * shift
        text = f"the flow shift is {number(total)}, the reference's {number(shift)}"
        if abs(more - shift) < 1e-3 * shift and abs(shift - 1) > 1e-3:
            text = f"the flow shift of {number(shift)} is applied twice"
        elif abs(total - 1) < 1e-3:
            text = f"no flow shift is applied, the reference's is {number(shift)}"
        yield Guess("flow shift", text, [made], f"flow_shift = {number(shift)}")
    else:
        text = f"the sigmas are shifted by {number(more)} on top of the reference's"
        yield Guess("flow shift", text, [made])
    shift = 1.0 if shift is None else shift
    yield from _on_grid(actual, reference, shift)


def _on_grid(actual: torch.Tensor, reference: torch.Tensor, shift: float) -> Iterator[Guess]:
    """Evenly spaced before the shift, in another number of parts or to another end."""

    def even(sigmas: torch.Tensor) -> torch.Tensor:
        return sigmas / (shift - (shift - 1) * sigmas)

    for length in (len(actual) - 1, len(actual)):
        base = even(actual[:length])
        if length < 3:
            continue
        line = torch.linspace(float(base[0]), float(base[-1]), length, dtype=torch.float64)
        made = torch.cat([shift * line / (1 + (shift - 1) * line), actual[length:]])
        was = even(reference[: len(reference) - 1])
        ends = f"{number(float(base[0]))} to {number(float(base[-1]))} in {length - 1} parts"
        before = f"{number(float(was[0]))} to {number(float(was[-1]))} in {len(was) - 1}"
        text = f"the sigmas before the shift go from {ends}, the reference's from {before}"
        yield Guess("sigma grid", text, [made])


def _own_shift(trusted: Pipeline) -> float | None:
    """The flow shift that the trusted side uses, where it says one."""
    said = getattr(trusted.settings, "flow_shift", None)
    config: Any = getattr(trusted.scheduler, "config", {})
    if said is None and not config.get("use_dynamic_shifting"):
        said = config.get("flow_shift", config.get("shift"))
    return float(said) if isinstance(said, int | float) and said > 0 else None


# Initial noise


def latent(scene: Scene) -> Iterator[Guess]:
    (one, *others) = scene.failing
    yield from scaled(scene, "the initial noise is")
    yield from rounded_to(scene, "the initial noise is")
    if others:
        return
    yield from _seeds(scene, one)
    yield from _drawn(scene, one)


def _seeds(scene: Scene, one: Failing) -> Iterator[Guess]:
    """The noise of another seed."""
    trusted, own = scene.trusted, scene.trusted.settings.seed
    near = sorted(range(max(own - SEEDS, 0), own + SEEDS + 1), key=lambda seed: abs(seed - own))
    for seed in dict.fromkeys([*near, 0, 42]):
        if seed == own:
            continue
        settings = trusted.settings.model_copy(update={"seed": seed})
        made = trusted.make_latent(replace(trusted, settings=settings))
        if isinstance(made, torch.Tensor):
            text = f"the initial noise is that of seed {seed}, the reference's of seed {own}"
            yield Guess("seed", text, [made.double().cpu()], f"seed = {own}")


def _drawn(scene: Scene, one: Failing) -> Iterator[Guess]:
    """Standard normal numbers of the case's seed, drawn in another way."""
    import numpy as np

    seed, shape = scene.trusted.settings.seed, tuple(one.actual.shape)
    for dtype in PRECISIONS:
        made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        yield Guess("precision", f"the initial noise is drawn in {name}", [made.double()])
    for order in itertools.permutations(range(len(shape))):
        if order == tuple(range(len(shape))) or order[0] != 0:
            continue
        drawn = torch.randn(
            [shape[axis] for axis in order], generator=torch.Generator().manual_seed(seed)
        )
        back = [order.index(axis) for axis in range(len(shape))]
        axes = "".join("bcfhw"[axis] if len(shape) == 5 else str(axis) for axis in order)
        text = f"the initial noise is drawn in the order {axes} and permuted"
        yield Guess("order", text, [drawn.permute(back).double()])
    generators: dict[str, Any] = {
        "RandomState": np.random.RandomState(seed % 2**32),
        "default_rng": np.random.default_rng(seed),
    }
    for name, generator in generators.items():
        made = torch.from_numpy(generator.standard_normal(shape))
        text = f"the initial noise is drawn by numpy.random.{name}, the reference's by torch"
        yield Guess("generator", text, [made])


# The scheduler's update


def update(scene: Scene) -> Iterator[Guess]:
    yield from rounded_to(scene, "the latent is kept")
    before = [_latent_before(scene, one.name) for one in scene.failing]
    known = [latent for latent in before if latent is not None]
    if len(known) == len(scene.failing):
        moved = [one.reference - latent for one, latent in zip(scene.failing, known, strict=True)]
        size = float(moved[0].square().sum())
        own = scene.failing[0].actual - known[0]
        factor = float((own * moved[0]).sum()) / size if size else 1.0
        made = [latent + factor * move for latent, move in zip(known, moved, strict=True)]
        text = f"a step of the scheduler is {number(factor)} times as long as the reference's"
        text = text if factor > 0 else "a step of the scheduler goes the other way"
        yield Guess("step size", text, made)
    yield from scaled(scene, "the latent after a step is")


def _latent_before(scene: Scene, name: str) -> torch.Tensor | None:
    """The latent that a step was given, by the name of what it gave."""
    from truestep.replay.steps import steps_recorded, stored_name

    step = address(name).step
    if step is None:  # the end
        step = steps_recorded(scene.recording) - 1
    plain = name.replace("latent/final", "step/0000/latent")
    before = re.sub(r"step/\d{4}", f"step/{step:04d}", plain)
    return scene.recorded(stored_name(scene.recording, before))
