"""The instruction set is a benign kind: measured by another process, kept, or said to be not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from truestep import check_function, record_function
from truestep.calls import instructions, tape
from truestep.calls.instructions import Elsewhere
from truestep.errors import UsageError
from truestep.floors import NoiseRun
from truestep.judge.rows import measured_run
from truestep.recording.format import Recording
from truestep.verdict import Verdict

SAMPLES = [{"input": torch.randn(2, 64, generator=torch.Generator().manual_seed(5))}]

SETS = instructions.other_sets()

pytestmark = pytest.mark.skipif(not SETS, reason="this processor has one instruction set")


def net(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "truestep" / "instructions"


def kind(recording: Recording) -> list[NoiseRun]:
    floor = recording.manifest.noise_floor
    assert floor is not None
    return [run for run in floor.runs if run.kind == "instructions"]


def notes(recording: Recording) -> str:
    return "; ".join(note for note in recording.manifest.notes if "instructions" in note)


def test_a_function_is_run_by_other_instructions_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = kind(record_function(net(), SAMPLES))
    assert [run.detail for run in runs] == [f"instructions {name}" for name, _ in SETS]
    assert all(0 < run.tensors[0].rel_l2 < 1e-6 for run in runs)
    assert len(list(cache.iterdir())) == len(SETS)

    def refused(variables: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(instructions, "_player", refused)
    assert kind(record_function(net(), SAMPLES)) == runs
    for other in (net(1), torch.nn.Sequential(net(), torch.nn.Tanh())):
        made = record_function(other, SAMPLES)
        assert kind(made) == []
        assert notes(made) == "noise floor without other instructions: no more processes"


def test_what_lies_in_the_temporary_folder_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may write there: a `numbers.py` took the place of Python's own."""
    for name in ("numbers.py", "select.py", "torch.py"):
        (tmp_path / name).write_text("raise SystemExit")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    instructions._end_all()
    runs = kind(record_function(net(2), SAMPLES))
    assert len(runs) == len(SETS)
    assert all(run.tensors for run in runs)


@pytest.mark.parametrize("damage", ["cut", "wider", "another", "binary"])
def test_a_damaged_cache_is_not_believed(cache: Path, damage: str) -> None:
    runs = kind(record_function(net(), SAMPLES))
    path = next(cache.iterdir())
    kept = json.loads(path.read_text())
    if damage == "wider":
        kept["run"]["tensors"][0]["rel_l2"] = 0.5
    if damage == "another":
        kept["key"] = "0" * 32
    text = json.dumps(kept)[: 100 if damage == "cut" else None]
    path.write_bytes(b"\xff\xfe\x00" if damage == "binary" else text.encode())
    assert kind(record_function(net(), SAMPLES)) == runs
    measured = [json.loads(run.model_dump_json()) for run in runs]
    assert json.loads(path.read_text())["run"] in measured


def test_a_folder_that_cannot_be_written_costs_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(kind(record_function(net(), SAMPLES))) == len(SETS)


