"""The walk-through of component parity runs, and the guide shows what it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "parity"


@pytest.mark.slow
def test_from_an_empty_folder_to_a_proven_component(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "walkthrough.py"), str(tmp_path)],
        env={**os.environ, "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    for step in (
        "scaffold_skip   missing: weights: *.safetensors of acme",
        "searched  $ACME_LOCAL_WEIGHTS_DIR (not set)",
        "debug_red       drifted: 3 of 3 tensors (first divergence: `act`)",
        "module    act (gelu in the port)",
        "at        aten.gelu at acme_port.py:20: ",
        "weights   last.weight (out.weight): transposed",
        "non_skip_pass   rel_l2 ",
        "expired: code changed: port: acme_port.py (was non_skip_pass)",
        "- handed over: yes",
    ):
        assert " ".join(step.split()) in " ".join(said.split())
    assert said.count("weights   ") == 1  # named while it is wrong, and not any more afterwards
    assert str(tmp_path) not in said
    guide = (EXAMPLES / "README.md").read_text("utf-8")
    shown = [line.strip() for line in _session(guide) if line.strip()]
    printed = _plain(" ".join(said.split()))  # lines are broken where the terminal ends
    assert not [line for line in shown if _plain(" ".join(line.split())) not in printed]


def _session(guide: str) -> list[str]:
    """The lines of the guide's block that shows the walk-through."""
    block = re.search(r"```console\n# A test is written.*?```", guide, re.DOTALL)
    assert block is not None
    return block[0].splitlines()[1:-1]


def _plain(line: str) -> str:
    """A line without what differs between machines and days."""
    line = re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "0", line)
    return re.sub(r"0-0-0", "DATE", line)
