"""Write the JSON schemas of everything that `--json` writes: `make schema`."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel

from truestep.experiment.ablation_records import Ablation, Matrix
from truestep.experiment.bisecting.records import Bisection
from truestep.experiment.perf_importing import PerfImport
from truestep.experiment.perf_records import PerfResults
from truestep.experiment.quality.records import Quality
from truestep.experiment.records import Experiment
from truestep.experiment.sensitivity_records import Sensitivity
from truestep.gates.thresholds.linting import Lint
from truestep.report.brief import Brief
from truestep.report.trend import Trend
from truestep.training.gap import LogProbabilityGap
from truestep.verdict import Comparison, Results

SCHEMAS: dict[str, type[BaseModel]] = {
    "comparison-1": Comparison,
    "results-1": Results,
    "experiment-1": Experiment,
    "perf-1": PerfResults,
    "perf-trend-1": Trend,
    "perf-import-1": PerfImport,
    "thresholds-lint-1": Lint,
    "ablation-1": Ablation,
    "ablation-matrix-1": Matrix,
    "bisect-1": Bisection,
    "log-probability-1": LogProbabilityGap,
    "quality-1": Quality,
    "sensitivity-1": Sensitivity,
    "brief-1": Brief,
}
"""File to model: of one comparison, of `check`, `ab`, `perf record` and `check`, `perf show`,
`perf import`, `thresholds lint`, `ablate`, `ablate --all`, `ab --quality`, `bisect`,
`training gap`, `sensitivity`; of what `--brief` gives."""


def main() -> None:
    for name, model in SCHEMAS.items():
        schema = json.dumps(model.model_json_schema(mode="serialization"), indent=2)
        (Path(__file__).parent / f"{name}.json").write_text(schema + "\n", "utf-8")


if __name__ == "__main__":
    main()
