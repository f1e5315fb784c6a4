"""Read back what `--json` wrote, as hostile: it may come from a run that nobody vouches for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from truestep.errors import FileFormatError
from truestep.experiment.ablation_records import Ablation, Matrix
from truestep.experiment.perf_records import PerfResults
from truestep.experiment.quality.records import Quality
from truestep.experiment.records import Experiment
from truestep.reading import parse_json, read
from truestep.verdict import Comparison, Results

AnyResult = Results | Comparison | Experiment | PerfResults | Ablation | Matrix | Quality
"""What `check` and all that compare, `ab`, `perf record` and `check`, and `ablate` write."""

MOST_BYTES = 32 * 2**20
"""Of a file of results: some 80,000 rows, or 50 frames of video."""

_BY_FIELD: dict[str, type[AnyResult]] = {
    "comparisons": Results,
    "rows": Comparison,
    "plan": Experiment,
    "quality": Quality,
    "results": PerfResults,
    "switches": Ablation,
    "profiles": Matrix,
}
"""A field that no other of the kinds has."""


def read_result(path: str | Path) -> AnyResult:
    """Read a result.

    Raises:
        FileFormatError: It is larger than `MOST_BYTES`, no JSON, no result, or contradicts itself.
    """
    result = read(path, "the file of results cannot be read", _parsed, most=MOST_BYTES)
    said = _contradiction(result)
    if said:
        raise FileFormatError(
            "the file of results contradicts itself",
            where=str(path),
            measured=said,
            likely="it was changed by hand, or by another program",
        )
    return result


def _kind(data: Any) -> type[AnyResult] | None:
    if not isinstance(data, dict) or "schema_version" not in data:
        return None
    return next((kind for field, kind in _BY_FIELD.items() if field in data), None)


def _parsed(data: bytes) -> AnyResult:
    value = parse_json(data, unique=True)
    kind = _kind(value)
    if kind is None:
        raise ValueError(
            "it is no result of check, compare, ab, ablate or perf (what --json writes)"
        )
    if value.get("schema_version") != 1:
        raise ValueError(f"schema_version {value.get('schema_version')!r:.40}; 1 is read here")
    return kind.model_validate(value)


def _contradiction(result: AnyResult) -> str:
    """What the verdict of the whole should be by its parts, where it is another."""
    if isinstance(result, Comparison | Ablation | Matrix | Quality):
        return ""
    if isinstance(result, Results):
        again: Any = Results.of(result.comparisons)
    elif isinstance(result, PerfResults):
        again = PerfResults.of(result.results)
    else:
        again = Experiment.of(result.plan, result.cells, environment={})
    said, found = (f"{r.verdict.value}, exit {r.exit_code}" for r in (result, again))
    return "" if said == found else f"it says {said}; its parts make {found}"
