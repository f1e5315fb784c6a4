"""Parameters are not activations: equal bits, exact rounding, or others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.commands import Captured, runner
from truestep import compare
from truestep.errors import UsageError
from truestep.judge.parameters import are_parameters
from truestep.measure.rounding import expanded, rounded_to, rounding, spread
from truestep.verdict import Comparison, Verdict

Tensors = dict[str, torch.Tensor]


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    drawn = torch.Generator().manual_seed(seed)
    return {
        "blocks.0.attn.to_q.weight": 0.02 * torch.randn(96, 64, generator=drawn).to(dtype),
        "blocks.0.attn.to_q.bias": torch.zeros(96, dtype=dtype),
        "blocks.0.scale_shift_table": 0.1 * torch.randn(6, 64, generator=drawn).to(dtype),
    }


SOURCE = weights()
MATRIX = "blocks.0.attn.to_q.weight"


def files(tmp_path: Path, actual: Tensors, reference: Tensors) -> tuple[Path, Path]:
    paths = tmp_path / "actual.safetensors", tmp_path / "reference.safetensors"
    for path, tensors in zip(paths, (actual, reference), strict=True):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return paths


def judged(tmp_path: Path, actual: Tensors, reference: Tensors) -> Comparison:
    result = compare(*files(tmp_path, actual, reference))
    assert result.rule.name == "weights/1"
    return result


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def test_equal_bits_are_identical(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        tensors = cast(SOURCE, dtype)
        assert judged(tmp_path, tensors, tensors).verdict is Verdict.IDENTICAL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_of_one_dtype_have_no_noise(dtype: torch.dtype, tmp_path: Path) -> None:
    source = cast(SOURCE, dtype)
    scaled = judged(tmp_path, {k: v * 1.003 for k, v in source.items()}, source)
    assert scaled.verdict is Verdict.DRIFTED
    assert "blocks.0.attn.to_q.weight" in {row.name for row in scaled.failing}
    if dtype is torch.float32:
        assert "scaled by 1.003" in scaled.sentence
    step = {k: v.clone() for k, v in source.items()}
    last = step[MATRIX].view(-1)[-1:]
    last.copy_(torch.nextafter(last.float(), torch.tensor(1.0)).to(dtype))
    last.add_(last.abs() * torch.finfo(dtype).eps)
    found = judged(tmp_path, step, source)
    assert [row.name for row in found.failing] == [MATRIX]
    assert f"not the same {str(dtype)[6:]}" in found.failing[0].note


def test_mirrored_rows_of_float8_are_drifted(tmp_path: Path) -> None:
    source = cast({k: v * 50 for k, v in SOURCE.items()}, torch.float8_e4m3fn)
    mirrored = {k: v.view(torch.uint8).flip(0).view(v.dtype) for k, v in source.items()}
    assert judged(tmp_path, mirrored, source).verdict is Verdict.DRIFTED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_conversion_is_the_nearest_of_every_element(dtype: torch.dtype, tmp_path: Path) -> None:
    narrow = cast(SOURCE, dtype)
    wide = cast(narrow, torch.float32)
    for actual, reference in ((narrow, SOURCE), (SOURCE, narrow), (wide, narrow), (wide, wide)):
        assert judged(tmp_path, actual, reference).verdict.passed
    found = judged(tmp_path, narrow, SOURCE)
    assert found.verdict is Verdict.EQUIVALENT
    name = str(dtype).removeprefix("torch.")
    assert found.sentence == (
        f"equivalent: 3 of 3 parameters rounded to {name}, the others agree bit for bit"
    )
    wrong = {k: v.clone() for k, v in narrow.items()}
    wrong[MATRIX].view(torch.int16)[3, 5] += 1
    off = judged(tmp_path, wrong, SOURCE)
    assert off.verdict is Verdict.DRIFTED
    assert f"1 of 6,144 elements are not the nearest {name}" in off.sentence


def test_truncation_and_a_detour_are_no_rounding(tmp_path: Path) -> None:
    bits = SOURCE[MATRIX].view(torch.int32) & ~0xFFFF
    cut = SOURCE | {MATRIX: bits.view(torch.float32).bfloat16()}
    assert judged(tmp_path, cut, SOURCE).verdict is Verdict.DRIFTED
    detour = SOURCE | {MATRIX: SOURCE[MATRIX].half().bfloat16()}
    found = judged(tmp_path, detour, SOURCE)
    assert found.verdict is Verdict.DRIFTED
    assert "they are of the other side rounded to float16" in found.failing[0].note


def test_ties_may_go_either_way(tmp_path: Path) -> None:
    middle = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 0.5])
    up = torch.tensor([1 + 2.0**-7, 1 + 2.0**-6, 0.5]).bfloat16()
    down = torch.tensor([1.0, 1 + 2.0**-7, 0.5]).bfloat16()
    for narrow in (up, down):
        found = judged(tmp_path, {"x.weight": narrow}, {"x.weight": middle})
        assert found.rows[0].note == "rounded to bfloat16; 1 ties rounded the other way"


def test_two_roundings_of_one_source(tmp_path: Path) -> None:
    """Where float16 is the finer one they meet at its ties; below 2^-17 neither is the finer."""
    source = {name: v + 2**-12 * v.sign() for name, v in SOURCE.items()}  # whatever was drawn
    both = cast(source, torch.bfloat16), cast(source, torch.float16)
    assert judged(tmp_path, *both).verdict is Verdict.EQUIVALENT
    twice = {k: v * 1.02 for k, v in both[0].items()}
    assert judged(tmp_path, twice, both[1]).verdict is Verdict.DRIFTED
    tiny = {k: 1e-4 * v for k, v in SOURCE.items()}
    found = judged(tmp_path, cast(tiny, torch.bfloat16), cast(tiny, torch.float16))
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "two roundings of one source may be" in found.failing[0].note


def quantised(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, stored scale, and what is divided by, of `MATRIX`."""
    matrix = SOURCE[MATRIX]
    dtype, most = (torch.int8, 127.0) if "int8" in kind else (torch.float8_e4m3fn, 448.0)
    if "row" in kind:
        stored = matrix.abs().amax(1, keepdim=True) / most
        each = stored
    elif "block" in kind:
        blocks = matrix.reshape(3, 32, 2, 32).abs().amax((1, 3)) / most
        stored, each = blocks, blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)
    else:
        stored = matrix.abs().max() / most
        each = stored
    codes = (matrix / each).clamp(-most, most)
    return (codes.round() if dtype is torch.int8 else codes).to(dtype), stored, each


