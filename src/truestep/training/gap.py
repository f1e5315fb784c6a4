"""The gap between log-probabilities of the trainer and of the engine that sampled, by timestep.

Reinforcement learning of a diffusion model (DDPO, Flow-GRPO) weighs what was sampled by the ratio
of two probabilities, `exp(log p_trainer - log p_engine)`. Before the first update it has to be 1:
whatever it is instead is the difference of two implementations, and clipping cuts it off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field

from truestep.environment import library_version
from truestep.errors import UsageError
from truestep.floors import EPSILON, NoiseFloor, NoiseRun
from truestep.judge.floor import Limits, coarser, pair_of
from truestep.judge.rows import compare_tensors, dtype_name, measured_run
from truestep.keys import Address
from truestep.verdict import Float, Record, Row, Verdict

CLIP = 1e-4
"""Half-width of the range of the ratio: Flow-GRPO's and DDPO's default (`train.clip_range`)."""


class StepGap(Record):
    """The gap of one step, over all samples."""

    step: int
    timestep: Float | None = None
    verdict: Verdict
    mean: Float = Field(description="of trainer less engine: a bias")
    rms: Float
    largest: Float = Field(description="absolute value")
    ratio_least: Float = Field(description="least exp(gap)")
    ratio_most: Float
    outside: Float = Field(description="share of samples whose ratio is outside of the range")
    kl: Float = Field(description="mean of exp(gap) - 1 - gap, over samples of the engine")
    floor: Float | None = Field(default=None, description="largest rms of benign runs")
    ratio: Float | None = Field(default=None, description="deciding statistic / its floor")
    note: str = ""


class LogProbabilityGap(Record):
    """What `truestep training gap --json` writes."""

    schema_version: int = 1
    tool_version: str
    verdict: Verdict
    exit_code: int
    sentence: str
    clip: Float
    samples: int
    worst: int | None = Field(default=None, description="step of the largest rms")
    measured: bool = Field(description="whether benign runs were given to measure a floor by")
    steps: tuple[StepGap, ...]


def gaussian_log_probability(
    action: torch.Tensor, mean: torch.Tensor, std: torch.Tensor | float, *, batch: int = 2
) -> torch.Tensor:
    """Log-probability of what was sampled, averaged over the elements of a sample.

    Args:
        action: The latent after the step, as the engine sampled it: `t b ...`.
        mean: Of the step, by one side's prediction: the same shape.
        std: Of the step: a number, or broadcastable.
        batch: How many leading axes are kept.

    Returns:
        `t b`, in float64.

    Source:
        Flow-GRPO (Liu et al. 2025, arXiv:2505.05470), `sd3_sde_with_logprob.py`; DDPO (Black et al.
        2023, arXiv:2305.13301), `ddim_with_logprob.py`: both take the mean over elements.
    """
    spread = torch.as_tensor(std, dtype=torch.float64)
    apart = (action.double() - mean.double()).square() / (2 * spread.square())
    value = -apart - spread.log() - 0.5 * math.log(2 * math.pi)
    return value.broadcast_to(apart.shape).flatten(batch).mean(-1) if apart.ndim > batch else value


def flow_step(
    sample: torch.Tensor,
    velocity: torch.Tensor,
    *,
    sigma: float,
    next_sigma: float,
    noise_level: float = 0.7,
    largest_sigma: float | None = None,
) -> tuple[torch.Tensor, float]:
    """Mean and standard deviation of one stochastic step of a flow-matching model.

    Args:
        sample: Latent before the step.
        velocity: Prediction of one side for it.
        sigma, next_sigma: Noise levels before and after; the second is smaller.
        noise_level: `a` of the paper.
        largest_sigma: Stands for a sigma of 1, whose spread has no bound: the schedule's second.

    Returns:
        Mean, in float64, and standard deviation.

    Raises:
        UsageError: The two noise levels are not in order, or a sigma of 1 has nothing in its place.

    Source:
        Flow-GRPO (arXiv:2505.05470), equation 9: sigma_t = a sqrt(t / (1 - t)), and the update
        x + (v + sigma_t^2 / (2 t) (x + (1 - t) v)) dt + sigma_t sqrt(|dt|) noise.
    """
    if not 0 <= next_sigma < sigma <= 1:
        raise UsageError(
            "a step goes from a larger sigma to a smaller one",
            measured=f"from {sigma:g} to {next_sigma:g}",
        )
    bounded = largest_sigma if sigma == 1 else sigma
    if bounded is None or not 0 < bounded < 1:
        raise UsageError(
            "a sigma of 1 has no spread: sigma / (1 - sigma) has no bound",
            hint="give largest_sigma=, the second sigma of the schedule",
        )
    spread = noise_level * math.sqrt(sigma / (1 - bounded))
    x, v, dt = sample.double(), velocity.double(), next_sigma - sigma
    drift = v + spread**2 / (2 * sigma) * (x + (1 - sigma) * v)
    return x + drift * dt, spread * math.sqrt(-dt)


def log_probability_gap(
    trainer: torch.Tensor,
    engine: torch.Tensor,
    *,
    benign: Sequence[torch.Tensor] = (),
    timesteps: torch.Tensor | None = None,
    clip: float = CLIP,
    tolerance: float | None = None,
) -> LogProbabilityGap:
    """Say at which timestep the trainer gives what was sampled another probability.

    Args:
        trainer: Log-probabilities of the sampled steps by the trainer's model, `t b`.
        engine: By the engine that sampled them, `t b`; see `gaussian_log_probability`.
        benign: The engine's own, of harmless changes (run again, other batch, other kernels): they
            measure the floor. Without them the rounding of float32 is assumed; what is kept in 16
            bits and may be their rounding is then undecided.
        timesteps: Of the steps, `t`.
        clip: Half-width of the range of the ratio.
        tolerance: Judge the rms of the gap by this limit, in nats, in the place of a floor.

    Raises:
        UsageError: Shapes differ, are not `t b`, a benign run is not finite, or `clip` cannot be a
            width.
    """
    _refuse(trainer, engine, benign, timesteps, clip)
    names = [f"step/{step:04d}/log_probability" for step in range(len(engine))]
    rows = _judged(trainer, engine, benign, names, tolerance)
    steps = tuple(
        _step(step, row, trainer, engine, benign, timesteps, clip) for step, row in enumerate(rows)
    )
    verdict = Verdict.worst(step.verdict for step in steps)
    finite = [step for step in steps if math.isfinite(step.rms)]
    worst = max(finite, key=lambda step: step.rms, default=None)
    return LogProbabilityGap(
        tool_version=library_version("truestep") or "",
        verdict=verdict,
        exit_code=verdict.exit_code,
        sentence=_sentence(verdict, steps, worst, clip),
        clip=clip,
        samples=int(engine.shape[1]),
        worst=worst.step if worst else None,
        measured=bool(benign),
        steps=steps,
    )


def _refuse(
    trainer: torch.Tensor,
    engine: torch.Tensor,
    benign: Sequence[torch.Tensor],
    timesteps: torch.Tensor | None,
    clip: float,
) -> None:
    shape = list(engine.shape)
    if engine.ndim != 2 or not engine.numel() or not engine.is_floating_point():
        raise UsageError(
            "log-probabilities are of steps and samples: `t b`",
            measured=f"the engine's are {dtype_name(engine)} of shape {shape}",
            hint="gaussian_log_probability(actions, means, stds) makes them",
        )
    for what, other in (("trainer's", trainer), *(("benign", run) for run in benign)):
        if list(other.shape) != shape:
            raise UsageError(
                "the log-probabilities are of other steps or samples",
                measured=f"the {what} have shape {list(other.shape)}, the engine's {shape}",
            )
    for number, run in enumerate(benign, start=1):
        count = int((~run.double().isfinite()).sum())
        if count:
            raise UsageError(
                "a benign run holds values that are not finite: it measures no floor",
                where=f"run {number}",
                measured=f"{count} of {run.numel()} log-probabilities",
                likely="it is no harmless change, or its file is not what it was meant to be",
            )
    if timesteps is not None and timesteps.numel() != shape[0]:
        raise UsageError(
            "there is one timestep a step",
            measured=f"{timesteps.numel()} timesteps, {shape[0]} steps",
        )
    if not 0 < clip < 1:
        raise UsageError(f"clip = {clip!r} is no half-width of a range around 1")


def _judged(
    trainer: torch.Tensor,
    engine: torch.Tensor,
    benign: Sequence[torch.Tensor],
    names: Sequence[str],
    tolerance: float | None,
) -> list[Row]:
    """A row a step. Two numbers beside each sample's own set the scale: a gap is absolute, and the
    level of a log-probability, which differs by the step's spread, says nothing."""
    sides = [
        {
            name: _at_unit_scale(own.double() - theirs.double())
            for name, own, theirs in zip(names, run, engine, strict=True)
        }
        for run in (trainer, engine, *benign)
    ]
    computed = "float64" if dtype_name(engine) == dtype_name(trainer) == "float64" else "float32"
    pair = pair_of(computed, computed)
    runs = [
        _kept_in(
            computed,
            measured_run("benign", f"run {at}", pair, {n: (run[n], sides[1][n]) for n in names}),
        )
        for at, run in enumerate(sides[2:], start=1)
    ]
    floor = NoiseFloor(runs=tuple(runs)) if runs else None
    limits = Limits(floor=floor, pair=pair, tolerance=tolerance)
    rows = compare_tensors(sides[0], sides[1], limits=limits, describe=_place)
    if runs or tolerance is not None:
        return rows
    kept = coarser(dtype_name(trainer), dtype_name(engine))
    return [
        _undecided(row, own, theirs, kept)
        for row, own, theirs in zip(rows, trainer.double(), engine.double(), strict=True)
    ]


