"""Where an error is made, from rows in order of execution; and what kind it is."""

from __future__ import annotations

import pytest
import torch

from truestep.judge.divergence import (
    GREW,
    ROOT,
    kind_of,
    locate,
    parent,
    traced_back,
    with_growth,
    with_origins,
)
from truestep.judge.rows import build_comparison, compare_tensors
from truestep.verdict import Row, Side, TensorInfo, Verdict

INFO = TensorInfo(dtype="float32", shape=(1,))


def row(fqn: str, slot: str, verdict: str = "identical", **sides: TensorInfo | None) -> Row:
    return Row(
        name=f"module/{fqn}/0/cond/{slot}",
        verdict=Verdict(verdict),
        fqn=fqn,
        step=0,
        branch="cond",
        **{"actual": INFO, "reference": INFO, **sides},
    )


def where(*rows: Row) -> tuple[str | None, str | None]:
    found = locate(rows)
    return (found.fqn, found.kind) if found else (None, None)


def test_nothing_wrong_names_nothing() -> None:
    assert where(row("blocks.0", "in.0"), row("blocks.0", "out.0", "equivalent")) == (None, None)


def test_a_wrong_output_on_right_inputs_names_the_module() -> None:
    rows = (row("a", "in.0"), row("a", "out.0"), row("b", "in.0"), row("b", "out.0", "drifted"))
    assert where(*rows) == ("b", None)


def test_a_wrong_input_after_right_outputs_names_what_lies_around() -> None:
    rows = (row("blocks.2.norm1", "out.0"), row("blocks.2.attn1", "in.0", "drifted"))
    assert where(*rows) == ("blocks.2", "before blocks.2.attn1")
    assert where(row("blocks.2", "in.0", "invalid")) == (ROOT, "before blocks.2")
    assert where(row(ROOT, "in.timestep", "drifted")) == (ROOT, "given another input")


def test_calls_that_are_missing_or_too_many_are_named() -> None:
    rows = (row("a", "out.0"), row("b", "in.0", "missing", actual=None))
    assert where(*rows) == ("b", "not called")
    assert where(row("a", "out.0"), row("a", "out.0", "incomparable", reference=None)) == (
        "a",
        "called once more",
    )


def test_a_module_that_is_not_called_is_at_fault_only_where_it_is_missed() -> None:
    skipped = row("a.q", "out.0", "missing", actual=None)
    fine, wrong = row("a.norm", "in.0"), row("a.norm", "in.0", "drifted")
    later = row("a.out", "out.0", "drifted")
    assert where(skipped, wrong, later) == ("a.q", "not called")
    assert where(skipped, fine, later) == ("a.out", None)  # another module makes what it made
    assert where(skipped, fine, row("a", "out.0", "drifted")) == ("a.q", "not called")


def test_an_argument_that_is_not_given_is_of_the_code_around() -> None:
    rows = (
        row("blocks.2.attn1", "in.0"),
        row("blocks.2.attn1", "in.3", "missing", actual=None),
        row("blocks.2.attn1", "out.0"),
    )
    assert where(*rows) == ("blocks.2", "blocks.2.attn1 is not given in.3")
    rows = (row("a", "in.0"), row("a", "out.1", "missing", actual=None))
    assert where(*rows) == ("a", "does not return out.1")


def test_parents_skip_lists() -> None:
    assert parent("blocks.3") == ROOT
    assert parent("blocks.3.attn1") == "blocks.3"
    assert parent("blocks.3.attn1.to_out.0") == "blocks.3.attn1"
    assert parent("proj_out") == ROOT


X = torch.randn(1, 32, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("actual", "kind"),
    [
        (-X, "sign flipped"),
        (X * 1.02, "scaled by 1.02"),
        (X + 0.3, "constant offset 0.3"),
        (X + torch.linspace(-1, 1, 16), "a bias: the same offset everywhere in a channel"),
        (X[:, :, torch.randperm(16)], "values permuted along axis 2"),
        (X.flip(1), "values permuted along axis 1"),
        (X.bfloat16().float(), "rounded to bfloat16: a cast in or after it"),
        (X.half().float(), "rounded to float16: a cast in or after it"),
        (
            torch.cat([X[:, :30], X[:, 30:] * 0], 1),
            "only positions 30 to 31 of axis -2: a mask, a padding or a range",
        ),
        (X + 0.1 * torch.randn(X.shape), None),
        (X, None),
        (X * float("nan"), None),
        (X[:, :8], None),
    ],
)
def test_kinds(actual: torch.Tensor, kind: str | None) -> None:
    assert kind_of(actual, X) == kind


