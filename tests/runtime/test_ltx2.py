"""LTX-2: bit-equal to diffusers, and a contract for every choice, without weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truestep.case import Case
from truestep.controls import AudioVideo, Controls, find_profile, resolve
from truestep.errors import CaseError, ModelLoadError, UsageError
from truestep.joint import Encoded, Joint
from truestep.replay.capture import Capture
from truestep.replay.check import check
from truestep.replay.record import record_pipeline
from truestep.runtime.loading import load
from truestep.runtime.ltx2.guidance import guided_estimate
from truestep.runtime.ltx2.latents import from_tokens
from truestep.runtime.ltx2.plan import ORDER, perturbed_blocks, wanted_passes
from truestep.runtime.pipeline import Pipeline, generate
from truestep.verdict import Verdict

SEED = 7


def of_model(folder: Path, base: dict[str, Any], **changes: Any) -> Case:
    return Case(model=str(folder), **base).replace(**changes)


@pytest.fixture(scope="module")
def newer(tiny_ltx2: dict[str, Path]) -> Path:
    return tiny_ltx2["2.3"]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("image") / "first.png"
    Image.fromarray(pixels).save(path)
    return str(path)


# --- bit-equal to diffusers --------------------------------------------------------------------

SCALES: list[dict[str, float]] = [
    {},
    {"guidance_scale": 1.0, "audio_guidance_scale": 1.0},
    {"stg_scale": 0.0, "audio_stg_scale": 1.0},
    {"modality_scale": 1.0, "audio_modality_scale": 1.0, "guidance_rescale": 0.0},
]


def of_diffusers(case: Case) -> tuple[torch.Tensor, ...]:
    """Latent, sound latent, frames and waveform of diffusers' own pipeline."""
    import diffusers
    from PIL import Image

    settings = case.settings
    image = settings.image is not None
    kind = diffusers.LTX2ImageToVideoPipeline if image else diffusers.LTX2Pipeline
    pipe = kind.from_pretrained(case.model, dtype=getattr(torch, case.dtype))
    pipe.set_progress_bar_config(disable=True)
    given = {
        "prompt": case.prompt,
        "negative_prompt": case.negative_prompt,
        "height": case.height,
        "width": case.width,
        "num_frames": case.num_frames,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance_scale,
        "spatio_temporal_guidance_blocks": list(settings.stg_blocks or ()),
        "max_sequence_length": case.max_sequence_length,
        "num_videos_per_prompt": settings.videos_per_prompt or 1,
        **{
            name: getattr(settings, name)
            for name in (
                "stg_scale",
                "audio_stg_scale",
                "modality_scale",
                "audio_modality_scale",
                "guidance_rescale",
                "audio_guidance_scale",
            )
            if getattr(settings, name) is not None
        },
        **({"image": Image.open(str(settings.image))} if image else {}),
    }
    results: list[torch.Tensor] = []
    for output in ("latent", "pt"):
        generator = torch.Generator().manual_seed(case.seed)
        results += pipe(**given, generator=generator, output_type=output, return_dict=False)
    return tuple(results)


@pytest.mark.parametrize(
    ("version", "dtype", "changes"),
    [
        *(("2.3", "float32", scales) for scales in SCALES),
        ("2.3", "bfloat16", {}),
        ("2.0", "float32", {}),
        ("2.3", "float32", {"image": True}),
        ("2.0", "bfloat16", {"image": True}),
        ("2.3", "float32", {"videos_per_prompt": 2}),
    ],
)
def test_latents_frames_and_sound_are_bit_equal_to_diffusers(
    tiny_ltx2: dict[str, Path],
    ltx2_case: dict[str, Any],
    picture: str,
    version: str,
    dtype: str,
    changes: dict[str, Any],
) -> None:
    changes = {**changes, **({"image": picture} if "image" in changes else {})}
    case = of_model(tiny_ltx2[version], ltx2_case, dtype=dtype, **changes)
    latent, sound, frames, waveform = of_diffusers(case)
    pipe = load(case)
    watch = Capture()
    decoded = generate(pipe, observer=watch, output="frames")
    final = from_tokens(pipe, watch.tensors["latent/final"])
    vae, audio_vae = pipe.vae, pipe.audio_vae
    mean, deviation = (v.view(1, -1, 1, 1, 1) for v in (vae.latents_mean, vae.latents_std))
    own_sound = watch.tensors["audio/latent/final"]
    own_sound = own_sound * audio_vae.latents_std.float() + audio_vae.latents_mean.float()
    assert torch.equal(final * deviation.float() + mean.float(), latent)
    assert torch.equal(own_sound, sound.transpose(1, 2).flatten(2, 3))
    pixels = (decoded.video * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 1, 3, 4)
    assert torch.equal(pixels.float(), frames.float())
    assert torch.equal(decoded.audio, waveform)


