"""The sampler res2s: its coefficients, its order, and its loop against one written here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truestep.case import Case
from truestep.errors import CaseError
from truestep.joint import Joint, each
from truestep.replay.capture import Capture
from truestep.replay.stages import replay
from truestep.runtime.loading import load
from truestep.runtime.ltx2 import sampler
from truestep.runtime.ltx2.settings import skips
from truestep.runtime.pipeline import Pipeline, Step, generate


@pytest.fixture(scope="module")
def case(tiny_ltx2: dict[str, Path], ltx2_case: dict[str, Any]) -> Case:
    return Case(model=str(tiny_ltx2["2.3"]), **ltx2_case).replace(sampler="res2s", steps=3)


@pytest.fixture(scope="module")
def pipe(case: Case) -> Pipeline:
    return load(case)


# --- coefficients ------------------------------------------------------------------------------


@given(st.floats(1e-6, 8))
def test_phi_is_its_formula_in_fifty_digits(h: float) -> None:
    with localcontext() as context:
        context.prec = 50
        z = -Decimal(h)
        first = (z.exp() - 1) / z
        second = (z.exp() - 1 - z) / z**2
    assert sampler.phi(1, -h) == pytest.approx(float(first), rel=1e-12)
    assert sampler.phi(2, -h) == pytest.approx(float(second), rel=1e-12)


def test_phi_of_no_step_is_its_limit() -> None:
    assert sampler.phi(1, 0.0) == 1.0
    assert sampler.phi(2, 0.0) == 0.5
    a21, b1, b2 = sampler.weights(0.0)
    assert (a21, b1, b2) == (0.5, 0.0, 1.0)  # the explicit midpoint rule


@given(st.floats(1e-3, 1), st.floats(0, 1))
def test_new_noise_keeps_signal_and_deviation(sigma: float, eta: float) -> None:
    alpha, down, up = sampler.noise_shares(sigma, eta)
    assert alpha * (1 - down) == pytest.approx(1 - sigma, abs=1e-12)
    assert (alpha * down) ** 2 + up**2 == pytest.approx(sigma**2, rel=1e-9)
    assert up == pytest.approx(min(eta, 0.9999) * sigma)


def test_midpoints_are_geometric_and_the_end_is_there() -> None:
    made = sampler.with_midpoints(torch.tensor([1.0, 0.25, 0.0]))
    assert made.dtype is torch.float32
    expected = [1.0, 0.5, 0.25, math.sqrt(0.25 * 0.0011), 0.0011, 0.0]
    assert made.tolist() == pytest.approx(expected)


# --- the method --------------------------------------------------------------------------------


def solved(steps: int, *, slope: float = 0.4, shift: float = 0.7) -> float:
    """x at sigma 0.1, from 1 at sigma 1, for the estimate `x0 = slope x + shift`, without noise."""
    sigmas = [10 ** (-i / steps) for i in range(steps + 1)]
    x, none = torch.ones(1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
    for now, later in itertools.pairwise(sigmas):
        ends: dict[str, Any] = {"sigma": now, "sigma_next": later, "noise": none, "eta": 0.0}
        middle, half = sampler.to_midpoint(x, slope * x + shift, **ends)
        x = sampler.to_next(half, slope * middle + shift, **ends)
    return float(x)


def test_the_method_is_of_second_order() -> None:
    """dx/dt = x0 - x with t = -log sigma: x = c + (1 - c) sigma^(1 - slope), c its fixed point."""
    fixed = 0.7 / 0.6
    exact = fixed + (1 - fixed) * 0.1**0.6
    errors = [abs(solved(steps) - exact) for steps in (8, 16, 32, 64)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert errors[-1] > 1e-12  # otherwise there is no order to be seen
    assert orders == pytest.approx([2, 2, 2], abs=0.25)


def test_an_estimate_that_does_not_change_is_reached_exactly() -> None:
    assert solved(3, slope=0.0) == pytest.approx(0.7 + 0.3 * 0.1, rel=1e-12)


# --- the loop ----------------------------------------------------------------------------------

Denoise = Callable[[Joint, float], Joint]

SIGMAS = (1.0, 0.99, 0.9, 0.7, 0.3, 0.02, 0.0)
"""Steps below and above the length up to which a start is refined, and one from below 0.03."""


def denoise(x: Joint, sigma: float) -> Joint:
    """Some smooth estimate in which each modality sees the other."""

    def own(part: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.8 * part + sigma) * (1 - sigma) + 0.1 * part + 0.2 * other.mean()

    return Joint(own(x.video, x.audio), own(x.audio, x.video))


def written_out(x: Joint, denoise: Denoise) -> Joint:
    """The loop in one piece, each modality beside the other, in float64 throughout."""
    generators = {"mid": torch.Generator().manual_seed(9999)}
    generators["step"] = torch.Generator().manual_seed(-1)

    def noise(kind: str, like: torch.Tensor) -> torch.Tensor:
        made = torch.randn(like.shape, generator=generators[kind], dtype=torch.float64)
        made = (made - made.mean()) / made.std()
        centred = made - made.mean((1, 2), keepdim=True)
        return centred / centred.std((1, 2), keepdim=True)

    def renoise(a: torch.Tensor, b: torch.Tensor, s: float, t: float, kind: str) -> torch.Tensor:
        up = 0.5 * t
        kept = math.sqrt(t * t - up * up)
        velocity = (a - b) / (s - t)
        x0 = a - s * velocity
        return (1 - t) * x0 + kept * (x0 + velocity) + up * noise(kind, a)

    sigmas = [*SIGMAS[:-1], 0.0011]
    for s, t in itertools.pairwise(sigmas):
        h, middle = math.log(s / t), math.sqrt(s * t)
        a = (1 - math.exp(-h / 2)) / h
        b2 = 2 * (math.exp(-h) - 1 + h) / h**2
        b1 = (1 - math.exp(-h)) / h - b2
        first = denoise(x, s)
        starts, mids = list(x), []
        for k in (0, 1):
            moved = starts[k] + h * a * (first[k] - starts[k])
            mids.append(renoise(starts[k], moved, s, middle, "mid"))
            if h < 0.5 and s > 0.03:
                for _ in range(100):
                    starts[k] = mids[k] - h * a * (first[k] - starts[k])
        second = denoise(Joint(*mids), middle)
        ends = []
        for k in (0, 1):
            step = b1 * (first[k] - starts[k]) + b2 * (second[k] - starts[k])
            ends.append(renoise(starts[k], starts[k] + h * step, s, t, "step"))
        x = Joint(*ends)
    return denoise(x, 0.0011)


@pytest.fixture
def stub(pipe: Pipeline) -> Pipeline:
    """The pipeline at the start of a run with the sigmas above, in float64."""
    pipe.prepare(pipe)
    pipe.scheduler.sigmas = torch.tensor(SIGMAS, dtype=torch.float64)
    sampler.begin(pipe)
    return pipe


def noisy() -> Joint:
    generator = torch.Generator().manual_seed(3)
    return Joint(
        torch.randn(2, 12, 8, generator=generator, dtype=torch.float64),
        torch.randn(2, 5, 8, generator=generator, dtype=torch.float64),
    )


def run(pipe: Pipeline, x: Joint) -> list[Joint]:
    """Latents after each update."""
    made = []
    for index, sigma in enumerate(pipe.scheduler.sigmas[:-1].tolist()):
        step = Step(index, torch.tensor(0.0), sigma)
        x = sampler.advance(pipe, step, denoise(x, sigma), x)
        made.append(x)
    return made


def test_the_loop_is_the_written_out_one(stub: Pipeline) -> None:
    latents = run(stub, noisy())
    assert len(latents) == 2 * (len(SIGMAS) - 1) + 1
    for own, other in zip(latents[-1], written_out(noisy(), denoise), strict=True):
        assert float((own - other).norm() / other.norm()) < 1e-9


def test_latents_stay_in_their_dtype(stub: Pipeline) -> None:
    narrow = each(lambda part: part.float(), noisy())
    for own, wide in zip(run(stub, narrow)[-1], run_again(stub), strict=True):
        assert own.dtype is torch.float32
        assert float((own.double() - wide).norm() / wide.norm()) < 1e-5


def run_again(pipe: Pipeline) -> Joint:
    pipe.scheduler.sigmas = torch.tensor(SIGMAS, dtype=torch.float64)
    sampler.begin(pipe)
    return run(pipe, noisy())[-1]


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_noise_depends_on_the_step_and_not_on_what_was_asked_before(order: list[int]) -> None:
    x = noisy()
    in_order = sampler.Noise(5, "cpu")
    expected = [in_order.of(index, x) for index in range(6)]
    asked = sampler.Noise(5, "cpu")
    for index in order:
        for own, other in zip(asked.of(index, x), expected[index], strict=True):
            assert torch.equal(own, other)
    means = expected[0].video.mean((1, 2)), expected[0].video.std((1, 2))
    assert means[0].abs().max() < 1e-12
    assert means[1].tolist() == pytest.approx([1, 1])


def test_a_second_half_without_its_first_is_refused(stub: Pipeline) -> None:
    with pytest.raises(RuntimeError, match="the second half of step 1 without its first"):
        sampler.advance(stub, Step(3, torch.tensor(0.0), 0.9), noisy(), noisy())


# --- a pipeline --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(pipe: Pipeline) -> dict[str, torch.Tensor]:
    watch = Capture()
    pipe.forwards = 0
    generate(pipe, observer=watch, output="frames")
    assert pipe.forwards == 4 * 7  # passes times predictions
    return watch.tensors


def test_each_prediction_is_a_step(recorded: dict[str, torch.Tensor]) -> None:
    sigmas, timesteps = recorded["schedule/sigmas"], recorded["schedule/timesteps"]
    assert (len(sigmas), len(timesteps)) == (8, 7)
    assert sigmas[1] == pytest.approx(math.sqrt(sigmas[0] * sigmas[2]), rel=1e-6)
    assert sigmas[-2:].tolist() == pytest.approx([0.0011, 0])
    assert torch.allclose(timesteps, sigmas[:-1] * 1000)
    assert torch.equal(recorded["latent/final"], recorded["step/0006/guided"])
    assert torch.equal(recorded["audio/latent/final"], recorded["audio/step/0006/guided"])


def test_a_replay_of_the_same_pipeline_is_identical(
    pipe: Pipeline, recorded: dict[str, torch.Tensor]
) -> None:
    """Twice, because a replay must leave nothing behind for the next."""
    for _ in range(2):
        again = replay(pipe, recorded)
        assert not again.failures
        for name, value in again.outputs.items():
            assert torch.equal(value, recorded[name]), name
        assert {"step/0001/latent", "step/0002/latent", "latent/final"} <= set(again.outputs)


def test_a_replay_with_other_steps_still_updates_as_recorded(
    case: Case, recorded: dict[str, torch.Tensor]
) -> None:
    other = load(case.replace(steps=5))
    again = replay(other, recorded, only=["update"])
    assert torch.equal(again.outputs["step/0004/latent"], recorded["step/0004/latent"])


def test_a_changed_midpoint_shows_in_that_update(
    case: Case, recorded: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "_REFINEMENTS", 0)
    again = replay(load(case), recorded, only=["update"]).outputs
    sigmas = recorded["schedule/sigmas"]
    refined = [n for n in range(3) if math.log(sigmas[2 * n] / sigmas[2 * n + 2]) < 0.5]
    assert refined
    for number in refined:
        name = f"step/{2 * number + 2:04d}/latent"
        assert not torch.equal(again[name], recorded[name])
        middle = f"step/{2 * number + 1:04d}/latent"
        assert torch.equal(again[middle], recorded[middle])


def test_a_given_frame_stays(case: Case, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    pipe = load(case.replace(image=str(tmp_path / "first.png"), steps=2))
    watch = Capture()
    generate(pipe, observer=watch)
    count = 2 * 3  # tokens of a frame
    first = watch.tensors["latent/initial"][:, :count]
    for name in ("step/0001/latent", "step/0002/latent", "latent/final"):
        assert torch.equal(watch.tensors[name][:, :count], first)


def test_midpoints_are_never_skipped(case: Case) -> None:
    pipe = load(case.replace(skip_step=1))
    pipe.prepare(pipe)
    assert [skips(pipe, index) for index in range(7)] == [0, 0, 1, 0, 0, 0, 1]


def test_the_fixed_schedules_have_midpoints_too(case: Case) -> None:
    pipe = load(case.replace(sigma_schedule="distilled_stage_2", steps=3))
    pipe.prepare(pipe)
    made = pipe.make_schedule(pipe).sigmas[::2].tolist()
    assert made == pytest.approx([0.909375, 0.725, 0.421875, 0.0011])


def test_a_schedule_must_end_above_the_last_sigma(case: Case) -> None:
    with pytest.raises(CaseError, match=r"terminal_sigma 0\.001 is below the last sigma of res2s"):
        generate(load(case.replace(terminal_sigma=0.001)))


def test_euler_is_what_a_profile_has(case: Case, recorded: dict[str, torch.Tensor]) -> None:
    watch = Capture()
    pipe = load(case.replace(sampler=None))
    generate(pipe, observer=watch)
    assert len(watch.tensors["schedule/sigmas"]) == 4
    assert pipe.forwards == 4 * 3
    assert not torch.allclose(watch.tensors["latent/final"], recorded["latent/final"])
