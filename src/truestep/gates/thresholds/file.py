"""SGLang-Diffusion's threshold files: read and write them, overlay a platform, look limits up.

A file is JSON: `{"cases": {ID: {"ssim_threshold": ...}}, "default_ssim_threshold_video": ...}`.
SGLang's reader asks for the keys it knows and ignores all others, in a case too; that is where
truestep keeps how a limit was measured (`"truestep"`). No torch.

Source:
    sglang 0.5.23, multimodal_gen/test/test_utils.py, `get_consistency_thresholds`,
    `get_audio_consistency_thresholds` and `_merge_threshold_metadata`;
    test/server/consistency_thresholds/*.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from truestep import reading
from truestep.case import Case
from truestep.errors import FileFormatError, UsageError
from truestep.files import write_text
from truestep.verdict import Float, Record

CASES, OURS = "cases", "truestep"
LARGEST_FILE = 16 * 2**20
"""Bytes; the largest file of the source is 10 KB."""


@dataclass(frozen=True)
class Metric:
    """One limit of a case.

    Attributes:
        name: As results name it.
        key: In a case.
        at_least: Whether larger is better: `>=` passes, else `<=`.
        possible: Smallest and largest value that the metric can have and still differ.
        image, video: The limit where a file has none.
        sound: Whether it is of the sound, and judged only where there is one.
    """

    name: str
    key: str
    at_least: bool
    possible: tuple[float, float]
    image: float
    video: float
    sound: bool = False

    def holds(self, value: float, limit: float) -> bool:
        """Whether a value passes; NaN never does."""
        return value >= limit if self.at_least else value <= limit

    def default_key(self, *, video: bool) -> str:
        """Key of the file's own default; the sound's is the same for both."""
        suffix = "" if self.sound else "_video" if video else "_image"
        return f"default_{self.key}{suffix}"


IMAGE_METRICS = (
    Metric("clip", "clip_threshold", True, (-1.0, 1.0), 0.92, 0.90),
    Metric("ssim", "ssim_threshold", True, (-1.0, 1.0), 0.95, 0.92),
    Metric("psnr_db", "psnr_threshold", True, (0.0, 140.0), 28.0, 24.0),
    Metric("mad", "mean_abs_diff_threshold", False, (0.0, 255.0), 8.0, 10.0),
)
"""140 dB is one 8-bit value of one pixel in a frame of 1.5 gigapixels."""

_ANY = (0.0, math.inf)
AUDIO_METRICS = (
    Metric(
        "audio_spectral", "audio_spectral_similarity_threshold", True, (-1.0, 1.0), 0.95, 0.95, True
    ),
    Metric(
        "audio_correlation",
        "audio_waveform_correlation_threshold",
        True,
        (-1.0, 1.0),
        0.9,
        0.9,
        True,
    ),
    Metric("audio_rms_db", "audio_rms_db_diff_threshold", False, _ANY, 2.0, 2.0, True),
    Metric("audio_duration_s", "audio_duration_diff_threshold", False, _ANY, 0.1, 0.1, True),
)
METRICS = (*IMAGE_METRICS, *AUDIO_METRICS)
DEFAULT_KEYS = frozenset(m.default_key(video=v) for m in METRICS for v in (True, False))


class ReferenceSource(Record):
    """What the limits were measured against.

    Attributes:
        case_id: Of the recording. created: when it was recorded.
        weights: Fingerprint of the weights that ran.
        commit: Of the code that made it, where it has one.
        implementation: Names and released versions of that code otherwise.
    """

    case_id: str
    created: str
    weights: str = ""
    commit: str = ""
    implementation: str = ""


class Provenance(Record):
    """How the limits of one case came about; the value of its key `truestep`.

    Attributes:
        date: When they were measured, UTC, ISO 8601.
        runs: Benign free runs. measured: metric to its worst value in each of them, in order.
        environment: Of the reference, which is that of the runs.
        rule: In words, how limits were made of values.
    """

    date: str
    runs: int = Field(ge=1)
    environment: dict[str, str]
    reference: ReferenceSource
    measured: dict[str, tuple[Float, ...]]
    rule: str


@dataclass(frozen=True)
class Limits:
    """What one case is judged by.

    Attributes:
        rule: Name of the rule: file and case.
        values: Metric name to limit.
        source: Metric name to `case`, `file` (its default) or `constant` (the reader's own).
    """

    rule: str
    values: Mapping[str, float]
    source: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Thresholds:
    """A threshold file's content.

    Attributes:
        label: Name of the file and of what was laid over it.
        data: All of it, unknown keys included.
    """

    label: str
    data: Mapping[str, Any]

    @property
    def cases(self) -> Mapping[str, Mapping[str, Any]]:
        """Case id to its keys."""
        found: Mapping[str, Mapping[str, Any]] = self.data.get(CASES, {})
        return found

    def limits(self, case: str, *, video: bool, sound: bool = False) -> Limits:
        """What a case is judged by: its own limit, else the file's default, else the constant.

        Args:
            case: Its id in the file. One that is not there is judged by the defaults.
            video: Whether it makes more than one frame.
            sound: Whether it makes sound. Without, only limits of its own on sound are kept.

        Raises:
            FileFormatError: A limit that applies is no finite number.
        """
        own = self.cases.get(case, {})
        values, source = {}, {}
        for metric in METRICS:
            if metric.sound and not sound and metric.key not in own:
                continue
            default = metric.default_key(video=video)
            for where, holder, key in (("case", own, metric.key), ("file", self.data, default)):
                if key in holder:
                    values[metric.name] = self._number(holder[key], f"{case}: {key}")
                    source[metric.name] = where
                    break
            else:
                values[metric.name] = metric.video if video else metric.image
                source[metric.name] = "constant"
        return Limits(f"sglang {self.label} [{case}]", values, source)

    def _number(self, value: object, key: str) -> float:
        if not is_number(value):
            raise FileFormatError(
                "a threshold is not a number that can judge",
                where=f"{self.label}: {key}",
                measured=f"{value!r}; needed: a finite number",
                hint="all of them are listed by truestep gate thresholds lint FILE",
            )
        return float(value)  # type: ignore[arg-type]  # is_number says so

    def with_case(self, case: str, entry: Mapping[str, Any]) -> Thresholds:
        """A copy in which a case has these keys; everything else stays as it is."""
        cases = {**self.cases, case: dict(entry)}
        return Thresholds(self.label, {**self.data, CASES: cases})

    def overlaid(self, over: Thresholds) -> Thresholds:
        """A copy with another file's keys laid over it; a case of both is the other's alone."""
        data = {**self.data, **over.data, CASES: {**self.cases, **over.cases}}
        return Thresholds(f"{self.label} + {over.label}", data)


def limits_of(thresholds: Thresholds, name: str, case: Case, *, sound: bool) -> tuple[Limits, str]:
    """The limits of a case, under its name or its id, and what to say where it has none.

    Raises:
        FileFormatError: A limit that applies is no finite number.
    """
    key = next((k for k in (name, case.id) if k in thresholds.cases), name)
    limits = thresholds.limits(key, video=case.num_frames > 1, sound=sound)
    if key in thresholds.cases:
        return limits, ""
    return limits, f"{thresholds.label} has no case {name!r}: its defaults judge"


def is_number(value: object) -> bool:
    """Whether a value of a file can be a limit: finite, and neither a string nor a flag."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read(path: str | Path, *, platform: str | None = None) -> Thresholds:
    """Read a threshold file.

    Args:
        path: The file.
        platform: Lay that platform's file over it: `<platform>.json` beside it, or in
            `consistency_thresholds/` beside it. The file's own name lays nothing over it.

    Raises:
        FileFormatError: It cannot be read, or is not such a file.
        UsageError: There is no file of that platform.
    """
    path = Path(path)
    base = _read(path)
    if platform is None or platform == path.stem:
        return base
    folders = (path.parent, path.parent / "consistency_thresholds")
    found = next((p for f in folders if (p := f / f"{platform}.json").is_file()), None)
    if found is None:
        there = sorted({p.stem for f in folders for p in f.glob("*.json")} - {path.stem})
        raise UsageError(
            f"no thresholds of platform {platform!r}",
            where=" or ".join(str(f / f"{platform}.json") for f in folders),
            measured=f"there is: {', '.join(there) or 'no other file'}",
        )
    return base.overlaid(_read(found))


def write(path: str | Path, thresholds: Thresholds) -> None:
    """Write a threshold file, whole or not at all.

    Raises:
        WriteError: It could not be written; an existing file is untouched.
    """
    text = json.dumps(thresholds.data, indent=4, ensure_ascii=False)
    write_text(path, text, "the threshold file")


def _read(path: Path) -> Thresholds:
    data = reading.read(
        path,
        "the threshold file cannot be used",
        _parse,
        most=LARGEST_FILE,
        hint='it holds {"cases": {"ID": {"ssim_threshold": 0.95, ...}}}, as SGLang\'s',
    )
    return Thresholds(path.name, data)


def _parse(text: bytes) -> dict[str, Any]:
    data: dict[str, Any] = reading.parse_json(text, unique=True)
    problem = _shape_problem(data)
    if problem:
        raise ValueError(problem)
    return data


def _shape_problem(data: object) -> str:
    if not isinstance(data, dict):
        return f"a {type(data).__name__} instead of an object"
    cases = data.get(CASES, {})
    if not isinstance(cases, dict):
        return f"cases is a {type(cases).__name__} instead of an object"
    bad = next((k for k, v in cases.items() if not isinstance(v, dict)), None)
    if bad is not None:
        return f"case {bad!r} is a {type(cases[bad]).__name__} instead of an object"
    if CASES not in data and not DEFAULT_KEYS & set(data):
        return "neither cases nor a default in it"
    return ""