def test_a_transposition_is_a_kind() -> None:
    square = torch.randn(1, 16, 16)
    found = kind_of(square.transpose(1, 2).contiguous(), square)
    assert found == "transposed: axes 1 and 2 exchanged"


def test_what_a_module_was_given_is_not_its_error() -> None:
    rows = [
        row("a", "out.0", "drifted"),
        row("b", "in.0", "drifted"),
        row("b.part", "out.0", "drifted"),
        row("b", "out.0", "drifted"),
        row("c", "out.0"),
        row(ROOT, "out.0", "drifted"),
    ]
    told = {f"{r.fqn} {r.name.rpartition('/')[2]}": r.origin for r in with_origins(rows, None)}
    assert told == {
        "a out.0": "introduced",
        "b in.0": "inherited",
        "b.part out.0": "introduced",
        "b out.0": "inherited",
        "c out.0": "",
        f"{ROOT} out.0": "inherited",
    }
    before = locate([row("b", "in.0", "drifted")])
    assert [r.origin for r in with_origins([row("b", "in.0", "drifted")], before)] == ["introduced"]


def run_of(**scales: float) -> dict[str, torch.Tensor]:
    """Tensors of a run of two steps, some of them scaled."""
    names = [
        "text/cond",
        "schedule/sigmas",
        "latent/initial",
        "step/0000/cond",
        "step/0000/uncond",
        "step/0000/guided",
        "step/0001/latent",
        "step/0001/cond",
        "latent/final",
    ]
    made = {}
    for seed, name in enumerate(names):
        draw = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
        made[name] = draw * scales.get(name.replace("/", "_"), 1.0)
    return made


@pytest.mark.parametrize(
    ("scaled", "introduced"),
    [
        (
            ("schedule_sigmas", "step_0001_latent", "step_0001_cond", "latent_final"),
            {"schedule/sigmas"},
        ),
        (("step_0000_cond", "step_0000_guided", "latent_final"), {"step/0000/cond"}),
        (
            ("step_0000_cond", "step_0000_uncond", "latent_final"),
            {"step/0000/cond", "step/0000/uncond"},
        ),
        (
            ("text_cond", "latent_initial", "step_0000_cond"),
            {"text/cond", "latent/initial"},
        ),
    ],
)
def test_what_began_it_is_told_from_what_follows(
    scaled: tuple[str, ...], introduced: set[str]
) -> None:
    rows = compare_tensors(run_of(**dict.fromkeys(scaled, 1.1)), run_of())
    found = {row.name: row.origin for row in traced_back(rows)}
    assert {name for name, origin in found.items() if origin == "introduced"} == introduced
    inherited = {name for name, origin in found.items() if origin == "inherited"}
    assert {name.replace("/", "_") for name in introduced | inherited} == set(scaled)
    result = build_comparison(traced_back(rows), actual=Side(label="a"), reference=Side(label="r"))
    assert {row.name for row in result.causes} == introduced


@pytest.mark.parametrize(
    ("scaled", "verdicts"),
    [
        # Rounding of the text, ten times further off where guidance combines passes of it.
        (
            {"text_cond": 5e-7, "step_0000_cond": 5e-7, "step_0000_guided": 4e-5},
            {"step/0000/guided": Verdict.INCONCLUSIVE},
        ),
        # Nothing came before it that was not bit for bit the same.
        ({"step_0000_cond": 4e-5}, {"step/0000/cond": Verdict.DRIFTED}),
        # A thousand times what came before it is an error of its own, and is inherited.
        (
            {"text_cond": 5e-7, "step_0000_cond": 1e-2, "step_0001_latent": 1e-2},
            {"step/0000/cond": Verdict.DRIFTED, "step/0001/latent": Verdict.DRIFTED},
        ),
        # What begins a run takes nothing from the text.
        (
            {"text_cond": 5e-7, "schedule_sigmas": 4e-5},
            {"schedule/sigmas": Verdict.DRIFTED},
        ),
        # Passes of one step take nothing from each other.
        (
            {"step_0000_cond": 5e-7, "step_0000_uncond": 4e-5},
            {"step/0000/uncond": Verdict.DRIFTED},
        ),
    ],
    ids=["grown", "alone", "larger", "source", "beside"],
)
def test_what_rounding_may_have_grown_to_is_undecided(
    scaled: dict[str, float], verdicts: dict[str, Verdict]
) -> None:
    rows = compare_tensors(run_of(**{name: 1 + by for name, by in scaled.items()}), run_of())
    grown = with_growth(rows)
    assert {row.name: row.verdict for row in grown if not row.verdict.passed} == verdicts
    for row in grown:
        assert (GREW in row.note) == (row.verdict is Verdict.INCONCLUSIVE)


