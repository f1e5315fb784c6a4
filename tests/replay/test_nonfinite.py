"""Values that are not finite, or hardly so: the cases that people trace for name their module."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from truestep import capture
from truestep.cli.app import app

Change = Callable[[torch.Tensor], torch.Tensor]


class Changes(nn.Module):
    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change(x)


class Net(nn.Module):
    def __init__(self, change: Change) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.changes, self.after = nn.Linear(8, 8), Changes(change), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return self.after(self.changes(self.before(x)).float())


def one(value: float) -> Change:
    def change(x: torch.Tensor) -> torch.Tensor:
        changed = x.clone()
        changed[0, 0] = value
        return changed

    return change


CHANGES: dict[str, Change] = {
    "one NaN": one(math.nan),
    "one inf": one(math.inf),
    "one -inf": one(-math.inf),
    "all NaN": lambda x: x * math.nan,
    "all inf": lambda x: torch.full_like(x, math.inf),
    "zero": lambda x: x * 0,
    "beyond the square of float32": lambda x: x * 1e38,
    "beyond the square of float64": lambda x: x.double() * 1e300,
    "below the square of float32": lambda x: x * 1e-30,
    "float8": lambda x: x.to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("level", ["full", "sketch", "stats"])
def test_the_module_is_named_on_either_side(level: str, tmp_path: Path) -> None:
    def trace(name: str, change: Change) -> str:
        path = tmp_path / f"{name}.safetensors"
        model = Net(change)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), capture(model, level=level, path=path):  # type: ignore[arg-type]
            model(x)
        return str(path)

    plain = trace("plain", lambda x: x)
    for name, change in CHANGES.items():
        changed = trace(name, change)
        for sides in ((changed, plain), (plain, changed), (changed, changed)):
            page = str(tmp_path / "report.html")
            found = CliRunner().invoke(app, ["trace", *sides, "--report", page])
            assert found.exception is None or isinstance(found.exception, SystemExit), name
            if sides[0] != sides[1] and name != "float8":
                assert found.exit_code == 1, (name, found.output)
                assert "first divergence: `changes`, step 0, main" in found.output, name
