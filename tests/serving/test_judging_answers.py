"""What answers show, on pictures whose distances are known."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from truestep.serving.judging import ROUNDING, Answers, distance, judge, scale_of
from truestep.serving.plan import Ask, Plan
from truestep.verdict import Verdict

PLAN = Plan("image", Ask("a fox", steps=6, width=32, height=32))
ASKS = PLAN.asks()


def picture(of: Any, ask: Ask) -> torch.Tensor:
    """Another picture for everything that is another."""
    random = torch.Generator().manual_seed(zlib.crc32(repr(of).encode()))
    return torch.randint(16, 240, (1, ask.height, ask.width, 3), generator=random).to(torch.uint8)


def answers(
    change: Callable[[str, Ask], Any] = lambda name, ask: ask, noise: float = 0.0, label: str = "it"
) -> Answers:
    """Answers of a server that hears what `change` says, with noise of its own in levels."""
    random = torch.Generator().manual_seed(len(label))
    made = {}
    for name, ask in ASKS.items():
        heard = change(name, ask)
        clean = picture(heard, heard if isinstance(heard, Ask) else ask).float()
        made[name] = (
            (clean + noise * torch.randn(clean.shape, generator=random)).round().to(torch.uint8)
        )
    return Answers(label, made)


REFERENCE = answers(label="trusted")
BASE = ASKS["base/0"]


def verdict_of(result: Any, name: str) -> Verdict:
    return next(row.verdict for row in result.rows if row.name == name)


def test_distances_are_of_the_worst_frame() -> None:
    frames = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    other = frames.clone()
    other[2] = 3
    assert distance(frames, frames) == 0
    assert distance(other, frames) == 3
    assert distance(frames[:2], frames) == float("inf")


def test_a_scale_is_of_repeats_and_seeds() -> None:
    scale = scale_of(answers(noise=2.0))
    assert 2 < scale.floor < 4
    assert scale.near == 2 * scale.floor
    assert scale.far is not None
    assert scale.far > 50
    assert not scale.noisy
    assert scale_of(REFERENCE).near == ROUNDING


def test_the_same_answers_are_equivalent_not_identical() -> None:
    """What is the same picture need not be the same model."""
    result = judge(PLAN, answers(), REFERENCE)
    assert result.verdict is Verdict.EQUIVALENT
    assert "8 pictures are the reference's bit for bit" in result.sentence
    assert "predictions and latents" in result.not_looked_at[0]


@pytest.mark.parametrize("noise", [0.4, 2.0, 5.0])
def test_noise_of_its_own_is_no_fault(noise: float) -> None:
    result = judge(PLAN, answers(noise=noise), answers(noise=noise, label="other"))
    assert result.verdict is Verdict.EQUIVALENT, result.sentence


IGNORED: dict[str, Callable[[str, Ask], Any]] = {
    "seed": lambda name, ask: replace(ask, seed=7),
    "steps": lambda name, ask: replace(ask, steps=BASE.steps),
    "guidance": lambda name, ask: replace(ask, guidance=BASE.guidance),
    "negative": lambda name, ask: replace(ask, negative=""),
    "prompt": lambda name, ask: replace(ask, prompt="a house"),
    "size": lambda name, ask: replace(ask, width=32, height=32),
}


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("name", IGNORED)
def test_an_ignored_parameter_is_named(name: str, noise: float) -> None:
    result = judge(PLAN, answers(IGNORED[name], noise), REFERENCE)
    assert result.verdict is Verdict.DRIFTED
    assert result.sentence.startswith(f"drifted: {name}: ignored"), result.sentence
    others = [row for row in result.rows if row.name.startswith("parameter/")]
    assert [row.name for row in others if not row.verdict.passed] == [f"parameter/{name}"]


@pytest.mark.parametrize("name", IGNORED)
def test_without_a_reference_only_what_may_be_so_is_left_open(name: str) -> None:
    result = judge(PLAN, answers(IGNORED[name]))
    expected = Verdict.INCONCLUSIVE if name in ("guidance", "negative") else Verdict.DRIFTED
    assert result.verdict is expected
    assert judge(PLAN, answers()).verdict is Verdict.EQUIVALENT
    assert "which model it is was not looked at" in judge(PLAN, answers()).sentence


def little(name: str, levels: float, noise: float = 0.0, label: str = "it") -> Answers:
    """Answers of a server in which a parameter has a small effect."""
    made = dict(answers(IGNORED[name], noise, label=label).pictures)
    random = torch.Generator().manual_seed(5)
    flip = torch.rand(made[name].shape, generator=random) < levels**2
    made[name] = made[name] + flip.to(torch.uint8)
    return Answers(label, made)


@pytest.mark.parametrize("name", ["guidance", "negative", "steps"])
def test_a_small_effect_is_one_where_repeats_agree(name: str) -> None:
    """0.05 levels: less than what rounding may make between two servers, more than a repeat."""
    result = judge(PLAN, little(name, 0.05))
    assert result.verdict is Verdict.EQUIVALENT, result.sentence


@pytest.mark.parametrize("name", ["guidance", "negative", "steps"])
@pytest.mark.parametrize(("levels", "noise"), [(0.05, 0.0), (0.5, 1.0), (2.0, 2.0)])
def test_a_small_effect_that_noise_hides_is_not_called_ignored(
    name: str, levels: float, noise: float
) -> None:
    trusted = little(name, min(levels, 1.0), label="trusted")
    result = judge(PLAN, answers(IGNORED[name], noise), trusted)
    assert verdict_of(result, f"parameter/{name}") is Verdict.INCONCLUSIVE
    assert "as much as noise" in result.sentence


def test_steps_that_noise_may_hide_are_left_open_without_a_reference() -> None:
    assert judge(PLAN, answers(IGNORED["steps"])).verdict is Verdict.DRIFTED
    assert judge(PLAN, answers(IGNORED["steps"], noise=1.0)).verdict is Verdict.INCONCLUSIVE
    assert judge(PLAN, answers(IGNORED["prompt"], noise=1.0)).verdict is Verdict.DRIFTED


def test_what_the_reference_ignores_too_is_no_fault() -> None:
    deaf = answers(IGNORED["guidance"])
    result = judge(PLAN, deaf, answers(IGNORED["guidance"], label="trusted"))
    assert result.verdict is Verdict.EQUIVALENT
    heard = judge(PLAN, answers(), deaf)
    assert heard.verdict is Verdict.DRIFTED
    assert verdict_of(heard, "picture/guidance") is Verdict.DRIFTED


def test_a_seed_that_is_drawn_anew_each_time_is_ignored() -> None:
    result = judge(PLAN, answers(lambda name, ask: (name, ask.prompt)), REFERENCE)
    assert result.verdict is Verdict.DRIFTED
    assert "repeats of one seed are" in result.sentence


def test_another_model_is_as_far_off_as_another_seed() -> None:
    result = judge(PLAN, answers(lambda name, ask: ("other weights", ask)), REFERENCE)
    assert result.verdict is Verdict.DRIFTED
    assert "another model, or the seed makes other noise" in result.sentence
    assert "effects beside the reference's" in result.notes[-1]


@pytest.mark.parametrize(
    ("off", "verdict"),
    [(0.005, Verdict.EQUIVALENT), (0.02, Verdict.INCONCLUSIVE), (0.2, Verdict.DRIFTED)],
)
def test_a_share_of_values_off_by_one_level(off: float, verdict: Verdict) -> None:
    ours = answers()
    changed = {}
    for name, own in ours.pictures.items():
        flip = torch.rand(own.shape, generator=torch.Generator().manual_seed(1)) < off
        changed[name] = own + flip.to(torch.uint8)
    result = judge(PLAN, Answers("it", changed), REFERENCE)
    assert verdict_of(result, "picture/base/0") is verdict
    if verdict is Verdict.DRIFTED:
        assert "the same noise, and other weights, precision" in result.sentence


@pytest.mark.parametrize(
    ("which", "verdict"),
    [
        (("prompt",), Verdict.INCONCLUSIVE),
        (("base/0", "base/1", "base/2"), Verdict.DRIFTED),
        (("seed/1", "seed/2", "steps", "guidance", "negative"), Verdict.DRIFTED),
    ],
)
def test_noise_of_the_base_alone_accuses_no_other_picture_alone(
    which: tuple[str, ...], verdict: Verdict
) -> None:
    noisy = answers(noise=1.0).pictures
    off = {n: (p.float() * 0.9).to(torch.uint8) if n in which else p for n, p in noisy.items()}
    assert judge(PLAN, Answers("it", off), REFERENCE).verdict is verdict
    exact = {n: REFERENCE.pictures[n] if n not in which else off[n] for n in noisy}
    assert judge(PLAN, Answers("it", exact), REFERENCE).verdict is Verdict.DRIFTED


def test_a_server_that_is_all_noise_decides_nothing() -> None:
    result = judge(PLAN, answers(noise=16.0), REFERENCE)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "too much" in result.sentence


def test_a_picture_of_another_size_than_asked_for_is_told() -> None:
    cut = {name: own[:, :24] for name, own in REFERENCE.pictures.items()}
    result = judge(PLAN, Answers("it", cut), REFERENCE)
    assert result.sentence == "drifted: size: ignored: base/0 is 32x24 where 32x32 was asked for"
    same = judge(PLAN, Answers("it", cut), Answers("trusted", cut))
    assert same.verdict is Verdict.EQUIVALENT  # the trusted one rounds sizes, too


def test_what_is_left_out_is_said() -> None:
    plan = replace(PLAN, without=("guidance", "negative"))
    kept = Answers("it", {name: REFERENCE.pictures[name] for name in plan.asks()})
    result = judge(plan, kept)
    assert result.not_looked_at[1:] == (
        "whether guidance is ignored",
        "whether negative is ignored",
    )
    assert verdict_of(result, "parameter/seed") is Verdict.EQUIVALENT
    none = replace(PLAN, without=("seed", "steps", "guidance", "negative", "prompt"))
    kept = Answers("it", {name: REFERENCE.pictures[name] for name in none.asks()})
    assert judge(none, kept, kept).verdict is Verdict.EQUIVALENT
