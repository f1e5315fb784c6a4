"""Faults between the seams of an engine's run, and right runs that look odd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from truestep.engines.assembling import SEVERAL, left_by
from truestep.engines.branches import with_branches
from truestep.engines.conventions import AS_IT_IS
from truestep.engines.engine import GENERIC
from truestep.engines.expected import Seams, _put_given, _settings
from truestep.engines.named import run_of
from truestep.engines.ordered import check_run
from truestep.engines.run import COND, UNCOND, Pass, Run, Step
from truestep.engines.running import recover
from truestep.engines.trusted import Denoiser, Trusted, arguments, schedule_of
from truestep.engines.watch.spool import CallSpool
from truestep.errors import FileFormatError, UsageError
from truestep.judge.rows import compare_tensors
from truestep.verdict import Comparison, Verdict

NAMES = {"latent": "hidden_states", "timestep": "timestep", "text": "encoder_hidden_states"}


class Simulated:
    """A right engine's run in memory, and the same with a fault in it."""

    def __init__(self, model: Path, reference: Run) -> None:
        from diffusers import WanTransformer3DModel

        self.folder, self.reference = model, reference
        self.denoiser = WanTransformer3DModel.from_pretrained(f"{model}/transformer").eval()
        self.inputs = load_file(model.parent / "inputs.safetensors")

    @torch.no_grad()
    def passes(self, number: int, latent: torch.Tensor, time: torch.Tensor, fault: str) -> list:
        texts = {COND: self.inputs["cond"], UNCOND: self.inputs["uncond"]}
        late = number == 1
        if fault == "text in other order later" and late:
            texts[COND] = texts[COND].flip(1)
        if fault == "no guidance" or (fault == "guidance left out of a step" and late):
            del texts[UNCOND]
        given = {"input scaled": latent * 1.05, "input channels": latent.flip(1)}
        latent = given.get(fault, latent)
        every = []
        for branch, text in texts.items():
            made = self.denoiser(latent, time[None], text, return_dict=False)[0]
            values = (latent, time[None], text)
            held = dict(zip(NAMES.values(), values, strict=True))
            every.append(Pass(held, NAMES, made, "WanTransformer3DModel", branch))
        return every

    def run(self, fault: str = "", *, scale: float = 5.0) -> Run:
        sigmas, times = self.reference.sigmas, self.reference.timesteps
        assert sigmas is not None
        assert times is not None
        latent, steps = self.inputs["noise"], []
        if fault == "not finite":
            latent = latent * float("nan")
        outputs: dict[str, torch.Tensor] = {}
        for number, time in enumerate(times.float()):
            cached = fault == "prediction reused" and number == 1
            passes = [] if cached else self.passes(number, latent, time, fault)
            outputs = outputs if cached else {one.branch: one.output for one in passes}
            cond, uncond = outputs[COND], outputs.get(UNCOND)
            guided = cond if uncond is None else uncond + scale * (cond - uncond)
            if fault == "guidance rescaled":
                guided = guided * float(cond.std() / guided.std())
            after = latent + (sigmas[number + 1] - sigmas[number]) * guided
            steps.append(Step(number, latent, float(time), tuple(passes), guided, after))
            latent = after
            if fault == "latent rounded":
                latent = after.bfloat16().float()
            if fault == "latent clamped":
                latent = after.clamp(-1, 1)
        run = Run("engine", GENERIC, tuple(steps), sigmas=sigmas, timesteps=times)
        return with_branches(run)

    def check(self, run: Run, *, known: bool = True) -> Comparison:
        return check_run(run, self.folder, reference=self.reference if known else None)


@pytest.fixture(scope="module")
def engine(model: Path, reference: Path) -> Simulated:
    return Simulated(model, run_of(reference))


