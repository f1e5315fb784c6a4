"""The brief of a result: what an agent reads, under a bound, with commands that are whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.experiment.test_baseline import COHORT, make_batches, make_run
from tests.experiment.test_table import Made
from truestep.experiment.baseline import check_result
from truestep.experiment.perf_records import PerfResults
from truestep.report.brief import MOST_TOKENS, Brief, brief_of, error_brief, tokens
from truestep.report.items import command_in, is_below
from truestep.report.results_file import AnyResult
from truestep.verdict import Comparison, Divergence, Results, Row, Rule, Side, Verdict

SCHEMA = json.loads(
    (Path(__file__).parents[2] / "docs" / "schema" / "brief-1.json").read_text("utf-8")
)


def plain(**changes: Any) -> Comparison:
    """A comparison of one tensor, that drifted."""
    fields: dict[str, Any] = {
        "verdict": Verdict.DRIFTED,
        "sentence": "drifted: 1 of 1 tensors",
        "rows": (Row(name="x", verdict=Verdict.DRIFTED),),
        "rule": Rule(name="size/1", text="by size"),
        "actual": Side(label="candidate"),
        "reference": Side(label="reference"),
        "case_id": "a-red-three",
        "repeat": "truestep check a --apply change.py:worse",
    }
    return Comparison(**{**fields, **changes})


def checked(result: AnyResult, path: str = "r.json") -> dict[str, Any]:
    """A brief as an agent gets it: it fits the schema and the bound."""
    text = brief_of(result, path=path).to_json()
    assert tokens(text) <= MOST_TOKENS
    data: dict[str, Any] = json.loads(text)
    jsonschema.validate(data, SCHEMA)
    return data


def test_a_failure_has_its_cause_place_evidence_cost_and_what_is_next(drifted: Comparison) -> None:
    data = checked(Results.of([drifted]))
    (item,) = data["items"]
    assert (data["verdict"], data["exit_code"]) == ("drifted", 1)
    assert data["sentence"] == drifted.sentence
    assert item["id"] == "c0"
    assert item["cost"] == "0.1 s, 6 forwards (15% of a generation)"
    assert item["place"]["stage"] == "guidance"
    first = item["evidence"][0]
    number = int(first["id"].removeprefix("c0.r"))
    row = drifted.rows[number]
    assert first["text"].startswith(f"{row.name} drifted, rel_l2 ")
    # guidance is at fault: there is no model to open, but a cause to look for
    assert data["next"] == f"{drifted.repeat} --depth cause"
    assert data["details"] == "truestep show r.json ID"
    assert "whether this difference is wanted" in data["decide"]
    assert data["seconds"] == 0.1


def test_a_note_is_no_cause_of_what_differs_and_is_of_what_raised() -> None:
    notes = ("its 3 repeats are the same bit for bit",)
    (item,) = checked(Results.of([plain(notes=notes)]))["items"]
    assert not item.get("cause")
    raised = plain(notes=("raised ValueError: no",), verdict=Verdict.INVALID)
    (item,) = checked(Results.of([raised]))["items"]
    assert item["cause"] == "raised ValueError: no"


def test_a_pass_asks_for_nothing(equivalent: Comparison) -> None:
    data = checked(Results.of([equivalent]))
    assert (data["verdict"], data["exit_code"]) == ("equivalent", 0)
    assert not {"next", "decide"} & set(data)
    assert "evidence" not in data["items"][0]


def test_failures_come_first_and_their_own_next_only_where_it_is_another() -> None:
    good = plain(verdict=Verdict.IDENTICAL, sentence="identical", rows=())
    other = plain(repeat="truestep check b", sentence="drifted: b")
    data = checked(Results.of([good, plain(), other]))
    assert [item["id"] for item in data["items"]] == ["c1", "c2", "c0"]
    assert data["sentence"] == "3 cases: 2 drifted, 1 identical"
    assert "next" not in data["items"][0]
    assert data["items"][1]["next"] == "truestep check b --depth modules"


@pytest.mark.parametrize(
    ("changes", "following"),
    [
        ({}, "truestep check a --apply change.py:worse --depth modules"),
        ({"repeat": "truestep check a --depth modules"}, None),  # never the same again
        ({"repeat": "truestep compare a b"}, None),
        ({"repeat": "truestep record a", "hint": "truestep record a  # again"}, None),
        ({"verdict": Verdict.MISSING, "hint": "truestep record a"}, "truestep record a"),
        (
            {"verdict": Verdict.INCOMPARABLE, "hint": "truestep record a --update  # again"},
            "truestep record a --update",
        ),
        (
            {"verdict": Verdict.INCONCLUSIVE, "hint": "truestep record a --runs 30"},
            "truestep record a --runs 30",
        ),
        (  # advice is no command
            {"hint": "replay the change: truestep check CASE", "repeat": "truestep compare a b"},
            None,
        ),
    ],
)
def test_what_is_next(changes: dict[str, Any], following: str | None) -> None:
    assert checked(Results.of([plain(**changes)])).get("next") == following


def test_a_command_is_told_from_advice() -> None:
    assert command_in("truestep record CASE") == ""
    assert command_in("give another --output") == ""
    assert command_in("truestep trace record CASE --output FILE") == ""
    assert command_in("grep '^.case' my.toml  # lists them") == "grep '^.case' my.toml"


@pytest.mark.parametrize(
    ("file", "below"),
    [
        ("change.py", True),
        ("src/a b/c.py", True),
        ("/etc/passwd", False),
        ("../x.py", False),
        ("a/../../x.py", False),
        ("C:\\x.py", False),
        ("x.py\n::error::y", False),
        ("", False),
    ],
)
def test_only_files_below_the_folder_of_the_check_are_places(file: str, below: bool) -> None:
    assert is_below(file) is below
    first = Divergence(name="x", fqn="blocks.0", file=file, line=3)
    place = checked(Results.of([plain(first_divergence=first)]))["items"][0]["place"]
    assert place.get("file") == (file if below else None)
    assert place.get("line") == (3 if below else None)


def test_experiments_and_costs_have_the_same_envelope(tmp_path: Path) -> None:
    noisy = Made(tmp_path / "r").time(4, candidate=1.0).result()
    data = checked(noisy.model_copy(update={"repeat": "truestep ab a --set steps=2"}))
    assert data["verdict"] == noisy.verdict.value
    assert data["items"][0]["id"] == "c0"
    slow = check_result(
        [make_run(1.5)] * 5, make_batches(3, 8), cohort=COHORT, case_name="a", steps=4
    )
    perf = checked(PerfResults.of([slow], repeat="truestep perf check a"))
    assert (perf["verdict"], perf["exit_code"]) == ("drifted", 1)
    assert perf["items"][0]["evidence"][0]["text"].startswith("e2e ")
    assert "next" not in perf  # the same again would tell nothing new


def test_an_error_has_it_too() -> None:
    found = error_brief(
        "no reference", notes=("refs/a", ""), exit_code=3, hint="truestep record a  # makes one"
    )
    data = json.loads(found.to_json())
    jsonschema.validate(data, SCHEMA)
    assert data["next"] == "truestep record a"
    assert data["notes"] == [{"id": "n0", "text": "refs/a"}]
    advice = error_brief("no", notes=(), exit_code=2, hint="give another --output")
    assert (advice.next, advice.decide) == ("", "give another --output")
    hint = "truestep record a --update  # replaces it"
    replacing = error_brief("a reference of this case exists", notes=(), exit_code=2, hint=hint)
    assert (replacing.next, replacing.decide) == ("", hint)  # what runs `next` replaces nothing


TEXT = st.text(max_size=3000) | st.sampled_from(
    ["猫" * 2000, "0f" * 1500, '{}[]"' * 400, "x" * 3000]
)


@settings(max_examples=40, deadline=None)
@given(TEXT, TEXT, TEXT, st.integers(1, 60))
def test_no_result_is_longer_than_the_bound(name: str, note: str, repeat: str, count: int) -> None:
    """Whatever it says; and a command is whole, or is not there."""
    first = Divergence(name=name, stage=note, fqn=name, kind=note, operator=name)
    command = f"truestep check {repeat}"
    made = plain(
        rows=tuple(Row(name=f"{name}{at}", verdict=Verdict.DRIFTED, note=note) for at in range(9)),
        sentence=note, notes=(note,) * 9, case_id=name, first_divergence=first, repeat=command,
    )  # fmt: skip
    whole = brief_of(Results.of([made] * count), path="r.json")
    assert tokens(whole.to_json()) <= MOST_TOKENS
    assert whole.next in ("truestep show r.json c0", "", f"{command} --depth modules")
    assert whole.items or whole.left_out
    assert len(whole.items) + whole.left_out == count


def test_the_estimate_is_above_plain_counts() -> None:
    assert tokens("the quick brown fox") >= 4
    assert tokens('{"a":1}') == 7
    assert tokens("猫") == 3
    assert Brief(verdict="x", exit_code=0, sentence="").to_json().startswith('{"verdict"')
