"""Annotations, SARIF, code quality and JUnit: nothing of a result acts in them."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from tests.report import results_to_show as results
from truestep.report import ci
from truestep.verdict import Results

HOSTILE = Results.of([results.hostile()])


def test_a_fault_is_at_its_line_and_what_names_none_at_the_case_file() -> None:
    first, second, third = ci.workflow_commands(results.everything(), "models/").splitlines()
    assert first.startswith("::error file=models/src/change.py,line=6,title=truestep%3A drifted")
    assert second.startswith("::warning file=models/truestep.toml,line=1,")
    assert second.endswith("no line of this repository is named")
    assert third.startswith("::notice file=models/src/change.py,line=6,")


def test_nothing_that_passed_is_a_finding() -> None:
    good = Results.of([results.passed()])
    assert ci.workflow_commands(good) == ""
    assert json.loads(ci.sarif(good))["runs"][0]["results"] == []
    assert json.loads(ci.code_quality(good)) == []
    suite = ElementTree.fromstring(ci.junit(good))[0]
    assert suite.attrib == {"name": "truestep", "tests": "1", "failures": "0", "errors": "0"}


def test_no_text_is_a_command_of_the_runner() -> None:
    """One finding, one line, whose properties end where they should."""
    text = ci.workflow_commands(HOSTILE)
    assert text.count("\n") == 1
    assert text.startswith("::error file=truestep.toml,line=1,title=truestep%3A drifted ")
    head, _, message = text[2:].partition("::")
    assert head.count(",") == 2
    assert ":" not in head.partition("file=")[2]
    assert "%250A" in message
    assert "\x1b" not in text


def test_sarif_has_no_links_and_only_places_below_the_root() -> None:
    (run,) = json.loads(ci.sarif(HOSTILE))["runs"]
    (found,) = run["results"]
    assert found["locations"][0]["physicalLocation"]["artifactLocation"] == {"uri": "truestep.toml"}
    assert "\\[l\\](http://e.vil)" in found["message"]["text"]


def test_junit_is_xml_whatever_is_said() -> None:
    case = ElementTree.fromstring(ci.junit(HOSTILE))[0][0]
    failure = case.find("failure")
    assert failure is not None
    assert "<img src=x onerror=alert(1)>" in failure.attrib["message"]
    names = [p.attrib["name"] for p in case.iter("property")]
    assert names[:2] == ["truestep.verdict", "truestep.place"]


def test_the_fingerprint_of_a_fault_has_no_number_in_it() -> None:
    def prints(result: Results) -> list[str]:
        return [each["fingerprint"] for each in json.loads(ci.code_quality(result))]

    fault = results.fault()
    again = fault.model_copy(update={"sentence": "drifted: 3 of 4", "rows": fault.rows[:2]})
    other = fault.model_copy(update={"case_id": "another"})
    assert prints(Results.of([fault])) == prints(Results.of([again]))
    assert prints(Results.of([fault])) != prints(Results.of([other]))
