"""Records of a noise floor: benign runs of a trusted side, measured. Pure: no I/O, no torch."""

from __future__ import annotations

from pydantic import Field

from truestep.verdict import Float, Record

EPSILON = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float8_e4m3fn": 2.0**-3,
    "float8_e5m2": 2.0**-2,
}
"""Distance from 1 to the next number, per dtype."""


class RunMetrics(Record):
    """Distance of one tensor of one benign run from the reference, and the residual's structure."""

    name: str
    rel_l2: Float
    max_abs: Float = Field(description="over the rms of the reference")
    dtype: str = Field(default="", description="of this run, where it is not the reference's")
    structure: dict[str, Float] = Field(default_factory=dict, description="over the same rms")

    def value(self, statistic: str) -> float:
        """One statistic; 0 where it was not measured."""
        if statistic in ("rel_l2", "max_abs"):
            return self.rel_l2 if statistic == "rel_l2" else self.max_abs
        return self.structure.get(statistic, 0.0)


class NoiseRun(Record):
    """One benign run. `pair` is `candidate dtype/reference dtype`."""

    kind: str
    detail: str
    pair: str = Field(pattern="^[^/]+/[^/]+$")
    tensors: tuple[RunMetrics, ...]


FREELY = "free run, "
"""Begin of the kind of a benign run in which nothing was forced: only its end was measured."""


class NoiseFloor(Record):
    """Benign runs of one reference, kept run by run."""

    runs: tuple[NoiseRun, ...] = ()

    def of(self, *, freely: bool) -> NoiseFloor:
        """The part of it that was measured in free runs, or in all others."""
        runs = tuple(run for run in self.runs if run.kind.startswith(FREELY) is freely)
        return NoiseFloor(runs=runs)

    def pairs(self) -> tuple[str, ...]:
        """Precision pairs for which at least one run exists."""
        return tuple(sorted({run.pair for run in self.runs}))
