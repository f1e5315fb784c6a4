"""Engines with two experts: each prediction is the right one's, and each has its own guidance."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import truestep
from truestep.engines.named import run_of
from truestep.engines.ordered import check_run
from truestep.engines.run import Run
from truestep.engines.running import run_engine
from truestep.engines.watch.request import Looked
from truestep.testing import tiny
from truestep.verdict import Comparison, Verdict

PORT = Path(__file__).parent.parent / "examples" / "two_experts.py"
FAULTS = ("late", "early", "exchanged", "scales")


@pytest.fixture(scope="module")
def two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two experts, and the inputs and the reference of a case beside it."""
    from diffusers import WanPipeline

    folder = tmp_path_factory.mktemp("experts") / "wan"
    shutil.copytree(model, folder)
    other = tiny.pipeline("WanPipeline", seed=1)
    other.transformer.save_pretrained(str(folder / "transformer_2"))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.875}
    (folder / "model_index.json").write_text(json.dumps(index))
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift": 5.0}))
    shutil.copy(model.parent / "inputs.safetensors", folder.parent)
    given = load_file(folder.parent / "inputs.safetensors")
    call = {
        "prompt_embeds": given["cond"],
        "negative_prompt_embeds": given["uncond"],
        "latents": given["noise"],
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "output_type": "latent",
    }
    pipe = WanPipeline.from_pretrained(str(folder))
    truestep.record(
        pipe, call=call, floor="none", keep="all", path=folder.parent / "reference.safetensors"
    )
    return folder


@pytest.fixture(scope="module")
def runs(two: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    output = tmp_path_factory.mktemp("runs") / "run.safetensors"
    inputs = str(two.parent / "inputs.safetensors")
    command = [sys.executable, str(PORT), str(two), inputs, "none", *FAULTS]
    made = run_engine(command, output, inside=Looked((0,)))
    assert (made.code, made.failures) == (0, [])
    found = [run_of(path) for path, _ in made.recordings]
    return dict(zip(("none", *FAULTS), found, strict=True))


def checked(two: Path, run: Run, **options: str) -> Comparison:
    known = run_of(two.parent / "reference.safetensors")
    return check_run(run, two, reference=known, **options)  # type: ignore[arg-type]


def test_a_right_engine_of_two_experts_is_equivalent(two: Path, runs: dict[str, Run]) -> None:
    run = runs["none"]
    assert {one.component for step in run.steps for one in step.passes} == {"Model", "Model_2"}
    assert {*run.insides} == {("Model.forward", 0), ("Model_2.forward", 0)}
    result = checked(two, run)
    assert result.verdict is Verdict.EQUIVALENT, result.sentence
    assert sum(row.stage == "prediction" for row in result.rows) == 8
    assert sum(row.stage == "guidance" for row in result.rows) == 4
    scales = [note for note in result.notes if note.startswith("guidance, by")]
    assert scales == [
        "guidance, by the reference's weights: uncond + 4 (cond - uncond)",
        "guidance, by the reference's weights: uncond + 3 (cond - uncond)",
    ]


@pytest.mark.parametrize(
    ("fault", "expert", "right"),
    [("late", "transformer", "transformer_2"), ("early", "transformer_2", "transformer")],
)
def test_a_boundary_that_is_one_step_off_is_named(
    two: Path, runs: dict[str, Run], fault: str, expert: str, right: str
) -> None:
    times = [step.passes[0].timestep or 0.0 for step in runs["none"].steps]
    switch = next(number for number, time in enumerate(times) if time < 875)
    step = switch if fault == "late" else switch - 1
    for depth in ("steps", "modules"):
        result = checked(two, runs[fault], depth=depth)
        place = result.first_divergence
        assert result.verdict is Verdict.DRIFTED
        assert place is not None
        assert (place.stage, place.step, place.branch) == ("prediction", step, "cond")
        assert f"predicted by `{expert}` in the place of `{right}`" in result.sentence
        assert "the boundary 875" in (place.kind or "")
        assert (
            f"step {step}: the engine goes on to the expert of low noise 1 step too {fault} "
            "(boundary 875)"
        ) in result.notes
        failed = {row.name for row in result.rows if not row.verdict.passed}
        assert failed == {f"step/{step:04d}/{branch}" for branch in ("cond", "uncond")}
        assert not result.hint


def test_experts_that_are_exchanged_are_named(two: Path, runs: dict[str, Run]) -> None:
    result = checked(two, runs["exchanged"])
    assert result.first_divergence is not None
    assert result.first_divergence.step == 0
    assert "every step is predicted by the other expert: the two are exchanged" in result.notes


def test_scales_of_the_guidance_that_are_exchanged_are_named(
    two: Path, runs: dict[str, Run]
) -> None:
    result = checked(two, runs["scales"])
    assert result.first_divergence is not None
    assert result.first_divergence.stage == "guidance"
    assert {row.stage for row in result.rows if not row.verdict.passed} == {"guidance"}
    assert "the run combines by other weights: uncond + 3 (cond - uncond)" in result.notes


def test_without_a_reference_each_expert_has_its_own_scale(two: Path, runs: dict[str, Run]) -> None:
    result = check_run(runs["none"], two)
    assert result.verdict is Verdict.EQUIVALENT, result.sentence
    assert "not judged: guidance scale: no reference was given" in result.notes
