"""The screen of `truestep sensitivity` has every step that was looked at."""

from __future__ import annotations

import pytest

from truestep.experiment.sensitivity_records import LayerSensitivity, MeasuredError, Sensitivity
from truestep.report.sensitivity import print_sensitivity


def ranked(steps: int) -> Sensitivity:
    nothing = MeasuredError(predictions=(0.0123,) * steps, final=0.2, frames=0.1)
    kept = MeasuredError(predictions=(0.0045,) * steps, final=0.1, frames=0.05)
    errors = (1e-3,) * steps
    layers = (LayerSensitivity(name="blocks.0", kept=True, errors=errors, score=1e-3, bytes=8),)
    return Sensitivity(
        sentence="1 of 1 layers",
        case_id="cat",
        case={},
        change="int8",
        steps=tuple(range(0, 24 * steps, 24)),
        gains=(1.0,) * steps,
        layers=layers,
        budget=0.1,
        kept=("blocks.0",),
        kept_bytes=8,
        total_bytes=80,
        nothing_kept=nothing,
        list_kept=kept,
        method="exact",
        forwards=8,
        forwards_generation=4,
    )


@pytest.mark.parametrize(("steps", "verbose"), [(3, False), (9, True)])
def test_no_step_is_cut_off(
    steps: int,
    verbose: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = ranked(steps)
    print_sensitivity(result, verbose=verbose, output=None)
    out = capsys.readouterr().out
    assert verbose or max(map(len, out.splitlines())) <= 80
    for step in result.steps:
        assert f"step {step}: 0.012 to 0.0045" in " ".join(out.split())
