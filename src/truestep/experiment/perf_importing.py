"""Read other tools' performance files: SGLang's baselines and FastVideo's results.

Pure but for reading the file. A file is read whole before anything of it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from truestep import reading
from truestep.errors import FileFormatError
from truestep.experiment.baseline import every_step, impossible, unequal_sums
from truestep.experiment.history import Import
from truestep.experiment.perf_records import SCHEMA_VERSION, Cohort, PerfBatch, PerfRun
from truestep.text import listed
from truestep.verdict import Record, Verdict

MOST_NAMED = 3
"""Cases that a note names; it counts the others."""

ROUNDING = 1e-3
"""Share by which a mean may be beyond its samples, as all are rounded."""

ZERO_STAGE = "a stage of 0, below the file's resolution of 0.01 ms, is left out"
NO_STAGE = "per_frame_generation is not a stage"
UNEQUAL = {
    "steps": "the steps do not sum to their stage (work around the loop, offload, two stages)",
    "stages": "the stages sum to more than the whole (some run at once)",
}

MEAN = "avg_generation_time_s"


@dataclass(frozen=True)
class _Entry:
    """What one case of a file says.

    Attributes:
        wrong: What of it cannot be true.
        notes: Kind of what is odd, and the numbers.
    """

    cohort: Cohort
    runs: list[PerfRun]
    wrong: list[str]
    notes: list[tuple[str, str]]


class ImportedFile(Record):
    """What was read from one file.

    Attributes:
        left_out: Cases whose numbers cannot be true, each with the reason.
        notes: What is odd in the file, or says nothing; a kind is one line with its cases.
    """

    path: str
    source: Literal["sglang", "fastvideo"]
    cases: tuple[str, ...]
    left_out: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()


class PerfImport(Record):
    """What `perf import` did: `invalid` if any case was left out, else `equivalent`."""

    schema_version: int = SCHEMA_VERSION
    verdict: Verdict
    exit_code: int
    sentence: str
    history: str
    files: tuple[ImportedFile, ...]
    new: int
    known: int


def read_file(path: Path) -> tuple[ImportedFile, list[Import]]:
    """Read one file of either tool.

    Raises:
        FileFormatError: It is absent, not JSON, or of neither form.
    """
    content = _load(path)
    if isinstance(content, Mapping) and "scenarios" in content:
        return _sglang(path, content)
    results = content if isinstance(content, list) else [content]
    if results and all(isinstance(r, Mapping) and MEAN in r for r in results):
        return _fastvideo(path, results)
    latent = isinstance(content, Mapping) and "slice_spec" in content
    raise FileFormatError(
        "this file holds no times: it is the result of FastVideo's latent gate"
        if latent
        else "this is neither SGLang's perf_baselines.json nor a FastVideo performance result",
        where=str(path),
        measured="needed: a table `scenarios`, or the key `avg_generation_time_s`",
        hint="nothing was imported",
    )


def _load(path: Path) -> Any:
    return reading.read(
        path,
        "the file is not JSON that can be read",
        reading.parse_json,
        hint="nothing was imported",
    )


def _sglang(path: Path, content: Mapping[str, Any]) -> tuple[ImportedFile, list[Import]]:
    """Each scenario is a cohort with one run; `metadata` names model and hardware."""
    scenarios = content["scenarios"]
    if not isinstance(scenarios, Mapping) or not scenarios:
        raise _malformed(path, "scenarios", "holds no scenario")
    metadata = content.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise _malformed(path, "metadata", "is not a table")
    values = {k: str(metadata[k]) for k in ("model", "hardware") if metadata.get(k)}
    started = str(metadata.get("last_updated") or "")

    def read(name: str, data: Mapping[str, Any]) -> _Entry:
        at = f"scenarios.{name}"
        stages = _times(path, f"{at}.stages_ms", data.get("stages_ms", {}))
        per_frame = stages.pop("per_frame_generation", None)  # a rate, not a stage
        zero = [key for key, value in stages.items() if value == 0]
        notes = [(ZERO_STAGE, key) for key in zero] + ([(NO_STAGE, "")] if per_frame else [])
        run = PerfRun(
            started=started,
            e2e_ms=_number(path, f"{at}.expected_e2e_ms", data.get("expected_e2e_ms")),
            stages_ms={key: value for key, value in stages.items() if key not in zero},
            denoise_step_ms=_times(
                path, f"{at}.denoise_step_ms", data.get("denoise_step_ms", {}), steps=True
            ),
            load_ms=_optional(path, f"{at}.expected_load_ms", data.get("expected_load_ms")),
            **_memory(path, f"{at}.runtime_peak_vram_mb", data.get("runtime_peak_vram_mb")),
        )
        samples = list(run.denoise_step_ms.values()) if every_step(run) else []
        wrong = []
        for key in ("expected_avg_denoise_ms", "expected_median_denoise_ms"):
            middle = _optional(path, f"{at}.{key}", data.get(key))
            wrong += _outside(key, middle, samples)
        for kind, text in unequal_sums(run).items():
            notes.append((UNEQUAL[kind], text))
        cohort = Cohort(source="sglang", case_id=name, values=values)
        return _Entry(cohort, [run], wrong, notes)

    return _collect(path, "sglang", scenarios, read, started=started)


def _outside(key: str, middle: float | None, samples: Sequence[float]) -> list[str]:
    """Why a mean or median cannot be that of its own samples."""
    if middle is None:
        return []
    if not 0 <= middle < math.inf:
        return [f"{key} is {middle:g}"]
    low, high = min(samples, default=middle), max(samples, default=middle)
    slack = ROUNDING * high
    if low - slack <= middle <= high + slack:
        return []
    return [f"{key} is {middle:g}, outside its own samples: {low:g} to {high:g}"]


_COMPONENTS = {
    "text_encoder_time_s": "text",
    "dit_time_s": "denoise",
    "vae_decode_time_s": "decode",
}
"""FastVideo's keys of seconds a component, means over the measured runs."""


