"""What an id of a brief stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.experiment.test_table import Made
from truestep.errors import UsageError
from truestep.report.brief import brief_of
from truestep.report.details import detail, lines
from truestep.report.items import items_of
from truestep.verdict import Comparison, Results


def test_every_id_of_a_brief_has_a_detail(drifted: Comparison, equivalent: Comparison) -> None:
    both = Results.of([equivalent, drifted])
    ids = [proof.id for item in items_of(both) for proof in item.evidence]
    assert any(name.startswith("c1.r") for name in ids)
    assert any(name.startswith("c1.e") for name in ids)
    for name in ids:
        assert detail(both, name)
    for item in brief_of(both).items:
        assert detail(both, item.id)["sentence"] == both.comparisons[int(item.id[1:])].sentence


def test_a_row_is_the_one_at_its_place(drifted: Comparison) -> None:
    assert detail(Results.of([drifted]), "c0.r3")["name"] == drifted.rows[3].name
    assert detail(Results.of([drifted]), "r3") == detail(Results.of([drifted]), "c0.r3")
    assert detail(drifted, "r3") == detail(drifted, "c0.r3")
    note = detail(Results.of([drifted]), "n0")
    assert note == {"text": "both sides were decoded by one VAE"}


def test_a_part_is_told_without_its_rows_and_pictures(drifted: Comparison) -> None:
    found = detail(Results.of([drifted]), "c0")
    assert found["rows"] == f"{len(drifted.rows)}: r0 to r{len(drifted.rows) - 1}"
    assert found["next"] == "truestep check three --set guidance_scale=3.1 --depth cause"
    media = "\n".join(lines(detail(Results.of([drifted]), "x0")))
    assert "data:image/png;base64, " in media
    assert len(media) < 3000


def test_of_several_parts_one_has_to_be_named(drifted: Comparison) -> None:
    with pytest.raises(UsageError, match="no part of the result is called 'r3'"):
        detail(Results.of([drifted, drifted]), "r3")


@pytest.mark.parametrize("name", ["c0.r999", "c0.z1", "c7", "c0.r1.q2", "r", "c0..r1", ""])
def test_an_id_that_there_is_not_says_which_there_are(drifted: Comparison, name: str) -> None:
    with pytest.raises(UsageError, match="no part of the result is called") as caught:
        detail(Results.of([drifted]), name)
    assert "c0.r" in str(caught.value)


def test_parts_of_an_experiment(tmp_path: Path, drifted: Comparison) -> None:
    found = Made(tmp_path / "r").time(20, candidate=0.8).check(off=0.01).result()
    assert detail(found, "c0")["sentence"] == found.cells[0].sentence
    assert detail(found, "c0.s0")["seconds"] == found.cells[0].samples[0].seconds
    assert detail(found, "c0.k0")["case"] == found.cells[0].checks[0].case
    checks = (found.cells[0].checks[0].model_copy(update={"steps": drifted}),)
    cells = (found.cells[0].model_copy(update={"checks": checks}),)
    with_steps = found.model_copy(update={"cells": cells})
    assert detail(with_steps, "c0.k0.c0.r0")["name"] == drifted.rows[0].name
