"""Every tensor of both sides is judged; nothing passes by having nothing to say."""

from __future__ import annotations

import pytest
import torch

from truestep.errors import UsageError
from truestep.floors import NoiseFloor, NoiseRun, RunMetrics
from truestep.judge.floor import Limits
from truestep.judge.rows import build_comparison, compare_tensors, measured_run
from truestep.verdict import Comparison, Difference, Row, Side, Verdict

torch.manual_seed(0)
X = torch.randn(2, 3, 16, 16)
FLOOR = NoiseFloor(
    runs=tuple(
        NoiseRun(
            kind="jitter",
            detail=str(i),
            pair="float32/float32",
            tensors=(RunMetrics(name="x", rel_l2=1e-4 * (1 + i / 40), max_abs=1e-3 + i * 1e-5),),
        )
        for i in range(9)
    )
)


def judge(actual: torch.Tensor, reference: torch.Tensor = X, **options: object) -> Row:
    limits = Limits(**options)  # type: ignore[arg-type]
    return compare_tensors({"x": actual}, {"x": reference}, limits=limits)[0]


def verdict(actual: torch.Tensor, reference: torch.Tensor = X, **options: object) -> str:
    return judge(actual, reference, **options).verdict.value


def patched(value: float, *, count: int = 1) -> torch.Tensor:
    actual = X.clone()
    actual.view(-1)[:count] = value
    return actual


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (X.clone(), "identical"),
        (X * (1 + 1e-7), "equivalent"),
        (X * 1.01, "drifted"),
        (-X, "drifted"),
        (X * 100, "drifted"),
        (X.flip(1), "drifted"),
        (X.roll(1, -1), "drifted"),
        (patched(9.0), "drifted"),
        (patched(float("nan")), "invalid"),
        (patched(float("inf")), "invalid"),
        (torch.full_like(X, float("nan")), "invalid"),
        (torch.zeros_like(X), "invalid"),
        (torch.ones_like(X), "invalid"),
        (X[:1], "incomparable"),
        (X.transpose(2, 3).reshape(3, 2, 16, 16), "incomparable"),
        (torch.empty(0), "incomparable"),
    ],
)
def test_standard_damages(actual: torch.Tensor, expected: str) -> None:
    assert verdict(actual) == expected


def test_a_broken_reference_accepts_nothing() -> None:
    nan = torch.full_like(X, float("nan"))
    assert verdict(X, nan) == "invalid"
    assert verdict(nan, nan.clone()) == "invalid"
    assert verdict(X, torch.zeros_like(X)) == "invalid"
    assert verdict(torch.empty(0), torch.empty(0)) == "invalid"


def test_constant_integers_are_judged_like_any_other() -> None:
    ones = torch.ones(4, dtype=torch.int64)
    assert verdict(ones, ones.clone()) == "identical"
    assert verdict(ones * 2, ones) == "drifted"


def test_float8_is_judged() -> None:
    tensor = torch.randn(4, 64).to(torch.float8_e4m3fn)
    assert verdict(tensor, tensor.clone()) == "identical"
    assert verdict((tensor.float() * 2).to(torch.float8_e4m3fn), tensor) == "drifted"


def test_equal_zeros_are_identical() -> None:
    assert verdict(torch.zeros(4), torch.zeros(4)) == "identical"


def test_the_measured_floor_judges_and_is_named() -> None:
    noisy = X + 0.9e-4 * torch.randn_like(X) / 1.1
    assert verdict(noisy) == "drifted"  # far beyond the analytic floor of float32
    row = judge(noisy, floor=FLOOR)
    assert row.verdict is Verdict.EQUIVALENT
    assert row.floor is not None
    assert (row.floor.source, row.floor.runs) == ("measured", 9)
    assert 1.2 < row.floor.bound < 3
    assert judge(X + 1.3e-4 * torch.randn_like(X), floor=FLOOR).verdict is Verdict.EQUIVALENT
    assert judge(X + 4e-4 * torch.randn_like(X), floor=FLOOR).verdict is Verdict.DRIFTED


def test_a_tolerance_replaces_the_floor_and_says_so() -> None:
    row = judge(X * 1.01, tolerance=0.02)
    assert row.verdict is Verdict.EQUIVALENT
    assert row.floor is not None
    assert row.floor.source == "tolerance"
    assert verdict(X * 1.03, tolerance=0.02) == "drifted"
    assert verdict(patched(float("nan")), tolerance=1.0) == "invalid"


NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_candidates_own_dtype_does_not_choose_its_floor(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    steady = NoiseFloor(runs=(measured_run("repeat", "", "float32/float32", {"x": (X, X)}),))
    for values in ({"pair": "float32/float32"}, {"floor": steady}):
        row = judge(X.to(dtype), **values)
        assert row.verdict is Verdict.DRIFTED
        assert row.floor is not None
        assert row.floor.pair == "float32/float32"
        assert f"dtype {name} against float32" in row.note


@pytest.mark.parametrize("dtype", NARROW)
def test_where_no_precision_is_declared_a_coarser_candidate_is_left_undecided(
    dtype: torch.dtype,
) -> None:
    row = judge(X.to(dtype))
    name = str(dtype).removeprefix("torch.")
    assert row.verdict is Verdict.INCONCLUSIVE
    assert f"within the rounding of {name}, which nobody asked for" in row.note
    assert f"dtype {name} against float32" in row.note
    assert judge(X.to(dtype).float() * 3).verdict is Verdict.DRIFTED
    assert verdict(X.to(dtype), X.to(dtype).float()) == "equivalent"  # the same values
    assert verdict(X.to(dtype), tolerance=0.3) == "equivalent"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_finer_candidate_is_judged_by_the_references_precision(dtype: torch.dtype) -> None:
    row = judge(X, X.to(dtype))
    assert row.verdict is Verdict.EQUIVALENT
    assert f"dtype float32 against {str(dtype).removeprefix('torch.')}" in row.note


@pytest.mark.parametrize("dtype", NARROW[:2])
def test_float8_has_no_floor_unless_it_is_asked_for(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    one_off = X.to(dtype)
    moved = one_off.view(torch.uint8).clone()
    moved.view(-1)[7] ^= 1
    for actual, reference in ((moved.view(dtype), one_off), (X, one_off)):
        assert verdict(actual, reference) == "inconclusive"
        assert verdict(actual, reference, pair="float32/float32") == "inconclusive"
        assert verdict(actual, reference, pair=f"{name}/{name}") == "equivalent"
        assert verdict(actual, reference, tolerance=0.2) == "equivalent"


def test_the_trusted_runs_dtype_in_another_precision_counts() -> None:
    rounded = X.bfloat16()
    metrics = measured_run("precision", "loaded in bfloat16", "bfloat16/float32", {"x": (X, X)})
    plain = NoiseFloor(runs=(metrics,))
    narrow = measured_run("precision", "", "bfloat16/float32", {"x": (rounded, X)})
    assert narrow.tensors[0].dtype == "bfloat16"
    assert metrics.tensors[0].dtype == ""
    for floor, outcome in ((plain, "drifted"), (NoiseFloor(runs=(narrow,)), "equivalent")):
        assert verdict(rounded, floor=floor, pair="bfloat16/float32") == outcome


def test_nothing_is_equivalent_to_a_reference_that_differs_from_itself() -> None:
    noisy = NoiseFloor(runs=(measured_run("repeat", "", "float32/float32", {"x": (-X, X)}),))
    for actual in (-X, X + 1e-9 * torch.randn_like(X), X * 1.5):
        row = judge(actual, floor=noisy)
        assert row.verdict is Verdict.INCONCLUSIVE
        assert "the reference cannot judge: the trusted side differed from itself" in row.note
    assert verdict(X, floor=noisy) == "identical"
    steady = NoiseFloor(runs=(measured_run("repeat", "", "float32/float32", {"x": (X, X)}),))
    assert verdict(X + 1e-8 * torch.randn_like(X), floor=steady) == "equivalent"


def test_working_precision_sets_the_analytic_floor() -> None:
    rounded = X.bfloat16().float()
    assert verdict(rounded) == "drifted"
    assert verdict(rounded, pair="bfloat16/float32") == "equivalent"


def narrow_floor(*names: str) -> NoiseFloor:
    """Nine benign runs of noise without structure, and the same of names raised to 32 bits."""
    runs = []
    for index in range(9):
        noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(10 + index))
        for dtype, size in (("bfloat16", 5e-3), ("float32", 1e-6)):
            wanted = [name for name in names if name.startswith("float32/") == (dtype == "float32")]
            pairs = dict.fromkeys(wanted, (X + noise * size, X))
            runs.append(measured_run("jitter", str(index), f"{dtype}/{dtype}", pairs))
    return NoiseFloor(runs=tuple(runs))


def test_the_structure_of_rounding_in_16_bits_is_no_fault_where_32_bits_are_judged_too() -> None:
    name, lifted = "step/0000/cond", "float32/step/0000/cond"
    limits = Limits(narrow_floor(name, lifted))
    gained = (X * 1.004).bfloat16()
    reference = {name: X.bfloat16(), lifted: X}

    def verdicts(raised: torch.Tensor, *, also: bool) -> list[str]:
        actual = {name: gained} | ({lifted: raised} if also else {})
        expected = {k: v for k, v in reference.items() if k in actual}
        return [row.verdict.value for row in compare_tensors(actual, expected, limits=limits)]

    assert verdicts(X, also=False) == ["drifted"]
    assert verdicts(X * (1 + 1e-7), also=True) == ["equivalent", "equivalent"]
    assert verdicts(X * 1.004, also=True) == ["equivalent", "drifted"]
    alone = compare_tensors(
        {name: gained},
        {name: X.bfloat16()},
        limits=Limits(narrow_floor(name), raised=True),
    )
    assert [row.verdict.value for row in alone] == ["equivalent"]
    assert not alone[0].statistics
    large = compare_tensors(
        {name: (X * 1.02).bfloat16()},
        {name: X.bfloat16()},
        limits=Limits(narrow_floor(name), raised=True),
    )
    assert [row.verdict.value for row in large] == ["drifted"]


def test_every_key_of_both_sides_is_accounted_for() -> None:
    rows = compare_tensors({"a": X, "c": X}, {"a": X, "b": X})
    assert [(row.name, row.verdict.value) for row in rows] == [
        ("a", "identical"),
        ("b", "missing"),
        ("c", "incomparable"),
    ]
    result = build(rows)
    assert (result.missing, result.unexpected) == (("b",), ("c",))
    assert result.verdict is Verdict.INCOMPARABLE


def build(rows: list[Row]) -> Comparison:
    return build_comparison(rows, actual=Side(label="a"), reference=Side(label="r"))


@pytest.mark.parametrize(
    ("actual", "note"),
    [
        (X * 1.01, "scaled by 1.01"),
        (-X, "sign flipped"),
        (X.unsqueeze(0), "a dimension of size 1 was added or dropped"),
        (X.transpose(0, 1), "looks transposed"),
        (X.reshape(6, 256), "looks reshaped"),
        (patched(float("nan"), count=3), "non-finite values: 3 in actual (of 1,536)"),
        (torch.ones_like(X), "the actual side holds one value everywhere (1)"),
    ],
)
def test_notes_say_the_kind(actual: torch.Tensor, note: str) -> None:
    assert note in judge(actual).note


@pytest.mark.parametrize(
    ("actual", "sentence"),
    [
        (X, "identical: 1 tensor agrees bit for bit"),
        (X * (1 + 1e-7), "equivalent: 1 tensor, the worst at 0.0"),
        (X * 1.01, "drifted: 1 of 1 tensor (first divergence: `x`), the worst at"),
        (patched(float("nan")), "invalid: 1 of 1 tensor (first divergence: `x`): non-finite"),
        (X[:1], "incomparable: 1 of 1 tensor: x: shape [1, 3, 16, 16] against [2, 3, 16, 16]"),
        (X * (1 + 8e-6), "inconclusive: 1 of 1 tensor: x: between the analytic floor"),
    ],
)
def test_sentences(actual: torch.Tensor, sentence: str) -> None:
    assert build([judge(actual)]).sentence.startswith(sentence)


def test_a_pass_says_what_it_could_have_seen() -> None:
    result = build([judge(X * (1 + 1e-7))])
    assert "a relative change of 1.5e-05 would have been seen" in result.sentence
    assert result.detectable == pytest.approx(4 * 32 * 2.0**-23)


def test_nothing_to_compare_is_invalid() -> None:
    assert build([]).verdict is Verdict.INVALID


def test_the_first_divergence_is_the_first_in_order() -> None:
    rows = compare_tensors(
        {"step/0000/cond": X, "step/0001/cond": X * 2, "step/0002/cond": X * 3},
        {f"step/000{i}/cond": X for i in range(3)},
    )
    first = build(rows).first_divergence
    assert first is not None
    assert (first.stage, first.step, first.branch) == ("prediction", 1, "cond")


@pytest.mark.parametrize("zeros", [torch.zeros(4), torch.tensor(0.0)])
def test_zeros_in_another_dtype_or_sign_are_equivalent(zeros: torch.Tensor) -> None:
    assert verdict(zeros.bfloat16(), zeros) == "equivalent"
    assert verdict(-zeros, zeros) == "equivalent"


def test_one_in_a_large_integer_is_seen() -> None:
    big = torch.tensor([2**62, 3])
    assert verdict(big + torch.tensor([1, 0]), big) == "drifted"


def test_tiny_and_huge_float64_have_verdicts() -> None:
    for scale in (1e-200, 1e200):
        x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64) * scale
        assert verdict(x * (1 + 1e-15), x) == "equivalent"
        assert verdict(x * 1.01, x) == "drifted"