# --- sigmas ------------------------------------------------------------------------------------


def sigmas(folder: Path, base: dict[str, Any], **changes: Any) -> list[float]:
    pipe = load(of_model(folder, base, **changes))
    pipe.prepare(pipe)
    return [float(sigma) for sigma in pipe.make_schedule(pipe).sigmas]


def test_sigmas_of_the_official_one_stage_entry(newer: Path, ltx2_case: dict[str, Any]) -> None:
    made = sigmas(newer, ltx2_case, profile="official@f4b06fb", steps=30)
    assert len(made) == 31
    assert made[:6] == pytest.approx([1, 0.99496, 0.9896, 0.98391, 0.97784, 0.97136], abs=1e-5)
    assert made[-5:] == pytest.approx([0.48016, 0.38754, 0.26612, 0.1, 0], abs=1e-5)


def test_sigmas_of_the_hq_entry_come_from_8160_tokens(
    newer: Path, ltx2_case: dict[str, Any]
) -> None:
    made = sigmas(newer, ltx2_case, mu="tokens", steps=15, height=544, width=960, num_frames=121)
    assert made[:2] + made[-3:] == pytest.approx([1, 0.99349, 0.50338, 0.1, 0], abs=1e-5)
    assert made == pytest.approx(
        sigmas(newer, ltx2_case, profile="official@f4b06fb", mu=3.505208, steps=15), abs=1e-5
    )


def test_sigmas_of_the_distilled_models_are_a_list(newer: Path, ltx2_case: dict[str, Any]) -> None:
    made = sigmas(newer, ltx2_case, sigma_schedule="distilled", steps=8)
    expected = [1, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0]
    assert made == pytest.approx(expected, abs=1e-7)


def test_sigmas_follow_the_formula_in_float64(newer: Path, ltx2_case: dict[str, Any]) -> None:
    steps, mu, end = 12, 1.3, 0.2
    made = sigmas(
        newer, ltx2_case, profile="official@f4b06fb", mu=mu, steps=steps, terminal_sigma=end
    )
    shifted = [math.exp(mu) / (math.exp(mu) + 1 / (1 - i / steps) - 1) for i in range(steps)]
    scale = (1 - shifted[-1]) / (1 - end)
    assert made == pytest.approx([1 - (1 - s) / scale for s in shifted] + [0], abs=1e-6)


# --- passes ------------------------------------------------------------------------------------

NONE: dict[str, Any] = {
    "audio_guidance_scale": 1.0,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
}


def controls(base: dict[str, Any], **changes: Any) -> Controls:
    return resolve(Case(model="x", **base).replace(**changes).run_settings())


@pytest.mark.parametrize("gating", ["per_modality", "shared_blocks", "shared"])
@pytest.mark.parametrize("on", list(itertools.product((False, True), repeat=6)))
def test_a_pass_runs_where_a_scale_asks_for_it(
    ltx2_case: dict[str, Any], on: tuple[bool, ...], gating: str
) -> None:
    names = ("guidance_scale", "audio_guidance_scale", "stg_scale", "audio_stg_scale")
    names += ("modality_scale", "audio_modality_scale")
    off = {"guidance_scale": 1.0, **NONE}
    scales = {
        name: (off[name] + 2 if use else off[name]) for name, use in zip(names, on, strict=True)
    }
    cfg = scales.pop("guidance_scale")
    made = wanted_passes(cfg, controls(ltx2_case, **scales, pass_gating=gating))
    expected = {"cond"}
    expected |= {"uncond"} if on[0] or on[1] or gating == "shared" else set()
    expected |= {"perturbed"} if on[2] or on[3] else set()
    expected |= {"modality"} if on[4] or on[5] else set()
    assert made == tuple(branch for branch in ORDER if branch in expected)