_IDENTITY = (
    "device",
    "gpu_type",
    "num_gpus",
    "hardware_profile_id",
    "software_profile_id",
    "recipe_fingerprint",
    "benchmark_version",
    "model_short_name",
)
"""FastVideo's keys that set cohorts apart."""


def _fastvideo(path: Path, results: list[Mapping[str, Any]]) -> tuple[ImportedFile, list[Import]]:
    """Each result is a batch: its individual times are runs, or the average is the only one."""
    named: dict[str, Mapping[str, Any]] = {}
    for number, result in enumerate(results):
        name = result.get("benchmark_id") or result.get("model_id")
        if not isinstance(name, str) or not name:
            raise _malformed(path, f"result {number}", "has neither benchmark_id nor model_id")
        named[name if name not in named else f"{name} #{number}"] = result

    def read(name: str, data: Mapping[str, Any]) -> _Entry:
        times = data.get("individual_times_s") or [data[MEAN]]
        peaks = data.get("individual_peak_memories_mb") or [data.get("max_peak_memory_mb")]
        if not isinstance(times, list) or not isinstance(peaks, list):
            raise _malformed(path, f"{name}.individual_times_s", "is not a list")
        if len(peaks) != len(times):
            peaks = [data.get("max_peak_memory_mb")] * len(times)
        stages = {
            stage: 1e3 * seconds
            for key, stage in _COMPONENTS.items()
            if (seconds := _optional(path, f"{name}.{key}", data.get(key))) is not None
        }
        runs = [
            PerfRun(
                started=str(data.get("timestamp") or ""),
                e2e_ms=1e3 * _number(path, f"{name}.individual_times_s", seconds),
                stages_ms=stages if len(times) == 1 else {},
                **_memory(path, f"{name}.max_peak_memory_mb", peak),
            )
            for seconds, peak in zip(times, peaks, strict=True)
        ]
        values = {key: str(data[key]) for key in _IDENTITY if data.get(key) not in (None, "")}
        case_id = str(data.get("benchmark_id") or data.get("model_id"))
        mean = _number(path, f"{name}.{MEAN}", data[MEAN])
        wrong = _outside(MEAN, mean, [run.e2e_ms / 1e3 for run in runs])
        cohort = Cohort(source="fastvideo", case_id=case_id, values=values)
        return _Entry(cohort, runs, wrong, [])

    started = str(results[0].get("timestamp") or "")
    return _collect(path, "fastvideo", named, read, started=started)


def _collect(
    path: Path,
    source: Literal["sglang", "fastvideo"],
    entries: Mapping[str, Any],
    read: Callable[[str, Mapping[str, Any]], _Entry],
    *,
    started: str,
) -> tuple[ImportedFile, list[Import]]:
    """Batches of what can be true, and the reason for what cannot."""
    items: list[Import] = []
    left_out: dict[str, str] = {}
    notes: dict[str, list[str]] = {}
    for name, data in entries.items():
        if not isinstance(data, Mapping):
            raise _malformed(path, str(name), "is not a table")
        entry = read(str(name), data)
        cohort, runs = entry.cohort, entry.runs
        wrong = [text for run in runs for text in impossible(run)] + entry.wrong
        if wrong:
            left_out[str(name)] = wrong[0]
            continue
        for kind, text in entry.notes:
            notes.setdefault(kind, []).append(f"{name} ({text})" if text else str(name))
        batch = PerfBatch(
            started=runs[0].started or started, label=path.name, baseline=1, runs=tuple(runs)
        )
        text = json.dumps([cohort.id, [run.model_dump(mode="json") for run in runs]])
        items.append(Import(cohort, batch, hashlib.sha256(text.encode()).hexdigest()))
    return (
        ImportedFile(
            path=str(path),
            source=source,
            cases=tuple(item.cohort.case_id for item in items),
            left_out=left_out,
            notes=tuple(_note(kind, named) for kind, named in notes.items()),
        ),
        items,
    )


def _note(kind: str, named: Sequence[str]) -> str:
    """A note of one kind on several cases."""
    count = f"{len(named)} cases: " if len(named) > 1 else ""
    return f"{count}{kind}: {listed(named, MOST_NAMED)}"


def _times(path: Path, at: str, value: object, *, steps: bool = False) -> dict[str, float]:
    """A table of milliseconds; null is left out."""
    if not isinstance(value, Mapping):
        raise _malformed(path, at, "is not a table of milliseconds")
    if steps and not all(str(key).isdecimal() for key in value):
        raise _malformed(path, at, "has a key that is not a step's index")
    return {
        str(key): _number(path, f"{at}.{key}", number)
        for key, number in value.items()
        if number is not None
    }


def _number(path: Path, at: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _malformed(path, at, "is missing" if value is None else f"is not a number: {value!r}")
    return float(value)


def _optional(path: Path, at: str, value: object) -> float | None:
    return None if value is None else _number(path, at, value)


def _memory(path: Path, at: str, value: object) -> dict[str, Any]:
    found = _optional(path, at, value)
    return {"memory_mib": found, "memory_kind": "unknown" if found is None else "device"}


def _malformed(path: Path, at: str, what: str) -> FileFormatError:
    return FileFormatError(
        f"the file is malformed: {at[:120]} {what[:120]}",
        where=str(path),
        hint="nothing was imported",
    )
