"""Candidates that batch, split or reorder their guidance passes are paired, and judged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.calls.regrouping import (
    COND,
    IN_ORDER,
    NO_UNCOND,
    REVERSED_BATCH,
    REVERSED_CALLS,
    SWAPPED,
    UNCOND,
    Change,
    both,
    row_scaled,
    scaled,
    sdxl,
    subject,
    wan_batched,
    wan_calls,
    wan_cond_only,
)
from truestep.calls.check import check
from truestep.calls.record import record
from truestep.calls.recording import CallRecording
from truestep.verdict import Comparison, Verdict

WAN, SDXL = "WanPipeline", "StableDiffusionXLPipeline"
UNCOND_FIRST = "negative_prompt_embeds, prompt_embeds", "noise_uncond, noise_pred"
ZERO_WAN = "torch.zeros_like(negative_prompt_embeds)"
ZERO_SDXL = "torch.cat([torch.zeros_like(prompt_embeds[:1]), prompt_embeds[1:]])"


@pytest.fixture(scope="module")
def references() -> Callable[[str], CallRecording]:
    """The reference of a tiny pipeline, recorded once."""
    recorded: dict[str, CallRecording] = {}

    def reference(name: str) -> CallRecording:
        if name not in recorded:
            recorded[name] = record(subject(name))
        return recorded[name]

    return reference


@pytest.fixture(scope="module")
def two_pictures() -> CallRecording:
    return record(subject(SDXL, images=2))


Checked = Callable[[str, Change], Comparison]


@pytest.fixture
def checked(references: Callable[[str], CallRecording]) -> Checked:
    return lambda name, change: check(subject(name, change), references(name))


HARMLESS = [
    (WAN, wan_batched(), "transformer: both passes in one batch, recorded in 2 calls"),
    (WAN, wan_batched(*UNCOND_FIRST), "transformer: both passes in one batch, recorded in 2 calls"),
    (WAN, wan_calls(UNCOND, COND), "transformer: passes in another order"),
    (SDXL, sdxl(IN_ORDER), "unet: passes in 2 calls, recorded in one batch"),
    (SDXL, sdxl(REVERSED_CALLS), "unet: passes in 2 calls, recorded in one batch"),
    (SDXL, sdxl(REVERSED_BATCH), "unet: passes in another order"),
]


@pytest.mark.parametrize(("name", "change", "note"), HARMLESS)
def test_other_layouts_of_the_same_passes_pass(
    name: str, change: Change, note: str, checked: Checked
) -> None:
    result = checked(name, change)
    assert result.verdict in (Verdict.EQUIVALENT, Verdict.IDENTICAL)
    assert note in result.notes
    assert not result.missing
    assert not result.unexpected


def test_the_recorded_layout_has_no_note(checked: Checked) -> None:
    result = checked(WAN, wan_calls(COND, UNCOND))
    assert result.verdict is Verdict.IDENTICAL
    assert result.notes == ()


GIVEN = "code before transformer.forward (uncond) at step 0: encoder_hidden_states"
GAVE = "transformer.forward ({}) at step 0: output 0"
COMBINED = "code before scheduler.step at step 0: model_output"
COND_TWICE = "prompt_embeds, prompt_embeds"
FAULTS_OF_WAN = {
    "batched, prompt twice": (wan_batched(COND_TWICE), GIVEN),
    "batched in the other order, prompt twice": (wan_batched(COND_TWICE, UNCOND_FIRST[1]), GIVEN),
    "batched, no negative text": (wan_batched(f"prompt_embeds, {ZERO_WAN}"), GIVEN),
    "batched in the other order, no negative text": (
        wan_batched(f"{ZERO_WAN}, prompt_embeds", UNCOND_FIRST[1]),
        GIVEN,
    ),
    "batched, combined the other way": (wan_batched(names=UNCOND_FIRST[1]), COMBINED),
    "batched, second row off": (
        both(wan_batched(), row_scaled("transformer", 1)),
        GAVE.format("uncond"),
    ),
    "batched in the other order, second row off": (
        both(wan_batched(*UNCOND_FIRST), row_scaled("transformer", 1)),
        GAVE.format("cond"),
    ),
    "batched, model off": (both(wan_batched(), scaled("transformer")), GAVE.format("cond")),
    "reversed, no negative text": (wan_calls((UNCOND[0], ZERO_WAN), COND), GIVEN),
    "reversed, prompt twice": (wan_calls((UNCOND[0], COND[1]), COND), GIVEN),
    "reversed, model off": (
        both(wan_calls(UNCOND, COND), scaled("transformer")),
        GAVE.format("uncond"),
    ),
    "texts swapped": (
        wan_calls((COND[0], UNCOND[1]), (UNCOND[0], COND[1])),
        GIVEN.replace("uncond", "cond"),
    ),
}
_BEFORE_UNET = "code before unet.forward{} at step 0: encoder_hidden_states"
_UNCOND = _BEFORE_UNET.format(" (uncond)")
FAULTS_OF_SDXL = {
    "split, combined the other way": (sdxl(SWAPPED), COMBINED),
    "split, no negative text": (sdxl(IN_ORDER, ZERO_SDXL), _UNCOND),
    "split in the other order, no negative text": (
        sdxl(REVERSED_CALLS, ZERO_SDXL),
        _UNCOND,
    ),
    "split, model off": (both(sdxl(IN_ORDER), scaled("unet")), "unet.forward at step 0: output 0"),
    "reversed batch, no negative text": (
        sdxl(REVERSED_BATCH, ZERO_SDXL),
        _UNCOND,
    ),
    "reversed batch, not turned back": (
        sdxl("noise_pred = _unet([1, 0])"),
        _BEFORE_UNET.format(""),
    ),
    "reversed batch, a row off": (
        both(sdxl(REVERSED_BATCH), row_scaled("unet", 0)),
        "unet.forward (cond) at step 0: output 0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS_OF_WAN)
def test_faults_of_regrouped_calls_are_named_at_their_pass(fault: str, checked: Checked) -> None:
    change, place = FAULTS_OF_WAN[fault]
    result = checked(WAN, change)
    assert place in result.sentence
    assert result.verdict in (Verdict.DRIFTED, Verdict.INVALID)


@pytest.mark.parametrize("fault", FAULTS_OF_SDXL)
def test_faults_of_a_batch_that_is_split_or_turned_are_named(fault: str, checked: Checked) -> None:
    change, place = FAULTS_OF_SDXL[fault]
    result = checked(SDXL, change)
    assert result.sentence.startswith(f"drifted: {place}")


def test_a_pass_that_does_not_come_is_missing(checked: Checked) -> None:
    result = checked(WAN, wan_cond_only)
    assert result.sentence.endswith("3 recorded calls did not come")
    assert "transformer: 1 of 2 rows in 1 call, recorded in 2 calls" in result.notes
    assert {row.branch for row in result.rows if row.verdict is Verdict.MISSING} == {"uncond"}


def test_a_row_that_does_not_come_is_missing(checked: Checked) -> None:
    result = checked(SDXL, sdxl(NO_UNCOND))
    notes = {row.note for row in result.rows if row.verdict is Verdict.MISSING}
    assert notes == {"1 of the 2 rows of its batch did not come (uncond)"}
    assert not result.verdict.passed


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (WAN, wan_calls(COND, UNCOND, COND)),
        (SDXL, sdxl("noise_pred = torch.cat([_unet([0]), _unet([1])]); _unet([0])")),
    ],
)
def test_a_call_more_is_unexpected(name: str, change: Change, checked: Checked) -> None:
    result = checked(name, change)
    assert result.verdict is Verdict.INCOMPARABLE
    assert "unexpected: 3 more calls than recorded (1 of" in result.sentence


def test_a_step_that_lacks_a_row_is_named_and_the_others_stay_paired(checked: Checked) -> None:
    once = "if i == 1:\n    noise_pred = torch.cat([_unet([1])] * 2)\nelse:\n    " + IN_ORDER
    result = checked(SDXL, sdxl(once))
    missing = [row.step for row in result.rows if row.verdict is Verdict.MISSING]
    assert missing == [1]
    assert {row.step for row in result.failing} == {1}


def test_sixteen_bits_are_judged_raised_in_any_layout() -> None:
    reference = record(subject(WAN, dtype="bfloat16"))
    twin = check(subject(WAN, wan_batched(), dtype="bfloat16"), reference)
    assert twin.verdict in (Verdict.EQUIVALENT, Verdict.IDENTICAL)
    assert any(row.name.startswith("float32/") for row in twin.rows)
    fault = both(wan_batched(), row_scaled("transformer", 1))
    result = check(subject(WAN, fault, dtype="bfloat16"), reference)
    assert GAVE.format("uncond") in result.sentence.replace(", raised to float32", "")


def test_a_thinned_recording_pairs_passes_too() -> None:
    reference = record(subject(SDXL, steps=8), keep=())
    assert reference.judged_steps is not None and 1 not in reference.judged_steps  # noqa: PT018
    assert check(subject(SDXL, sdxl(IN_ORDER), steps=8), reference).verdict.passed
    result = check(subject(SDXL, sdxl(SWAPPED), steps=8), reference)
    assert result.sentence.startswith(f"drifted: {COMBINED}")


@pytest.mark.parametrize(
    ("calls", "passes"),
    [
        ("noise_pred = torch.cat([_unet([0, 1]), _unet([2, 3])])", True),
        ("noise_pred = torch.cat([_unet([row]) for row in range(4)])", True),
        (
            "a, b = _unet([2, 0]), _unet([3, 1])\n"
            "noise_pred = torch.stack([a[1], b[1], a[0], b[0]])",
            True,
        ),
        (
            "a, b = _unet([2, 0]), _unet([3, 1])\n"
            "noise_pred = torch.stack([b[1], a[1], a[0], b[0]])",
            False,
        ),
    ],
)
def test_samples_and_passes_of_a_batch_may_be_mixed(
    calls: str, passes: bool, two_pictures: CallRecording
) -> None:
    result = check(subject(SDXL, sdxl(calls), images=2), two_pictures)
    assert result.verdict.passed == passes
    assert passes or result.sentence.startswith(f"drifted: {COMBINED}")


def test_nothing_is_left_patched(checked: Checked) -> None:
    kept = torch.get_rng_state()
    candidate = subject(WAN, wan_batched())
    classes = {name: type(part) for name, part in candidate.components.items()}
    check(candidate, record(subject(WAN), floor=False))
    assert {name: type(part) for name, part in candidate.components.items()} == classes
    assert torch.equal(torch.get_rng_state(), kept)