FAULTS = {
    "text in other order later": ("text", "text/0001/cond"),
    "input scaled": ("latent", "step/0000/input"),
    "input channels": ("latent", "step/0000/input"),
    "latent rounded": ("update", "step/0001/latent"),
    "latent clamped": ("update", "step/0001/latent"),
    "no guidance": ("guidance", "step/0000/guided"),
    "guidance left out of a step": ("guidance", "step/0001/guided"),
    "prediction reused": ("guidance", "step/0001/guided"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_changed_between_the_seams_is_a_fault(engine: Simulated, fault: str) -> None:
    stage, name = FAULTS[fault]
    result = engine.check(engine.run(fault))
    assert result.verdict is Verdict.DRIFTED, result.sentence
    assert result.first_divergence is not None
    assert (result.first_divergence.stage, result.first_divergence.name) == (stage, name)
    assert {row.stage for row in result.rows if not row.verdict.passed} == {stage}


def test_a_right_run_is_equivalent_at_every_seam(engine: Simulated) -> None:
    result = engine.check(engine.run())
    assert result.verdict.passed, result.sentence
    assert {row.name for row in result.rows} >= {"step/0000/input", "step/0002/guided"}
    assert not [note for note in result.notes if "not judged" in note]


UNJUDGED = {
    "input scaled": "not judged: model input: it is not the latent of step 0",
    "latent clamped": "not judged: between steps: the latent is changed between steps",
    "prediction reused": "not judged: predictions that are not there: step 1",
    "guidance left out of a step": "not judged: predictions that are not there: step 1",
}


@pytest.mark.parametrize("fault", UNJUDGED)
def test_what_only_a_reference_could_tell_is_said_without_one(
    engine: Simulated, fault: str
) -> None:
    result = engine.check(engine.run(fault), known=False)
    assert any(note.startswith(UNJUDGED[fault]) for note in result.notes), result.notes


def test_a_run_that_is_not_finite_is_invalid(engine: Simulated) -> None:
    for known in (True, False):
        result = engine.check(engine.run("not finite"), known=known)
        assert result.verdict is Verdict.INVALID
        assert not any("changed between" in note for note in result.notes)


def test_one_rank_of_a_group_that_shares_the_branches_is_not_accused(engine: Simulated) -> None:
    whole = engine.run()
    steps = tuple(step.but(passes=step.passes[:1]) for step in whole.steps)
    result = engine.check(with_branches(whole.but(steps=steps, weights={})))
    assert result.verdict.passed, result.sentence
    assert any("uncond is not there: by the trusted model's" in note for note in result.notes)


def test_steps_that_draw_noise_are_not_judged(engine: Simulated, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "wan"
    shutil.copytree(engine.folder, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    settings = {**json.loads(config.read_text()), "stochastic_sampling": True}
    config.write_text(json.dumps(settings))
    result = check_run(engine.run(), folder)
    assert result.verdict.passed, result.sentence
    assert any("draws new noise in its steps" in note for note in result.notes)


def test_calls_that_only_repeat_another_are_none_of_the_guidance(engine: Simulated) -> None:
    """A warm-up before the first step, and one of every step."""
    whole = engine.run()
    for numbers in ((0,), (0, 1, 2)):
        steps = tuple(
            step.but(passes=(again(step.passes[0]), *step.passes))
            if step.number in numbers
            else step
            for step in whole.steps
        )
        run = with_branches(whole.but(steps=steps, weights={}))
        assert run.weights == pytest.approx({COND: 5.0, UNCOND: -4.0}, abs=1e-4)
        assert engine.check(run).verdict is Verdict.EQUIVALENT


def again(one: Pass) -> Pass:
    return Pass(one.arguments, one.names, one.output.clone(), one.component)


def test_a_scale_of_many_digits_is_no_fault(engine: Simulated) -> None:
    run = engine.run(scale=4.333333)
    assert engine.check(run, known=False).verdict is Verdict.EQUIVALENT
    known = engine.reference
    other = known.but(weights={COND: 4.333333, UNCOND: -3.333333})
    assert check_run(run, engine.folder, reference=other).verdict is Verdict.EQUIVALENT
    result = check_run(engine.run(scale=4.34), engine.folder, reference=other)
    assert result.first_divergence is not None
    assert result.first_divergence.stage == "guidance"


def test_a_run_of_which_no_prediction_is_judged_is_undecided(engine: Simulated) -> None:
    whole = engine.run()
    steps = tuple(step.but(passes=()) for step in whole.steps)
    result = engine.check(whole.but(steps=steps))
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "no prediction was recorded" in result.sentence


def test_schedulers_of_a_higher_order_make_as_many_timesteps_as_the_run_has() -> None:
    from diffusers import HeunDiscreteScheduler

    _, times, why = schedule_of((HeunDiscreteScheduler, {}), 5)
    assert not why
    assert times is not None
    assert len(times) == 5


def test_tokens_with_times_of_their_own_keep_them() -> None:
    class Model(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> None: ...

    time = torch.tensor([[0.0, 0.9, 0.9]])
    held = {"hidden_states": torch.zeros(1, 3, 4), "timestep": time}
    one = Pass(held, NAMES, torch.zeros(1, 3, 4), "")
    assert one.timestep == pytest.approx(0.9)
    given, _, _ = arguments(one, Model(), None, 1000.0)
    assert torch.equal(given["timestep"], (time.double() * 1000).float())


def test_tables_of_tensors_reach_the_trusted_model() -> None:
    class Model(torch.nn.Module):
        def forward(self, sample: torch.Tensor, added: dict[str, torch.Tensor]) -> torch.Tensor:
            return sample + added["ids"]

    held = {"sample": torch.zeros(1, 4), "added/ids": torch.ones(1, 4)}
    one = Pass(held, {"latent": "sample"}, torch.zeros(1, 4), "")
    model = Model()
    given, plain, _ = arguments(one, model, None, 1.0)
    assert torch.equal(Denoiser(model, plain, AS_IT_IS)(**given), torch.ones(1, 4))


def test_the_engine_s_latent_takes_the_place_of_a_reference_s_list() -> None:
    class Lists(torch.nn.Module):
        def forward(self, x: list[torch.Tensor], t: torch.Tensor) -> tuple[list[torch.Tensor]]:
            return ([2 * sample for sample in x],)

    names = {"latent": "x", "timestep": "t"}
    time = torch.tensor([0.5])
    theirs = Pass({"x": (torch.zeros(3, 4),), "t": time}, names, torch.zeros(3, 4), "")
    ours = Pass({"x": (torch.ones(3, 4),), "t": time}, names, torch.zeros(3, 4), "")
    given, plain, _ = arguments(ours, Lists(), theirs, 1.0)
    made = Denoiser(Lists(), plain, AS_IT_IS)(**given)
    assert torch.equal(made.reshape(3, 4), torch.full((3, 4), 2.0))


def turned(run: Run) -> Run:
    """A run whose model is given 1 - t."""
    steps = []
    for step in run.steps:
        other = 1.0 - torch.tensor([step.time or 0.0]) / 1000.0
        passes = [
            Pass({**one.arguments, "timestep": other}, NAMES, one.output, "", one.branch)
            for one in step.passes
        ]
        steps.append(step.but(passes=tuple(passes)))
    return run.but(steps=tuple(steps))


def test_times_the_other_way_are_right_where_the_reference_has_them(engine: Simulated) -> None:
    right, other = engine.run(), turned(engine.run())
    for run, known, failing in (
        (other, turned(engine.reference), False),
        (other, None, False),
        (other, engine.reference, True),
        (right, turned(engine.reference), False),
    ):
        found = Seams()
        _put_given(found, run, known)
        rows = compare_tensors(found.actual, found.expected)
        assert any(not row.verdict.passed for row in rows) is failing
        assert bool(found.unjudged) is (known is None)


def test_what_a_recording_could_not_hold_leaves_the_folder_s_setting(engine: Simulated) -> None:
    held = {"scheduler": {"class": "X", "lambda_min_clipped": None, "shift": 3.0}}
    assert _settings(engine.reference.but(schedulers=held)) == {"shift": 3.0}


CALL: dict[str, Any] = {
    "component": "M",
    "method": "forward",
    "kind": "model",
    "owner": "x.M",
    "begun": 1,
    "parameters": ["x"],
    "arguments": {},
}
HOSTILE = (
    {"kind": "zzz"},
    {"component": 5},
    {"parameters": 5},
    {"arguments": [1]},
    {"state": 5},
    {"state": {"sigmas": {"tensor": "not there"}}},
    {"begun": "1e400"},
    {"dtype": 5},
    {"role": [1]},
    {"branches": 7},
)
HEADS = ({"started": "x"}, {"rank": [1]}, {"rank": "../../x"}, {"environment": {"a": 1}})


def left_behind(folder: Path, call: dict[str, Any], head: dict[str, Any]) -> Path:
    folder.mkdir()
    output = folder / "run.safetensors"
    spool = CallSpool(output, 1, {"engine": "generic", **head}, largest=1 << 20)
    spool.add({**CALL, "output": spool.keep(torch.zeros(3)), **call})
    return output


def test_what_another_process_left_is_read_with_care(tmp_path: Path) -> None:
    assert len(recover(left_behind(tmp_path / "right", {}, {}))) == 1
    cases = [(call, {}) for call in HOSTILE] + [({}, head) for head in HEADS]
    for number, (call, head) in enumerate(cases):
        output = left_behind(tmp_path / str(number), call, head)
        with pytest.raises(FileFormatError, match="a process left"):
            recover(output)
        assert not output.exists()


def test_one_generation_that_cannot_be_recovered_does_not_keep_the_others(tmp_path: Path) -> None:
    output = left_behind(tmp_path / "run", {}, {})
    CallSpool(output, 2, {"engine": "generic"}, largest=1 << 20)  # killed before its first call
    told: list[Path] = []
    assert [path for path, _ in recover(output, lambda path, _: told.append(path))] == [output]
    assert told == [output]
    assert not left_by(output)
    CallSpool(output, 3, {"engine": "generic"}, largest=1 << 20)
    with pytest.raises(UsageError, match="no call was recorded"):
        recover(output)

    output = left_behind(tmp_path / "damaged", {"dtype": 5}, {})
    spool = CallSpool(output, 2, {"engine": "generic"}, largest=1 << 20)
    spool.add({**CALL, "output": spool.keep(torch.zeros(3))})
    with pytest.raises(FileFormatError, match="a call that a process left cannot be read"):
        recover(output)
    assert output.with_name("run.2.safetensors").exists()
    assert len(left_by(output)) == 1  # the damaged one, to be looked at


def test_threads_that_generate_at_once_are_not_taken_for_one_run(tmp_path: Path) -> None:
    output = tmp_path / "run.safetensors"
    spool = CallSpool(output, 1, {"engine": "generic"}, largest=1 << 20)
    for number, thread in enumerate((1, 2, 1, 2)):
        made = spool.keep(torch.full((3,), float(thread)))
        step = {"method": "step", "kind": "scheduler", "thread": thread, "begun": number + 1}
        spool.add({**CALL, **step, "output": made})
    ((_, recording),) = recover(output)
    assert len(recording.calls) == 2
    assert SEVERAL in recording.recording.manifest.notes


def test_guidance_that_nothing_judges_leaves_a_run_undecided(model: Path, reference: Path) -> None:
    """Without a reference a combination that is not affine is no evidence of anything."""
    known = run_of(reference)
    run = Simulated(model, known).run("guidance rescaled")
    result = check_run(run, model)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "no affine combination" in result.sentence
    result = check_run(run, model, reference=known)
    assert result.first_divergence is not None
    assert result.first_divergence.stage == "guidance"


def test_a_run_that_is_no_longer_finite_is_invalid_and_no_error(
    model: Path, tmp_path: Path
) -> None:
    inputs = load_file(model.parent / "inputs.safetensors")
    given = {"latent": inputs["noise"] * 1e38, "sigma": torch.tensor([0.5])}
    for finite in (False, True):
        if finite:
            given["latent"] = inputs["noise"]
        with torch.no_grad():
            made = Trusted(model, torch.float32).denoiser(None)(
                given["latent"], torch.tensor([500.0]), inputs["cond"], return_dict=False
            )[0]
        tensors = {f"step/0000/{name}": value for name, value in {**given, "cond": made}.items()}
        path = tmp_path / f"{finite}.safetensors"
        save_file({**tensors, "text/cond": inputs["cond"]}, path)
        result = check_run(run_of(path), model)
        first = next(row for row in result.rows if row.stage == "prediction")
        assert (first.verdict is Verdict.INVALID) is not finite, result.sentence


def test_a_model_that_keeps_some_weights_in_float32_is_called_in_the_dtype_of_most() -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.ones(2))  # first, and in float32
            self.linear = torch.nn.Linear(8, 8, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    made = Denoiser(Mixed(), {}, AS_IT_IS)(x=torch.ones(1, 8))
    assert made.dtype is torch.bfloat16
