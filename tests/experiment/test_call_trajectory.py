"""Which layers of a plain pipeline a quantisation costs most in; what a run of it is made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

from tests.commands import Run, runner
from truestep.call_case import CallCase
from truestep.calls.guidance import Guidance, Pass, Row
from truestep.errors import UsageError
from truestep.experiment import sensitivity as module
from truestep.experiment.call_trajectory import CallTrajectory, _samples
from truestep.experiment.sensitivity import sensitivity
from truestep.experiment.trajectory import apart
from truestep.runtime.quantising import instead, layers_in, quantised
from truestep.testing import tiny

CALL = {"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> CallCase:
    folder = tmp_path_factory.mktemp("plain") / "flux"
    tiny.save("FluxPipeline", folder)
    return CallCase(model=str(folder), call=CALL)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> CallCase:
    """Of two passes a step, in one batch."""
    folder = tmp_path_factory.mktemp("plain") / "sd3"
    tiny.save("StableDiffusion3Pipeline", folder)
    return CallCase(model=str(folder), call={**CALL, "guidance_scale": 3.0})


@pytest.fixture(scope="module")
def run(sd3: CallCase) -> CallTrajectory:
    return CallTrajectory.recorded(sd3)


def test_a_prediction_alone_is_the_recorded_one_with_its_guidance(run: CallTrajectory) -> None:
    recorded = run.recording
    for step in range(run.total):
        (call,) = (c for c in recorded.calls if c.stage == "prediction" and c.step == step)
        (update,) = (c for c in recorded.calls if c.stage == "update" and c.step == step)
        assert call.component == "transformer"
        guided = recorded.recording[update.arguments["model_output"]["tensor"]]
        with torch.no_grad():
            made = run.guided(step)
        assert apart(made, guided.reshape(-1)) < 1e-5
        assert apart(run.trusted(step), guided.reshape(-1)) < 1e-5


def test_a_change_of_one_step_acts_at_that_step_alone(run: CallTrajectory) -> None:
    layers = layers_in(run.denoisers)
    changed = quantised(layers.values(), "gguf:Q4_0")
    assert apart(run.end(1, nullcontext), run.final()) == 0.0
    entered = []

    def during() -> Any:
        entered.append(1)
        return instead(layers, changed)

    moved = [apart(run.end(step, during), run.final()) for step in range(run.total)]
    assert len(entered) == run.total
    with instead(layers, changed):
        whole = apart(run.latent(), run.final())
    assert all(0 < each < 2 * whole for each in moved)
    assert apart(run.latent(), run.final()) == 0.0


def test_forwards_are_counted(run: CallTrajectory) -> None:
    assert run.forwards == run.total == 3
    before = run.spent
    run.latent()
    assert run.spent == before + 3
    run.guided(0)
    assert run.spent == before + 4
    shorter = run.shortened(2)
    shorter.latent()
    assert shorter.spent == 2


def test_steps_that_a_call_spells_out_stay(run: CallTrajectory) -> None:
    spelled = CallTrajectory(run.case, run.pipe, {**run.call, "sigmas": [1.0, 0.5]}, run.recording)
    assert spelled.shortened(2).call == spelled.call
    assert run.shortened(2).call["num_inference_steps"] == 2
    assert run.shortened(8).call == run.call


def row(call: int, place: int | None, path: tuple[str, ...] = ("0",)) -> Row:
    return Row("transformer", "forward", call, path, place)


def test_passes_are_weighed_sample_by_sample() -> None:
    passes = tuple(
        Pass(row(0, place), "scheduler.step model_output", weight, name=name)
        for place, (weight, name) in enumerate([(-2.0, "uncond")] * 2 + [(3.0, "cond")] * 2)
    )
    assert _samples(Guidance(0, passes, True)) == [
        [(row(0, 0), -2.0), (row(0, 2), 3.0)],
        [(row(0, 1), -2.0), (row(0, 3), 3.0)],
    ]
    assert _samples(Guidance(0, passes, False)) is None
    assert _samples(Guidance(0, (), True)) is None
    assert _samples(Guidance(0, passes[:3], True)) is None  # a sample lacks a pass


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_estimates_rank_layers_as_running_each_does(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = request.getfixturevalue(name)
    exact = sensitivity(case, change="gguf:Q4_0", exact=True)
    monkeypatch.setattr(module, "REFINED", 0)
    found = sensitivity(case, change="gguf:Q4_0", probes=16)
    own = {layer.name: layer.score for layer in found.layers}
    truth = {layer.name: layer.score for layer in exact.layers}
    assert own.keys() == truth.keys()
    assert spearmanr([own[n] for n in own], [truth[n] for n in own]).statistic > 0.8
    assert exact.kept
    assert exact.list_kept.final < exact.nothing_kept.final
    assert exact.kept_bytes <= exact.budget * exact.total_bytes


Change = Callable[[Any], None]


def test_a_function_is_a_change_too_and_what_else_it_does_is_told(flux: CallCase) -> None:
    def change(pipe: Any) -> None:
        pipe.transformer.proj_out.weight.data *= 1.02
        pipe.transformer.proj_out.bias = None
        pipe.vae.decoder.conv_out.weight.data *= 1.1

    found = sensitivity(flux, change=change, steps=(0,), budget=0.5, probes=2)
    assert [layer.name for layer in found.layers] == ["transformer.proj_out"]
    assert set(found.left_out) == {
        "vae.decoder.conv_out.weight: of no layer of a denoiser",
        "transformer.proj_out.bias: it is gone",
    }


def test_code_that_a_change_replaces_is_told(flux: CallCase) -> None:
    def change(pipe: Any) -> None:
        pipe.transformer.proj_out.weight.data *= 1.02
        norm = pipe.transformer.norm_out
        forward = norm.forward
        norm.forward = lambda x, c: 1.1 * forward(x, c)

    found = sensitivity(flux, change=change, steps=(0,), budget=0.5, probes=2)
    assert "with every weight put back the end is still" in found.left_out[0]


def test_what_has_no_layers_or_steps_is_refused(flux: CallCase) -> None:
    with pytest.raises(UsageError, match="the change changes no weight of a denoiser's layers"):
        sensitivity(flux, change=lambda pipe: None)
    with pytest.raises(UsageError, match="no step 9 in the case"):
        sensitivity(flux, change="int8", steps=(9,))


def test_on_the_command_line(
    flux: CallCase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run: Run = runner(monkeypatch, capsys, "sensitivity")
    monkeypatch.chdir(tmp_path)
    said = [flux.model, "--subject", "diffusers", "--prompt", "a cat"]
    sets = [f"--set={key}={CALL[key]}" for key in ("height", "width", "num_inference_steps")]
    words = [*said, *sets, "--change", "gguf:Q4_0", "--probes", "2", "--output", "keep.json"]
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert out.startswith("RANKED gguf:Q4_0: keeping ")
    kept = json.loads((tmp_path / "keep.json").read_text())["modules_to_not_convert"]
    assert [*kept] == ["transformer"]
