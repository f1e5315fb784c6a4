"""Engines in processes of their own: what is recorded of them, and which seam is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import Captured, runner
from tests.warm import COLD
from truestep.calls.recording import read
from truestep.engines.assembling import PARTIAL, left_by
from truestep.engines.comparing import compare_runs, odd_one_out
from truestep.engines.engine import engine, engines
from truestep.engines.expected import place_of
from truestep.engines.named import run_of
from truestep.engines.ordered import check_run
from truestep.engines.run import COND, UNCOND, Run
from truestep.engines.running import Ran, recover, run_engine
from truestep.errors import ModelLoadError, UsageError
from truestep.verdict import Comparison, Verdict

PORT = Path(__file__).parent.parent / "examples" / "engine_port.py"
STAGES = {
    "shift": "schedule",
    "sign": "guidance",
    "swapped": "guidance",
    "time": "schedule",
    "tail": "text",
    "order": "update",
    "noise": "latent",
    "bias": "prediction",
    "scale": "guidance",
    "clamped": "update",
}
STYLES = ("call", "batch", "function")


def ran(model: Path, folder: Path, style: str, *faults: str, **options: Any) -> Ran:
    """Generations of the port, one a fault, recorded into a folder."""
    folder.mkdir(exist_ok=True)
    inputs = folder / "inputs.safetensors"
    inputs.write_bytes((model.parent / "inputs.safetensors").read_bytes())
    command = [sys.executable, str(PORT), str(model), str(inputs), style, *faults]
    return run_engine(command, folder / "run.safetensors", **options)


@pytest.fixture(scope="session")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Run]]:
    """By style: the right generation, then one a fault."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for style in STYLES:
        with pytest.MonkeyPatch.context() as patch:
            if style == STYLES[0]:
                patch.setenv(COLD, "1")  # torch is imported by the port, not before it
            made = ran(model, folder / style, style, "none", *STAGES)
        assert (made.code, made.failures) == (0, [])
        assert not left_by(folder / style / "run.safetensors")
        found[style] = [run_of(path) for path, _ in made.recordings]
    return found


@pytest.fixture(scope="session")
def verdicts(
    model: Path, reference: Path, runs: dict[str, list[Run]]
) -> dict[tuple[str, str], Comparison]:
    known = run_of(reference)
    return {
        (style, fault): check_run(run, model, reference=known)
        for style in STYLES
        for fault, run in zip(("none", *STAGES), runs[style], strict=True)
    }


def test_a_right_port_is_equivalent_however_it_calls_its_model(
    verdicts: dict[tuple[str, str], Comparison],
) -> None:
    for style in STYLES:
        result = verdicts[style, "none"]
        assert result.verdict is Verdict.EQUIVALENT, result.sentence
        judged = {row.stage for row in result.rows}
        assert {"schedule", "latent", "text", "prediction", "guidance", "update"} <= judged
        assert sum(row.stage == "prediction" for row in result.rows) == 6
        assert "converted: a schedule without its closing zero" in result.notes


@pytest.mark.parametrize("fault", STAGES)
def test_the_seam_of_a_fault_is_named_first(
    verdicts: dict[tuple[str, str], Comparison], fault: str
) -> None:
    for style in STYLES:
        result = verdicts[style, fault]
        assert result.verdict is Verdict.DRIFTED, (style, result.sentence)
        assert result.first_divergence is not None
        assert result.first_divergence.stage == STAGES[fault], (style, result.sentence)
        failed = {
            row.stage for row in result.rows if not row.verdict.passed and row.origin != "inherited"
        }
        assert failed == {STAGES[fault]}  # each seam by itself: nothing is inherited


def test_what_guidance_does_otherwise_is_said(
    verdicts: dict[tuple[str, str], Comparison],
) -> None:
    swapped = "\n".join(verdicts["call", "swapped"].notes)
    assert "uncond - 4 (cond - uncond): the branches are exchanged" in swapped
    assert "guidance, by the reference's weights: uncond + 5 (cond - uncond)" in swapped
    turned = "\n".join(verdicts["call", "sign"].notes)
    assert "uncond - 5 (cond - uncond): the sign of the guidance is turned" in turned


def test_of_three_runs_the_odd_one_is_named(runs: dict[str, list[Run]]) -> None:
    """Every fault in every style among two right runs, at each place of the three."""
    for fault, number in zip(STAGES, range(1, len(STAGES) + 1), strict=True):
        for at, style in enumerate(STYLES):
            trio = [runs[other][0] for other in STYLES if other != style]
            trio.insert(at, runs[style][number])
            text, results = odd_one_out(trio)
            assert f"the odd one out is {trio[at].label}" in text, (fault, style, text)
            assert len(results) == 2
            stage = place_of(text.split("`")[1]).stage
            expected = "latent" if fault == "clamped" else STAGES[fault]  # where it first shows
            assert stage == expected, (fault, style, text)
    text, _ = odd_one_out([runs[style][0] for style in STYLES])
    assert text.startswith("no run parts from the others")
    text, _ = odd_one_out([runs["call"][0], runs["batch"][2], runs["function"][9]])
    assert text.startswith("no two of the 3 runs agree at `step/0000/guided`")
    text, _ = odd_one_out([runs["call"][0], runs["batch"][1], runs["function"][7]])
    assert "the odd one out is" in text
    assert f"{runs['function'][7].label} parts at `latent/initial`" in text


