"""Metrics, mutations and detectors of quality, and the judge of the digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from training.digits.data import sample_clips
from truestep.errors import UsageError
from truestep.experiment.quality import detectors
from truestep.experiment.quality import digits_judge as judge
from truestep.experiment.quality.metrics import LOOK, builtin, chosen, nearness, scale_of
from truestep.experiment.quality.mutations import MUTATIONS, Frames, expected, other_prompts

CLIPS = 120


@pytest.fixture(scope="module")
def held_out() -> tuple[list[Frames], list[str]]:
    """Real clips of scans that neither the model nor the reader of digits learned."""
    clips = sample_clips(CLIPS, seed=3, held_out=True)
    frames = ((clips.video + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()
    return [np.ascontiguousarray(clip) for clip in frames], [c.prompt for c in clips.captions]


def _right(frames: list[Frames], prompts: list[str]) -> float:
    seen = [judge.see(f, _asked(p)).right for f, p in zip(frames, prompts, strict=True)]
    return float(np.mean(seen))


def _asked(prompt: str) -> judge.Asked:
    found = judge.asked(prompt)
    assert found is not None
    return found


def test_the_judge_reads_held_out_scans_and_no_wrong_prompt(
    held_out: tuple[list[Frames], list[str]],
) -> None:
    """The model card states 92 % of the digits; 120 of them leave room for 6 % less."""
    frames, prompts = held_out
    assert _right(frames, prompts) >= 0.86
    assert _right(frames, list(other_prompts(prompts))) == 0


@pytest.mark.parametrize("name", [*MUTATIONS])
def test_the_judge_and_the_look_together_notice_every_damage(
    name: str, held_out: tuple[list[Frames], list[str]]
) -> None:
    frames, prompts = held_out[0][:30], held_out[1][:30]
    damage: Callable[[Frames], Frames] = MUTATIONS[name].apply
    losses = {}
    for metric in builtin("builtin:digits"):
        pairs = [
            (np.array(metric.read(f, p)), np.array(metric.read(damage(f), p)))
            for f, p in zip(frames, prompts, strict=True)
        ]
        before, after = (np.stack(side) for side in zip(*pairs, strict=True))
        if metric.kind == "look":
            losses[metric.name] = float(np.abs(before - after).mean() / before.std(axis=0).mean())
        else:
            losses[metric.name] = float((before - after).mean() / (before.std() + 1e-3))
    assert max(losses.values()) > 1, losses


def test_what_a_prompt_asks_is_read_or_refused() -> None:
    assert judge.asked("a red three moving left") == judge.Asked(3, "red", "left")
    assert judge.asked("a red three moving sideways") is None
    assert judge.asked("a fox") is None
    with pytest.raises(UsageError, match="cannot read the prompt"):
        builtin("builtin:digits")[0].read(np.zeros((9, 32, 32, 3), np.float32), "a fox")


def test_every_start_of_the_prompts_is_even() -> None:
    prompts = judge.prompts()
    assert len(set(prompts)) == len(prompts) == 160
    first = [_asked(prompt) for prompt in prompts[:32]]
    for key in ("digit", "colour", "direction"):
        values = [getattr(a, key) for a in first]
        counts = [values.count(value) for value in set(values)]
        assert max(counts) <= 2 * min(counts)
    assert len({a.digit for a in first}) == 10


def test_detectors_find_their_own_damage_and_leave_real_clips(
    held_out: tuple[list[Frames], list[str]],
) -> None:
    for frames in held_out[0][:40]:
        assert detectors.found_in(frames) == ()
        assert all(detectors.planted(frames).values())
    picture = held_out[0][0][:1]
    assert "frozen" not in detectors.planted(picture)
    assert detectors.found_in(np.zeros_like(picture)) == ("black",)


def test_a_natural_texture_is_no_noise_and_a_still_one_is_frozen() -> None:
    rng = np.random.default_rng(0)
    coarse = rng.random((3, 8, 8, 3), dtype=np.float32).repeat(8, axis=1).repeat(8, axis=2)
    assert detectors.found_in(coarse) == ()
    assert detectors.found_in(coarse[:1].repeat(3, axis=0)) == ("frozen",)
    assert "noise" in detectors.found_in(rng.random((3, 64, 64, 3), dtype=np.float32))


def test_mutations_keep_the_form_and_pictures_have_no_frames_to_swap() -> None:
    frames = np.random.default_rng(1).random((9, 16, 24, 3), dtype=np.float32)
    for mutation in MUTATIONS.values():
        damaged = mutation.apply(frames)
        assert damaged.shape == frames.shape
        assert damaged.dtype == np.float32
        assert damaged.min() >= 0
        assert damaged.max() <= 1.0001
    assert "frozen frames" not in expected(1)
    assert len(expected(9)) == len(MUTATIONS) + 1


def test_another_prompt_shares_as_little_as_can_be() -> None:
    prompts = ["a red three moving left", "a red three moving up", "a blue zero moving right"]
    assert other_prompts(prompts) == (prompts[2], prompts[2], prompts[0])
    assert all(a != b for a, b in zip(prompts, other_prompts(prompts), strict=True))


def test_a_look_of_another_seed_costs_what_seeds_differ_and_another_look_more() -> None:
    rng = np.random.default_rng(2)
    baseline, same = (rng.standard_normal((40, 4, 5)) for _ in range(2))
    scale = scale_of(baseline)
    own, other, moved = (nearness(x, baseline, scale) for x in (baseline, same, same + 1.5))
    assert abs(own.mean() - other.mean()) < 0.1
    assert moved.mean() < own.mean() - 0.3


METRICS = """
def bright(frames, prompt):
    assert frames.dtype == "float32" and frames.max() <= 1
    return frames.mean()

def raises(frames, prompt):
    raise RuntimeError("no such thing")

def digit(frames, prompt):
    return 1.0

def word(frames, prompt):
    return "good"

def alone(frames):
    return 1.0
"""


def test_a_metric_of_the_user_is_read_and_its_faults_are_named(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(METRICS)
    frames = np.full((1, 4, 4, 3), 0.25, np.float32)
    (*_, bright) = chosen("builtin:digits", [f"{file}:bright"])
    assert bright.read(frames, "") == (0.25,)
    assert bright.digest
    with pytest.raises(UsageError, match="metric raises raised RuntimeError"):
        chosen("other", [f"{file}:raises"])[-1].read(frames, "")
    for name, said in (("word", "returned str, not a number"), ("alone", "raised TypeError")):
        with pytest.raises(UsageError, match=said) as raised:
            chosen("other", [f"{file}:{name}"])[-1].read(frames, "")
        line = 1 + METRICS[: METRICS.index(f"def {name}(")].count("\n")
        assert f"{file}:{line}" in str(raised.value), "where is the user's file"
    with pytest.raises(UsageError, match="two metrics are called digit"):
        chosen("builtin:digits", [f"{file}:digit"])
    with pytest.raises(UsageError, match="CLIP model cannot be loaded"):
        chosen("other", [f"clip:{tmp_path}"])
    assert chosen("other", []) == (LOOK,)
