"""Verdicts, their order and exit codes, and records that survive strict JSON."""

from __future__ import annotations

import json
import math
import pickle

import pytest

from truestep.errors import EquivalenceError
from truestep.judge.compare import assert_equivalent
from truestep.verdict import (
    Comparison,
    Divergence,
    Metrics,
    Results,
    Row,
    Rule,
    Side,
    Verdict,
)


def comparison(verdict: Verdict, *rows: Row) -> Comparison:
    return Comparison(
        verdict=verdict,
        sentence="1 of 2 tensors drifted",
        rows=rows,
        rule=Rule(name="size/1", text="size"),
        actual=Side(label="a"),
        reference=Side(label="r"),
        hint="truestep show r",
    )


def metrics(rel_l2: float) -> Metrics:
    return Metrics(
        count=4,
        rel_l2=rel_l2,
        max_abs=1.0,
        max_abs_index=(0,),
        cosine_distance=0.0,
        norm_ratio=1.0,
        gain=1.0,
        rms_reference=1.0,
    )


def test_words_and_exit_codes() -> None:
    assert {v.value: v.exit_code for v in Verdict} == {
        "identical": 0,
        "equivalent": 0,
        "drifted": 1,
        "invalid": 1,
        "missing": 3,
        "incomparable": 3,
        "inconclusive": 4,
        "unmet": 1,
    }


@pytest.mark.parametrize(
    ("verdicts", "worst"),
    [
        (["identical", "equivalent"], "equivalent"),
        (["equivalent", "inconclusive"], "inconclusive"),
        (["inconclusive", "missing"], "missing"),
        (["incomparable", "drifted"], "drifted"),
        (["drifted", "invalid"], "invalid"),
        ([], "invalid"),
    ],
)
def test_the_worst_verdict_stands_for_all(verdicts: list[str], worst: str) -> None:
    assert Verdict.worst(Verdict(v) for v in verdicts).value == worst


def test_no_truth_value() -> None:
    with pytest.raises(TypeError, match="no truth value"):
        bool(Verdict.EQUIVALENT)
    with pytest.raises(TypeError, match="no truth value"):
        bool(comparison(Verdict.EQUIVALENT))


def test_json_is_strict_and_round_trips() -> None:
    row = Row(name="x", verdict=Verdict.INVALID, metrics=metrics(math.nan), ratio=math.inf)
    text = comparison(Verdict.INVALID, row).to_json()
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"literal {name}"))
    assert data["rows"][0]["metrics"]["rel_l2"] == "nan"
    assert data["rows"][0]["ratio"] == "inf"
    again = Comparison.model_validate_json(text)
    assert again.rows[0].metrics is not None
    assert math.isnan(again.rows[0].metrics.rel_l2)
    assert again.to_json() == text


def test_assert_equivalent_raises_with_the_rows_and_the_hint() -> None:
    good = comparison(Verdict.IDENTICAL)
    assert assert_equivalent(good) is good
    row = Row(name="step/0000/cond", verdict=Verdict.DRIFTED, metrics=metrics(0.5), ratio=7.0)
    with pytest.raises(EquivalenceError) as caught:
        assert_equivalent(comparison(Verdict.DRIFTED, row))
    text = str(caught.value)
    assert text.startswith("1 of 2 tensors drifted")
    assert "step/0000/cond" in text
    assert "hint: truestep show r" in text
    assert len(text.splitlines()) <= 25
    assert isinstance(caught.value, AssertionError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


def test_assert_equivalent_compares_two_sides() -> None:
    import torch

    x = torch.randn(3, 4)
    assert assert_equivalent(x, x.clone()).verdict is Verdict.IDENTICAL
    with pytest.raises(EquivalenceError, match="sign flipped"):
        assert_equivalent(x, -x)


def test_a_thousand_failures_stay_on_one_screen() -> None:
    rows = tuple(
        Row(name=f"t{i}", verdict=Verdict.DRIFTED, metrics=metrics(0.5)) for i in range(1000)
    )
    text = str(EquivalenceError(comparison(Verdict.DRIFTED, *rows)))
    assert len(text.splitlines()) <= 25
    assert "992 more failed" in text


def test_results_take_the_worst() -> None:
    results = Results.of([comparison(Verdict.IDENTICAL), comparison(Verdict.MISSING)])
    assert (results.verdict, results.exit_code) == (Verdict.MISSING, 3)


def test_the_cause_is_listed_first_and_what_is_inherited_is_counted() -> None:
    def row(name: str, origin: str, verdict: Verdict = Verdict.DRIFTED) -> Row:
        return Row(name=name, verdict=verdict, metrics=metrics(0.5), origin=origin)  # type: ignore[arg-type]

    rows = (
        row("in", "inherited"),
        row("also", "introduced"),
        row("cause", "introduced"),
        *(row(f"later{i}", "inherited") for i in range(30)),
        row("open", "", Verdict.INCONCLUSIVE),
    )
    result = comparison(Verdict.DRIFTED, *rows).model_copy(
        update={"first_divergence": Divergence(name="cause")}
    )
    assert [r.name for r in result.causes] == ["cause", "also"]
    assert result.uncounted(1) == "1 more failed, 31 inherited, 1 undecided"
    assert "31 inherited, 1 undecided; " in result.table()
    grown = comparison(Verdict.DRIFTED, row("a", "inherited"), row("b", "inherited"))
    assert [r.name for r in grown.causes] == ["a", "b"]
    assert grown.uncounted(2) == ""
