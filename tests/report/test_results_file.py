"""Results that are read back: whole, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.experiment.test_table import Made
from truestep.errors import FileFormatError
from truestep.report import results_file
from truestep.report.results_file import read_result
from truestep.verdict import Comparison, Results


def test_every_kind_is_read_as_it_was_written(drifted: Comparison, tmp_path: Path) -> None:
    made: list[Any] = [Results.of([drifted]), drifted]
    made.append(Made(tmp_path / "ab").time(20, candidate=0.8).check(off=0.01).result())
    for at, result in enumerate(made):
        (tmp_path / f"{at}.json").write_text(result.model_dump_json())
        read = read_result(tmp_path / f"{at}.json")
        assert type(read) is type(result)
        assert read.model_dump_json() == result.model_dump_json()


def tampered(result: Results, change: Any) -> str:
    data = json.loads(result.model_dump_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(verdict="identical", exit_code=0), "its parts make drifted, exit 1"),
        (lambda d: d.update(exit_code=0), "its parts make drifted, exit 1"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d["comparisons"][0].update(verdict="fine"), "comparisons.0.verdict"),
        (lambda d: d.update(schema_version=2), "schema_version 2; 1 is read here"),
        (lambda d: d.pop("comparisons"), "it is no result"),
    ],
)
def test_what_was_tampered_with_is_refused(
    change: Any, said: str, drifted: Comparison, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    path.write_text(tampered(Results.of([drifted]), change))
    with pytest.raises(FileFormatError) as caught:
        read_result(path)
    assert said in str(caught.value)


def test_too_large_a_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_file, "MOST_BYTES", 100)
    (tmp_path / "r.json").write_text(" " * 101)
    with pytest.raises(FileFormatError, match="the file of results cannot be read"):
        read_result(tmp_path / "r.json")


@pytest.mark.parametrize("text", ["", "[", "[1]", '{"a": 1, "a": 2}', "[" * 5000, "nul"])
def test_what_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(FileFormatError):
        read_result(tmp_path / "r.json")
