"""Our stages against diffusers.WanPipeline: bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from truestep.case import Case
from truestep.errors import CaseError
from truestep.runtime.loading import load
from truestep.runtime.pipeline import generate

WanFolders = dict[str, Path]


def diffusers_latent(case: Case, folder: Path, *, output_type: str = "latent") -> torch.Tensor:
    """What diffusers.WanPipeline generates for a case, by its own public interface."""
    import diffusers

    pipe = diffusers.WanPipeline.from_pretrained(folder, dtype=getattr(torch, case.dtype))
    pipe.set_progress_bar_config(disable=True)
    name = case.settings.scheduler
    shift = case.settings.flow_shift
    if name == "UniPCMultistepScheduler":
        pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(
            pipe.scheduler.config,
            flow_shift=shift,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
        )
    result = pipe(
        prompt=case.prompt,
        negative_prompt=case.negative_prompt or None,
        height=case.height,
        width=case.width,
        num_frames=case.num_frames,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance_scale,
        guidance_scale_2=case.guidance_scale_2,
        num_videos_per_prompt=case.settings.videos_per_prompt or 1,
        max_sequence_length=case.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(case.seed),
        output_type=output_type,
    ).frames
    assert isinstance(result, torch.Tensor)
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "scheduler", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
@pytest.mark.parametrize("kind", ["wan21", "wan22", "wan22-ti2v"])
def test_latent_is_bit_equal_to_diffusers(
    kind: str, scheduler: str, dtype: str, tiny_wan: WanFolders, tiny_case: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"device": "cpu"}
    if scheduler == "UniPCMultistepScheduler":
        settings |= {"scheduler": scheduler, "flow_shift": 5.0}
    second = {"guidance_scale_2": 2.5} if kind == "wan22" else {}
    values = {**tiny_case, **second, "dtype": dtype, "settings": settings}
    case = Case(model=str(tiny_wan[kind]), **values)
    expected = diffusers_latent(case, tiny_wan[kind])
    actual = generate(load(case))
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheduler", [None, "UniPCMultistepScheduler"])
def test_digits_latent_is_bit_equal_to_diffusers(scheduler: str | None, dtype: str) -> None:
    from truestep.models import digits

    settings = {"device": "cpu", "scheduler": scheduler, "flow_shift": 2.0 if scheduler else None}
    case = Case(
        model="builtin:digits",
        prompt="a red three moving left",
        steps=6,
        dtype=dtype,
        settings=settings,
    )
    assert torch.equal(generate(load(case)), diffusers_latent(case, digits.path()))


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 1.0},
        {"negative_prompt": "a blue one"},
        {"settings": {"device": "cpu", "videos_per_prompt": 2}},
    ],
)
def test_other_guidance_is_bit_equal(
    changes: dict[str, Any], tiny_wan: WanFolders, tiny_case: dict[str, Any]
) -> None:
    case = Case(model=str(tiny_wan["wan21"]), **{**tiny_case, **changes})
    assert torch.equal(generate(load(case)), diffusers_latent(case, tiny_wan["wan21"]))


def test_frames_agree_with_diffusers(tiny_wan: WanFolders, tiny_case: dict[str, Any]) -> None:
    case = Case(model=str(tiny_wan["wan21"]), **tiny_case)
    frames = generate(load(case), output="frames")
    expected = diffusers_latent(case, tiny_wan["wan21"], output_type="pt")
    shown = (frames / 2 + 0.5).clamp(0, 1).permute(0, 2, 1, 3, 4)
    assert torch.equal(shown, expected)


def test_one_forward_a_step_without_guidance(
    tiny_wan: WanFolders, tiny_case: dict[str, Any]
) -> None:
    pipe = load(Case(model=str(tiny_wan["wan21"]), **tiny_case))
    generate(pipe)
    assert pipe.forwards == 2 * 4
    pipe.forwards, pipe.settings.guidance_scale = 0, 1.0
    generate(pipe)
    assert pipe.forwards == 4


def test_dtype_keeps_what_the_model_keeps_in_float32(
    tiny_wan: WanFolders, tiny_case: dict[str, Any]
) -> None:
    pipe = load(Case(model=str(tiny_wan["wan21"]), **{**tiny_case, "dtype": "bfloat16"}))
    parameters = dict(pipe.transformer.named_parameters())
    assert parameters["blocks.0.scale_shift_table"].dtype == torch.float32
    assert parameters["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"height": 20}, "height 20 does not fit the model", "--set height=16"),
        ({"height": 144}, "height 144 does not fit the model", "--set height=128"),
        ({"num_frames": 65}, "num_frames 65 does not fit the model", "--set num_frames=63"),
        ({"num_frames": 6}, "num_frames 6 does not fit the model", "--set num_frames=5"),
        ({"guidance_scale_2": 2.0}, "guidance_scale_2 is set, but the model has one", "leave"),
        (
            {"settings": {"device": "cpu", "attention_backend": "nope"}},
            "attention backend 'nope' cannot be used",
            "truestep doctor",
        ),
    ],
)
def test_settings_that_do_not_fit_are_errors_not_roundings(
    changes: dict[str, Any],
    message: str,
    hint: str,
    tiny_wan: WanFolders,
    tiny_case: dict[str, Any],
) -> None:
    case = Case(model=str(tiny_wan["wan21"]), **{**tiny_case, **changes})
    with pytest.raises(CaseError, match=message) as caught:
        generate(load(case))
    assert hint in str(caught.value)
