"""A port replayed on a trace: every module judged on the official model's inputs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from truestep import capture
from truestep.cli.app import app
from truestep.errors import UsageError
from truestep.recording.format import Recording
from truestep.replay.ports import replay_trace
from truestep.verdict import Verdict

PORT = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
    def forward(self, x, scale):
        return x + self.down(nn.functional.gelu(self.up(x))) * scale

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 8)
    def forward(self, x, *, scale):
        for block in self.blocks:
            x = block(x, scale)
        return self.head(x)

def right():
    return Net().eval()

def wrong():
    model = right()
    model.blocks[1].down.weight.data.mul_(1.01)
    return model

def with_call():
    model = right()
    return model, lambda x, scale: model(x, scale=scale)
"""


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("port") / "port.py"
    path.write_text(PORT, "utf-8")
    return path


@pytest.fixture(scope="module")
def parts(port: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"__name__": "port"}
    exec(compile(PORT, str(port), "exec"), found)
    return found


def traced(model: Any, path: Path | None = None, **options: Any) -> Recording:
    options = {"level": "full", "inputs": True, **options}
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), capture(model, path=path, **options) as trace:
        for step in range(4):
            model(x * (step + 1), scale=torch.tensor(0.5))
    assert trace.recording is not None
    return trace.recording


def test_the_same_code_passes_on_the_first_middle_and_last_step(parts: dict[str, Any]) -> None:
    result = replay_trace(parts["right"](), traced(parts["right"]()))
    assert result.verdict.passed
    assert {row.step for row in result.rows} == {0, 2, 3}
    assert {row.floor.source for row in result.rows if row.floor} == {"measured"}


def test_the_wrong_module_is_named_and_no_other_fails(parts: dict[str, Any]) -> None:
    result = replay_trace(parts["wrong"](), traced(parts["right"]()), steps=[1])
    assert result.verdict is Verdict.DRIFTED
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == "blocks.1.down"
    outputs = {row.fqn for row in result.failing if "/out." in row.name}
    assert outputs == {"blocks.1.down", "blocks.1"}


def test_other_names(parts: dict[str, Any]) -> None:
    class Renamed(nn.Module):
        def __init__(self, net: Any) -> None:
            super().__init__()
            self.layers, self.final = net.blocks, net.head

        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> Any:
            for layer in self.layers:
                x = layer(x, scale)
            return self.final(x)

    trace = traced(parts["right"]())
    with pytest.raises(UsageError, match="no module of the port has the name of one") as caught:
        replay_trace(Renamed(parts["wrong"]()), trace)
    assert "rename=" in str(caught.value)
    rename = {"layers.*": "blocks.*"}
    result = replay_trace(Renamed(parts["wrong"]()), trace, rename=rename)
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == "blocks.1.down"
    assert result.not_looked_at == ("without a partner in the port: head",)


@pytest.mark.parametrize(
    ("options", "measured"),
    [({"level": "stats"}, "level stats, with inputs"), ({"inputs": False}, "without inputs")],
)
def test_what_a_trace_must_hold(
    parts: dict[str, Any], options: dict[str, Any], measured: str
) -> None:
    with pytest.raises(UsageError, match="the trace cannot be replayed") as caught:
        replay_trace(parts["right"](), traced(parts["right"](), **options))
    assert measured in str(caught.value)
    assert "--level full --inputs" in str(caught.value)


def test_a_trace_without_the_root_and_a_port_that_raises(parts: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="does not hold what the model itself was given"):
        replay_trace(parts["right"](), traced(parts["right"](), select="blocks*"))

    def call(**recorded: Any) -> Any:
        raise TypeError("missing timestep")

    with pytest.raises(UsageError, match="the port raised TypeError on the recorded inputs"):
        replay_trace(parts["right"](), traced(parts["right"]()), call=call)
    with pytest.raises(UsageError, match="no step 9 in the trace"):
        replay_trace(parts["right"](), traced(parts["right"]()), steps=[9])


def test_a_program_s_trace_is_replayed_by_the_port_s_own_names(
    parts: dict[str, Any], port: Path, tmp_path: Path
) -> None:
    """A program may have several models: each name in its trace begins with the class."""
    program = tmp_path / "program.py"
    program.write_text(
        "import torch, port\n"
        "class Text(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x + 1\n"
        "g = torch.Generator().manual_seed(0)\n"
        "x, scale = Text()(torch.randn(2, 16, generator=g)), torch.rand(1, generator=g)\n"
        "port.right()(x, scale=scale)\n",
        "utf-8",
    )
    path = tmp_path / "program.safetensors"
    options = ["--level", "full", "--inputs", "--output", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "truestep", "trace", "run", *options, "--", sys.executable, program],
        env={**os.environ, "PYTHONPATH": f"{port.parent}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert replay_trace(parts["right"](), path).verdict is Verdict.IDENTICAL
    assert replay_trace(parts["right"](), path, rename={"head": "Net.head"}).verdict.passed
    found = replay_trace(parts["wrong"](), path)
    assert found.first_divergence is not None
    assert found.first_divergence.fqn == "blocks.1.down"


def test_the_command(parts: dict[str, Any], port: Path, tmp_path: Path) -> None:
    path = tmp_path / "official.safetensors"
    traced(parts["right"](), path)
    found = CliRunner().invoke(app, ["trace", "replay", str(path), f"{port}:wrong"])
    assert found.exit_code == 1
    assert "first divergence: `blocks.1.down`, step 0, main" in " ".join(found.output.split())
    same = CliRunner().invoke(app, ["trace", "replay", str(path), f"{port}:with_call"])
    assert same.exit_code == 0, same.output