def test_two_right_runs_differ_by_rounding_alone(runs: dict[str, list[Run]]) -> None:
    result = compare_runs(runs["function"][0], runs["batch"][0])
    assert result.verdict in (Verdict.EQUIVALENT, Verdict.INCONCLUSIVE), result.sentence
    wrong = compare_runs(runs["function"][0], runs["batch"][3])
    assert wrong.first_divergence is not None
    assert wrong.first_divergence.stage == "guidance"
    origins = {row.stage: row.origin for row in wrong.rows if row.verdict is Verdict.DRIFTED}
    assert origins["update"] == "inherited"


def test_what_the_program_makes_is_the_same_with_and_without_the_recorder(
    model: Path, runs: dict[str, list[Run]], tmp_path: Path
) -> None:
    inputs = tmp_path / "inputs.safetensors"
    inputs.write_bytes((model.parent / "inputs.safetensors").read_bytes())
    subprocess.run(
        [sys.executable, str(PORT), str(model), str(inputs), "function", "none"], check=True
    )
    alone = load_file(f"{inputs}.function.made")["none"]
    final = runs["function"][0].final
    assert final is not None
    assert torch.equal(alone, final)


def test_without_a_reference_what_it_would_say_is_not_judged(
    model: Path, runs: dict[str, list[Run]]
) -> None:
    result = check_run(runs["function"][0], model)
    assert result.verdict is Verdict.EQUIVALENT
    for seam in ("noise", "text", "guidance scale"):
        assert f"not judged: {seam}: no reference was given" in result.notes


def test_a_worker_that_is_killed_leaves_its_calls(
    model: Path, reference: Path, tmp_path: Path
) -> None:
    made = ran(model, tmp_path / "worker", "worker", "none")
    (path, recording), *others = made.recordings
    assert not others
    assert PARTIAL in recording.recording.manifest.notes
    run = run_of(path)
    assert [len(step.passes) for step in run.steps] == [2, 2, 2]
    assert {*run.weights} == {COND, UNCOND}
    result = check_run(run, model, reference=run_of(reference))
    assert result.verdict is Verdict.EQUIVALENT, result.sentence


def test_an_engine_is_given_noise_text_and_schedule_of_a_reference(
    model: Path, reference: Path, tmp_path: Path
) -> None:
    made = ran(model, tmp_path / "given", "call", "shift", inject=read(reference))
    run, known = run_of(made.recordings[0][0]), run_of(reference)
    assert run.timesteps is not None
    assert known.timesteps is not None
    assert torch.equal(run.timesteps, known.timesteps.to(run.timesteps.dtype))
    result = check_run(run, model, reference=known)
    assert result.verdict is Verdict.EQUIVALENT, result.sentence


def test_what_truestep_left_when_it_was_killed_is_recovered(model: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs.safetensors"
    inputs.write_bytes((model.parent / "inputs.safetensors").read_bytes())
    output = tmp_path / "run.safetensors"
    program = [sys.executable, str(PORT), str(model), str(inputs), "call", *["none"] * 500]
    command = [sys.executable, "-m", "truestep", "engine", "run", "--output", str(output), "--"]
    process = subprocess.Popen([*command, *program], start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        os.killpg(process.pid, signal.SIGSTOP)  # what is seen is what is killed
        if output.exists() and any(tmp_path.glob(f"{output.name}.*.calls/*.safetensors")):
            break
        os.killpg(process.pid, signal.SIGCONT)
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert output.exists()
    left = left_by(output)
    assert left
    with pytest.raises(UsageError, match="calls of an earlier run were left"):
        run_engine(program, output)
    kept = output.read_bytes()
    begun = [one for one in left if any(one.folder.glob("*.safetensors"))]
    recovered = recover(output)
    assert len(recovered) == len(begun) > 0
    assert not left_by(output)
    assert output.read_bytes() == kept  # what was whole is not replaced


def test_an_output_is_of_one_run_at_a_time(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "run.safetensors"
    held = tmp_path / ".run.safetensors.recording"
    sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        held.write_text(str(sleeping.pid))
        with pytest.raises(UsageError, match="another program is being recorded"):
            run_engine([sys.executable, "-c", "pass"], output)
        assert held.exists()
    finally:
        sleeping.kill()
        sleeping.wait()
    ran_again = run_engine([sys.executable, "-c", "pass"], output)  # its holder is gone
    assert ran_again.code == 0
    assert not held.exists()


def test_a_program_without_an_engine_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    run = runner(monkeypatch, capsys, "engine")
    output = str(tmp_path / "run.safetensors")
    code, out, _ = run("run", "--output", output, "--", sys.executable, "-c", "print(1)")
    assert code == 4
    assert "NOT RECORDED: no denoiser, scheduler or known function ran" in out
    code, _, err = run("run", "--output", output, "--", "no-such-program")
    assert code == 2
    assert "the program cannot be started" in err
    code, _, err = run("run", "--engine", "comfy", "--", "python")
    assert code == 2
    assert "no engine 'comfy'" in err
    assert "--engine comfyui" in err


def test_bad_sides_of_a_check_are_refused(
    model: Path, runs: dict[str, list[Run]], tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match="no folder of diffusers"):
        check_run(runs["call"][0], tmp_path)
    alone = tmp_path / "alone.safetensors"
    save_file({"latent_tensor": torch.zeros(1, 16, 3, 8, 8)}, alone)
    with pytest.raises(UsageError, match="no denoise steps"):
        check_run(run_of(alone), model)
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, other)
    with pytest.raises(UsageError, match="no seam of a run"):
        run_of(other)


def test_every_adapter_says_how_it_is_told_and_is_found_by_its_name() -> None:
    for one in engines():
        assert one.packages
        assert engine(one.name) is one
        for boundary in one.boundaries:
            assert boundary.module
            assert all(boundary.path)
