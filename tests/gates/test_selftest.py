"""The gates' own test: ours lets nothing live, and a gate that cannot fail is told so."""

from __future__ import annotations

import math

import pytest
import torch

from truestep.errors import UsageError
from truestep.gates.kinds import Domain, Gate, parse_gate
from truestep.gates.selftest import (
    DAMAGES,
    Score,
    Selftest,
    Selftests,
    Trial,
    score,
    sentence,
    suited,
    table,
    truestep_gate,
)
from truestep.verdict import Side

torch.manual_seed(0)
LATENT = {"latent/final": torch.randn(1, 16, 16, 24, 24)}
FRAMES = {"video/frames": (torch.rand(1, 3, 5, 24, 24) - 0.5).cumsum(-1).clamp(-1, 1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_lets_nothing_live_even_without_a_measured_floor(dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in LATENT.items()}
    found = score(truestep_gate(None, pair=None), tensors)
    lenient = {"scaled by 1.01", "moved by 1 % of the rms"} if dtype is torch.bfloat16 else set()
    assert {damage for damage, _ in found.survived} <= lenient
    assert len(found.trials) == len(DAMAGES)
    least = 0.05 if dtype is torch.bfloat16 else 2e-5
    assert max(found.smallest_noise, found.smallest_gain, found.smallest_shift) < least
    assert min(found.smallest_noise, found.smallest_gain, found.smallest_shift) > 1e-8


def test_ours_is_scored_on_latents_and_frames() -> None:
    found = score(truestep_gate(None, pair=None), {**LATENT, **FRAMES})
    assert found.domain is Domain.ANY
    assert {t.tensor for t in found.trials} == {"latent/final", "video/frames"}
    assert found.survived == ()
    assert found.share == 1.0


def test_gates_are_scored_on_their_own_domain() -> None:
    tensors = {**LATENT, **FRAMES}
    assert list(suited(parse_gate("cosine"), tensors)) == ["latent/final"]
    assert list(suited(parse_gate("psnr"), tensors)) == ["video/frames"]
    with pytest.raises(UsageError, match=r"gate psnr:28 has nothing to judge") as caught:
        score(parse_gate("psnr"), LATENT)
    assert "it judges frames; the reference holds latent/final" in str(caught.value)
    assert "hint: truestep record CASE --update  # with decoded frames" in str(caught.value)


def test_video_gates_let_live_what_a_mean_over_8_bit_frames_hides() -> None:
    for name in ("ssim", "psnr", "sglang"):
        found = score(parse_gate(name), FRAMES)
        survived = {damage for damage, _ in found.survived}
        assert {"one NaN", "scaled by 1.01"} <= survived
        assert not {"all NaN", "sign flipped", "another seed"} & survived
        assert 1e-3 < found.smallest_noise < 0.5
    between = {d for d, _ in score(parse_gate("sglang"), FRAMES).survived}
    assert "two frames swapped" not in between  # the last frame is a key frame


def test_a_gate_that_adapts_itself_names_the_result() -> None:
    gate = Gate("x", lambda _, a, r: torch.equal(a, r), named=lambda t: f"x@{t.shape[-1]}")
    assert score(gate, LATENT).gate == "x@24"


def test_a_damage_that_changes_nothing_is_not_tried() -> None:
    still = LATENT["latent/final"][:, :, :1].repeat(1, 1, 3, 1, 1)
    found = score(parse_gate("allclose"), {"latent/final": still})
    assert found.cell("two frames swapped") == found.cell("last frame duplicated") == "-"
    assert len(found.trials) == len(DAMAGES) - 2
    line = next(line for line in table([found]) if line.startswith("two frames swapped"))
    assert line.split()[-1] == "-"


def test_the_cosine_gate_lets_live_what_it_cannot_see() -> None:
    found = score(parse_gate("cosine:5e-3,1e-2"), LATENT)
    survived = {damage for damage, _ in found.survived}
    assert {"all NaN", "scaled by 2", "scaled by 1.01", "one patch of one frame"} <= survived
    assert "another seed" not in survived
    assert 0.05 < found.smallest_noise < 0.2
    assert found.smallest_gain == math.inf
    assert 0.05 < found.smallest_shift < 0.5
    assert table([found])[-2].split()[-1] == "none"


def test_allclose_sees_size() -> None:
    found = score(parse_gate("allclose:1e-4"), LATENT)
    assert found.survived == ()
    assert found.smallest_noise < 1e-3
    assert found.smallest_gain == pytest.approx(1e-4, rel=0.5)


def test_gates_that_cannot_judge_are_told_so() -> None:
    always = score(Gate("always", lambda *_: True), LATENT)
    assert len(always.survived) == len(DAMAGES)
    assert always.smallest_noise == always.smallest_shift == math.inf
    assert always.share == 0
    with pytest.raises(UsageError, match="gate never fails latent/final undamaged"):
        score(Gate("never", lambda *_: False), LATENT)


@pytest.mark.parametrize(
    "tensor", [torch.ones(3, 3), torch.randn(1, 2, 1, 4, 4), torch.full((1, 2, 3, 4, 4), math.nan)]
)
def test_tensors_that_cannot_be_damaged(tensor: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="cannot be damaged"):
        score(truestep_gate(None, pair=None), {"x": tensor})


def test_the_table_names_survivors() -> None:
    text = "\n".join(table([score(parse_gate("cosine"), LATENT)]))
    assert "all NaN                  LIVES" in text
    assert "another seed             caught" in text
    assert "judges                   latent" in text
    assert "mutation score           54 %" in text
    assert "smallest noise seen" in text


def made(gate: str, *, lives: int) -> Score:
    trials = [
        Trial(damage="all NaN", tensor="latent/final", lives=lives > 0),
        Trial(damage="all NaN", tensor="step/2/cond", lives=lives > 1),
    ]
    return Score(
        gate=gate,
        domain=Domain.LATENT,
        trials=tuple(trials),
        smallest_noise=0.05,
        smallest_gain=math.inf,
        smallest_shift=1e-9,
    )


def test_a_damage_may_live_on_some_tensors() -> None:
    assert [made("x", lives=n).cell("all NaN") for n in range(3)] == [
        "caught",
        "LIVES 1/2",
        "LIVES",
    ]
    assert made("x", lives=1).share == 0.5


def test_many_gates_take_several_tables() -> None:
    scores = [made(f"gate-number-{n}:0.005,0.01", lives=n % 3) for n in range(6)]
    lines = table(scores)
    assert max(map(len, lines)) <= 100
    heads = [line for line in lines if line.startswith("damage")]
    assert len(heads) == lines.count("") + 1 > 1
    assert " ".join(heads).replace("damage", "").split() == [s.gate for s in scores]
    assert max(map(len, table([made("x" * 120, lives=0)]))) > 100  # one gate is never split


def test_the_sentence() -> None:
    told = sentence("three", [made("truestep", lives=0), made("ssim:0.93", lives=1)])
    assert told == "three: damages caught: truestep 2 of 2 (100 %), ssim:0.93 1 of 2 (50 %)"


def test_results_survive_json() -> None:
    scores = (made("x", lives=1),)
    side = Side(label="reference")
    found = Selftests(
        results=(Selftest(name="a", sentence="b", tensors=("c",), reference=side, scores=scores),)
    )
    text = found.model_dump_json()
    assert '"smallest_gain":"inf"' in text
    assert Selftests.model_validate_json(text) == found


def test_every_damage_changes_the_tensor() -> None:
    for tensor in (*LATENT.values(), *FRAMES.values()):
        for name, damage in DAMAGES.items():
            assert not torch.equal(damage(tensor), tensor), name
            assert damage(tensor).shape == tensor.shape
