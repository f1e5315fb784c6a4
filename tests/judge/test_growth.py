"""Who made an error of a free run, and who was given it."""

from __future__ import annotations

import pytest

from truestep.judge.growth import introduced, origins
from truestep.verdict import FloorUsed, Row, Verdict


def row(label: str, slot: str, ratio: float | None, *, source: str = "analytic") -> Row:
    verdict = Verdict.INVALID if ratio is None else Verdict.EQUIVALENT
    if ratio is not None and ratio > 4:
        verdict = Verdict.DRIFTED
    floor = FloorUsed(rel_l2=1e-6, max_abs=1e-5, bound=4.0, source=source, pair="a/b")
    return Row(
        name=f"module/{label}/0/cond/{slot}",
        verdict=verdict,
        stage="module",
        step=0,
        branch="cond",
        fqn=label,
        ratio=ratio,
        floor=floor,
    )


def told(rows: list[Row]) -> dict[str, str]:
    return {f"{r.fqn} {r.name.rpartition('/')[2]}": r.origin for r in origins(rows) if r.origin}


def places(rows: list[Row]) -> list[str]:
    return [str(place) for place in introduced(origins(rows))]


def test_the_leaf_made_it_and_what_is_around_and_after_it_inherits() -> None:
    rows = [
        row("a", "out.0", 0.2),
        row("b.one", "out.0", 90.0),
        row("b.two", "out.0", 80.0),
        row("b", "out.0", 70.0),
        row("(root)", "out.0", 60.0),
    ]
    assert told(rows) == {
        "b.one out.0": "introduced",
        "b.two out.0": "inherited",
        "b out.0": "inherited",
        "(root) out.0": "inherited",
    }
    assert places(rows) == ["`b.one`, step 0, cond"]


def test_with_inputs_a_second_error_beside_the_first_is_seen() -> None:
    rows = [
        row("a", "in.0", 0.1),
        row("a", "out.0", 500.0),
        row("b", "in.0", 0.1),
        row("b", "out.0", 90.0),
        row("c", "in.0", 500.0),
        row("c", "out.0", 400.0),
    ]
    assert places(rows) == ["`a`, step 0, cond", "`b`, step 0, cond"]
    assert told(rows)["c out.0"] == "inherited"


def test_a_module_whose_parts_are_wrong_on_right_inputs_only_inherits() -> None:
    rows = [
        row("b", "in.0", 0.1),
        row("b.one", "in.0", 0.1),
        row("b.one", "out.0", 90.0),
        row("b", "out.0", 95.0),
    ]
    assert places(rows) == ["`b.one`, step 0, cond"]


def test_a_wrong_input_is_the_fault_of_the_module_around_it() -> None:
    rows = [
        row("b", "in.0", 0.1),
        row("b.one", "out.0", 0.1),
        row("b.two", "in.0", 90.0),
        row("b.two", "out.0", 91.0),
    ]
    assert places(rows) == ["`b`, step 0, cond: before b.two"]


def test_another_input_of_the_whole_model_is_called_that() -> None:
    assert places([row("(root)", "in.0", 90.0)]) == ["`(root)`, step 0, cond: given another input"]


@pytest.mark.parametrize(
    ("source", "origin"), [("analytic", "inherited"), ("measured", "introduced")]
)
def test_a_measured_floor_knows_what_a_module_amplifies(source: str, origin: str) -> None:
    rows = [row("a", "out.0", 0.9, source=source), row("b", "out.0", 9.0, source=source)]
    assert told(rows) == {"b out.0": origin}


def test_what_is_not_finite_is_made_once() -> None:
    rows = [row("a", "out.0", 0.1), row("b", "out.0", None), row("c", "out.0", None)]
    assert told(rows) == {"b out.0": "introduced", "c out.0": "inherited"}


def test_nothing_fails_nothing_is_said() -> None:
    rows = [row("a", "out.0", 0.0), row("b", "out.0", 1.0)]
    assert told(rows) == {}
    assert places(rows) == []
