"""The table of families: what counts, what is listed."""

from __future__ import annotations

from typing import Any

from bench.families_report import markdown


def row(**fields: Any) -> dict[str, Any]:
    plain = {
        "subject": "flux",
        "entry": "wrong",
        "kind": "fault",
        "draw": 0,
        "dtype": "float32",
        "effect": 0.1,
        "passed": False,
        "place": "vae.decode in z",
        "named": True,
        "sentence": "",
    }
    return {**plain, **fields}


def test_the_table_counts_and_lists() -> None:
    rows = [
        row(),
        row(entry="missed", passed=True, named=None, place=""),
        row(entry="misplaced", named=False, place="vae.decode out 0"),
        row(entry="nothing", effect=1e-8, passed=True, named=None),
        row(entry="raised", effect="inf"),
        row(entry="quiet", kind="twin", passed=True, named=None),
        row(entry="loud", kind="twin", named=None, sentence="inconclusive: vae.decode"),
        {"subject": "flux", "entry": "gone", "kind": "fault", "draw": 0, "dtype": "float32",
         "not_applicable": "no such line"},
        row(dtype="bfloat16"),
        row(dtype="bfloat16", entry="small", passed=True, effect=0.5),
        row(entry="small", effect=5e-4),
    ]  # fmt: skip
    text = markdown(rows)
    assert (
        "- float32: 4 of 5 (80.0%) runs of 5 faults with an effect caught, 3 of 4 (75.0%) of them "
        "named at the right place; 1 alarms (1 of them inconclusive) in 2 runs of 2 harmless twins."
        in text
    )
    assert "- bfloat16: 1 of 1 (100.0%) runs of 1 faults of 0.001 or more caught" in text
    assert "| flux | float32 | 5 | 4 | 3 | 2 | 1 |" in text
    assert "- `missed` on flux, float32, draw 0, size 1.0e-01: " in text
    assert "- `misplaced` on flux, float32, draw 0, size 1.0e-01: vae.decode out 0; " in text
    assert "- `loud` on flux, float32, draw 0" in text
    assert "not counted: `nothing` on flux." in text
    assert "Entries with nothing to change: `gone` on flux." in text