def _kept_in(dtype: str, run: NoiseRun) -> NoiseRun:
    """A run whose numbers are at least rounded as a dtype rounds, whatever they are measured in."""
    tensors = tuple(metrics.model_copy(update={"dtype": dtype}) for metrics in run.tensors)
    return run.model_copy(update={"tensors": tensors})


def _undecided(row: Row, own: torch.Tensor, theirs: torch.Tensor, kept: str) -> Row:
    """A gap of which each number may be the rounding of the 16 bits that it is kept in, half a unit
    of each side: nobody can say what it was before."""
    if row.verdict is not Verdict.DRIFTED or EPSILON.get(kept, 0.0) <= EPSILON["float32"]:
        return row
    most = EPSILON[kept] * torch.maximum(own.abs(), theirs.abs())
    if not bool(((own - theirs).abs() <= most).all()):
        return row
    note = f"within the rounding of {kept}: keep log-probabilities in float32"
    return row.model_copy(update={"verdict": Verdict.INCONCLUSIVE, "note": note})


def _at_unit_scale(gap: torch.Tensor) -> torch.Tensor:
    """A gap in float64 around values of 1 and -1, so that its size beside theirs is its rms."""
    signs = torch.ones_like(gap)
    signs[1::2] = -1
    return torch.cat([signs + gap, -signs + gap])