def test_what_is_no_number_does_not_grow() -> None:
    run = run_of(text_cond=1 + 5e-7)
    run["step/0000/cond"] = run["step/0000/cond"] * float("nan")
    run["latent/final"] = run["latent/final"] * (1 + 4e-5)
    rows = with_growth(compare_tensors(run, run_of()))
    failing = {row.name: row.verdict for row in rows if not row.verdict.passed}
    assert failing == {"step/0000/cond": Verdict.INVALID, "latent/final": Verdict.DRIFTED}


def test_a_raised_place_takes_what_its_own_step_was_given() -> None:
    def raised(**scales: float) -> dict[str, torch.Tensor]:
        run = run_of(**scales)
        for name in ("step/0000/cond", "step/0001/cond"):
            run[f"float32/{name}"] = run[name] * scales.get(f"raised_{name[5:9]}", 1.0)
        return run

    scales = {"step_0001_latent": 1 + 5e-7, "raised_0000": 1 + 4e-5, "raised_0001": 1 + 4e-5}
    rows = with_growth(compare_tensors(raised(**scales), raised()))
    assert {row.name: row.verdict for row in rows if not row.verdict.passed} == {
        "float32/step/0000/cond": Verdict.DRIFTED,
        "float32/step/0001/cond": Verdict.DRIFTED,  # what is after a drift is inherited
    }
    scales.pop("raised_0000")
    rows = with_growth(compare_tensors(raised(**scales), raised()))
    assert {row.name: row.verdict for row in rows if not row.verdict.passed} == {
        "float32/step/0001/cond": Verdict.INCONCLUSIVE
    }


def test_what_is_undecided_explains_nothing_that_follows() -> None:
    """A hundredfold once, not from place to place."""
    scales = {"text_cond": 1 + 5e-7, "step_0000_cond": 1 + 4e-5, "latent_final": 1 + 4e-3}
    rows = with_growth(compare_tensors(run_of(**scales), run_of()))
    assert {row.name: row.verdict for row in rows if not row.verdict.passed} == {
        "step/0000/cond": Verdict.INCONCLUSIVE,
        "latent/final": Verdict.DRIFTED,
    }


def test_another_thing_is_no_grown_rounding() -> None:
    """However far off what came before it was: in 16 bits that is much."""
    narrow = {name: tensor.bfloat16() for name, tensor in run_of(step_0000_cond=-1.0).items()}
    rows = with_growth(compare_tensors(narrow, {n: t.bfloat16() for n, t in run_of().items()}))
    assert [row.name for row in rows if row.verdict is Verdict.DRIFTED] == ["step/0000/cond"]
    whole = run_of(text_cond=1 + 5e-7)
    ids = torch.arange(1000) + 1_000_000
    other = ids.clone()
    other[0] += 1
    rows = with_growth(
        compare_tensors({**whole, "step/0001/ids": other}, {**run_of(), "step/0001/ids": ids})
    )
    assert [row.name for row in rows if row.verdict is Verdict.DRIFTED] == ["step/0001/ids"]


def test_a_place_that_was_given_the_same_grows_nothing() -> None:
    run = run_of(text_cond=1 + 5e-7, latent_final=1 + 4e-5)
    rows = compare_tensors(run, run_of())
    (grown,) = [row for row in with_growth(rows) if not row.verdict.passed]
    assert grown.verdict is Verdict.INCONCLUSIVE
    (given,) = [r for r in with_growth(rows, {"latent/final": 0.0}) if not r.verdict.passed]
    assert given.verdict is Verdict.DRIFTED