def test_a_scale_below_one_asks_for_a_pass_but_not_in_diffusers(ltx2_case: dict[str, Any]) -> None:
    below = {**NONE, "audio_guidance_scale": 0.5}
    assert wanted_passes(1.0, controls(ltx2_case, **below, pass_gating="per_modality")) == (
        "cond",
        "uncond",
    )
    assert wanted_passes(1.0, controls(ltx2_case, **below, pass_gating="shared_blocks")) == (
        "cond",
    )


def test_blocks_are_perturbed_in_the_modality_whose_scale_asks(ltx2_case: dict[str, Any]) -> None:
    own = {"stg_blocks": (0,), "audio_stg_blocks": (2,), "pass_gating": "per_modality"}
    assert perturbed_blocks(controls(ltx2_case, **own)) == ((0,), (2,))
    assert perturbed_blocks(controls(ltx2_case, **own, stg_scale=0.0)) == ((), (2,))
    one = {**own, "pass_gating": "shared_blocks", "audio_stg_scale": 0.0}
    assert perturbed_blocks(controls(ltx2_case, **one)) == ((0,), (0,))
    both = {**own, "pass_gating": "shared", "stg_scale": 0.0}
    assert perturbed_blocks(controls(ltx2_case, **both)) == ((0,), (2,))
    off = {**both, "audio_stg_scale": 0.0}
    assert perturbed_blocks(controls(ltx2_case, **off)) == ((), ())


class Counted:
    """Batch of every forward of the transformer, and how often it ran A2V and V2A attention."""

    def __init__(self, pipe: Pipeline) -> None:
        self.batches: list[int] = []
        self.cross: list[tuple[int, int]] = []
        pipe.transformer.register_forward_pre_hook(self._begun, with_kwargs=True)
        for block in pipe.transformer.transformer_blocks:
            block.audio_to_video_attn.register_forward_pre_hook(lambda *_: self._ran(1, 0))
            block.video_to_audio_attn.register_forward_pre_hook(lambda *_: self._ran(0, 1))

    def _begun(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.batches.append(kwargs["hidden_states"].shape[0])
        self.cross.append((0, 0))

    def _ran(self, a2v: int, v2a: int) -> None:
        self.cross[-1] = (self.cross[-1][0] + a2v, self.cross[-1][1] + v2a)


@pytest.mark.parametrize(
    ("plan", "batches"), [("separate", [1, 1, 1, 1]), ("cond_uncond", [2, 1, 1]), ("all", [4])]
)
def test_one_forward_a_pass_and_none_that_is_not_needed(
    newer: Path, ltx2_case: dict[str, Any], plan: str, batches: list[int]
) -> None:
    pipe = load(of_model(newer, ltx2_case, pass_batching=plan, steps=2))
    counted = Counted(pipe)
    generate(pipe)
    assert counted.batches == batches * 2
    assert pipe.forwards == 8
    alone = load(
        of_model(newer, ltx2_case, guidance_scale=1.0, pass_batching=plan, steps=2, **NONE)
    )
    counted = Counted(alone)
    generate(alone)
    assert counted.batches == [1, 1]


def test_skipped_steps_run_no_forward_and_keep_the_estimate(
    newer: Path, ltx2_case: dict[str, Any]
) -> None:
    pipe = load(of_model(newer, ltx2_case, skip_step=1, steps=4))
    watch = Capture()
    counted = Counted(pipe)
    generate(pipe, observer=watch)
    assert counted.batches == [2, 1, 1] * 2
    assert "step/0001/cond" not in watch.tensors
    for modality in ("", "audio/"):
        guided = [watch.tensors[f"{modality}step/000{step}/guided"] for step in range(4)]
        assert torch.equal(guided[0], guided[1])
        assert not torch.equal(guided[1], guided[2])


@pytest.mark.parametrize(
    ("key", "expected"),
    [("skip_v2a_cross_attn", (1, 0)), ("skip_a2v_cross_attn", (0, 1))],
)
def test_a_skipped_cross_attention_is_skipped_in_every_forward(
    newer: Path, ltx2_case: dict[str, Any], key: str, expected: tuple[int, int]
) -> None:
    pipe = load(of_model(newer, ltx2_case, pass_batching="separate", steps=2, **{key: True}))
    counted = Counted(pipe)
    generate(pipe)
    blocks = len(pipe.transformer.transformer_blocks)
    kept = (expected[0] * blocks, expected[1] * blocks)
    assert counted.cross == [kept, kept, kept, (0, 0)] * 2


def test_the_modality_pass_has_no_cross_attention(newer: Path, ltx2_case: dict[str, Any]) -> None:
    pipe = load(of_model(newer, ltx2_case, pass_batching="separate", steps=2))
    counted = Counted(pipe)
    generate(pipe)
    blocks = len(pipe.transformer.transformer_blocks)
    assert counted.cross == [(blocks, blocks)] * 3 + [(0, 0)] + [(blocks, blocks)] * 3 + [(0, 0)]


@pytest.fixture
def prepared(newer: Path, ltx2_case: dict[str, Any]) -> Iterator[tuple[Pipeline, Any, Any, Any]]:
    """A pipeline with its first step's latent and texts."""
    from truestep.runtime.pipeline import Observer, encode

    pipe = load(of_model(newer, ltx2_case))
    with torch.no_grad():
        pipe.prepare(pipe)
        texts = encode(pipe, Observer())
        step = pipe.make_schedule(pipe).step(1)
        yield pipe, pipe.make_latent(pipe), step, texts


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pass_gating": "per_modality", "stg_scale": 0.0},
        {"pass_gating": "per_modality", "stg_blocks": (0, 1), "audio_stg_blocks": (1, 2)},
        {"videos_per_prompt": 2},
    ],
)
def test_passes_together_are_passes_one_by_one_up_to_rounding(
    newer: Path, ltx2_case: dict[str, Any], changes: dict[str, Any]
) -> None:
    made = {}
    for plan in ("separate", "cond_uncond", "all"):
        pipe = load(of_model(newer, ltx2_case, pass_batching=plan, steps=2, **changes))
        watch = Capture()
        generate(pipe, observer=watch)
        made[plan] = {k: v for k, v in watch.tensors.items() if k.split("/")[-1] in ORDER}
    for plan in ("cond_uncond", "all"):
        assert made[plan].keys() == made["separate"].keys()
        for name, value in made["separate"].items():
            assert torch.allclose(made[plan][name], value, atol=2e-5), (plan, name)


