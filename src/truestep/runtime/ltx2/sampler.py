"""The sampler `res2s`: an exponential Runge-Kutta method of second order, with noise.

Each of a step's two predictions is a step of its own in a recording, so that it is replayed and
judged like any other: N steps make 2N + 1, at `s_0, sqrt(s_0 s_1), s_1, ..., 0.0011`. The update at
an even one goes to the midpoint, that at an odd one to the next sigma, and the last one takes the
estimate itself. All in float64.

Where it is not the reference, given the same predictions:
- Between predictions the reference rounds latents to the model's dtype (bfloat16); here they stay
  in float32, and equal the reference's run with `model_dtype=float32`.
- The reference has the sigmas of a step in float32 and those of its midpoint in float64; here a
  schedule is float32, and what is computed from it float64: 1e-7 apart.
- phi is summed where the reference subtracts: 1e-16 / h^2 apart.
- The reference runs it with the distilled LoRA at part of its strength: give a model folder that
  has it in its weights. diffusers has no such sampler.

Source:
    github.com/Lightricks/LTX-2 at 400fd31 (and f4b06fb): ltx_pipelines/utils/samplers.py,
    `res2s_audio_video_denoising_loop` and `_get_new_noise`; ltx_pipelines/utils/res2s.py;
    ltx_core/components/diffusion_steps.py, `Res2sDiffusionStep`. Hochbruck and Ostermann,
    "Explicit exponential Runge-Kutta methods for semilinear parabolic problems" (2005), 2-stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from truestep.joint import Joint
from truestep.runtime.ltx2.plan import LAST
from truestep.runtime.ltx2.settings import of
from truestep.runtime.pipeline import Pipeline, Step

ETA = 0.5
"""Share of the next sigma that is new noise, at midpoints and steps alike."""

STEP_SEED = -1
MIDPOINT_SEED = STEP_SEED + 10_000
"""Seeds of the new noise. The entries of the reference give none: these are its loop's defaults,
whatever the seed of the initial noise is."""

_REFINED_BELOW, _REFINED_ABOVE, _REFINEMENTS = 0.5, 0.03, 100
"""Steps shorter than this, from sigmas above this, have their start refined so often."""

_TERMS = 60
"""Of the series of phi: below 1e-16 of the sum for |z| up to 9, where z = log(1 / 0.0011) = 6.8 is
the longest step."""


def phi(order: int, z: float) -> float:
    """`phi_1(z) = (e^z - 1) / z`, `phi_2(z) = (e^z - 1 - z) / z^2`; at 0 their limits 1 and 1/2."""
    return math.fsum(z**k / math.factorial(k + order) for k in range(_TERMS))


def weights(h: float) -> tuple[float, float, float]:
    """`a21, b1, b2` of a step.

    Args:
        h: Its length, `log(sigma / sigma_next)`.
    """
    b2 = 2 * phi(2, -h)
    return 0.5 * phi(1, -h / 2), phi(1, -h) - b2, b2


def noise_shares(sigma_next: float, eta: float) -> tuple[float, float, float]:
    """`alpha, down, up`: a latent at `sigma_next` is `alpha (x0 + down v) + up noise`.

    What was noise and what is new are together as loud as `sigma_next` says.
    """
    up = min(sigma_next * eta, sigma_next * 0.9999)
    kept = math.sqrt(max(sigma_next**2 - up**2, 0.0))
    alpha = 1 - sigma_next + kept
    return alpha, kept / alpha, up


def renoised(
    start: torch.Tensor,
    moved: torch.Tensor,
    *,
    sigma: float,
    sigma_next: float,
    noise: torch.Tensor,
    eta: float = ETA,
) -> torch.Tensor:
    """A latent moved from `sigma` to `sigma_next`, with a part of its noise drawn anew.

    Args:
        start: Where it was, float64.
        moved: Where it is without new noise, which is the result for `eta` 0.
        noise: Of deviation 1, like it.
    """
    alpha, down, up = noise_shares(sigma_next, eta)
    if up == 0:
        return moved
    velocity = (start - moved) / (sigma - sigma_next)
    return alpha * (start - sigma * velocity + down * velocity) + up * noise


@dataclass(frozen=True)
class Half:
    """What the second half of a step needs from its first, of one modality, float64.

    Attributes:
        start: Where the step starts, refined.
        towards: From there to the first estimate.
    """

    start: torch.Tensor
    towards: torch.Tensor


def to_midpoint(
    latent: torch.Tensor,
    estimate: torch.Tensor,
    *,
    sigma: float,
    sigma_next: float,
    noise: torch.Tensor,
    eta: float = ETA,
) -> tuple[torch.Tensor, Half]:
    """First half of a step.

    Args:
        latent, estimate: x at `sigma` and x0, float64.
        sigma, sigma_next: Ends of the whole step.

    Returns:
        x at the midpoint `sqrt(sigma sigma_next)`, and what `to_next` needs.
    """
    h = math.log(sigma / sigma_next)
    length = h * weights(h)[0]
    half = Half(latent, estimate - latent)
    middle = renoised(
        latent,
        latent + length * half.towards,
        sigma=sigma,
        sigma_next=math.sqrt(sigma * sigma_next),
        noise=noise,
        eta=eta,
    )
    if h < _REFINED_BELOW and sigma > _REFINED_ABOVE:
        for _ in range(_REFINEMENTS):
            start = middle - length * half.towards
            half = Half(start, estimate - start)
    return middle, half


def to_next(
    half: Half,
    estimate: torch.Tensor,
    *,
    sigma: float,
    sigma_next: float,
    noise: torch.Tensor,
    eta: float = ETA,
) -> torch.Tensor:
    """Second half of a step: x at `sigma_next` from the midpoint's estimate x0, float64."""
    h = math.log(sigma / sigma_next)
    _, b1, b2 = weights(h)
    moved = half.start + h * (b1 * half.towards + b2 * (estimate - half.start))
    return renoised(half.start, moved, sigma=sigma, sigma_next=sigma_next, noise=noise, eta=eta)


