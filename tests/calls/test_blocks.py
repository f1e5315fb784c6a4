"""Blocks of modular pipelines are boundaries: a fault is named by the block whose code makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.calls.test_modular import modular
from truestep.calls import blocks
from truestep.calls.check import check
from truestep.calls.record import record
from truestep.calls.recording import CallRecording
from truestep.engines.subjects import check as check_pipeline
from truestep.engines.subjects import record as record_pipeline
from truestep.testing import tiny
from truestep.testing.corpus.editing import derive, edit
from truestep.verdict import Verdict

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

Change = Callable[[Any], None]


def block(pipe: Any, path: str) -> Any:
    part = pipe._blocks
    for name in path.split("."):
        part = part.sub_blocks[name]
    return part


def writes(path: str, name: str, *, factor: float = 1.01) -> Change:
    """A block leaves a value of the state that is 1 % larger."""

    def change(pipe: Any) -> None:
        part = block(pipe, path)
        original = type(part).__call__

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            components, state = original(self, *args, **kwargs)
            held = blocks.state_in((components, state))
            assert held is not None
            held[name] = held[name] * factor
            return components, state

        derive(part, {"__call__": call})

    return change


def given_more(pipe: Any) -> None:
    """The denoiser's block gives the model other latents than it was given."""
    old = "hidden_states=block_state.latent_model_input.to(block_state.dtype)"
    edit(block(pipe, "denoise.denoise.denoiser"), "__call__", (old, f"{old} * 1.01"))


def decoded_unscaled(pipe: Any) -> None:
    """The decoder's block does not undo the normalisation of latents."""
    old = "latents = latents / latents_std + latents_mean"
    edit(block(pipe, "decode"), "__call__", (old, "latents = latents + latents_mean"))


def scale(pipe: Any) -> None:
    pipe.guider.guidance_scale *= 1.01


def formula(pipe: Any) -> None:
    """The guider adds its shift to the conditional prediction, as the original paper does."""
    pipe.guider.use_original_formulation = True


def stacked(*changes: Change) -> Change:
    def change(pipe: Any) -> None:
        for part in changes:
            part(pipe)

    return change


def wrapped(pipe: Any) -> None:
    """Blocks are other objects' code around the same."""
    for path in ("text_encoder", "denoise.prepare_latents", "denoise.denoise.before_denoiser"):
        part = block(pipe, path)
        original = type(part).__call__
        derive(part, {"__call__": lambda self, *args, o=original, **kw: o(self, *args, **kw)})


def renamed(pipe: Any) -> None:
    """A block goes by another name."""
    inner = block(pipe, "denoise").sub_blocks
    parts = [("noise" if k == "prepare_latents" else k, part) for k, part in inner.items()]
    inner.clear()
    inner.update(parts)


@pytest.fixture(scope="module")
def references() -> Callable[[str], CallRecording]:
    """The reference of a modular pipeline, recorded once."""
    recorded: dict[str, CallRecording] = {}

    def reference(name: str) -> CallRecording:
        if name not in recorded:
            recorded[name] = record(modular(name))
        return recorded[name]

    return reference


def test_blocks_have_the_names_of_where_they_stand(
    references: Callable[[str], CallRecording],
) -> None:
    calls = [call for call in references("wan").calls if call.component == blocks.BLOCK]
    loop = "denoise.denoise"
    inner = ("before_denoiser", "denoiser", "after_denoiser")
    assert [(call.step, call.method) for call in calls] == [
        (None, "text_encoder"),
        (None, "denoise.input"),
        (None, "denoise.set_timesteps"),
        (None, "denoise.prepare_latents"),
        *((step, f"{loop}.{name}") for step in range(3) for name in inner),
        (None, loop),
        (None, "decode"),
    ]
    stages = {call.method.rpartition(".")[2]: call.stage for call in calls}
    assert stages["text_encoder"] == "text"
    assert stages["set_timesteps"] == "schedule"
    assert (stages["before_denoiser"], stages["denoiser"]) == ("latent", "guidance")
    assert (stages["after_denoiser"], stages["decode"]) == ("update", "decoding")