def _place(name: str) -> Address:
    return Address("prediction", int(name.split("/")[1]), inner=True)


def _step(
    step: int,
    row: Row,
    trainer: torch.Tensor,
    engine: torch.Tensor,
    benign: Sequence[torch.Tensor],
    timesteps: torch.Tensor | None,
    clip: float,
) -> StepGap:
    gap = trainer[step].double() - engine[step].double()
    ratio = gap.exp()
    noise = [_rms(run[step].double() - engine[step].double()) for run in benign]
    return StepGap(
        step=step,
        timestep=float(timesteps.reshape(-1)[step]) if timesteps is not None else None,
        verdict=row.verdict,
        mean=float(gap.mean()),
        rms=_rms(gap),
        largest=float(gap.abs().max()),
        ratio_least=float(ratio.min()),
        ratio_most=float(ratio.max()),
        outside=float(((ratio - 1).abs() > clip).double().mean()),
        kl=float((torch.expm1(gap) - gap).mean()),
        floor=max(noise, default=None),
        ratio=row.ratio,
        note=row.note,
    )


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def _sentence(
    verdict: Verdict, steps: Sequence[StepGap], worst: StepGap | None, clip: float
) -> str:
    outside = sum(step.outside for step in steps) / len(steps)
    share = f"{outside:.1%} of the ratios are outside of 1 +- {clip:g}"
    if verdict is Verdict.IDENTICAL:
        return f"identical: the log-probabilities of {len(steps)} steps agree bit for bit"
    bad = [step for step in steps if step.verdict is verdict]
    if worst is None or verdict is Verdict.INVALID:
        return f"invalid: {len(bad)} of {len(steps)} steps: step {bad[0].step}: {bad[0].note}"
    at = f"step {worst.step}"
    at += f" (timestep {worst.timestep:g})" if worst.timestep is not None else ""
    text = f"the worst at {at}: rms {worst.rms:.1e} nats; {share}"
    text += f"; {bad[0].note}" if verdict is Verdict.INCONCLUSIVE and bad[0].note else ""
    return f"{verdict.value}: {len(bad)} of {len(steps)} steps, {text}"
