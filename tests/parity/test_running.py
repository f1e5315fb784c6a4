"""Running a case in this process: what is judged, and what makes a pass prove nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

import truestep
from truestep.errors import ComponentMissingError, EquivalenceError, ParityError, UsageError
from truestep.parity import Loaded, Loosened, Parity, missing
from truestep.parity.evidence import Evidence, State, state_of
from truestep.parity.running import Run, run_parity

HERE = Path(__file__)


class Net(torch.nn.Module):
    """Stands for the official one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x))


def own(x: torch.Tensor) -> torch.Tensor:
    """Stands for the port: the same function in other operations."""
    net = NET
    e = torch.exp(2 * (x @ net.inner.weight.T + net.inner.bias))
    return (e - 1) / (e + 1)


NET = Net().eval()


def inputs(generator: torch.Generator) -> dict[str, Any]:
    return {"x": torch.randn(1, 4, 16, generator=generator)}


def case(
    port: Callable[..., Any] = own, official: Callable[..., Any] = NET, **changes: Any
) -> Parity:
    given: dict[str, Any] = {
        "kind": "generic",
        "coverage": "implementation_subcomponent",
        "official": lambda: official,
        "port": lambda: port,
        "inputs": inputs,
        "seeds": (0,),
    }
    return Parity("acme", "net", **{**given, **changes})


def execute(parity: Parity, tmp_path: Path | None = None) -> Evidence:
    run = Run(parity, HERE.parent, HERE, tmp_path)
    run_parity(run)
    return run.evidence()


def test_a_pass_and_its_recordings(tmp_path: Path) -> None:
    evidence = execute(case(), tmp_path)
    assert evidence.numbers is not None
    assert evidence.numbers.verdict == "equivalent"
    kept = truestep.Recording.open(tmp_path / "acme-net.official.safetensors")
    assert kept.manifest.noise_floor is not None
    made = truestep.Recording.open(tmp_path / "acme-net.port.safetensors")
    assert "sample/0000/output/out" in made


class Counting(torch.nn.Module):
    """A port whose n-th call is off by a hundredth."""

    def __init__(self, wrong: int) -> None:
        super().__init__()
        self.inner, self.wrong, self.calls = Net().inner, wrong, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.tanh(self.inner(x)) * (1.01 if self.calls == self.wrong else 1.0)


def test_no_call_of_a_port_is_overlooked() -> None:
    """Those that measure its rounding are answers too, but where it runs in a higher precision."""
    good = Counting(0).eval()
    execute(case(port=good, seeds=(0, 1)))
    raised = (3, 4)  # both samples in float64, of which nothing but a rounding is concluded
    for wrong in range(1, good.calls + 1):
        parity = case(port=Counting(wrong).eval(), seeds=(0, 1))
        if wrong in raised:
            execute(parity)
            continue
        with pytest.raises(EquivalenceError, match="the same input gave another output the second"):
            execute(parity)


def test_the_official_side_may_be_a_recording(tmp_path: Path) -> None:
    sample = inputs(torch.Generator().manual_seed(0))
    path = tmp_path / "official.safetensors"
    truestep.record_function(NET, [sample], path=path)
    run = Run(case(official=dict), HERE.parent, HERE)
    run.parity = Parity(
        "acme", "net", "generic", "both", official=lambda: path, port=lambda: Loaded(own, [HERE])
    )
    run_parity(run)
    (name,) = run.evidence().official.weights
    assert name.endswith("official.safetensors")


def test_the_same_module_on_both_sides_proves_nothing() -> None:
    with pytest.raises(ParityError, match="the numbers agree, but the test may not pass"):
        execute(case(port=NET))


def test_shared_code_can_be_explained() -> None:
    from truestep.parity.sharing import shared_files

    a, b = Path("/x/port/norm.py"), Path("/x/port/own.py")
    assert shared_files([a, b], [a], allowed={}) == (a,)
    assert shared_files([a, b], [a], allowed={"port/norm.py": "torch's own"}) == ()


def test_production_coverage_needs_weight_files() -> None:
    with pytest.raises(ParityError, match="but the official side names no weight files"):
        execute(case(coverage="both"))


def test_an_expired_tolerance_is_red() -> None:
    loosened = Loosened(0.5, reason="kernels", owner="ada", expires="2020-01-01")
    with pytest.raises(ParityError, match="expired on 2020-01-01"):
        execute(case(loosened=loosened))
    later = Loosened(0.5, reason="kernels", owner="ada", expires="2999-01-01")
    evidence = execute(case(port=lambda x: own(x) * 1.01, loosened=later))
    assert evidence.tolerance is not None
    assert evidence.numbers is not None
    assert evidence.numbers.floor_source == "loosened tolerance"


def test_what_the_port_raises_is_raised() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no kernel image")

    with pytest.raises(NotImplementedError, match="no kernel image"):
        execute(case(port=broken))


def test_a_lost_output_is_not_passed() -> None:
    def two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return NET(x), x

    with pytest.raises(EquivalenceError, match="missing"):
        execute(case(official=two, port=lambda x: (own(x),)))


