"""Replay, noise floor and check on tiny pipelines: every stage's fault is seen where it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from truestep import Recording, check, record
from truestep.calls.instructions import other_sets
from truestep.case import Case
from truestep.errors import FileFormatError, UsageError
from truestep.replay.raised import raised
from truestep.replay.stages import replay
from truestep.replay.steps import default_steps
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Pipeline
from truestep.verdict import Verdict

Apply = Callable[[Pipeline], Any]


@pytest.fixture(scope="module")
def case(tiny_wan: dict[str, Path], tiny_case: dict[str, Any]) -> Case:
    return Case(model=str(tiny_wan["wan21"]), **{**tiny_case, "steps": 6})


@pytest.fixture(scope="module")
def reference(case: Case) -> Recording:
    return record(case, floor="final")


@pytest.fixture(scope="module")
def case_22(tiny_wan: dict[str, Path], tiny_case: dict[str, Any]) -> Case:
    values = {**tiny_case, "steps": 8, "guidance_scale_2": 2.0}
    settings = {"device": "cpu", "scheduler": "UniPCMultistepScheduler", "flow_shift": 3.0}
    return Case(model=str(tiny_wan["wan22"]), **{**values, "settings": settings})


@pytest.fixture(scope="module")
def reference_22(case_22: Case) -> Recording:
    return record(case_22)


def test_everything_is_recorded(reference: Recording, case: Case) -> None:
    names = ["text/cond", "text/uncond", "schedule/sigmas", "schedule/timesteps", "latent/initial"]
    names += [f"step/{i:04d}/{what}" for i in range(6) for what in _STEP]
    names += ["latent/final", "video/frames"]
    assert set(names) | {"schedule/experts"} == set(reference)
    manifest = reference.manifest
    assert manifest.case == case.canonical()
    assert manifest.forwards == 12
    assert len(manifest.timings_s["step"]) == 6
    assert manifest.environment["attention.kernel"] == "flash-cpu"
    assert manifest.environment["model.weights"]
    assert manifest.settings["scheduler_config"]["shift"] == 3.0
    assert manifest.settings["guidance_scale"] == case.guidance_scale


_STEP = ("latent", "cond", "uncond", "guided")


def test_the_floor_is_kept_run_by_run(reference: Recording) -> None:
    floor = reference.manifest.noise_floor
    assert floor is not None
    kinds = [run.kind for run in floor.runs if run.pair == "float32/float32"]
    other = ["instructions"] if other_sets() else []
    assert sorted(set(kinds)) == [
        "attention",
        "batch",
        "functions",
        *other,
        "jitter",
        "precision",
        "repeat",
        "threads",
    ]
    assert "bfloat16/float32" in floor.pairs()
    values = {
        (run.kind, m.name): m.rel_l2
        for run in floor.runs
        for m in run.tensors
        if run.pair == "float32/float32"
    }
    assert values["repeat", "step/0003/cond"] == 0.0
    assert 1e-8 < values["precision", "step/0003/cond"] < 1e-5
    assert 0 < values["jitter", "run/final"] < 1e-4


def test_a_recording_survives_the_disk(reference: Recording, case: Case, tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    reference.save(path)
    opened = Recording.open(path)
    assert opened.manifest.noise_floor == reference.manifest.noise_floor
    assert check(case, path).verdict is Verdict.IDENTICAL


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (("step/0002/guided",), "it lacks step/0002/guided"),
        (("latent/final",), "it lacks latent/final"),
        (("schedule/sigmas", "schedule/timesteps"), "it lacks schedule/sigmas, schedule/timesteps"),
        (("step/0001/latent",), "it lacks step/0001/latent"),
    ],
)
@pytest.mark.parametrize("depth", ["steps", "final"])
def test_a_recording_that_is_no_whole_run_is_refused(
    missing: tuple[str, ...],
    said: str,
    depth: Literal["steps", "final"],
    case: Case,
    reference: Recording,
) -> None:
    manifest = reference.manifest
    table = tuple(entry for entry in manifest.tensors if entry.name not in missing)
    tensors = {name: tensor for name, tensor in reference.items() if name not in missing}
    part = Recording.in_memory(tensors, manifest.model_copy(update={"tensors": table}))
    with pytest.raises(FileFormatError, match="not a whole run") as caught:
        check(case, part, depth=depth)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_schedule_of_another_length_is_refused(case: Case, reference: Recording) -> None:
    tensors = {**reference, "schedule/experts": reference["schedule/experts"][:2]}
    part = Recording.in_memory(tensors, reference.manifest)
    with pytest.raises(FileFormatError, match="schedule is not that of its steps"):
        check(case, part)


def test_unchanged_is_identical_at_both_depths(case: Case, reference: Recording) -> None:
    steps = check(case, reference)
    assert steps.verdict is Verdict.IDENTICAL
    assert steps.cost is not None
    assert steps.cost.share == pytest.approx((5 + 1) * 2 / 12)  # one step is predicted twice
    assert any("prediction at steps 0, 2, 3, 4, 5 of 6" in text for text in steps.looked_at)
    assert any("prediction at the other 1 step" in text for text in steps.not_looked_at)
    final = check(case, reference, depth="final")
    assert final.verdict is Verdict.IDENTICAL
    assert [row.name for row in final.rows] == ["latent/final"]


def test_replay_of_a_multistep_scheduler_is_exact(case_22: Case, reference_22: Recording) -> None:
    assert check(case_22, reference_22).verdict is Verdict.IDENTICAL


def predict_scaled(pipe: Pipeline) -> None:
    original = pipe.predict
    pipe.predict = lambda *args: original(*args) * 1.001


def swap_shift_scale(pipe: Pipeline) -> None:
    table = pipe.transformer.blocks[1].scale_shift_table
    table.data = table.data[:, [1, 0, 2, 3, 4, 5]].clone()


def drop_bias(pipe: Pipeline) -> None:
    pipe.transformer.blocks[0].attn2.to_out[0].bias.data.zero_()


def combine_from_cond(pipe: Pipeline) -> None:
    pipe.combine = lambda p, s, c, u: c + p.settings.guidance_scale * (c - u)


def timestep_off(pipe: Pipeline) -> None:
    original = pipe.predict

    def predict(p: Any, z: Any, step: Any, text: Any, branch: Any) -> torch.Tensor:
        return original(p, z, replace(step, timestep=step.timestep * 0.999), text, branch)

    pipe.predict = predict


def sigma_off(pipe: Pipeline) -> None:
    pipe.settings.flow_shift = 3.01


def update_twice(pipe: Pipeline) -> None:
    pipe.update = lambda p, s, g, z: z - 1.01 * g * 0.1


def other_seed(pipe: Pipeline) -> None:
    pipe.settings.seed += 1


def vae_mean_lost(pipe: Pipeline) -> None:
    pipe.vae.register_to_config(latents_mean=[0.0] * 8)


def text_unpadded(pipe: Pipeline) -> None:
    original = pipe.encode_text
    pipe.encode_text = lambda p, prompts: original(p, prompts)[:, :6]


def text_not_zeroed(pipe: Pipeline) -> None:
    original = pipe.encode_text

    def encode(p: Pipeline, prompts: list[str]) -> torch.Tensor:
        text = original(p, prompts)
        text[:, -1] = text[:, 0]
        return text

    pipe.encode_text = encode


def branches_swapped(pipe: Pipeline) -> None:
    pipe.combine = lambda p, s, c, u: c + p.settings.guidance_scale * (u - c)


FAULTS: list[tuple[Apply, str]] = [
    (predict_scaled, "prediction"),
    (swap_shift_scale, "prediction"),
    (drop_bias, "prediction"),
    (timestep_off, "prediction"),
    (combine_from_cond, "guidance"),
    (branches_swapped, "guidance"),
    (sigma_off, "schedule"),
    (update_twice, "update"),
    (other_seed, "latent"),
    (vae_mean_lost, "decoding"),
    (text_unpadded, "text"),
    (text_not_zeroed, "text"),
]


@pytest.mark.parametrize(("fault", "stage"), FAULTS, ids=[f.__name__ for f, _ in FAULTS])
def test_faults_are_seen_where_they_are_made(
    fault: Apply, stage: str, case: Case, reference: Recording
) -> None:
    result = check(case, reference, apply=fault)
    assert result.verdict is Verdict.DRIFTED
    assert {row.stage for row in result.failing} == {stage}
    assert result.first_divergence is not None
    assert result.first_divergence.stage == stage


def fuse(pipe: Pipeline) -> None:
    pipe.transformer.fuse_qkv_projections()


def math_attention(pipe: Pipeline) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    original = pipe.predict

    def predict(*args: Any) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return original(*args)

    pipe.predict = predict


def two_threads(pipe: Pipeline) -> None:
    torch.set_num_threads(2)


@pytest.mark.parametrize("change", [fuse, math_attention, two_threads])
def test_harmless_changes_pass(change: Apply, case: Case, reference: Recording) -> None:
    result = check(case, reference, apply=change)
    assert result.verdict.passed, str(result)


def test_the_kernel_really_used_is_named(case: Case, reference: Recording) -> None:
    result = check(case, reference, apply=math_attention)
    assert ("attention.kernel", "math", "flash-cpu") in [
        (d.key, d.actual, d.reference) for d in result.environment_differences
    ]


def test_another_precision_uses_its_own_floor(case: Case, reference: Recording) -> None:
    result = check(case, reference, settings={"dtype": "bfloat16"})
    assert result.verdict is Verdict.EQUIVALENT
    assert "bfloat16/float32" in result.rule.text


def expert_boundary(pipe: Pipeline) -> None:
    pipe.boundary_ratio = 0.85


def second_scale(pipe: Pipeline) -> None:
    pipe.settings.guidance_scale_2 = 2.1


@pytest.mark.parametrize(
    ("fault", "stages"),
    [(expert_boundary, {"schedule", "prediction"}), (second_scale, {"guidance"})],
)
def test_two_expert_faults(
    fault: Apply, stages: set[str], case_22: Case, reference_22: Recording
) -> None:
    result = check(case_22, reference_22, apply=fault)
    assert result.verdict is Verdict.DRIFTED
    assert {row.stage for row in result.failing} <= stages


def test_steps_around_the_expert_switch_are_chosen(reference_22: Recording) -> None:
    experts = reference_22["schedule/experts"].tolist()
    switch = experts.index(2)
    assert 0 < switch < 7
    assert {0, switch - 1, switch, 7} <= set(default_steps(reference_22))
    assert {switch - 3, switch - 2, switch + 1, switch + 2} <= {-1, *default_steps(reference_22)}


def test_a_stage_that_raises_is_invalid_and_the_others_still_run(
    case: Case, reference: Recording
) -> None:
    def broken(pipe: Pipeline) -> None:
        def decode(*_: Any) -> torch.Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        pipe.decode = decode

    result = check(case, reference, apply=broken)
    assert result.verdict is Verdict.INVALID
    assert [row.stage for row in result.failing] == ["decoding"]
    assert "the stage raised RuntimeError: mat1 and mat2" in result.sentence


@pytest.mark.parametrize("what", ["predict", "encode_text", "decode", "make_latent"])
def test_nan_from_any_stage_is_invalid(what: str, case: Case, reference: Recording) -> None:
    def poison(pipe: Pipeline) -> None:
        original = getattr(pipe, what)
        setattr(pipe, what, lambda *args: original(*args) * float("nan"))

    assert check(case, reference, apply=poison).verdict is Verdict.INVALID


def test_another_case_is_incomparable(case: Case, reference: Recording) -> None:
    result = check(case.replace(seed=5), reference)
    assert result.verdict is Verdict.INCOMPARABLE
    assert "seed" in result.sentence


def test_a_changed_size_is_incomparable(case: Case, reference: Recording) -> None:
    result = check(case, reference, settings={"num_frames": 9})
    assert result.verdict is Verdict.INCOMPARABLE


def test_guidance_switched_off_is_seen(case: Case, reference: Recording) -> None:
    result = check(case, reference, settings={"guidance_scale": 1.0})
    assert result.verdict is Verdict.DRIFTED
    assert "text/uncond" in result.missing


def test_moments_cannot_be_replayed(case: Case) -> None:
    with pytest.raises(UsageError, match="holds level 'stats' only"):
        check(case, record(case, level="stats", floor="none"))


def test_changes_that_raise_or_return_nonsense(case: Case, reference: Recording) -> None:
    def wrong(pipe: Pipeline) -> Any:
        return 3

    def raises(pipe: Pipeline) -> Any:
        return pipe.nothing  # type: ignore[attr-defined]

    def dtype(pipe: Pipeline) -> Any:
        pipe.settings.dtype = "bfloat16"

    for change, message in (
        (wrong, "returned int, not a pipeline"),
        (raises, "raised AttributeError"),
        (dtype, "set dtype or device, which only loading can honour"),
    ):
        with pytest.raises(UsageError, match=message):
            check(case, reference, apply=change)


def test_steps_out_of_range(case: Case, reference: Recording) -> None:
    with pytest.raises(UsageError, match="no step 6 in the reference"):
        check(case, reference, steps=(0, 6))


def test_replay_leaves_the_recording_alone(case: Case, reference: Recording) -> None:
    before = {name: reference[name].clone() for name in reference}

    def in_place(pipe: Pipeline) -> None:
        original = pipe.predict

        def predict(p: Any, z: torch.Tensor, *rest: Any) -> torch.Tensor:
            result = original(p, z, *rest)
            z.zero_()
            return result

        pipe.predict = predict

    pipe = load(case)
    in_place(pipe)
    replay(pipe, reference)
    for name, tensor in before.items():
        assert torch.equal(reference[name], tensor)


def test_raising_leaves_the_weights_as_they_were(case: Case) -> None:
    pipe = load(case.replace(dtype="bfloat16"))
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    with raised(pipe, "float32") as lifted:
        assert {p.dtype for p in lifted.transformer.parameters()} == {torch.float32}
        assert lifted.first_transformer.dtype is torch.float32
    after = pipe.transformer.state_dict()
    assert all(v.dtype is after[k].dtype and torch.equal(v, after[k]) for k, v in before.items())


@pytest.fixture(scope="module")
def reference_16(case: Case) -> Recording:
    return record(case.replace(dtype="bfloat16"))


def test_a_16_bit_case_is_also_replayed_in_float32(case: Case, reference_16: Recording) -> None:
    """A fault far below the noise of bfloat16 is seen, and the place is named."""

    def slightly(pipe: Pipeline) -> None:
        with torch.no_grad():
            pipe.transformer.blocks[0].ffn.net[2].weight.mul_(1 + 2**-6)

    half = case.replace(dtype="bfloat16")
    assert check(half, reference_16).verdict is Verdict.IDENTICAL
    result = check(half, reference_16, apply=slightly)
    assert result.verdict is Verdict.DRIFTED
    rows = {row.name: row for row in result.rows}
    assert rows["float32/step/0000/cond"].verdict is Verdict.DRIFTED
    ratio = rows["float32/step/0000/cond"].ratio
    assert ratio is not None
    assert ratio > 100
    assert any("float32/float32" in floor.pair for r in rows.values() if (floor := r.floor))


def test_a_cast_that_changes_no_bit_is_the_same_model(case: Case, reference_16: Recording) -> None:
    """A cast to the working precision does nothing, until the pipeline is raised."""

    def cast(pipe: Pipeline) -> None:
        def round_output(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output.to(torch.bfloat16).to(output.dtype)

        pipe.transformer.blocks[0].register_forward_hook(round_output)

    result = check(case.replace(dtype="bfloat16"), reference_16, apply=cast)
    assert result.verdict is Verdict.IDENTICAL
    assert not any(row.name.startswith("float32/") for row in result.rows)


def test_what_cannot_be_raised_is_said(case: Case, reference_16: Recording) -> None:
    class Engine:
        """A transformer that is no torch module, and rounds differently."""

        def __init__(self, inner: Any) -> None:
            self._inner = inner
            self.config, self.dtype = inner.config, inner.dtype

        def __call__(self, **inputs: Any) -> Any:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            with sdpa_kernel([SDPBackend.MATH]):
                return self._inner(**inputs)

    def ported(pipe: Pipeline) -> None:
        pipe.transformer = Engine(pipe.transformer)

    result = check(case.replace(dtype="bfloat16"), reference_16, apply=ported)
    assert result.verdict is Verdict.EQUIVALENT
    assert "float32 replay (transformer is a Engine, not a torch module)" in result.not_looked_at


def test_the_mean_over_samples_is_judged(case: Case, reference: Recording) -> None:
    def offset(pipe: Pipeline) -> None:
        pipe.transformer.proj_out.bias.data.add_(1)

    result = check(case, reference, apply=offset)
    (row,) = [row for row in result.rows if row.name == "samples/prediction"]
    assert row.verdict is Verdict.DRIFTED
    assert row.stage == "prediction"


def poisoned(which: str) -> Apply:
    """A transformer that writes into what it is given."""

    def change(pipe: Pipeline) -> None:
        forward = pipe.transformer.forward

        def poisoning(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            made = forward(hidden_states, *args, **kwargs)
            (hidden_states if which == "latent" else kwargs["encoder_hidden_states"]).mul_(1.5)
            return made

        pipe.transformer.forward = poisoning

    return change


@pytest.mark.parametrize("which", ["latent", "text"])
def test_a_prediction_that_writes_into_its_inputs_is_blamed(
    case: Case, reference: Recording, which: str
) -> None:
    result = check(case, reference, apply=poisoned(which))
    assert result.verdict is Verdict.INVALID
    assert result.first_divergence is not None
    assert result.first_divergence.name == "step/0000/cond"
    assert "the stage wrote into a tensor of shape [1, " in result.sentence


def test_a_pass_that_writes_over_the_others_answer_is_blamed(
    case: Case, reference: Recording
) -> None:
    """As a captured graph answers, in one buffer."""

    def in_one_buffer(pipe: Pipeline) -> None:
        forward, buffer = pipe.transformer.forward, []

        def answering(*args: Any, **kwargs: Any) -> Any:
            (made,) = forward(*args, **kwargs)
            buffer.extend([] if buffer else [torch.empty_like(made)])
            return (buffer[0].copy_(made),)

        pipe.transformer.forward = answering

    result = check(case, reference, apply=in_one_buffer)
    assert result.verdict is Verdict.DRIFTED
    assert result.first_divergence is not None
    assert result.first_divergence.name == "step/0000/cond"


@pytest.mark.parametrize(
    ("stage", "given", "text"),
    [
        ("predict", lambda made: None, "no tensor came but NoneType"),
        ("update", lambda made: made.to_sparse(), "a tensor of layout torch.sparse_coo came"),
        ("make_latent", lambda made: [made], "no tensor came but list"),
    ],
)
def test_what_is_no_tensor_is_the_outcome_of_its_stage(
    case: Case, reference: Recording, stage: str, given: Callable[[Any], Any], text: str
) -> None:
    def change(pipe: Pipeline) -> None:
        own = getattr(pipe, stage)
        setattr(pipe, stage, lambda *args: given(own(*args)))

    result = check(case, reference, apply=change)
    assert result.verdict is Verdict.INVALID
    assert f"the stage raised TypeError: {text}" in " ".join(row.note for row in result.rows)


@pytest.mark.parametrize("size", [0.0, 0.5])
def test_what_runs_in_its_own_precision_alone_is_judged_there(
    size: float, case: Case, reference_16: Recording
) -> None:
    """A kernel with 16-bit constants of its own cannot be raised: that is no fault of it."""

    def fused(pipe: Pipeline) -> None:
        layer = pipe.transformer.blocks[0].attn1.to_q
        weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone() + size
        half = layer.in_features // 2

        def forward(x: torch.Tensor) -> torch.Tensor:  # in two parts, as a split-K kernel
            first = torch.nn.functional.linear(x[..., :half], weight[:, :half])
            return first + torch.nn.functional.linear(x[..., half:], weight[:, half:], bias)

        layer.forward = forward

    result = check(case.replace(dtype="bfloat16"), reference_16, apply=fused)
    assert result.verdict is (Verdict.DRIFTED if size else Verdict.EQUIVALENT), result
    assert any(
        text.startswith("float32 replay of prediction (the candidate raised RuntimeError")
        for text in result.not_looked_at
    )
