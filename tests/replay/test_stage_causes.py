"""Causes of stages without a model: accepted where the stage then gives what the candidate gave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from truestep.case import Case
from truestep.recording.format import Recording
from truestep.replay.causes.guesses import Failing, Scene, explains
from truestep.replay.causes.scheduled import schedule
from truestep.replay.check import check
from truestep.replay.record import record
from truestep.report.words import next_command
from truestep.verdict import Verdict

CASE = Case(model="builtin:digits", prompt="a red three moving left", steps=4)


@pytest.fixture(scope="module")
def reference() -> Recording:
    return record(CASE)


def explained(
    reference: Recording, change: Callable[[Any], Any] | None = None, **settings: Any
) -> tuple[str, str, str]:
    """Kind, text and patch of the cause."""
    result = check(CASE, reference, depth="cause", apply=change, settings=settings)
    assert result.verdict is Verdict.DRIFTED
    assert result.first_divergence is not None
    cause = result.first_divergence.cause
    if cause is None:
        assert any(note.startswith("no cause named: none of ") for note in result.notes)
        return "", "", ""
    assert cause.error_after < 1e-5 < cause.error_before
    return cause.kind, cause.text, cause.patch


def test_another_guidance_scale_is_said_with_both_values(reference: Recording) -> None:
    assert explained(reference, guidance_scale=3.1) == (
        "guidance scale",
        f"the guidance scale is 3.1, the reference's {CASE.guidance_scale:g}",
        f"set `guidance_scale` to {CASE.guidance_scale:g}",
    )


@pytest.mark.parametrize(
    ("kind", "said", "combine"),
    [
        ("guidance formula", "starts from the conditional pass", lambda c, u, s: c + s * (c - u)),
        ("guidance formula", "the two passes are exchanged", lambda c, u, s: c + s * (u - c)),
        ("guidance missing", "the conditional pass alone", lambda c, u, s: c),
        ("scaled", "1.02 times", lambda c, u, s: 1.02 * (u + s * (c - u))),
        ("guidance rescale", "over the sample, phi 0.5", None),
        ("", "", lambda c, u, s: (u + s * (c - u)).clamp(-0.5, 0.5)),
    ],
)
def test_formulas_of_guidance(
    reference: Recording, kind: str, said: str, combine: Callable[..., torch.Tensor] | None
) -> None:
    def change(pipe: Any) -> None:
        original = pipe.combine

        def rescaled(inner: Any, step: Any, cond: torch.Tensor, uncond: torch.Tensor) -> Any:
            guided = original(inner, step, cond, uncond)
            return guided * (0.5 * cond.std() / guided.std() + 0.5)

        def combined(inner: Any, step: Any, cond: torch.Tensor, uncond: torch.Tensor) -> Any:
            assert combine is not None
            return combine(cond, uncond, inner.settings.guidance_scale)

        pipe.combine = rescaled if combine is None else combined

    found, text, _ = explained(reference, change)
    assert found == kind
    assert said in text


def test_one_step_without_guidance_is_named(reference: Recording) -> None:
    def change(pipe: Any) -> None:
        original = pipe.combine
        pipe.combine = lambda inner, step, *passes: (
            passes[0] if step.index == 2 else original(inner, step, *passes)
        )

    assert explained(reference, change)[:2] == (
        "guidance missing",
        "step 2 is not guided: the conditional pass alone",
    )


@pytest.mark.parametrize(
    ("kind", "said", "change"),
    [
        ("precision", "the sigmas are in bfloat16", lambda s: s.bfloat16().float()),
        ("last sigma", "the last of the sigmas is 0.001", lambda s: s.clamp(min=1e-3)),
        ("scaled", "the sigmas are 0.99 times", lambda s: 0.99 * s),
        ("", "", lambda s: s.sqrt()),
    ],
)  # fmt: skip
def test_schedules(
    reference: Recording, kind: str, said: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    def changed(pipe: Any) -> None:
        original = pipe.make_schedule

        def scheduled(inner: Any) -> Any:
            made = original(inner)
            return replace(made, sigmas=change(made.sigmas))

        pipe.make_schedule = scheduled

    found, text, _ = explained(reference, changed)
    assert found == kind
    assert said in text


def test_another_flow_shift_is_said_with_both_values(reference: Recording) -> None:
    kind, text, patch = explained(reference, flow_shift=5.0)
    assert (kind, text.partition(", the")[0]) == ("flow shift", "the flow shift is 5")
    assert patch.startswith("flow_shift = ")


@pytest.mark.parametrize(
    ("kind", "said", "change"),
    [
        ("scaled", "1.01 times", lambda noise: 1.01 * noise),
        ("precision", "in bfloat16", lambda noise: noise.bfloat16().float()),
        ("", "", lambda noise: noise.flip(-1)),
    ],
)
def test_noise(
    reference: Recording, kind: str, said: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    def changed(pipe: Any) -> None:
        original = pipe.make_latent
        pipe.make_latent = lambda inner: change(original(inner))

    found, text, _ = explained(reference, changed)
    assert found == kind
    assert said in text


def test_the_noise_of_another_seed_is_named(reference: Recording) -> None:
    own = CASE.seed
    assert explained(reference, seed=own + 3)[:2] == (
        "seed",
        f"the initial noise is that of seed {own + 3}, the reference's of seed {own}",
    )


def test_a_latent_kept_in_16_bits_and_a_longer_step(reference: Recording) -> None:
    def changed(change: Callable[..., torch.Tensor]) -> Callable[[Any], None]:
        def apply(pipe: Any) -> None:
            original = pipe.update
            pipe.update = lambda inner, step, guided, latent: change(
                original(inner, step, guided, latent), latent
            )

        return apply

    kept = changed(lambda made, latent: made.bfloat16().float())
    assert explained(reference, kept)[0] == "precision"
    longer = changed(lambda made, latent: latent + 1.5 * (made - latent))
    assert explained(reference, longer)[:2] == (
        "step size",
        "a step of the scheduler is 1.5 times as long as the reference's",
    )


def test_what_comes_next_of_such_a_stage_is_its_cause(reference: Recording) -> None:
    result = check(CASE, reference, settings={"guidance_scale": 3.1})
    repeat = "truestep check a --set guidance_scale=3.1"
    told = next_command(result.model_copy(update={"repeat": repeat, "hint": ""}))
    assert told == f"{repeat} --depth cause"


def test_in_16_bits_the_cause_is_looked_for_where_the_stage_is_raised() -> None:
    half = CASE.replace(dtype="bfloat16")
    result = check(half, record(half), depth="cause", settings={"guidance_scale": 3.1})
    assert result.first_divergence is not None
    cause = result.first_divergence.cause
    assert cause is not None
    assert cause.text == f"the guidance scale is 3.1, the reference's {CASE.guidance_scale:g}"


# Around a model


def given_to(pipe: Any, stage: str, change: Callable[..., Any]) -> None:
    """Run a stage on other inputs."""
    original = getattr(pipe, stage)
    setattr(pipe, stage, lambda inner, *args: original(inner, *change(*args)))


def made_by(pipe: Any, stage: str, change: Callable[[Any], Any]) -> None:
    """Change what a stage gives."""
    original = getattr(pipe, stage)
    setattr(pipe, stage, lambda inner, *args: change(original(inner, *args)))


def before_the_vae(pipe: Any, change: Callable[..., torch.Tensor]) -> None:
    def decode(inner: Any, latent: torch.Tensor) -> Any:
        config = inner.vae.config
        mean, deviation = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return inner.vae.decode(change(latent, mean, deviation), return_dict=False)[0]

    pipe.decode = decode


def reversed_time(latent: Any, step: Any, *rest: Any) -> tuple[Any, ...]:
    return latent, replace(step, timestep=1000 - step.timestep), *rest


@pytest.mark.parametrize(
    ("kind", "said", "change"),
    [
        (
            "text template",
            "`a` (1 tokens) before",
            lambda pipe: given_to(
                pipe, "encode_text", lambda ps: ([f"a {p}".strip() for p in ps],)
            ),
        ),
        ("time convention", "1000 minus", lambda pipe: given_to(pipe, "predict", reversed_time)),
        ("sign", "the other sign", lambda pipe: made_by(pipe, "predict", torch.neg)),
        ("order", "turned round", lambda pipe: made_by(pipe, "decode", lambda x: x.flip(1))),
        ("image range", "from 0 to 1", lambda pipe: made_by(pipe, "decode", lambda x: x / 2 + 0.5)),
        (
            "latent statistics",
            "latents * latents_std - latents_mean",
            lambda pipe: before_the_vae(pipe, lambda x, mean, std: x * std - mean),
        ),
        ("", "", lambda pipe: made_by(pipe, "decode", lambda x: x + 0.2 * x.roll(1, -1))),
        ("", "", lambda pipe: made_by(pipe, "predict", lambda x: x + 0.2 * x.roll(1, -1))),
    ],
)
def test_code_around_a_model(
    reference: Recording, kind: str, said: str, change: Callable[[Any], None]
) -> None:
    result = check(CASE, reference, depth="cause", apply=change)
    first = result.first_divergence
    assert first is not None
    if not kind:
        assert first.cause is None
        return
    assert first.cause is not None
    assert first.cause.kind == kind
    assert said in first.cause.text
    assert not any(note.startswith("no cause named:") for note in result.notes)


def test_a_rescale_to_the_unconditional_pass(reference: Recording) -> None:
    def change(pipe: Any) -> None:
        original = pipe.combine

        def rescaled(inner: Any, step: Any, cond: torch.Tensor, uncond: torch.Tensor) -> Any:
            guided = original(inner, step, cond, uncond)
            return guided * uncond.std() / guided.std()

        pipe.combine = rescaled

    found, text, _ = explained(reference, change)
    assert found == "guidance rescale"
    assert "to the deviation of the unconditional pass, phi 1" in text


def test_the_ends_of_a_schedule() -> None:
    def curve(most: float, least: float, rho: float) -> torch.Tensor:
        ramp = torch.linspace(0, 1, 8, dtype=torch.float64)
        high, low = most ** (1 / rho), least ** (1 / rho)
        sigmas = (high + ramp * (low - high)) ** rho
        return torch.cat([sigmas, sigmas[-1:]])

    config = {"sigma_max": 80.0, "sigma_min": 0.002, "rho": 7.0}
    trusted: Any = SimpleNamespace(scheduler=SimpleNamespace(config=config), settings=None)
    for kind, ends, said in (
        ("sigma max", (70.0, 0.002, 7.0), "sigma_max of the schedule is 70, the reference's 80"),
        ("sigma min", (80.0, 0.02, 7.0), "sigma_min of the schedule is 0.02"),
        ("rho", (80.0, 0.002, 5.0), "rho of the schedule is 5, the reference's 7"),
        ("", (70.0, 0.002, 5.0), ""),
    ):
        one = Failing("schedule/sigmas", curve(*ends), curve(80.0, 0.002, 7.0), 1e-6)
        guesses = schedule(Scene([one], {}, trusted))
        found = next((guess for guess in guesses if explains(guess, [one])), None)
        assert (found.kind if found else "") == kind
        assert said in (found.text if found else "")