def test_only_the_asked_modality_is_perturbed(newer: Path, ltx2_case: dict[str, Any]) -> None:
    """Without attention between them, what perturbs the sound cannot reach the video."""
    pipe = load(
        of_model(
            newer,
            ltx2_case,
            pass_gating="per_modality",
            stg_scale=0.0,
            skip_a2v_cross_attn=True,
            skip_v2a_cross_attn=True,
            pass_batching="separate",
            steps=2,
        )
    )
    watch = Capture()
    generate(pipe, observer=watch)
    found = watch.tensors
    assert torch.equal(found["step/0000/perturbed"], found["step/0000/cond"])
    assert not torch.equal(found["audio/step/0000/perturbed"], found["audio/step/0000/cond"])


@pytest.mark.parametrize("gating", ["per_modality", "shared", "shared_blocks"])
def test_a_floor_is_measured_with_two_videos_and_under_autocast(
    newer: Path, ltx2_case: dict[str, Any], gating: str
) -> None:
    case = of_model(
        newer,
        ltx2_case,
        videos_per_prompt=2,
        dtype="bfloat16",
        disable_autocast=False,
        pass_gating=gating,
        pass_batching="all",
        steps=2,
        height=32,
        width=32,
        num_frames=9,
    )
    recording = record_pipeline(load(case), case=case)
    floor = recording.manifest.noise_floor
    assert floor is not None
    assert {run.kind for run in floor.runs} >= {"batch", "jitter", "precision", "repeat"}
    assert check(case, recording).verdict is Verdict.IDENTICAL


def test_hooks_are_gone_after_a_pass_that_raised(newer: Path, ltx2_case: dict[str, Any]) -> None:
    pipe = load(of_model(newer, ltx2_case, pass_batching="all", av_adaln="own_cross_gate", steps=2))

    def count() -> int:
        return sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in pipe.transformer.modules()
        )

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = pipe.transformer.transformer_blocks[1].register_forward_hook(fail)
    before = count()
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(pipe)
    assert count() == before
    handle.remove()


# --- guidance ----------------------------------------------------------------------------------

_SCALE = st.floats(-2, 10, allow_nan=False)