def test_inputs_must_be_a_function_of_their_seed() -> None:
    with pytest.raises(UsageError, match="the inputs are not a function of their seed"):
        execute(case(inputs=lambda generator: {"x": torch.randn(1, 16)}))


def test_training_mode_is_an_error() -> None:
    with pytest.raises(UsageError, match="the official module is in training mode"):
        execute(case(official=Net()))


def test_an_official_side_with_state_is_an_error() -> None:
    calls: list[int] = []

    def counts(x: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return NET(x) * len(calls)

    with pytest.raises(UsageError, match="the trusted side differs from itself"):
        execute(case(official=counts))


def test_each_side_gets_its_own_inputs() -> None:
    def spoils(x: torch.Tensor) -> torch.Tensor:
        made = own(x)
        x.zero_()
        return made

    execute(case(port=spoils))


def test_a_typed_reason_reaches_the_evidence() -> None:
    def load() -> Loaded:
        raise missing("converted_weights", "b.bin", searched=["$X"])

    run = Run(case(), HERE.parent, HERE)
    run.parity = Parity("acme", "net", "vae", "both", official=lambda: NET, port=load)
    with pytest.raises(ComponentMissingError):
        run_parity(run)
    part = run.evidence().missing
    assert part is not None
    assert (part.kind, part.what, part.searched) == ("converted_weights", "b.bin", ("$X",))


def latent(generator: torch.Generator) -> dict[str, Any]:
    return {"x": torch.randn(1, 4, 2, 8, 8, generator=generator)}


@pytest.mark.parametrize(("scale", "passes"), [(1.0, True), (-1.0, False)])
def test_a_pipeline_is_judged_by_its_latents(scale: float, passes: bool) -> None:
    parity = case(
        official=lambda x: x * 2,
        port=lambda x: (x + x) * scale,
        kind="pipeline",
        inputs=latent,
        judge=truestep.check_latent,
    )
    if passes:
        evidence = execute(parity)
        assert evidence.numbers is not None
        assert len(evidence.port.recording) == 64
    else:
        with pytest.raises(EquivalenceError):
            execute(parity)


def test_nan_on_both_sides_is_no_agreement() -> None:
    def bad(x: torch.Tensor) -> torch.Tensor:
        return NET(x) * float("nan")

    run = Run(case(official=bad, port=lambda x: own(x) * float("nan")), HERE.parent, HERE)
    with pytest.raises(UsageError, match="this cannot be a reference"):
        run_parity(run)
    evidence = run.evidence()
    assert evidence.raised.startswith("raised UsageError: this cannot be a reference")
    assert state_of(evidence, date(2026, 12, 1))[0] is State.DEBUG_RED


@pytest.mark.parametrize("output", [{}, (), None, {"a": "text"}])
def test_an_output_without_tensors_is_an_error(output: Any) -> None:
    with pytest.raises(UsageError, match="holds no tensor"):
        execute(case(official=lambda x: output))
    with pytest.raises(UsageError, match="holds no tensor"):
        execute(case(port=lambda x: output))


def test_tensors_without_elements_prove_nothing() -> None:
    with pytest.raises(UsageError, match="this cannot be a reference"):
        execute(case(official=lambda x: NET(x)[:0], port=lambda x: own(x)[:0]))


def test_an_output_too_many_is_not_passed() -> None:
    run = Run(case(official=lambda x: {"a": NET(x)}), HERE.parent, HERE)
    run.parity = case(official=lambda x: {"a": NET(x)}, port=lambda x: {"a": own(x), "b": x})
    with pytest.raises(EquivalenceError, match="1 unexpected"):
        run_parity(run)


@pytest.mark.parametrize("side", ["official", "port"])
def test_a_missing_side_is_an_error(side: str) -> None:
    with pytest.raises(UsageError, match="a loader returned NoneType"):
        execute(case(**{side: None}))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16]
)
def test_a_port_that_casts_its_output_is_not_judged_by_the_cast(dtype: torch.dtype) -> None:
    with pytest.raises(EquivalenceError, match="drifted"):
        execute(case(port=lambda x: own(x).to(dtype)))


class Narrow(torch.nn.Module):
    """A net that was loaded in 16 bits and takes any input."""

    def __init__(self, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__()
        self.net = Net().eval().to(torch.bfloat16)
        self.dtype, self.scale = dtype, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.to(self.net.inner.weight.dtype)).to(self.dtype) * self.scale


@pytest.mark.parametrize("official", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("port", [torch.float32, torch.bfloat16])
def test_a_port_in_16_bits_is_judged_as_one(official: torch.dtype, port: torch.dtype) -> None:
    sides = {"official": Narrow(official).eval(), "kind": "vae"}
    execute(case(port=Narrow(port).eval(), **sides))
    execute(case(port=Narrow(port).eval(), official=NET, kind="vae"))
    with pytest.raises(EquivalenceError, match="drifted"):
        execute(case(port=Narrow(port, 1.1).eval(), **sides))
