"""Log-probabilities of a trainer against those of the engine that sampled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.commands import runner
from truestep import log_probability_gap
from truestep.errors import UsageError
from truestep.training.gap import flow_step, gaussian_log_probability
from truestep.verdict import Verdict

Tensor = torch.Tensor


def engine(steps: int = 6, samples: int = 8) -> Tensor:
    return torch.randn(steps, samples, generator=torch.Generator().manual_seed(0))


def near(values: Tensor, seed: int, size: float = 1e-5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return values + size * torch.randn(values.shape, generator=generator)


BENIGN = [near(engine(), seed) for seed in (1, 2, 3)]


def test_a_harmless_run_passes_and_a_step_with_a_bias_is_named() -> None:
    right = log_probability_gap(near(engine(), 9), engine(), benign=BENIGN)
    assert right.verdict is Verdict.EQUIVALENT
    wrong = near(engine(), 9)
    wrong[4] += 3e-4
    found = log_probability_gap(wrong, engine(), benign=BENIGN, timesteps=torch.arange(6) * 100.0)
    assert (found.verdict, found.exit_code, found.worst) == (Verdict.DRIFTED, 1, 4)
    assert [step.verdict for step in found.steps].count(Verdict.DRIFTED) == 1
    assert found.steps[4].timestep == 400.0
    assert found.steps[4].outside == 1.0
    assert found.steps[4].mean == pytest.approx(3e-4, rel=0.1)
    assert found.steps[0].outside == 0.0
    assert "step 4 (timestep 400)" in found.sentence


def test_the_same_twice_is_identical_and_a_tolerance_judges_in_nats() -> None:
    assert log_probability_gap(engine(), engine()).verdict is Verdict.IDENTICAL
    other = engine() + 1e-3
    assert log_probability_gap(other, engine(), tolerance=2e-3).verdict is Verdict.EQUIVALENT
    assert log_probability_gap(other, engine(), tolerance=5e-4).verdict is Verdict.DRIFTED


def test_what_is_not_finite_is_invalid() -> None:
    broken = engine()
    broken[2, 1] = float("nan")
    found = log_probability_gap(broken, engine(), benign=BENIGN)
    assert found.verdict is Verdict.INVALID
    assert "step 2" in found.sentence
    assert log_probability_gap(engine(), broken).verdict is Verdict.INVALID


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", [3e-4, 7.8e-3])
def test_sixteen_bits_hide_no_gap(dtype: torch.dtype, gap: float) -> None:
    sampled = torch.zeros(5, 8, dtype=dtype)
    trained = torch.full((5, 8), gap, dtype=dtype)
    for benign in ([sampled.clone()], []):
        found = log_probability_gap(trained, sampled, benign=benign)
        assert found.verdict is Verdict.DRIFTED, found.sentence
    again = log_probability_gap(sampled.clone(), sampled, benign=[sampled.clone()])
    assert again.verdict is Verdict.IDENTICAL
    spread = [near(sampled.float(), seed, 2e-3).to(dtype) for seed in (1, 2, 3)]
    within = near(sampled.float(), 9, 2e-3).to(dtype)
    assert log_probability_gap(within, sampled, benign=spread).verdict is Verdict.EQUIVALENT


def test_what_sixteen_bits_may_have_rounded_is_undecided_without_a_benign_run() -> None:
    exact = -1.4 + 0.01 * engine()
    rounded = exact.bfloat16()
    found = log_probability_gap(near(exact, 2, 1e-3).bfloat16(), rounded)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "within the rounding of bfloat16" in found.sentence
    far = log_probability_gap((exact + 0.1).bfloat16(), rounded)
    assert far.verdict is Verdict.DRIFTED


def test_a_gap_below_the_numbers_beside_it_is_not_called_identical() -> None:
    found = log_probability_gap(engine() * (1 + 2e-7), engine(), benign=BENIGN)
    assert found.verdict is Verdict.EQUIVALENT
    small = torch.full((2, 4), 1e-9)
    assert log_probability_gap(small, torch.zeros(2, 4)).verdict is Verdict.EQUIVALENT


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_benign_run_that_is_not_finite_is_refused(value: float) -> None:
    broken = BENIGN[1].clone()
    broken[0, 0] = value
    with pytest.raises(UsageError, match="measures no floor") as raised:
        log_probability_gap(engine(), engine(), benign=[BENIGN[0], broken])
    assert "run 2" in str(raised.value)


@pytest.mark.parametrize(
    ("trainer", "sampled", "options", "text"),
    [
        (engine(), engine(5), {}, "other steps or samples"),
        (engine()[0], engine()[0], {}, "`t b`"),
        (engine(0), engine(0), {}, "`t b`"),
        (engine(), engine(), {"clip": 0.0}, "half-width"),
        (engine(), engine(), {"timesteps": torch.arange(5)}, "one timestep a step"),
        (engine(), engine(), {"benign": [engine(3)]}, "other steps or samples"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    trainer: Tensor, sampled: Tensor, options: dict[str, object], text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        log_probability_gap(trainer, sampled, **options)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(
    st.floats(0.05, 3.0),
    st.integers(0, 1000),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
)
def test_the_density_is_that_of_a_normal_distribution(
    std: float, seed: int, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    action, mean = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    expected = torch.distributions.Normal(mean, std).log_prob(action).mean(-1)
    torch.testing.assert_close(gaussian_log_probability(action, mean, std), expected)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 0.95), st.floats(0.0, 0.99), st.integers(0, 1000))
def test_a_step_without_noise_is_eulers_and_noise_keeps_the_marginal(
    sigma: float, share: float, seed: int
) -> None:
    """With x0 = 0 a latent is sigma * noise, its velocity that noise, whose spread each step of the
    stochastic process keeps to first order: mean of the square sigma^2 before and after."""
    following = sigma * share
    latent, velocity = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed))
    mean, std = flow_step(latent, velocity, sigma=sigma, next_sigma=following, noise_level=0.0)
    torch.testing.assert_close(mean, latent.double() + velocity.double() * (following - sigma))
    assert std == 0.0
    close = sigma * (1 - 1e-4)
    noise = torch.ones(1, dtype=torch.float64)
    mean, std = flow_step(sigma * noise, noise, sigma=sigma, next_sigma=close, noise_level=0.7)
    assert float(mean.square() + std**2) == pytest.approx(close**2, rel=1e-4)


def test_sigmas_out_of_order_and_a_first_one_without_a_bound_are_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(UsageError, match="from a larger sigma to a smaller"):
        flow_step(one, one, sigma=0.2, next_sigma=0.4)
    with pytest.raises(UsageError, match="has no spread"):
        flow_step(one, one, sigma=1.0, next_sigma=0.8)
    mean, std = flow_step(one, one, sigma=1.0, next_sigma=0.8, largest_sigma=0.8)
    assert mean.isfinite().all()
    assert std > 0


def test_the_verb_prints_the_worst_steps_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = runner(monkeypatch, capfd)
    wrong = near(engine(), 9)
    wrong[4] += 3e-4
    save_file({"log_probability": wrong}, "t.safetensors")
    save_file({"log_probability": engine(), "timesteps": torch.arange(6)}, "e.safetensors")
    save_file({"log_probability": BENIGN[0]}, "b.safetensors")
    words = ("training", "gap", "t.safetensors", "e.safetensors", "--benign", "b.safetensors")
    code, out, _ = run(*words)
    assert code == 1
    assert out.startswith("FAILED drifted: 1 of 6 steps")
    code, out, _ = run(*words, "--json")
    assert json.loads(out)["worst"] == 4
    save_file({"x": engine()}, "x.safetensors")
    code, out, err = run("training", "gap", "x.safetensors", "e.safetensors")
    assert code == 2
    assert "holds no log-probabilities" in err