FAULTS: dict[str, tuple[str, Change, str]] = {
    "initial noise": (
        "wan",
        writes("denoise.prepare_latents", "latents"),
        "block denoise.prepare_latents: latents, ",
    ),
    "text": (
        "wan",
        writes("text_encoder", "prompt_embeds"),
        "block text_encoder: prompt_embeds, ",
    ),
    "before the denoiser": (
        "wan",
        writes("denoise.denoise.before_denoiser", "latent_model_input"),
        "block denoise.denoise.before_denoiser at step 0: latent_model_input, ",
    ),
    "after the scheduler": (
        "wan",
        writes("denoise.denoise.after_denoiser", "latents"),
        "block denoise.denoise.after_denoiser at step 0: latents, ",
    ),
    "after the loop": (
        "wan",
        writes("denoise.denoise", "latents"),
        "block denoise.denoise: latents, ",
    ),
    "time": (
        "flux",
        writes("denoise.before_denoise.text2image.set_timesteps", "timesteps"),
        "block denoise.before_denoise.text2image.set_timesteps: timesteps, ",
    ),
    "guider's scale": ("wan", scale, "guider.forward at step 0: output pred, "),
    "guider's formula": ("qwen", formula, "guider.forward at step 0: output pred, "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_the_block_that_makes_it(
    fault: str, references: Callable[[str], CallRecording]
) -> None:
    name, change, place = FAULTS[fault]
    result = check(modular(name, change), references(name))
    assert result.sentence.startswith(f"drifted: {place}")
    assert len({row.fqn for row in result.failing}) == 1


@pytest.mark.parametrize(
    ("change", "place", "inside"),
    [
        (
            given_more,
            "code before transformer.forward at step 0: hidden_states",
            "in block denoise.denoise.denoiser (",
        ),
        (decoded_unscaled, "code before vae.decode: z", "in block decode ("),
    ],
)
def test_code_inside_a_block_before_a_call_is_named_with_it(
    change: Change, place: str, inside: str, references: Callable[[str], CallRecording]
) -> None:
    result = check(modular("wan", change), references("wan"))
    assert place in result.sentence
    assert inside in result.sentence


@pytest.mark.parametrize("change", [wrapped, renamed])
def test_blocks_that_do_the_same_pass(
    change: Change, references: Callable[[str], CallRecording]
) -> None:
    result = check(modular("wan", change), references("wan"))
    assert result.verdict is Verdict.IDENTICAL


def test_a_block_that_the_reference_has_not_is_named_beside_the_next(
    references: Callable[[str], CallRecording],
) -> None:
    faulty = stacked(writes("denoise.prepare_latents", "latents"), renamed)
    result = check(modular("wan", faulty), references("wan"))
    assert result.verdict is Verdict.DRIFTED
    assert "or in denoise.noise, which the reference has not" in result.sentence


def test_a_recording_without_blocks_judges_as_before(
    references: Callable[[str], CallRecording],
) -> None:
    reference = references("wan")
    manifest = reference.recording.manifest
    calls = tuple(call for call in manifest.calls if call.component != blocks.BLOCK)
    older = reference.with_manifest(manifest.model_copy(update={"calls": calls}))
    assert check(modular("wan"), older).verdict is Verdict.IDENTICAL
    faulty = modular("wan", writes("denoise.prepare_latents", "latents"))
    assert "code before transformer.forward at step 0" in check(faulty, older).sentence


def test_blocks_are_what_they_were_afterwards(references: Callable[[str], CallRecording]) -> None:
    candidate = modular("wan")
    before = [type(part) for part in blocks.every(candidate.blocks)]
    check(candidate, references("wan"))
    assert [type(part) for part in blocks.every(candidate.blocks)] == before


def test_a_block_is_not_opened_and_a_note_says_why() -> None:
    name = "wan/WanBlocks"
    call = {k: v for k, v in tiny.example_call(name).items() if k != "generator"}
    reference = record_pipeline(tiny.pipeline(name), call=call, floor="none")
    faulty = tiny.pipeline(name)
    writes("denoise.prepare_latents", "latents")(faulty)
    trusted = tiny.pipeline(name)
    result = check_pipeline(faulty, reference, depth="modules", trusted=trusted, tolerance=1e-4)
    note = "no module named: block denoise.prepare_latents: latents is code of the pipeline itself"
    assert result.notes == (note,)


def test_what_is_not_made_of_blocks_has_none() -> None:
    class Odd:
        def __getattr__(self, name: str) -> Any:
            raise KeyError(name)

    assert blocks.root_of(Odd()) is None
    assert blocks.root_of(torch.nn.Linear(1, 1)) is None
    assert blocks.state_in((Odd(),)) is None
