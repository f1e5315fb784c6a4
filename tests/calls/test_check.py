"""A check names the call, or the code between two calls, in which a fault was made."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.calls.conftest import TINY, Tiny
from truestep.calls.check import check
from truestep.calls.judging import in_order
from truestep.calls.record import record
from truestep.calls.recording import CallRecording, read
from truestep.calls.subject import subject_of
from truestep.errors import UsageError
from truestep.verdict import Row, Verdict

BFLOAT = "ignore:There are modules"


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], CallRecording]:
    """The reference of a tiny pipeline, recorded once, from its file; `wan bf16` is in bfloat16."""
    folder = tmp_path_factory.mktemp("references")
    recorded: dict[str, CallRecording] = {}

    def reference(name: str) -> CallRecording:
        if name not in recorded:
            path = folder / f"{name}.safetensors"
            record(tiny_of(name).subject()).write(path)
            recorded[name] = read(path)
        return recorded[name]

    return reference


def tiny_of(name: str) -> Tiny:
    kind, _, dtype = name.partition(" ")
    tiny = TINY[kind]
    if not dtype:
        return tiny

    def build() -> Any:
        pipeline = tiny.build()
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.to(torch.bfloat16)
        return pipeline

    return Tiny(build, tiny.call)


def denoiser(pipeline: Any) -> Any:
    return getattr(pipeline, "unet", None) or pipeline.transformer


def linears(module: torch.nn.Module) -> list[torch.nn.Linear]:
    return [m for m in module.modules() if isinstance(m, torch.nn.Linear) and m.bias is not None]


def bias_dropped(pipeline: Any) -> None:
    linears(denoiser(pipeline))[3].bias.data.zero_()


def weight_off(pipeline: Any) -> None:
    linears(denoiser(pipeline))[5].weight.data.mul_(1.01)


def encoder_off(pipeline: Any) -> None:
    next(pipeline.text_encoder.parameters()).data.mul_(1.001)


def padded_otherwise(pipeline: Any) -> None:
    pipeline.tokenizer.pad = 7


def scheduler_shifted(pipeline: Any) -> None:
    scheduler = pipeline.scheduler
    settings = {
        "EulerDiscreteScheduler": {"beta_end": 0.0201},
        "FlowMatchEulerDiscreteScheduler": {"max_shift": 1.2, "base_shift": 0.55},
        "UniPCMultistepScheduler": {"flow_shift": 3.01},
    }[type(scheduler).__name__]
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, **settings)


def decoder_scaled(pipeline: Any) -> None:
    config = pipeline.vae.config
    if config.get("latents_std"):
        pipeline.vae.register_to_config(latents_std=[x * 1.005 for x in config.latents_std])
    else:
        pipeline.vae.register_to_config(scaling_factor=config.scaling_factor * 1.005)


def step_scaled(pipeline: Any) -> None:
    original = pipeline.scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        return (original(*args, **kwargs)[0] * 1.001,)

    pipeline.scheduler.step = step


FAULTS: dict[str, tuple[Callable[[Any], None], dict[str, str]]] = {
    "bias": (bias_dropped, {"sd": "unet.forward", "": "transformer.forward"}),
    "encoder": (encoder_off, {"": "text_encoder.forward: output"}),
    "pad": (padded_otherwise, {"": "code before text_encoder.forward: input_ids"}),
    "scheduler": (
        scheduler_shifted,
        {
            "sd": "scheduler.set_timesteps: betas",
            "flux": "code before scheduler.set_timesteps: mu",
            "": "scheduler.set_timesteps: sigmas",
        },
    ),
    "decoder": (decoder_scaled, {"": "code before vae.decode: z"}),
    "step": (step_scaled, {"": "scheduler.step at step 0: output"}),
}


@pytest.mark.parametrize(("name", "fault"), [*itertools.product(TINY, FAULTS)])
def test_a_planted_fault_is_named_where_it_is(
    references: Callable[[str], CallRecording], name: str, fault: str
) -> None:
    change, places = FAULTS[fault]
    result = check(TINY[name].subject(change), references(name))
    assert result.verdict is Verdict.DRIFTED
    place = places.get(name, places[""])
    assert result.sentence.startswith(f"drifted: {place}"), result.sentence
    assert result.first_divergence is not None
    assert (result.first_divergence.fqn or "").startswith(place)


@pytest.mark.parametrize(("name", "scale"), [("sd", 6.0), ("wan", 4.0)])
def test_a_guidance_scale_shows_in_what_the_scheduler_is_given(
    references: Callable[[str], CallRecording], name: str, scale: float
) -> None:
    result = check(TINY[name].subject(guidance_scale=1.05 * scale), references(name))
    place = "code before scheduler.step at step 0: model_output"
    assert result.sentence.startswith(f"drifted: {place}")


@pytest.mark.parametrize("name", TINY)
def test_a_right_candidate_is_identical(
    references: Callable[[str], CallRecording], name: str
) -> None:
    result = check(TINY[name].subject(), references(name))
    assert result.verdict is Verdict.IDENTICAL
    assert not result.missing
    assert not result.unexpected


def unfused_attention(pipeline: Any) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    inner = denoiser(pipeline).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel([SDPBackend.MATH]):
            return inner(*args, **kwargs)

    denoiser(pipeline).forward = forward


def summed_otherwise(pipeline: Any) -> None:
    for layer in linears(denoiser(pipeline)):
        layer.forward = lambda x, m=layer: torch.matmul(x, m.weight.T) + m.bias  # type: ignore[method-assign]


def wrapped(pipeline: Any) -> None:
    module = denoiser(pipeline)
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs)


BENIGN = [unfused_attention, summed_otherwise, wrapped]


@pytest.mark.parametrize(("name", "change"), [*itertools.product(TINY, BENIGN)])
def test_a_harmless_change_passes(
    references: Callable[[str], CallRecording], name: str, change: Callable[[Any], None]
) -> None:
    result = check(TINY[name].subject(change), references(name))
    assert result.verdict.passed, result.sentence


@pytest.mark.filterwarnings(BFLOAT)
@pytest.mark.parametrize("fault", [weight_off, decoder_scaled, scheduler_shifted])
def test_in_bfloat16_faults_below_the_rounding_are_seen_raised(
    references: Callable[[str], CallRecording], fault: Callable[[Any], None]
) -> None:
    reference = references("wan bf16")
    tiny = tiny_of("wan bf16")
    assert check(tiny.subject(), reference).verdict is Verdict.IDENTICAL
    result = check(tiny.subject(fault), reference)
    assert result.verdict is Verdict.DRIFTED
    if fault is decoder_scaled:
        place = "code before vae.decode, raised to float32: z"
        assert result.sentence.startswith(f"drifted: {place}")
    passed = check(tiny.subject(unfused_attention), reference)
    assert passed.verdict.passed, passed.sentence


@pytest.mark.filterwarnings(BFLOAT)
def test_in_bfloat16_a_guidance_scale_is_seen_in_the_raised_code_between(
    references: Callable[[str], CallRecording],
) -> None:
    result = check(tiny_of("wan bf16").subject(guidance_scale=4.02), references("wan bf16"))
    place = "code before scheduler.step at step 0, raised to float32: model_output"
    assert result.sentence.startswith(f"drifted: {place}")


def test_another_number_of_steps_is_the_schedules_fault_first(
    references: Callable[[str], CallRecording],
) -> None:
    result = check(TINY["sd"].subject(num_inference_steps=4), references("sd"))
    place = "code before scheduler.set_timesteps: num_inference_steps, 4, recorded 3"
    assert result.sentence.startswith(f"drifted: {place}")
    timesteps = next(row for row in result.rows if row.name.endswith("timesteps"))
    assert timesteps.note == "(state).timesteps has shape [4], recorded [3]"


def longer(tokenizer: Any) -> None:
    """Pad every text to one more token."""
    original = type(tokenizer).__call__

    class Longer(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any, **options: Any) -> Any:
            options["max_length"] = (options.get("max_length") or self.model_max_length) + 1
            return original(self, text, **options)

    tokenizer.__class__ = Longer


def test_a_text_of_another_length_is_judged_by_its_effect(
    references: Callable[[str], CallRecording],
) -> None:
    seen = check(TINY["flux"].subject(lambda p: longer(p.tokenizer_2)), references("flux"))
    assert seen.verdict is Verdict.DRIFTED
    assert seen.sentence.startswith(
        "drifted: code before text_encoder_2.forward: input_ids, input_ids has shape [1, 17], "
        "recorded [1, 16]; judged by its effect on transformer.forward (cond) at step"
    )
    # cut to its real length, and padded again: nothing that follows is given anything else
    cut = check(TINY["wan"].subject(lambda p: longer(p.tokenizer)), references("wan"))
    assert cut.verdict is Verdict.EQUIVALENT, cut.sentence


def test_another_seed_is_other_random_numbers(
    references: Callable[[str], CallRecording],
) -> None:
    generator = torch.Generator().manual_seed(5)
    result = check(TINY["flux"].subject(generator=generator), references("flux"))
    assert result.sentence.startswith("drifted: random.randn: other random numbers")


def test_what_a_candidate_raises_is_its_outcome(
    references: Callable[[str], CallRecording],
) -> None:
    def broken(pipeline: Any) -> None:
        def decode(*args: Any, **kwargs: Any) -> Any:
            raise ValueError("no decoder")

        pipeline.vae.decode = decode

    result = check(TINY["flux"].subject(broken), references("flux"))
    assert result.verdict is Verdict.INVALID
    assert result.sentence.startswith(
        "invalid: run, raised ValueError: no decoder, after vae.decode was called"
    )


def test_calls_that_do_not_come_and_calls_that_were_not_recorded_fail() -> None:
    net = torch.nn.Linear(3, 3)

    def run(x: torch.Tensor, times: int) -> torch.Tensor:
        for _ in range(times):
            x = net(x)
        return x

    reference = record(subject_of(run, torch.randn(2, 3), 2, components={"net": net}))
    x = reference.recording[reference.calls[0].arguments["input"]["tensor"]]
    fewer = check(subject_of(run, x, 1, components={"net": net}), reference)
    assert fewer.sentence.startswith("drifted: code after the last call: output")
    assert fewer.sentence.endswith("; 1 recorded call did not come")
    more = check(subject_of(run, x, 3, components={"net": net}), reference)
    assert more.sentence.startswith("drifted: code after the last call: output")
    assert more.sentence.endswith("calls that were not recorded: net.forward")
    assert "unexpected: 1 more call than recorded" in more.table()


def test_a_call_without_a_recorded_argument_is_judged_by_its_effect() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)

        def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return self.linear(x) + (0 if bias is None else bias)

    net = Net()
    x, bias = torch.randn(2, 3), torch.randn(3)
    reference = record(subject_of(net, x, bias=bias))
    result = check(subject_of(net, x), reference)
    assert result.verdict is Verdict.DRIFTED
    assert result.sentence.startswith(
        "drifted: code before module.forward: bias, bias is not given"
    )
    harmless = record(subject_of(net, x, bias=torch.zeros(3)))
    assert check(subject_of(net, x), harmless).verdict.passed


def test_chosen_steps(references: Callable[[str], CallRecording]) -> None:
    def late(pipeline: Any) -> None:
        module, calls = denoiser(pipeline), itertools.count()
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            return (output[0] * 1.01,) if next(calls) == 2 else output

        module.forward = forward

    reference = references("sd")
    assert check(TINY["sd"].subject(late), reference).verdict is Verdict.DRIFTED
    with pytest.raises(UsageError, match="no step 3 in the reference"):
        check(TINY["sd"].subject(), reference, steps=[3])
    with pytest.raises(UsageError, match="no steps were chosen"):
        check(TINY["sd"].subject(), reference, steps=[])
    result = check(TINY["sd"].subject(), reference, steps=[1])
    assert "models run at steps 1" in result.looked_at
    assert "models at 2 other steps" in result.not_looked_at


def test_a_file_or_a_recording_in_memory_may_be_the_reference(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 3)
    subject = subject_of(net, torch.randn(2, 3))
    reference = record(subject)
    reference.write(tmp_path / "r.safetensors")
    assert check(subject, reference).verdict is Verdict.IDENTICAL
    assert check(subject, tmp_path / "r.safetensors").verdict is Verdict.IDENTICAL
    assert check(subject, reference, tolerance=1e-3).verdict is Verdict.IDENTICAL
    net.weight.data *= 1.01
    assert check(subject, reference, tolerance=0.1).verdict is Verdict.EQUIVALENT
    assert check(subject, reference).verdict is Verdict.DRIFTED


class Masked(torch.nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x + mask, -1) @ x.T


def test_infinities_of_a_mask_are_no_failure() -> None:
    x, mask = torch.randn(4, 4), torch.randn(4, 4).masked_fill(torch.eye(4) > 0, -torch.inf)
    reference = record(subject_of(Masked(), x, mask))
    assert check(subject_of(Masked(), x, mask), reference).verdict is Verdict.IDENTICAL
    other = mask.masked_fill(torch.ones(4, 4).tril(-3) > 0, -torch.inf)
    result = check(subject_of(Masked(), x, other), reference)
    assert not result.verdict.passed
    assert "code before module.forward: mask" in result.sentence


def test_numbers_are_compared_as_they_are_used() -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor, *, scale: float) -> torch.Tensor:
            return x * scale

    x = torch.randn(3, 4)
    reference = record(subject_of(Scaled(), x, scale=0.1))
    assert check(subject_of(Scaled(), x, scale=0.1 + 1e-12), reference).verdict.passed
    result = check(subject_of(Scaled(), x, scale=0.1001), reference)
    assert result.sentence.startswith(
        "drifted: code before module.forward: scale, 0.1001, recorded 0.1 (1 of"
    )


@pytest.mark.filterwarnings(BFLOAT)
def test_a_candidate_that_cannot_be_raised_says_so(
    references: Callable[[str], CallRecording],
) -> None:
    def narrow(pipeline: Any) -> None:
        inner = denoiser(pipeline).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if next(denoiser(pipeline).parameters()).dtype is torch.float32:
                raise TypeError("bfloat16 only")
            return inner(*args, **kwargs)

        denoiser(pipeline).forward = forward

    result = check(tiny_of("wan bf16").subject(narrow), references("wan bf16"))
    assert result.verdict.passed
    (note,) = result.notes
    assert note.startswith("not judged in float32: the candidate raised TypeError: bfloat16 only")


def test_rows_of_two_precisions_stand_in_the_order_of_the_run() -> None:
    def rows(*names: str) -> list[Row]:
        return [Row(name=name, verdict=Verdict.EQUIVALENT) for name in names]

    both = in_order(rows("a", "b", "c"), rows("float32/a", "float32/more", "float32/c"), "float32")
    assert [row.name for row in both] == ["a", "float32/a", "float32/more", "b", "c", "float32/c"]
    assert [row.name for row in in_order([], rows("float32/a"), "float32")] == ["float32/a"]


@pytest.mark.filterwarnings(BFLOAT)
def test_the_first_divergence_is_the_earliest_in_either_precision(
    references: Callable[[str], CallRecording],
) -> None:
    def growing(pipe: Any) -> None:  # hidden by rounding at the first step, large at the others
        forward = pipe.transformer.forward

        def patched(*args: Any, **kwargs: Any) -> Any:
            first = float(kwargs["timestep"].max()) > 990
            return (forward(*args, **kwargs)[0] * (1.0005 if first else 1.1),)

        pipe.transformer.forward = patched

    result = check(tiny_of("wan bf16").subject(growing), references("wan bf16"))
    place = "transformer.forward (cond) at step 0, raised to float32: output 0"
    assert result.sentence.startswith(f"drifted: {place}")
    native = [row for row in result.failing if not row.name.startswith("float32/")]
    assert native and all(row.step for row in native)  # noqa: PT018