@dataclass
class Noise:
    """Noise of all steps, from one generator in order: a step's depends on seed and step alone.

    Steps may be asked for in any order; those before are drawn again where they must.
    """

    seed: int
    device: str
    _generator: torch.Generator | None = None
    _next: int = 0

    def of(self, index: int, like: Joint) -> Joint:
        """Of step `index`: the video's, then the sound's, of mean 0 and deviation 1 a sample."""
        if self._generator is None or index < self._next:
            self._generator = torch.Generator(self.device).manual_seed(self.seed)
            self._next = 0
        while self._next <= index:
            drawn = [_normal(part, self._generator) for part in like]
            self._next += 1
        return Joint(*(part.to(own.device) for part, own in zip(drawn, like, strict=True)))


def _normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(
        like.shape, generator=generator, dtype=_wide(generator.device), device=generator.device
    )
    noise = (noise - noise.mean()) / noise.std()
    noise = noise - noise.mean(dim=(-2, -1), keepdim=True)
    return noise / noise.std(dim=(-2, -1), keepdim=True)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which has no float64


@dataclass
class Res2s:
    """Where a run is: kept on its scheduler, as multistep schedulers keep theirs.

    Attributes:
        halves: Of `step`, video's and sound's.
        step: Whose first half was done last.
    """

    at_midpoint: Noise
    at_step: Noise
    halves: tuple[Half, ...] = ()
    step: int = field(default=-1)


def begin(pipe: Pipeline) -> None:
    """Put midpoints into a scheduler that has just been reset, and forget any step."""
    scheduler = pipe.scheduler
    scheduler.sigmas = with_midpoints(scheduler.sigmas)
    scheduler.timesteps = scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps
    device = pipe.device if of(pipe).generator_device == "device" else "cpu"
    scheduler.res2s = Res2s(Noise(MIDPOINT_SEED, device), Noise(STEP_SEED, device))


def with_midpoints(sigmas: torch.Tensor) -> torch.Tensor:
    """`s_0, ..., s_n, 0` to `s_0, sqrt(s_0 s_1), s_1, ..., s_n, sqrt(s_n 0.0011), 0.0011, 0`."""
    ends = torch.cat([sigmas[:-1].double(), sigmas.new_tensor([LAST]).double()])
    middles = (ends[:-1] * ends[1:]).sqrt()
    made = torch.stack([ends[:-1], middles], dim=1).flatten().tolist()
    return sigmas.new_tensor([*made, float(ends[-1]), 0.0])


def advance(pipe: Pipeline, step: Step, guided: Joint, latent: Joint) -> Joint:
    """The update after one prediction, to the midpoint or from there to the next sigma.

    Args:
        guided: x0 of both modalities.
        latent: x, in whose dtype the result is.

    Raises:
        RuntimeError: The second half of a step comes without its first.
    """
    sigmas, state = pipe.scheduler.sigmas, pipe.scheduler.res2s
    if step.index == len(sigmas) - 2:
        return Joint(*(g.to(x.dtype) for g, x in zip(guided, latent, strict=True)))
    number, second = divmod(step.index, 2)
    sigma, sigma_next = float(sigmas[2 * number]), float(sigmas[2 * number + 2])
    noise = (state.at_step if second else state.at_midpoint).of(number, latent)
    x, x0 = ([part.to(_wide(part.device)) for part in value] for value in (latent, guided))
    if second:
        if state.step != number:
            raise RuntimeError(f"the second half of step {number} without its first")
        moved = [
            to_next(half, estimate, sigma=sigma, sigma_next=sigma_next, noise=new)
            for half, estimate, new in zip(state.halves, x0, noise, strict=True)
        ]
    else:
        made = [
            to_midpoint(start, estimate, sigma=sigma, sigma_next=sigma_next, noise=new)
            for start, estimate, new in zip(x, x0, noise, strict=True)
        ]
        moved = [middle for middle, _ in made]
        state.halves, state.step = tuple(half for _, half in made), number
    return Joint(*(part.to(own.dtype) for part, own in zip(moved, latent, strict=True)))