def test_what_pytorch_did_not_make_is_said() -> None:
    model = net()
    made = record_function(lambda input: torch.from_numpy(model(input).numpy() + 1), SAMPLES)
    assert kind(made) == []
    assert notes(made) == "noise floor without other instructions: nothing that PyTorch made"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("raise SystemExit(3)", "the other process ended"),
        ("import time; time.sleep(100)", "the other process took more than 1 s"),
        ("input(); print('RuntimeError: no such operator')", "RuntimeError: no such operator"),
    ],
)
def test_a_process_that_fails_is_said_and_ended(
    source: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(source)
    started = []

    class Broken(instructions._Player):
        def __init__(self, variables: dict[str, str]) -> None:
            super().__init__(variables)
            started.append(self._process)

    monkeypatch.setattr(instructions, "_idle", [])
    monkeypatch.setattr(instructions, "_Player", Broken)
    monkeypatch.setattr(instructions, "PATIENCE", -1e9 if "sleep" in source else 50.0)
    monkeypatch.setattr(instructions, "STARTING_S", 1.0 if "sleep" in source else 60.0)
    monkeypatch.setattr(tape, "__file__", str(broken))
    made = record_function(net(), SAMPLES)
    assert kind(made) == []
    assert notes(made) == f"noise floor without other instructions: {text}"
    assert all(process.poll() is not None for process in started)
    assert check_function(net(), made).verdict.passed


def test_a_recording_that_fails_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "_idle", [])
    calls: list[int] = []
    model = net()

    def counting(input: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return model(input) * len(calls)

    with pytest.raises(UsageError, match="differs from itself"):
        record_function(counting, SAMPLES)
    assert instructions._idle == []


def test_a_limited_process_looks_at_the_other_side() -> None:
    source = """
import torch
from truestep.calls.instructions import other_sets
print(torch.backends.cpu.get_cpu_capability(), [name for name, _ in other_sets()])
"""
    environment = {**os.environ, **instructions.OLDEST}
    done = subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "DEFAULT ['not limited', 'limited to AVX2']"


def test_what_is_known_by_its_identity_is_not_taped_again() -> None:
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    recorded = {"out": layer(x).detach()}
    calls: list[bool] = []

    def again() -> dict[str, torch.Tensor]:
        calls.append(_taped())
        return {"out": layer(x)}

    def measured(made: Mapping[str, torch.Tensor]) -> NoiseRun:
        pairs = {"out": (made["out"], recorded["out"])}
        return measured_run("instructions", "other", "float32/float32", pairs)

    runs = []
    for _ in range(2):
        with torch.no_grad(), Elsewhere(pytest.fail, identity="a linear layer") as elsewhere:
            elsewhere.known(recorded)
            elsewhere.start(again, recorded)
            runs.append(elsewhere.run(measured))
    assert calls == [True, False]
    assert runs[0] is not None
    assert runs[0] == runs[1]
    with Elsewhere(pytest.fail, identity="another one") as elsewhere:
        assert not elsewhere.known(recorded)


@pytest.mark.parametrize("holds", [False, True])
def test_where_a_limit_does_not_hold_products_are_summed_in_parts(
    holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MKL gave the same bits under each of its variables on an EPYC; this limit holds nowhere."""
    if holds:
        monkeypatch.setattr(tape, "products", lambda: ["other bits"])
    found = _same_set(net())
    assert found == 0.0 if holds else 1e-8 < found < 1e-6
    assert _same_set(torch.nn.GELU()) == 0.0  # no products


def test_another_order_of_sums_passes_and_a_fault_as_large_as_twenty_roundings_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator)
    recording = record_function(lambda input: input @ weight, SAMPLES)

    def in_parts(input: torch.Tensor) -> torch.Tensor:
        return sum(input[:, at::7] @ weight[at::7] for at in range(7))  # type: ignore[return-value]

    assert check_function(in_parts, recording).verdict is Verdict.EQUIVALENT
    other = weight * (1 + 2e-6 * torch.randn(64, 256, generator=generator))
    found = check_function(lambda input: input @ other, recording)
    assert found.verdict is Verdict.DRIFTED


def _same_set(model: torch.nn.Module) -> float:
    """rel_l2 of a run in a process of the same instructions, as one of another set."""
    limits = {name: os.environ[name] for name in instructions.LIMITS if name in os.environ}
    x = SAMPLES[0]["input"]
    with torch.no_grad():
        recorded = {"out": model(x)}

    def measured(made: Mapping[str, torch.Tensor]) -> NoiseRun:
        pairs = {"out": (made["out"], recorded["out"])}
        return measured_run("instructions", "same", "float32/float32", pairs)

    with torch.no_grad(), Elsewhere(pytest.fail, chosen=("not limited", limits)) as elsewhere:
        elsewhere.start(lambda: {"out": model(x)}, recorded)
        run = elsewhere.run(measured)
    assert run is not None
    return run.tensors[0].rel_l2


def _taped() -> bool:
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return _get_current_dispatch_mode() is not None
