"""Known failures: as stated they pass and say so; worse, elsewhere or better they fail."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truestep.errors import UsageError
from truestep.judge.known import TOLERANCE, Entry, check_names, judged, read_ledger
from truestep.verdict import Comparison, Difference, Metrics, Results, Row, Rule, Side, Verdict

ENTRY = {"reason": "issue 41", "since": "2024-10-01", "stage": "prediction", "rel_l2": 1e-2}


def row(
    rel_l2: float,
    *,
    stage: str = "prediction",
    verdict: Verdict = Verdict.DRIFTED,
    modality: str | None = None,
    ratio: float | None = 10.0,
) -> Row:
    metrics = Metrics(
        count=4,
        rel_l2=rel_l2,
        max_abs=rel_l2,
        max_abs_index=(0,),
        cosine_distance=0.0,
        norm_ratio=1.0,
        gain=1.0,
        rms_reference=1.0,
    )
    name = f"{stage}/{rel_l2:g}"
    return Row(
        name=name, verdict=verdict, stage=stage, metrics=metrics, ratio=ratio, modality=modality
    )


def comparison(*rows: Row, verdict: Verdict | None = None) -> Comparison:
    return Comparison(
        verdict=Verdict.worst(r.verdict for r in rows) if verdict is None else verdict,
        sentence="what was seen",
        rows=rows,
        rule=Rule(name="x", text="x"),
        actual=Side(label="a"),
        reference=Side(label="r"),
    )


def judge(found: Comparison, **entry: object) -> Comparison:
    return judged(found, {"three": Entry.model_validate({**ENTRY, **entry})}, "three")


def test_a_drift_as_stated_is_a_known_failure_that_passes() -> None:
    fine = row(1e-9, stage="text", verdict=Verdict.EQUIVALENT)
    found = judge(comparison(fine, row(4e-3), row(1.1e-2)))
    assert found.verdict is Verdict.DRIFTED
    assert (found.known.outcome, found.known.accepted, found.exit_code) == ("known", True, 0)
    assert (found.known.measured, found.known.stated) == (1.1e-2, 1e-2)
    assert found.sentence == (
        "three: known failure at prediction since 2024-10-01: "
        "2 tensors, stated 1.0e-02, measured 1.1e-02 rel_l2: issue 41"
    )
    assert found.rows == (fine, row(4e-3), row(1.1e-2))  # nothing is hidden


def test_worse_than_stated_fails() -> None:
    found = judge(comparison(row(1.6e-2)))
    assert (found.known.outcome, found.exit_code) == ("worse", 1)
    assert "worse than known at prediction: stated 1.0e-02, measured 1.6e-02" in found.sentence
    assert judge(comparison(row(1.3e-2))).known.outcome == "known"
    assert judge(comparison(row(1.3e-2)), tolerance=0.2).known.outcome == "worse"


def test_better_than_stated_fails_and_says_tighten() -> None:
    found = judge(comparison(row(3e-4)))
    assert (found.known.outcome, found.exit_code) == ("better", 1)
    assert found.sentence.endswith("tighten me: stated 1.0e-02, measured 3.0e-04 rel_l2")


@pytest.mark.parametrize("verdict", [Verdict.IDENTICAL, Verdict.EQUIVALENT])
def test_a_known_failure_that_passes_fails(verdict: Verdict) -> None:
    found = judge(comparison(row(0.0, verdict=verdict)))
    assert (found.verdict, found.known.outcome, found.exit_code) == (verdict, "passes", 1)
    assert found.sentence.endswith(f"passes ({verdict}): delete the entry [known.three]")


def test_a_drift_elsewhere_fails() -> None:
    found = judge(comparison(row(1e-2), row(1e-3, stage="decoding"), row(1e-3, stage="text")))
    assert (found.known.outcome, found.exit_code) == ("elsewhere", 1)
    expected = "drifts elsewhere: decoding/0.001 at decoding and 1 more; known is prediction only"
    assert found.known.text == expected


def test_the_modality_is_part_of_the_place() -> None:
    sound = comparison(row(1e-2, modality="audio"))
    assert judge(sound, modality="audio").known.outcome == "known"
    assert judge(sound, modality="video").known.outcome == "elsewhere"
    found = judge(sound)
    assert found.known.text == (
        "drifts elsewhere: prediction/0.01 at prediction (audio); known is prediction only"
    )


def test_the_size_may_be_a_ratio_to_the_floor() -> None:
    entry = {"rel_l2": None, "ratio": 12.0}
    assert judge(comparison(row(1e-2)), **entry).known.outcome == "known"
    assert judge(comparison(row(1e-2, ratio=30.0)), **entry).known.outcome == "worse"
    assert judge(comparison(row(1e-2, ratio=2.0)), **entry).known.outcome == "better"
    assert judge(comparison(row(1e-2, ratio=None)), **entry).known.outcome == "worse"


def test_tensors_of_no_stage_have_a_name_too() -> None:
    assert judge(comparison(row(1e-2, stage="")), stage="tensors").known.outcome == "known"


@pytest.mark.parametrize(
    "verdict",
    [v for v in Verdict if v not in (Verdict.IDENTICAL, Verdict.EQUIVALENT, Verdict.DRIFTED)],
)
def test_no_other_verdict_is_excused(verdict: Verdict) -> None:
    found = judge(comparison(row(1e-2), verdict=verdict))
    assert (found.known.outcome, found.exit_code) == ("not judged", verdict.exit_code)
    assert found.sentence == "what was seen"


def test_nothing_else_may_be_wrong_beside_the_drift() -> None:
    """A drift outranks what is missing in the verdict; the ledger excuses the drift alone."""
    drift = row(1e-2)
    for verdict in (Verdict.MISSING, Verdict.INCOMPARABLE, Verdict.INCONCLUSIVE):
        other = row(2e-2, stage="decoding", verdict=verdict)
        found = judge(comparison(drift, other))
        assert (found.known.outcome, found.exit_code) == ("not judged", 1)
        assert f"decoding/0.02 at decoding is {verdict}" in found.known.text
    whole = comparison(drift, row(5e-3, verdict=Verdict.INCONCLUSIVE))
    assert judge(whole).known.outcome == "known"  # the drift's own surroundings
    differs = Difference(key="case.seed", actual="1", reference="0")
    for change, text in (
        ({"missing": ("a", "b")}, "a and 1 more is on one side only"),
        ({"unexpected": ("c",)}, "c is on one side only"),
        ({"case_differences": (differs,)}, "case.seed is not the reference's"),
    ):
        found = judge(whole.model_copy(update=change))
        assert (found.known.outcome, found.exit_code) == ("not judged", 1)
        assert found.known.text == f"the known failure is not judged: {text}"


def test_a_tensor_of_which_nothing_is_left_is_never_known() -> None:
    for size in (1.0, 1.41, math.inf):
        found = judge(comparison(row(1e-2), row(size, ratio=10.0)), rel_l2=None, ratio=10.0)
        assert (found.known.outcome, found.exit_code) == ("worse", 1)
    assert "nothing is left (rel_l2 1 or more)" in found.known.text
    assert judge(comparison(row(1.2)), rel_l2=0.9).known.outcome == "worse"


def test_a_drift_of_unknown_size_is_worse() -> None:
    entry = {"rel_l2": None, "ratio": 10.0}
    assert judge(comparison(row(1e-2), row(2e-2, ratio=None)), **entry).known.outcome == "worse"
    bare = row(1e-2).model_copy(update={"metrics": None})
    assert judge(comparison(row(1e-2), bare)).known.outcome == "worse"


def test_nan_is_worse() -> None:
    assert judge(comparison(row(math.nan), row(1e-2))).known.outcome == "worse"


def test_a_case_without_an_entry_is_left_alone() -> None:
    found = comparison(row(1e-2))
    assert judged(found, {}, "three") is found
    entry = Entry.model_validate(ENTRY)
    assert judged(found, {"four": entry}, "three") is found
    assert judged(found, {"by-id": entry}, "three", "by-id").known.name == "by-id"


@settings(deadline=None)
@given(st.floats(1e-6, 0.99), st.floats(1e-6, 0.99), st.floats(0.01, 0.5))
def test_it_passes_within_the_factor_and_nowhere_else(
    measured: float, stated: float, tolerance: float
) -> None:
    found = judge(comparison(row(measured)), rel_l2=stated, tolerance=tolerance)
    inside = stated / (1 + tolerance) <= measured <= stated * (1 + tolerance)
    assert (found.exit_code == 0) is inside
    assert found.verdict is Verdict.DRIFTED


def test_the_exit_code_of_several_follows_the_ledger() -> None:
    known, worse = judge(comparison(row(1e-2))), judge(comparison(row(1.0)))
    fine = comparison(row(0.0, verdict=Verdict.IDENTICAL))
    missing = comparison(row(0.0), verdict=Verdict.MISSING)
    assert Results.of([known, fine]).exit_code == 0
    assert Results.of([known, fine]).verdict is Verdict.DRIFTED
    assert Results.of([known, missing]).exit_code == 3
    assert Results.of([known, missing, worse]).exit_code == 1
    assert Results.of([]).exit_code == 1


def test_the_judgement_is_in_the_json_and_on_the_terminal() -> None:
    from truestep.report.terminal import lines

    found = judge(comparison(row(1e-2)))
    data = json.loads(found.to_json())
    assert data["verdict"] == "drifted"
    assert data["known"]["outcome"] == "known"
    assert Comparison.model_validate_json(found.to_json()) == found
    text = "\n".join(lines(found))
    assert "KNOWN" in text.splitlines()[0]
    assert "ledger       known failure at prediction since 2024-10-01" in text
    assert "FAILED" in "\n".join(lines(judge(comparison(row(1.0))))).splitlines()[0]
    passes = judge(comparison(row(0.0, verdict=Verdict.IDENTICAL)))
    assert "FAILED" in "\n".join(lines(passes)).splitlines()[0]


LEDGER = """
[known.three]
reason = "issue 41"
since = 2024-10-01
stage = "prediction"
rel_l2 = 1e-2