@given(
    _SCALE,
    _SCALE,
    _SCALE,
    st.floats(0, 1),
    st.sampled_from(["whole", "sample"]),
    st.sets(st.sampled_from(ORDER[1:])),
    st.integers(0, 99),
)
def test_guidance_is_the_formula_in_float64(
    guidance: float,
    stg: float,
    modality: float,
    rescale: float,
    scope: str,
    ran: set[Any],
    seed: int,
) -> None:
    import numpy as np

    draw = np.random.default_rng(seed)
    made = {name: draw.normal(size=(2, 5, 3)) for name in ("cond", *ORDER[1:])}
    c = made["cond"]
    g = c.copy()
    for name, factor in (("uncond", guidance - 1), ("perturbed", stg), ("modality", modality - 1)):
        if name in ran:
            g = g + factor * (c - made[name])
    if rescale:
        axes = None if scope == "whole" else (1, 2)
        wide = scope != "whole"
        wanted, found = (
            np.sqrt(
                ((v - v.mean(axis=axes, keepdims=True)) ** 2).sum(axis=axes, keepdims=wide)
                / ((v.size if axes is None else v[0].size) - 1)
            )
            for v in (c, g)
        )
        g = g * (rescale * wanted / found + 1 - rescale)
    own = guided_estimate(
        torch.from_numpy(c),
        {name: torch.from_numpy(made[name]) for name in ran},
        guidance=guidance,
        stg=stg,
        modality=modality,
        rescale=rescale,
        std_scope=scope,
    )
    assert torch.allclose(own, torch.from_numpy(g), rtol=1e-12, atol=1e-12 * np.abs(g).max())


def test_a_constant_estimate_is_not_divided_by_its_deviation() -> None:
    flat = torch.ones(1, 4, 2)
    for scope in ("whole", "sample"):
        made = guided_estimate(
            flat, {}, guidance=3, stg=0, modality=1, rescale=0.7, std_scope=scope
        )
        assert torch.equal(made, flat)


def test_scopes_of_the_deviation_differ_with_two_clips_only() -> None:
    torch.manual_seed(0)
    cond = torch.randn(2, 6, 4) * torch.tensor([1.0, 5.0])[:, None, None]
    others: Any = {"uncond": torch.randn(2, 6, 4)}

    def made(rows: slice, scope: str) -> torch.Tensor:
        return guided_estimate(
            cond[rows],
            {"uncond": others["uncond"][rows]},
            guidance=4,
            stg=0,
            modality=1,
            rescale=0.7,
            std_scope=scope,
        )

    one, two = slice(0, 1), slice(0, 2)
    assert torch.allclose(made(one, "whole"), made(one, "sample"), atol=1e-6)
    assert not torch.allclose(made(two, "whole"), made(two, "sample"), atol=1e-2)


def test_guidance_in_the_models_dtype_rounds_there(newer: Path, ltx2_case: dict[str, Any]) -> None:
    torch.manual_seed(0)
    cond, other = Joint(torch.randn(1, 6, 8), torch.randn(1, 4, 8)), None
    other = Joint(*(part + 0.1 for part in cond))
    made = {}
    for dtype in ("model", "float32"):
        pipe = load(of_model(newer, ltx2_case, dtype="bfloat16", guidance_dtype=dtype, **NONE))
        pipe.prepare(pipe)
        made[dtype] = pipe.combine(pipe, None, cond, other)
    bits = made["model"].video
    assert torch.equal(bits, bits.bfloat16().float())
    assert not torch.equal(made["float32"].video, bits)


# --- text connector ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "calls"), [("separate", [1, 1]), ("joint", [2])])
def test_the_connector_is_called_for_each_branch_or_jointly(
    newer: Path, ltx2_case: dict[str, Any], kind: str, calls: list[int]
) -> None:
    pipe = load(of_model(newer, ltx2_case, connector=kind, steps=2))
    batches: list[int] = []
    pipe.connectors.register_forward_pre_hook(lambda m, args: batches.append(args[0].shape[0]))
    generate(pipe)
    assert batches == calls


@pytest.mark.parametrize("field", ["embeds", "mask"])
def test_a_missing_embedding_or_mask_is_a_value_error(
    prepared: tuple[Any, ...], field: str
) -> None:
    pipe = prepared[0]
    text = Encoded(torch.zeros(1, 16, 96), torch.ones(1, 16, dtype=torch.int64))
    broken = text._replace(**{field: None})
    with pytest.raises(ValueError, match=f"the connector needs {field} of the uncond prompt"):
        pipe.connect(pipe, {"cond": text, "uncond": broken})


