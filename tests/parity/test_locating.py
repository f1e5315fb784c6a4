"""Red runs name the module and the weights that are wrong, and nothing where nothing is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from truestep.errors import EquivalenceError
from truestep.parity import Loaded, Parity
from truestep.parity.evidence import Fault, State
from truestep.parity.ledger import state_of
from truestep.parity.running import Run, run_parity

HERE = Path(__file__)


class Official(nn.Module):
    """Norm, two layers with an activation, an output layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.up.weight.data *= 4  # into the range where the forms of GELU differ
        self.act = nn.GELU(approximate="tanh")
        self.down = nn.Linear(32, 16)
        self.out = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.out(x + self.down(self.act(self.up(self.norm(x)))))
        return made


class Port(nn.Module):
    """The same under other names, with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
        self.first = nn.Linear(16, 32)
        self.gelu = nn.GELU(approximate="tanh")
        self.second = nn.Linear(32, 16)
        self.last = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        y = self.first(scaled * self.gain + self.shift)
        made: torch.Tensor = self.last(x + self.second(self.gelu(y)))
        return made


def ported(change: Callable[[Port], Any]) -> Port:
    """The port with the official weights, changed."""
    port, official = Port().eval(), Official()
    names = {"up": "first", "down": "second", "out": "last"}
    state = {"gain": official.norm.weight, "shift": official.norm.bias}
    for theirs, ours in names.items():
        for kind in ("weight", "bias"):
            state[f"{ours}.{kind}"] = getattr(getattr(official, theirs), kind)
    port.load_state_dict(state)
    change(port)
    return port


def executed(port: Callable[[], Any], official: Callable[[], Any] | None = None) -> Run:
    parity = Parity(
        "acme",
        "mixer",
        kind="generic",
        coverage="implementation_subcomponent",
        official=official or (lambda: Official().eval()),
        port=port,
        inputs=lambda generator: {"x": torch.randn(1, 5, 16, generator=generator)},
        seeds=(0,),
    )
    run = Run(parity, HERE.parent, HERE)
    try:
        run_parity(run)
    except EquivalenceError:
        return run
    assert run.fault is None
    return run


def other_gelu(port: Port) -> None:
    port.gelu = nn.GELU()


def transposed(port: Port) -> None:
    port.last.weight.data = port.last.weight.data.T.clone()


def unbiased(port: Port) -> None:
    port.second.bias.data.zero_()


@pytest.mark.parametrize(
    ("change", "module", "partner", "weights"),
    [
        (other_gelu, "act", "gelu", ""),
        (transposed, "out", "last", "last.weight (out.weight): transposed"),
        (unbiased, "down", "second", "second.bias (down.bias)"),
    ],
)
def test_the_wrong_module_is_named(
    change: Callable[[Port], None], module: str, partner: str, weights: str
) -> None:
    run = executed(lambda: ported(change))
    fault = run.fault
    assert fault is not None
    assert (fault.module, fault.port_module, fault.note) == (module, partner, "")
    assert fault.weights.startswith(weights)
    assert bool(fault.weights) == bool(weights)
    assert run.comparison is not None
    assert f"(first divergence: `{module}`" in run.comparison.sentence
    assert f"in the port: {partner}" in run.comparison.hint
    assert "\n" not in run.comparison.hint  # it is printed on one line
    state, reason = state_of(run.evidence(), run_date())
    assert state is State.DEBUG_RED
    assert f"`{partner}` in the port" in reason


def test_a_parameter_that_the_port_lacks_is_named() -> None:
    def without(port: Port) -> None:
        port.second.bias = None

    fault = executed(lambda: ported(without)).fault
    assert fault is not None
    assert fault.weights == "down.bias: without a partner in the port"


def test_a_right_port_has_no_fault() -> None:
    run = executed(lambda: ported(lambda port: None))
    assert run.comparison is not None
    assert run.comparison.verdict.passed
    assert run.evidence().fault is None


def test_code_around_the_modules_names_what_is_around_it() -> None:
    class Doubled(Port):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    def load() -> Port:
        port = Doubled().eval()
        port.load_state_dict(ported(lambda port: None).state_dict())
        return port

    fault = executed(load).fault
    assert fault is not None
    assert fault.module == "(root)"
    assert fault.kind == "scaled by 2"


def test_a_function_names_its_output_and_the_next_command() -> None:
    official = Official().eval()
    run = executed(lambda: lambda x: official(x) * 1.5)
    fault = run.fault
    assert fault == Fault(
        output="sample/0000/output/out",
        note="no module named: the port is no torch module that can be opened",
    )
    assert run.comparison is not None
    assert run.comparison.hint.startswith("`truestep parity keys ")
    assert "test_locating.py` lists the weights of both sides, paired" in run.comparison.hint


def test_quantised_weights_are_named_without_a_module() -> None:
    official = Official().eval()
    scale = official.out.weight.detach().abs().amax() / 127
    rounded = {k: v.detach().clone() for k, v in official.state_dict().items()}
    rounded["out.weight"] = (rounded["out.weight"] / scale).round() * scale

    def call(x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.func.functional_call(official, rounded, (x,))
        return made

    fault = executed(lambda: Loaded(call, state=rounded)).fault
    assert fault is not None
    assert fault.weights.endswith(": out.weight")
    assert fault.weights.startswith("the same checkpoint, 1 of 8 paired parameters as int8")


def run_date() -> Any:
    from datetime import date

    return date(2026, 12, 1)