[known."seven (bf16)"]
reason = "another kernel"
since = 2024-11-01
stage = "decoding"
modality = "audio"
ratio = 7
tolerance = 0.2
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "truestep-known.toml"
    path.write_text(text)
    return path


def test_a_ledger_is_read(tmp_path: Path) -> None:
    ledger = read_ledger(written(tmp_path, LEDGER), cases=["three", "seven (bf16)", "nine"])
    assert list(ledger) == ["three", "seven (bf16)"]
    assert ledger["three"].tolerance == TOLERANCE
    assert (ledger["seven (bf16)"].statistic, ledger["seven (bf16)"].stated) == ("ratio", 7.0)
    assert ledger["seven (bf16)"].place == "decoding (audio)"
    assert read_ledger(written(tmp_path, ""), cases=[]) == {}


def test_an_entry_of_no_case_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1 known failure of no case: 'three'") as caught:
        read_ledger(written(tmp_path, LEDGER), cases=["thre", "seven (bf16)"])
    assert "did you mean 'thre'?" in str(caught.value)
    with pytest.raises(UsageError, match="2 known failures of no case"):
        check_names(["a", "b"], [], where="x")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('stage = "predictoin"', "did you mean 'prediction'?"),
        ("rel_l2 = 0", "rel_l2: Input should be greater than 0"),
        ("rel_l2 = nan", "rel_l2: Input should be"),
        ("ratio = 3", "state its size as rel_l2 or as ratio"),
        ("rel_l2 = 1.0", "rel_l2: Input should be less than 1"),
        ("rel_l2 = inf", "rel_l2: Input should be"),
        ("ratio = inf", "ratio: Input should be a finite number"),
        ("tolerance = 0", "tolerance: Input should be greater than 0"),
        ("tolerance = 0.51", "tolerance: Input should be less than or equal to 0.5"),
        ("tolerance = 1.5", "tolerance: Input should be less than or equal to 0.5"),
        ("tolerance = nan", "tolerance: Input should be"),
        ('since = "soon"', "since: write it as a date that there is: since = 2024-10-01"),
        ('since = "2024-02-30"', "since: write it as a date that there is"),
        ("since = 20241001", "since: write it as a date that there is"),
        ("since = 2024-10-01T00:00:00", "since: write it as a date that there is"),
        ("since = 2999-01-01", "since: this date is in the future: say when it was first seen"),
        ('reason = ""', "reason: say why it drifts, and who knows of it"),
        ('reason = " \\u200b- "', "reason: say why it drifts, and who knows of it"),
        ("until = 2027-01-01", "until: Extra inputs are not permitted"),
        ('modality = "smell"', "modality: Input should be 'audio' or 'video'"),
    ],
)
def test_entries_that_are_not_valid_are_refused(tmp_path: Path, line: str, why: str) -> None:
    key = line.split(" =")[0]
    kept = [text for text in LEDGER.splitlines()[1:6] if not text.startswith(f"{key} =")]
    path = written(tmp_path, "\n".join([*kept, line]))
    with pytest.raises(UsageError, match="a known failure is not valid") as caught:
        read_ledger(path)
    assert why in str(caught.value)
    assert "[known.three]" in str(caught.value)


@pytest.mark.parametrize("key", ["reason", "since", "stage", "rel_l2"])
def test_every_key_is_needed(tmp_path: Path, key: str) -> None:
    kept = [text for text in LEDGER.splitlines()[1:6] if not text.startswith(f"{key} =")]
    with pytest.raises(UsageError, match="a known failure is not valid"):
        read_ledger(written(tmp_path, "\n".join(kept)))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[known.three", "the ledger of known failures cannot be read"),
        ("[case.three]\n", "unknown table 'case' in the ledger"),
        ("known = 3", "known is not a table"),
        ("[known]\nthree = 3", "a known failure is not valid"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        read_ledger(written(tmp_path, text))


def test_an_absent_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_ledger(tmp_path / "absent.toml")