def test_the_audit_finds_the_recipe_followed(prepared: tuple[Any, ...]) -> None:
    from truestep.runtime.audit import audit

    findings = audit(prepared[0])
    assert [finding for finding in findings if not finding.right] == []
    assert {finding.branch for finding in findings} == {"cond", "uncond"}


def cut(pipe: Pipeline) -> None:
    encode = pipe.encode_text
    pipe.encode_text = lambda inner, prompts: Encoded(
        *(part[:, -8:] for part in encode(inner, prompts))
    )


def padded_right(pipe: Pipeline) -> None:
    encode = pipe.encode_text
    pipe.encode_text = lambda inner, prompts: Encoded(
        *(part.flip(1) for part in encode(inner, prompts))
    )


def mixed(pipe: Pipeline) -> None:
    connect = pipe.connect
    assert connect is not None
    pipe.connect = lambda inner, texts: dict(
        zip(texts, reversed(connect(inner, texts).values()), strict=True)
    )


def not_finite(pipe: Pipeline) -> None:
    pipe.connectors.register_forward_hook(lambda m, args, made: (made[0] * math.nan, *made[1:]))


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (cut, {"length", "padding"}),
        (padded_right, {"padding", "rows"}),
        (mixed, {"connector"}),
        (not_finite, {"connector", "finite"}),
    ],
)
def test_the_audit_names_what_departs_from_the_recipe(
    newer: Path, ltx2_case: dict[str, Any], change: Any, wrong: set[str]
) -> None:
    from truestep.runtime.audit import audit

    pipe = load(of_model(newer, ltx2_case))
    change(pipe)
    found = {finding.what for finding in audit(pipe) if not finding.right}
    assert found == wrong


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"profile": None}, "must name the reference", "profile=diffusers-0.42.1"),
        ({"num_frames": 16}, "num_frames 16 does not fit", "num_frames=17"),
        ({"height": 50}, "height 50 does not fit", "height=64"),
        ({"width": 100}, "width 100 does not fit", "width=96"),
        ({"stg_blocks": (5,)}, "stg_blocks names block 5", "blocks are 0 to 2"),
        ({"stg_blocks": ()}, "stg_blocks is empty", "stg_blocks=28"),
        ({"max_sequence_length": 12}, "max_sequence_length 12 does not fit", "=16"),
        ({"sigma_schedule": "distilled"}, "has 8 steps, not 4", "--set steps=8"),
        ({"steps": 1}, "one step cannot be stretched", "--set steps=2"),
        ({"text_recipe": "keep_padding"}, "keep_padding is not for LTX-2", "per_branch_connector"),
        ({"cfg": "batched"}, "cfg=batched is for models with two passes", "pass_batching"),
        ({"text_attention": "collapsed"}, "not for LTX-2", "drop both"),
        ({"flow_shift": 3.0}, "flow_shift is set", "mu is the shift"),
        ({"scheduler": "UniPCMultistepScheduler"}, "scheduler is set", "sigma_schedule"),
        ({"image": "nowhere.png"}, "the image cannot be read", "give --set image=PATH"),
    ],
)
def test_what_does_not_fit_is_said_before_any_forward(
    newer: Path, ltx2_case: dict[str, Any], changes: dict[str, Any], message: str, hint: str
) -> None:
    pipe = load(of_model(newer, ltx2_case, **changes))
    with pytest.raises(CaseError, match=message) as caught:
        generate(pipe)
    assert hint in str(caught.value)
    assert pipe.forwards == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_rescale": -0.1}, "guidance_rescale = -0.1"),
        ({"audio_guidance_rescale": -0.1}, "audio_guidance_rescale = -0.1"),
        ({"stg_blocks": (-1,)}, "stg_blocks"),
        ({"mu": "tokns"}, "mu"),
        ({"stg_scale": float("nan")}, "stg_scale"),
    ],
)
def test_a_control_out_of_range_is_no_case(
    ltx2_case: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CaseError, match=message):
        Case(model="x", **ltx2_case).replace(**changes)


def test_a_profile_for_another_version_is_refused(
    tiny_ltx2: dict[str, Path], ltx2_case: dict[str, Any]
) -> None:
    pipe = load(of_model(tiny_ltx2["2.0"], ltx2_case, profile="vllm-omni-0.30"))
    with pytest.raises(CaseError, match=r"vllm-omni-0.30 is not for LTX-2.0"):
        generate(pipe)