@pytest.mark.parametrize("tolerance", [-1.0, float("inf"), float("nan")])
def test_tolerances_that_cannot_judge(tolerance: float) -> None:
    with pytest.raises(UsageError, match="cannot judge anything"):
        judge(X * 100, tolerance=tolerance)


def test_a_tolerance_judges_against_a_zero_too() -> None:
    assert verdict(torch.tensor(1.0), torch.tensor(0.0), tolerance=0.1) == "drifted"


def test_a_result_says_its_verdict_once() -> None:
    text = str(build([judge(X * 1.01)]))
    assert text.startswith("drifted: 1 of 1 tensor")


def beside(values: torch.Tensor, *, huge: float = 1e9) -> torch.Tensor:
    return torch.cat([torch.tensor([huge]), values])


SMALL = torch.randn(32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("values", "expected", "note"),
    [
        (-SMALL, "drifted", "structure: the smaller half of the elements is scaled by -1"),
        (SMALL * 0, "drifted", "structure: the smaller half of the elements is scaled by 0"),
        (
            SMALL * 1.001,
            "drifted",
            "structure: the smaller half of the elements is scaled by 1.001",
        ),
        (SMALL.flip(0), "inconclusive", "large ones hide it, or round it: measure a floor"),
        (SMALL * (1 + 1e-7), "equivalent", ""),
    ],
)
def test_a_few_large_elements_hide_nothing(values: torch.Tensor, expected: str, note: str) -> None:
    row = judge(beside(values), beside(SMALL))
    assert row.verdict.value == expected
    assert note in row.note
    assert row.metrics is not None
    assert row.metrics.rel_l2 < 2e-8


