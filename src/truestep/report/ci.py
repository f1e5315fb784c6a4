"""Results in the forms that continuous integration reads: annotations, SARIF, code quality, JUnit.

Each part that did not pass is one finding, at the line of code that the result names, else at the
case file: some of these forms have no finding without a file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from truestep.report.brief import shortened
from truestep.report.items import Item, items_of
from truestep.report.results_file import AnyResult
from truestep.text import visible

ANCHOR = "truestep.toml"
"""Where a finding is set that names no line of code."""

_LETTERS = 1000
_MOST = 1000
"""Findings in one file; GitHub takes 5,000 of SARIF."""

_LEVELS = {0: "notice", 1: "error", 3: "warning", 4: "warning"}
_SARIF = {"notice": "note", "error": "error", "warning": "warning"}
_SEVERITY = {"invalid": "critical", "drifted": "major", "unmet": "major", "inconclusive": "info"}
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def workflow_commands(result: AnyResult, prefix: str = "") -> str:
    """Workflow commands of GitHub Actions, one a finding.

    Args:
        prefix: Of the folder that the check ran in, below the root of the repository.

    Source: github.com/actions/toolkit, packages/core/src/command.ts (escapeData, escapeProperty).
    """
    lines = []
    for item in _findings(result):
        path, line = _location(item, prefix)
        level = _LEVELS[item.exit_code]
        title = _property(f"truestep: {item.verdict} {shortened(item.name, 100)}")
        at = f"file={_property(path)},line={line},title={title}"
        lines.append(f"::{level} {at}::{_data(_text(item))}")
    return "".join(f"{line}\n" for line in lines)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(visible(text)).replace(":", "%3A").replace(",", "%2C")


def sarif(result: AnyResult, prefix: str = "") -> str:
    """SARIF 2.1.0, as code scanning reads it."""
    found = list(_findings(result))
    rules = [{"id": word, "name": word} for word in dict.fromkeys(item.verdict for item in found)]
    driver = {
        "name": "truestep",
        "rules": rules,
    }
    results = []
    for item in found:
        path, line = _location(item, prefix)
        physical = {"artifactLocation": {"uri": _uri(path)}, "region": {"startLine": line}}
        place: dict[str, Any] = {"physicalLocation": physical}
        if item.place and item.place.module:
            named = {"fullyQualifiedName": visible(item.place.module), "kind": "module"}
            place["logicalLocations"] = [named]
        results.append(
            {
                "ruleId": item.verdict,
                "level": _SARIF[_LEVELS[item.exit_code]],
                "message": {"text": _linkless(_text(item))},
                "locations": [place],
                "partialFingerprints": {"truestep/v1": _fingerprint(item)},
            }
        )
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }
    return json.dumps(log, indent=2) + "\n"


def _linkless(text: str) -> str:
    """Text in which nothing is a link: SARIF takes `[words](address)` for one (3.11.6)."""
    return re.sub(r"[\\\[\]]", r"\\\g<0>", text)


def _uri(path: str) -> str:
    from urllib.parse import quote

    return quote(path)


def code_quality(result: AnyResult, prefix: str = "") -> str:
    """GitLab's code quality report.

    Source: docs.gitlab.com/ci/testing/code_quality, "Code Quality report format".
    """
    found = []
    for item in _findings(result):
        path, line = _location(item, prefix)
        found.append(
            {
                "description": _text(item),
                "check_name": f"truestep-{item.verdict}",
                "fingerprint": _fingerprint(item),
                "severity": _SEVERITY.get(item.verdict, "minor"),
                "location": {"path": path, "lines": {"begin": line}},
            }
        )
    return json.dumps(found, indent=2) + "\n"


def junit(result: AnyResult) -> str:
    """JUnit XML: every part is a test, with what the brief says as properties."""
    items = items_of(result)
    failed = sum(item.exit_code == 1 for item in items)
    broken = sum(item.exit_code > 1 for item in items)
    counts = {"tests": len(items), "failures": failed, "errors": broken}
    attributes = {"name": "truestep", **{key: str(value) for key, value in counts.items()}}
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(root, "testsuite", attributes)
    for item in items:
        names = {"classname": "truestep", "name": _xml(item.name)}
        case = ElementTree.SubElement(suite, "testcase", names)
        properties = ElementTree.SubElement(case, "properties")
        for key, value in _properties(item):
            told = {"name": f"truestep.{key}", "value": _xml(value)}
            ElementTree.SubElement(properties, "property", told)
        if item.exit_code:
            kind = "failure" if item.exit_code == 1 else "error"
            outcome = {"type": item.verdict, "message": _xml(item.sentence)}
            ElementTree.SubElement(case, kind, outcome).text = _xml(_text(item))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _properties(item: Item) -> Iterator[tuple[str, str]]:
    place = item.place
    line = f"{place.file}:{place.line}" if place and place.file else ""
    told = {
        "verdict": item.verdict,
        "place": place.text if place else "",
        "line": line,
        "cause": item.cause,
        "cost": item.cost,
        "next": item.next,
        "decide": item.decide,
    }
    yield from ((key, value) for key, value in told.items() if value)


def _xml(text: str) -> str:
    """Text with what acts, and what XML cannot hold, shown as escapes."""
    return _NO_XML.sub("\ufffd", visible(shortened(text, _LETTERS)))


def _findings(result: AnyResult) -> Iterator[Item]:
    """What did not pass, and known failures, which are told."""
    found = [i for i in items_of(result) if i.exit_code or i.verdict not in _PASSES]
    yield from sorted(found, key=lambda item: item.exit_code == 0)[:_MOST]


_PASSES = ("identical", "equivalent")


def _text(item: Item) -> str:
    """A finding in one line: what, why, the command that comes next."""
    line = item.place is not None and item.place.file is not None
    parts = [item.sentence, item.cause, f"next: {item.next}" if item.next else ""]
    parts += [] if line else ["no line of this repository is named"]
    return visible("; ".join(shortened(part, _LETTERS) for part in parts if part))


def _location(item: Item, prefix: str) -> tuple[str, int]:
    place = item.place
    file, line = (place.file, place.line) if place and place.file else (ANCHOR, 1)
    return f"{prefix}{file}", line or 1


def _fingerprint(item: Item) -> str:
    """The same for one fault in every run: no number that was measured is in it."""
    place = item.place
    parts = [
        item.name,
        item.verdict,
        place.stage if place else "",
        (place.module or "") if place else "",
    ]
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]
