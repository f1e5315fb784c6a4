"""A reference of one instruction set is equivalent under another, and faults are seen there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.bench_machines import LEAST, Stages, available, hardest
from bench.faults.draws import DRAWS
from bench.faults.subjects import SUBJECTS
from truestep.calls.instructions import other_sets

pytestmark = pytest.mark.skipif(not other_sets(), reason="this processor has one instruction set")


@pytest.mark.slow
@pytest.mark.parametrize("subject", [pytest.param("tiny-wan2.1", marks=pytest.mark.bar), "silero"])
def test_references_travel(subject: str, tmp_path: Path) -> None:
    if subject == "silero":
        for package in ("av", "onnxruntime", "silero_vad"):
            pytest.importorskip(package)
    sets = [available()[0], available()[-1]]
    arguments = ["--subject", subject, "--dtype", "float32", "--draws", "1", "--faults", "3"]
    arguments += ["--sets", *sets, "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.bench_machines", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "machines.jsonl").read_text().splitlines()]
    plain = [row for row in rows if not row["entry"]]
    assert [(row["recorded"], row["checked"]) for row in plain] == [tuple(sets), tuple(sets[::-1])]
    assert {row["verdict"] for row in plain} == {"equivalent"}  # other numbers, and close
    assert done.stdout.splitlines()[-1].startswith("2 references, 2 checks under another")
    assert ": 0 missed" in done.stdout
    assert len(rows) == (8 if subject == "tiny-wan2.1" else 2)


def test_the_hardest_faults_are_the_smallest() -> None:
    sizes = list(hardest("tiny-wan2.1", "float32", DRAWS[0], 5).values())
    assert sizes == sorted(sizes)
    assert len(sizes) == 5
    assert LEAST <= sizes[0] < 1e-4
    assert {Stages(subject).name for subject in SUBJECTS} >= {"digits", "tiny-cosmos", "tiny-ltx2"}
