"""What a run says of its point, what options mean, and in what words the result is told."""

from __future__ import annotations

import pytest

from truestep.errors import UsageError
from truestep.experiment.bisecting.changes import between, packages, values_of, variables
from truestep.experiment.bisecting.outcomes import judged, kind_of_failure, said
from truestep.experiment.bisecting.search import Outcome


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (0, Outcome.GOOD),
        (1, Outcome.BAD),
        *((code, Outcome.SKIPPED) for code in (2, 3, 4, 5, 125, 126, 127, 130, 137, 139)),
    ],
)
def test_only_0_and_1_judge(code: int, outcome: Outcome) -> None:
    found = judged(code, "", expected=None)
    assert found.outcome is outcome
    assert bool(found.reason) == (outcome is Outcome.SKIPPED)


def test_another_failure_than_the_bad_ends_is_not_bad() -> None:
    assert judged(1, "FAILED drifted", expected="FAILED drifted").outcome is Outcome.BAD
    found = judged(1, "ImportError", expected="FAILED drifted")
    assert found.outcome is Outcome.SKIPPED
    assert found.reason == "fails otherwise (ImportError) than the bad end (FAILED drifted)"
    assert judged(1, "ImportError", expected=None).outcome is Outcome.BAD


TRACEBACK = "Traceback (most recent call last):\n  File x\n"


@pytest.mark.parametrize(
    ("stdout", "stderr", "kind"),
    [
        ("FAILED drifted: a\n  at x\n", "", "FAILED drifted"),
        ("FAILED invalid: nan\n", "", "FAILED invalid"),
        ("", f"{TRACEBACK}torch.OutOfMemoryError: x\n", "OutOfMemoryError"),
        ("", f"{TRACEBACK}AssertionError\n", "AssertionError"),
        ("FAILED tests/test_x.py::test_y - assert 1 == 2\n", "", ""),
        ("2 cases\nFAILED drifted: a\nPASSED identical: b\n", "", "FAILED drifted"),
        ("FAILED invalid: a\nFAILED drifted: b\n", "", "FAILED drifted, FAILED invalid"),
        ("something\n", "a line: of no error\n", ""),
        ("", "ProcessEndedError: invalid: code ended the process\n", "FAILED invalid"),
    ],
)
def test_kinds_of_failures(stdout: str, stderr: str, kind: str) -> None:
    assert kind_of_failure(stdout, stderr) == kind


def test_the_answer_is_read_from_what_was_printed() -> None:
    text = "loading\nFAILED drifted: 3 of 48\n  at         block 7\n\nnext: truestep check x\n"
    assert said(text) == (
        "FAILED drifted: 3 of 48",
        "  at         block 7",
        "next: truestep check x",
    )
    several = "2 cases\nFAILED drifted: a\nPASSED identical: b\n"
    assert said(several) == ("FAILED drifted: a", "PASSED identical: b")
    assert said("PASSED identical: b\nnext: x\n") == ("PASSED identical: b", "next: x")
    assert said("one\ntwo\n") == ("two",)
    assert said("") == ()


def test_variables_are_two_values_or_a_range() -> None:
    found = variables(["N=1..4", "DOWN=3..1", "F=..1", "P=a:b", "M=1:9", "BIG=0:999999"])
    assert [change.values for change in found] == [
        ("1", "2", "3", "4"), ("3", "2", "1"), ("", "1"), ("a", "b"), ("1", "9"), ("0", "999999"),
    ]  # fmt: skip
    assert values_of(found[:3], [0, 2]) == {"N": "4", "DOWN": "3", "F": "1"}
    assert found[2].text == "(unset) to 1"


@pytest.mark.parametrize("last", ["4097", "999999", "-9999", "1" + "0" * 30])
def test_more_values_than_can_be_searched_are_refused(last: str) -> None:
    """They are not taken for two values in silence: what is between them would be no suspect."""
    with pytest.raises(UsageError, match="more values than can be searched") as refused:
        variables([f"N=1..{last}"])
    assert refused.value.hint == f"write it as N=1:{last} for the two values alone"
    assert variables([f"N=1:{last}"])[0].values == ("1", last)
    assert len(variables(["N=1..4096"])[0].values) == 4096


@pytest.mark.parametrize("spec", ["N", "N=1", "=1..2", "N=1..1", "1N=1..2", "N=1..2..3", "N=a:b:c"])
def test_what_is_no_change_of_a_variable_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="needs a variable with a good and a bad value"):
        variables([spec])


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="names N twice"):
        variables(["N=1..2", "N=3..4"])


LISTED = ["0.43.0", "0.42.1", "0.42.0", "0.41.2", "0.41.0", "0.40.0"]


def test_versions_between_two_are_those_of_the_index() -> None:
    (said_,) = packages(["diffusers==0.41..0.42.1"])
    assert between(said_, LISTED).values == ("0.41.0", "0.41.2", "0.42.0", "0.42.1")
    (back,) = packages(["diffusers==0.42..0.41"])
    assert between(back, LISTED).values == ("0.42.0", "0.41.2", "0.41.0")
    (named,) = packages(["diffusers==1.0,2.0,3.0"])
    assert between(named, []).values == ("1.0", "2.0", "3.0")
    (absent,) = packages(["diffusers==0.41..0.44"])
    with pytest.raises(UsageError, match=r"there is no diffusers 0\.44"):
        between(absent, LISTED)


@pytest.mark.parametrize(
    "spec", ["x", "x==1", "x==1..", "x==1..1", "==1..2", "x==1..2..3", "x==1,1", "x==-r f..2"]
)
def test_what_is_no_package_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="needs a package with a good and a bad version"):
        packages([spec])
