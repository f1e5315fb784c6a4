"""Records as columns: what goes in comes out, whatever was taken, replaced or found in between."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.counting import peak_bytes
from truestep.many import Numbers, Shared, Texts
from truestep.verdict import Metrics, Row, Rows, Statistic, TensorInfo, Verdict

TEXTS = st.lists(st.text(st.characters(exclude_categories=())), max_size=20)
FLOATS = st.floats(width=64)


def rows() -> st.SearchStrategy[list[Row]]:
    metrics = st.builds(
        Metrics,
        count=st.integers(0, 10**30),
        rel_l2=FLOATS,
        max_abs=FLOATS,
        max_abs_index=st.lists(st.integers(0, 9), max_size=3).map(tuple),
        cosine_distance=FLOATS,
        norm_ratio=FLOATS,
        gain=FLOATS,
        rms_reference=FLOATS,
    )
    statistic = st.builds(
        Statistic, name=st.just("gain"), value=FLOATS, floor=FLOATS, bound=FLOATS, ratio=FLOATS
    )
    info = st.builds(TensorInfo, dtype=st.just("float32"), shape=st.just((2, 3)))
    row = st.builds(
        Row,
        name=st.text(),
        verdict=st.sampled_from(list(Verdict)),
        step=st.none() | st.integers(),
        actual=st.none() | info,
        metrics=st.none() | metrics,
        ratio=st.none() | FLOATS,
        statistics=st.lists(statistic, max_size=2).map(tuple),
        note=st.text(max_size=2),
    )
    return st.lists(row, max_size=8)


def written(found: object) -> list[str]:
    return [row.model_dump_json() for row in found]  # type: ignore[attr-defined]


@given(rows())
def test_rows_come_out_as_they_went_in(records: list[Row]) -> None:
    kept = Rows.of(records)
    assert written(kept) == written(records)
    assert len(kept) == len(records)
    assert Rows.of(kept) is kept
    assert list(kept.each("name", "ratio", "metrics.count")) == [
        (row.name, pytest.approx(row.ratio, nan_ok=True), row.metrics and row.metrics.count)
        for row in records
    ]


@given(rows(), st.randoms(use_true_random=False))
def test_taken_and_replaced_rows_are_those_of_lists(records: list[Row], dice: object) -> None:
    places = [at for at in range(len(records)) if dice.random() < 0.5]  # type: ignore[attr-defined]
    dice.shuffle(places)  # type: ignore[attr-defined]
    taken = Rows.of(records).take(places)
    assert written(taken) == written(records[at] for at in places)
    assert written(taken[1:]) == written(taken)[1:]
    changed = taken.replaced(note=(f"{at}" for at in places), ratio=[None] * len(places))
    assert written(changed) == written(
        records[at].model_copy(update={"note": f"{at}", "ratio": None}) for at in places
    )
    assert written(taken) == written(records[at] for at in places)


@given(TEXTS)
def test_texts_are_found_where_they_first_are(texts: list[str]) -> None:
    kept = Texts()
    kept.extend(texts)
    assert list(kept) == texts
    assert [kept.find(text) for text in texts] == [texts.index(text) for text in texts]
    assert kept.distinct == len(set(texts))
    assert kept.find("never seen, too long") is None


def test_lines_of_a_file_are_texts_and_cannot_be_added_to() -> None:
    kept = Texts.of_lines("a\nblöcke.1\n\n".encode())
    assert list(kept) == ["a", "blöcke.1", ""]
    assert kept.find("blöcke.1") == 1
    with pytest.raises(TypeError, match="those of a file"):
        kept.append("b")


def test_what_few_values_stand_for_is_kept_once() -> None:
    kept = Shared()
    kept.extend([1, "a", None, 1, "a"])
    assert list(kept) == [1, "a", None, 1, "a"]
    assert kept.values == [1, "a", None]


def test_none_is_no_number_and_nan_is_equal_to_itself() -> None:
    kept = Numbers()
    kept.extend([None, math.nan, 0.0, -0.0])
    assert str(list(kept)) == "[None, nan, 0.0, -0.0]"
    row = Row(name="a", verdict=Verdict.DRIFTED, ratio=math.nan)
    assert Rows.of([row]) == (row,)
    assert Rows.of([row]) != (row, row)
    assert Rows.of([row]) != [row.model_copy(update={"name": "b"})]


def test_a_row_takes_a_tenth_of_a_record_of_records() -> None:
    def made(count: int) -> None:
        Rows.of(
            Row(
                name=f"module/blocks.{at}.attn.to_out.0/7/cond/out.0",
                verdict=Verdict.EQUIVALENT,
                fqn=f"blocks.{at % 50}",
                metrics=Metrics(
                    count=6,
                    rel_l2=at,
                    max_abs=at,
                    max_abs_index=(),
                    cosine_distance=at,
                    norm_ratio=at,
                    gain=at,
                    rms_reference=at,
                ),
                ratio=at,
            )
            for at in range(count)
        )

    peak_bytes(lambda: made(10))
    slope = (peak_bytes(lambda: made(6000)) - peak_bytes(lambda: made(2000))) / 4000
    assert slope < 300