KINDS = ("float8", "float8 row", "float8 block", "int8", "int8 row")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["weight_scale", "scale_weight", "weight.scale", "scale"])
def test_codes_are_judged_with_their_scale(kind: str, name: str, tmp_path: Path) -> None:
    codes, stored, _ = quantised(kind)
    scale = {f"blocks.0.attn.to_q.{name}": stored.reshape(stored.shape or (1,))}
    found = judged(tmp_path, SOURCE | {MATRIX: codes} | scale, SOURCE)
    assert found.verdict is Verdict.EQUIVALENT, found.table()
    assert len(found.rows) == 3
    notes = {row.name: row.note for row in found.rows}
    assert notes[MATRIX].startswith(f"rounded to {str(codes.dtype)[6:]} with its scale")
    wrong = {next(iter(scale)): next(iter(scale.values())) * (1 + 1e-4)}
    for damaged in (scale | {MATRIX: flipped(codes)}, wrong | {MATRIX: codes}):
        off = judged(tmp_path, SOURCE | {MATRIX: codes} | damaged, SOURCE)
        assert off.verdict is Verdict.DRIFTED
        assert "are not the nearest" in off.failing[0].note


def flipped(codes: torch.Tensor) -> torch.Tensor:
    raw = codes.clone().view(torch.uint8)
    raw[1, 1] ^= 1
    return raw.view(codes.dtype)


def test_bitsandbytes_keeps_the_largest_of_a_row(tmp_path: Path) -> None:
    codes, stored, _ = quantised("int8 row")
    other = {"blocks.0.attn.to_q.SCB": stored.flatten() * 127}
    assert judged(tmp_path, SOURCE | {MATRIX: codes} | other, SOURCE).verdict is Verdict.EQUIVALENT


def test_a_scale_that_keeps_nothing_is_not_a_pass(tmp_path: Path) -> None:
    scale = torch.tensor([1e3])
    codes = (SOURCE[MATRIX] / scale).to(torch.float8_e4m3fn)
    name = MATRIX.replace("weight", "weight_scale")
    assert judged(tmp_path, SOURCE | {MATRIX: codes, name: scale}, SOURCE).verdict.exit_code == 4
    for bad in (0.0, float("nan"), -1.0):
        broken = SOURCE | {MATRIX: codes, name: torch.tensor([bad])}
        assert judged(tmp_path, broken, SOURCE).verdict is Verdict.INVALID


def test_codes_that_cannot_be_read_are_incomparable(tmp_path: Path) -> None:
    codes, _, _ = quantised("int8")
    found = judged(tmp_path, SOURCE | {MATRIX: codes}, SOURCE)
    assert found.verdict is Verdict.INCOMPARABLE
    assert "int8 codes without a stored scale" in found.sentence
    odd = SOURCE | {MATRIX: codes, MATRIX + "_scale": torch.ones(5)}
    assert "a shape not known here" in judged(tmp_path, odd, SOURCE).sentence