def test_controls_of_ltx2_in_a_wan_case_are_refused(
    tiny_wan: dict[str, Path], tiny_case: dict[str, Any]
) -> None:
    case = Case(model=str(tiny_wan["wan21"]), **tiny_case).replace(mu="tokens")
    with pytest.raises(CaseError, match="mu is set, but the model makes video alone"):
        load(case)


def test_the_recipe_of_ltx2_in_a_wan_case_is_refused(
    tiny_wan: dict[str, Path], tiny_case: dict[str, Any]
) -> None:
    case = Case(model=str(tiny_wan["wan21"]), **tiny_case)
    with pytest.raises(CaseError, match="text_recipe is set, but the model makes video alone"):
        load(case.replace(text_recipe="per_branch_connector"))


def test_a_folder_without_sound_is_refused(
    newer: Path, ltx2_case: dict[str, Any], tmp_path: Path
) -> None:
    import json
    import shutil

    folder = shutil.copytree(newer, tmp_path / "mute")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    del index["vocoder"]
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(ModelLoadError, match="the model has no vocoder"):
        load(of_model(folder, ltx2_case))


def test_guidance_that_the_model_cannot_perturb_is_said(
    tiny_ltx2: dict[str, Path], ltx2_case: dict[str, Any]
) -> None:
    pipe = load(of_model(tiny_ltx2["2.0"], ltx2_case, steps=2))
    generate(pipe)
    assert "spatio-temporal guidance has no effect" in pipe.fallbacks[0]


def test_an_unprepared_pipeline_says_so(newer: Path, ltx2_case: dict[str, Any]) -> None:
    pipe = load(of_model(newer, ltx2_case))
    with pytest.raises(UsageError, match="not prepared"):
        pipe.make_latent(pipe)


# --- the record --------------------------------------------------------------------------------


def test_a_control_left_alone_is_absent_from_the_case(ltx2_case: dict[str, Any]) -> None:
    case = Case(model="x", **ltx2_case)
    given = set(ltx2_case["settings"]) - {"device"}
    assert set(case.canonical()["settings"]) & set(AudioVideo.model_fields) == given
    assert case.replace(mu="constant").id != case.id
    assert case.replace(mu=None).id == case.id


def test_disable_autocast_survives_an_override_from_a_dictionary(
    newer: Path, ltx2_case: dict[str, Any], tmp_path: Path
) -> None:
    from truestep.case import load_cases

    case = of_model(newer, ltx2_case, disable_autocast=False, dtype="bfloat16")
    changed = case.replace(steps=2, profile="official@f4b06fb", audio_stg_blocks=[1])
    assert changed.settings.disable_autocast is False
    path = tmp_path / "truestep.toml"
    path.write_text(
        '[case.a]\nmodel = "x"\nprompt = "p"\n[case.a.settings]\nprofile = "diffusers-0.42.1"\n'
        "disable_autocast = false\n[case.a.fast.settings]\nmu = 1.0\n",
        "utf-8",
    )
    tier = load_cases(path, tier="fast")["a"]
    assert (tier.settings.disable_autocast, tier.settings.mu) == (False, 1.0)
    seen: list[bool] = []
    pipe = load(changed)
    pipe.transformer.register_forward_pre_hook(
        lambda module, args: seen.append(torch.is_autocast_enabled("cpu"))
    )
    generate(pipe)
    assert seen
    assert all(seen)


def test_defaults_of_a_profiled_case_are_those_of_ltx2() -> None:
    case = Case(model="x", prompt="p", settings={"profile": "official@f4b06fb"})
    assert (case.steps, case.guidance_scale, case.max_sequence_length) == (30, 3.0, 1024)
    assert (case.height, case.width, case.num_frames) == (512, 768, 121)
    found = resolve(case.run_settings())
    assert (found.audio_guidance_scale, found.stg_scale, found.audio_stg_scale) == (7.0, 1.0, 1.0)
    assert (found.guidance_rescale, found.audio_guidance_rescale) == (0.7, 0.7)
    assert (found.modality_scale, found.audio_modality_scale) == (3.0, 3.0)
    assert (found.stg_blocks, found.audio_stg_blocks) == ((28,), (28,))
    own = Case(model="x", prompt="p", steps=4, settings={"profile": "official@f4b06fb"})
    assert own.steps == 4
    assert find_profile("official@822ce3c").cells["guidance_dtype"].value == "model"
