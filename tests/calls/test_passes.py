"""Passes in a batch are named: in the recording, and where one of them fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.calls.regrouping import both, row_scaled, subject
from truestep.calls.check import check
from truestep.calls.keys import Key
from truestep.calls.passes import PASSES, failing_pass, names_of
from truestep.calls.record import record
from truestep.calls.recording import CallRecording

PLACE = Key("prediction", "unet", "forward", 0, "out", ("0",), step=1)
NAMES = {("unet", "forward", 0): ["uncond", "uncond", "cond", "cond"]}


@pytest.fixture(scope="module")
def reference() -> CallRecording:
    return record(subject("StableDiffusionXLPipeline"))


def test_a_recording_names_the_rows_of_its_batches(reference: CallRecording) -> None:
    assert names_of(reference) == {("unet", "forward", 0): ["uncond", "cond"]}


def test_passes_that_say_which_they_are_get_no_other_names() -> None:
    assert names_of(record(subject("WanPipeline"), floor=False)) == {}


@pytest.mark.parametrize(("row", "name"), [(0, "uncond"), (1, "cond")])
def test_a_fault_in_one_row_is_named_by_its_pass(
    reference: CallRecording, row: int, name: str
) -> None:
    result = check(subject("StableDiffusionXLPipeline", row_scaled("unet", row)), reference)
    assert result.sentence.startswith(f"drifted: unet.forward ({name}) at step 0: output 0")


def test_a_fault_in_every_row_is_of_no_pass(reference: CallRecording) -> None:
    every = both(row_scaled("unet", 0), row_scaled("unet", 1))
    result = check(subject("StableDiffusionXLPipeline", every), reference)
    assert result.sentence.startswith("drifted: unet.forward at step 0: output 0")


def test_samples_of_one_pass_belong_together() -> None:
    recorded = torch.ones(4, 3)
    wrong = recorded + torch.tensor([[0.0], [0.0], [0.5], [0.2]])
    assert failing_pass(NAMES, PLACE, wrong, recorded) == "cond"
    wrong = recorded + torch.tensor([[0.0], [0.1], [0.5], [0.2]])
    assert failing_pass(NAMES, PLACE, wrong, recorded) is None
    wrong[3] = float("nan")
    assert failing_pass(NAMES, PLACE, wrong, recorded) == "cond"


def test_tensors_without_a_row_for_each_sample_have_no_pass() -> None:
    assert failing_pass(NAMES, PLACE, torch.ones(3, 4), torch.zeros(3, 4)) is None
    assert failing_pass({}, PLACE, torch.ones(4, 3), torch.zeros(4, 3)) is None


@pytest.mark.parametrize(
    "kept", ["unet", [["unet", "forward", 0]], [["unet", 0, "forward", []]], [[1, 2, 3, [4]]]]
)
def test_what_is_no_name_is_left_out(reference: CallRecording, kept: Any) -> None:
    manifest = reference.recording.manifest
    settings = {**manifest.settings, PASSES: kept}
    other = reference.with_manifest(manifest.model_copy(update={"settings": settings}))
    assert names_of(other) == {}