def test_nothing_is_lost_between_the_sides(tmp_path: Path) -> None:
    more = SOURCE | {"new.weight": torch.ones(2), "to_q.input_scale": torch.ones(1)}
    found = judged(tmp_path, more, SOURCE)
    assert found.verdict is Verdict.INCOMPARABLE
    assert found.unexpected == ("new.weight",)
    assert judged(tmp_path, SOURCE, more).missing == ("new.weight",)
    turned = SOURCE | {MATRIX: SOURCE[MATRIX].T}
    assert "looks transposed" in judged(tmp_path, turned, SOURCE).sentence
    mask = SOURCE | {"mask.weight": torch.tensor([0.0, float("-inf")])}
    assert judged(tmp_path, mask, mask).verdict is Verdict.IDENTICAL
    broken = SOURCE | {"blocks.0.attn.to_q.bias": torch.full((96,), torch.nan)}
    assert judged(tmp_path, broken, broken).verdict is Verdict.INVALID
    huge = SOURCE | {"blocks.0.attn.to_q.bias": torch.full((96,), 1e5)}
    overflown = judged(tmp_path, cast(huge, torch.float16), huge)
    assert overflown.verdict is Verdict.INVALID
    assert "96 values of the actual side overflowed to infinity" in overflown.sentence


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a.weight", "a.bias"), True),
        (("lstm.weight_ih_l0", "lstm.bias_hh_l0"), True),
        (("bn.weight", "bn.running_mean", "bn.num_batches_tracked"), True),
        (("a.lora_A.weight", "a.lora_B.weight", "a.alpha"), True),
        (("a.weight", "a.weight_scale", "a.input_scale", "scaled_fp8"), True),
        (("tensor",), False),
        (("blocks.0.attn.to_q", "blocks.0.ff"), False),
        (("blocks.0.attn.to_q.output", "blocks.0.attn_weights"), False),
        (("step/0000/cond", "latent/final"), False),
        (("a.weight.grad", "a.bias.grad"), False),
        ((), False),
    ],
)
def test_names_say_what_they_are_of(names: tuple[str, ...], expected: bool) -> None:
    assert are_parameters(names) is expected


def test_activations_keep_their_noise_floor(tmp_path: Path) -> None:
    outputs = {"blocks.0.attn": SOURCE[MATRIX], "blocks.0.ff": SOURCE[MATRIX] + 1}
    near = {name: tensor * (1 + 1e-6) for name, tensor in outputs.items()}
    result = compare(*files(tmp_path, near, outputs))
    assert (result.verdict, result.rule.name) == (Verdict.EQUIVALENT, "size/1")


def test_what_is_guessed_can_be_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    near = {name: tensor * (1 + 1e-6) for name, tensor in SOURCE.items()}
    actual, reference = files(tmp_path, near, SOURCE)
    guessed = compare(actual, reference)
    assert guessed.verdict is Verdict.DRIFTED
    assert guessed.hint == f"truestep compare --activations {actual} {reference}"
    assert compare(actual, reference, weights=False).rule.name == "size/1"
    assert compare(actual, reference, tolerance=1e-3).rule.name == "tolerance"
    told = compare({"x": SOURCE[MATRIX]}, {"x": near[MATRIX]}, weights=True)
    assert told.rule.name == "weights/1"
    with pytest.raises(UsageError, match="weights are judged bit by bit"):
        compare(actual, reference, weights=True, tolerance=1e-3)
    run = runner(monkeypatch, capsys)
    code, out, _ = run(*guessed.hint.split()[1:])
    assert (code, out.splitlines()[0][:17]) == (0, "PASSED equivalent")
    assert run("compare", str(actual), str(reference))[0] == 1
    assert run("compare", "--weights", str(reference), str(reference))[0] == 0


def test_a_block_may_be_cut_short() -> None:
    shape = torch.Size((576, 4))
    found = spread(torch.arange(1.0, 6.0).reshape(5, 1), shape)
    assert found is not None
    scale = expanded(found, shape)
    assert scale[:, 0].tolist() == [1 + i // 128 for i in range(576)]
    assert spread(torch.ones(3), torch.Size((5, 4))) is None


def test_float64_is_rounded_once() -> None:
    """A cast through float32 lands on a tie that the source is not on."""
    source = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    upper = torch.tensor([1 + 2.0**-7]).bfloat16()
    assert rounding(upper, source, None).off == 0
    assert rounding(torch.tensor([1 + 2.0**-6]).bfloat16(), source, None).off == 1


def test_the_dtype_that_was_rounded_to_is_named() -> None:
    source = torch.randn(4000)
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        assert rounded_to(source.to(dtype).float(), source) is dtype
    assert rounded_to(source * 1.0001, source) is None


@pytest.mark.parametrize("scale", [1e-8, 1e-7])
def test_weights_below_what_their_dtype_holds_are_not_rounded_to_it(scale: float) -> None:
    """float16 makes zeros of them, or keeps a bit or two."""
    weights = {"a.weight": torch.randn(64, 64) * scale}
    narrow = {name: tensor.half() for name, tensor in weights.items()}
    result = compare(narrow, weights)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "rounded to float16, but so coarsely that rel_l2 is" in result.sentence


def test_what_is_the_same_but_for_signs_of_zeros_or_a_scale_says_so() -> None:
    zeros = compare({"a.weight": -torch.zeros(4, 4)}, {"a.weight": torch.zeros(4, 4)})
    assert "only signs of zeros differ (float32)" in zeros.sentence
    codes = torch.randn(4, 4).to(torch.float8_e4m3fn)
    scaled = {"a.weight": codes, "a.weight_scale": torch.tensor(0.5)}
    result = compare(scaled, {"a.weight": codes})
    assert result.verdict is Verdict.DRIFTED
    assert "the same codes, with a stored scale on the actual side alone" in result.sentence
