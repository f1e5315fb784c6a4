"""Batch invariance: rounding is named, samples that are mixed are a drift."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from truestep.cli.app import app
from truestep.errors import UsageError
from truestep.replay.batching import batch_invariance
from truestep.verdict import Verdict


class Table(nn.Module):
    """Does not depend on the samples."""

    def forward(self, length: int) -> Any:
        return torch.arange(length).float()[None, :, None]


class Mixes(nn.Module):
    """Subtracts a tenth of the mean over the batch: a bug."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.on = on

    def forward(self, x: torch.Tensor) -> Any:
        return x - (x.mean(0, keepdim=True) / 10 if self.on else 0)


class Net(nn.Module):
    def __init__(self, *, mixes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.up = Table(), nn.Linear(16, 32)
        self.norm, self.down = Mixes(mixes), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> Any:
        return self.down(self.norm(torch.tanh(self.up(x + self.table(x.shape[1]))) * scale))


def given(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 12, 16, generator=torch.Generator().manual_seed(0))


def test_samples_that_are_mixed_are_a_drift_and_the_module_is_named() -> None:
    with torch.no_grad():
        result = batch_invariance(Net(mixes=True), given(), scale=2.0)
    assert result.verdict is Verdict.DRIFTED
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == "norm"
    outputs = [row for row in result.failing if "/out." in row.name]
    assert {row.fqn for row in outputs} == {"norm"}
    assert (result.actual.label, result.reference.label) == ("in a batch of 3", "one by one")


def test_a_model_that_does_not_mix_passes_and_says_what_rounds() -> None:
    with torch.no_grad():
        result = batch_invariance(Net(mixes=False), given())
    assert result.verdict.passed
    if result.verdict is Verdict.EQUIVALENT:
        assert result.first_divergence is not None
        assert "not batch invariant, rel_l2" in str(result.first_divergence.kind)
        assert "modules are not bit-equal" in result.notes[0]
    else:
        assert result.first_divergence is None


@pytest.mark.parametrize(
    ("args", "measured"), [((given(1),), "has 1 rows"), ((3,), "no tensor arguments")]
)
def test_a_single_sample_is_refused(args: tuple[Any, ...], measured: str) -> None:
    with pytest.raises(UsageError, match="a batch of 2 or more") as caught:
        batch_invariance(Net(mixes=False), *args)
    assert measured in str(caught.value)


def test_the_command_names_the_first_module(tmp_path: Any) -> None:
    found = CliRunner().invoke(
        app, ["trace", "batch", "builtin:digits", "--prompt", "a red three moving left"]
    )
    assert found.exit_code == 0, found.output
    assert "first not invariant: `" in found.output or "identical" in found.output