def test_half_precision_beside_a_massive_channel() -> None:
    """As in residual streams: one channel of 64 is 1e5 times the others."""
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    x[:, 7] = 1e5
    flipped = -x
    flipped[:, 7] = 1e5
    assert verdict(flipped.bfloat16(), x.bfloat16()) == "drifted"
    assert verdict(x.bfloat16(), x, pair="bfloat16/float32") == "equivalent"


def test_a_tolerance_is_of_rel_l2_alone_and_says_what_it_does_not_show() -> None:
    row = judge(beside(-SMALL), beside(SMALL), tolerance=1e-3)
    assert row.verdict is Verdict.EQUIVALENT
    assert "differs by 2.0e+00 of its own size, which rel_l2 does not show" in row.note


def test_a_measured_floor_has_a_test_of_its_own_for_what_is_small() -> None:
    from truestep.judge.rows import measured_run

    def noisy(seed: int, *, sign: float = 1.0) -> torch.Tensor:
        drawn = torch.Generator().manual_seed(seed)
        made = sign * SMALL * (1 + 1e-6 * torch.randn(32, generator=drawn))
        return beside(made, huge=1e9 + 64 * (seed % 3))

    reference = beside(SMALL)
    runs = [
        measured_run("jitter", str(seed), "float32/float32", {"x": (noisy(seed), reference)})
        for seed in range(9)
    ]
    floor = NoiseFloor(runs=tuple(runs))
    assert judge(noisy(20), reference, floor=floor).verdict is Verdict.EQUIVALENT
    row = judge(noisy(20, sign=-1.0), reference, floor=floor)
    assert row.verdict is Verdict.DRIFTED
    assert row.note.startswith("structure: bulk 2.0e+00")


def test_the_rule_says_that_all_agree_only_where_they_do() -> None:
    assert build([judge(X)]).rule.text == "every tensor agrees bit for bit"
    for rows in ([judge(X[:1])], [judge(X), judge(X[:1])], []):
        assert build(rows).rule.text.startswith("no distance was judged")


def test_two_values_everywhere_are_judged_inside_of_a_model() -> None:
    timestep = torch.full((4,), 999.0)
    name = "module/(root)/0/main/in.timestep"
    for other, verdict in (
        (torch.full((4,), 999), Verdict.EQUIVALENT),
        (torch.full((4,), 998.0), Verdict.DRIFTED),
        (torch.arange(4.0), Verdict.INVALID),
    ):
        (row,) = compare_tensors({name: timestep}, {name: other})
        assert row.verdict is verdict, row.note


def test_a_key_without_a_name_differs_like_any_other() -> None:
    rows = compare_tensors({"x": torch.ones(3)}, {"x": torch.ones(3)})
    result = build_comparison(
        rows,
        actual=Side(label="a"),
        reference=Side(label="r"),
        case_differences=(Difference(key="", actual="1", reference="2"),),
    )
    assert result.verdict is Verdict.INCOMPARABLE
    assert "different cases (a key without a name differ)" in result.sentence
