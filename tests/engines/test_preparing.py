"""Preparation is part of a case: LoRA files and a function, on both sides of a check."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import truestep
from truestep.errors import CaseError, FileFormatError, MissingExtraError, UsageError
from truestep.replay.touched import snapshot_of, touched
from truestep.testing import tiny
from truestep.verdict import Comparison, Verdict

SMALL = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16}
TARGET = "transformer.transformer_blocks.0.attn.to_q"

PREPARE = """
import torch

def rounded(pipe):
    with torch.no_grad():
        for weight in pipe.transformer.parameters():
            scale = weight.abs().max() / 127
            weight.copy_((weight / scale).round() * scale)

def nothing(pipe):
    pass

def broken(pipe):
    raise KeyError("unet")

def fused(pipe):
    pipe.fuse_lora(lora_scale=1.0)
    pipe.unload_lora_weights()
"""


def bias(pipe: Any) -> None:
    with torch.no_grad():
        pipe.transformer.proj_out.bias.add_(0.01)


def idle(pipe: Any) -> None:
    """Looks, and changes nothing."""
    list(pipe.transformer.parameters())


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """A folder with `port.py` and two LoRA files, one of another content."""
    (tmp_path / "port.py").write_text(PREPARE)
    for name, seed in (("style", 0), ("other", 1)):
        lora(tmp_path / f"{name}.safetensors", TARGET, seed=seed)
    return tmp_path


def lora(path: Path, *modules: str, seed: int = 0, width: int = 32) -> None:
    """Write a LoRA of rank 2 over square linear layers."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, width, generator=draw)
        tensors[f"{module}.lora_B.weight"] = torch.randn(width, 2, generator=draw) / 4
    save_file(tensors, path)


def flux(models: Path, **fields: Any) -> truestep.CallCase:
    call = {"prompt": "a cat", **SMALL}
    return truestep.CallCase(model=str(models / "flux"), call=call, **fields)


@pytest.fixture
def peft() -> None:
    pytest.importorskip("peft")


# --- prepare -----------------------------------------------------------------------------------


def test_a_reference_with_rounded_weights_is_one_of_its_case(models: Path, folder: Path) -> None:
    case = flux(models, prepare=f"{folder}/port.py:rounded")
    reference = truestep.record(case, floor="none")
    assert reference.manifest.settings["prepared"] == f"{folder}/port.py:rounded"
    same = truestep.check(case, reference)
    assert same.verdict is Verdict.IDENTICAL
    assert same.notes[0] == f"prepared: {folder}/port.py:rounded"
    plain = truestep.check(case, reference, settings={"prepare": None})
    assert plain.verdict is Verdict.DRIFTED
    assert plain.actual.label == "prepare=(absent)"
    assert plain.notes[0] == f"prepared: reference {folder}/port.py:rounded; candidate not"
    wrong = truestep.check(case, reference, apply=bias)
    assert wrong.sentence.startswith("drifted: transformer.forward (cond) at step 0: output")


def test_a_change_comes_after_the_preparation(models: Path, folder: Path) -> None:
    case = flux(models, prepare=f"{folder}/port.py:rounded")
    reference = truestep.record(case, floor="none")
    seen: list[bool] = []

    def looks(pipe: Any) -> None:
        weight = pipe.transformer.proj_out.weight
        steps = weight / (weight.abs().max() / 127)
        seen.append(bool((steps - steps.round()).abs().max() < 1e-3))

    truestep.check(case, reference, apply=looks)
    assert seen == [True]


def test_another_source_of_the_preparation_is_another_case(models: Path, folder: Path) -> None:
    case = flux(models, prepare=f"{folder}/port.py:nothing")
    reference = truestep.record(case, floor="none")
    before = case.id
    (folder / "port.py").write_text(PREPARE + "\n# changed\n")
    assert case.id == before  # the reference is found, and refused by what differs
    result = truestep.check(case, reference)
    assert result.verdict is Verdict.INCOMPARABLE
    assert "(sha256.prepare differ)" in result.sentence
    assert result.hint.startswith("truestep record CASE --update")


REMOVED = """
def transformer(pipe):
    pipe.transformer = None

def vae(pipe):
    pipe.vae = None
"""


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_a_component_that_a_preparation_takes_away_is_named(
    name: str, models: Path, folder: Path
) -> None:
    (folder / "removing.py").write_text(REMOVED)
    spec = f"{folder}/removing.py:{name}"
    with pytest.raises(UsageError) as caught:
        truestep.record(flux(models, prepare=spec), floor="none")
    assert caught.value.what == (
        f"the pipeline does not run once the preparation {spec} has set {name} to None"
    )
    assert caught.value.measured.startswith("AttributeError: 'NoneType' object has no attribute")

    def change(pipe: Any) -> None:
        setattr(pipe, name, None)

    with pytest.raises(UsageError, match=f"the change .*change has set {name} to None"):
        truestep.record(flux(models), apply=change, floor="none")


def test_a_component_that_the_pipeline_can_do_without_is_no_error(models: Path) -> None:
    def change(pipe: Any) -> None:
        pipe.image_encoder = None

    assert truestep.record(flux(models), apply=change, floor="none").manifest.forwards


BAD_PREPARE = {
    "absent": ("none.py:fuse", "the file of prepare is not there"),
    "function": ("port.py:round", "no function 'round'"),
    "raises": ("port.py:broken", "the preparation broken raised KeyError: 'unet'"),
}


@pytest.mark.parametrize("name", sorted(BAD_PREPARE))
def test_a_preparation_that_cannot_be_is_refused(name: str, models: Path, folder: Path) -> None:
    spec, what = BAD_PREPARE[name]
    with pytest.raises(UsageError) as caught:
        truestep.record(flux(models, prepare=f"{folder}/{spec}"))
    assert caught.value.what == what


# --- LoRA --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("peft")
def test_a_lora_is_part_of_the_reference(models: Path, folder: Path) -> None:
    style = f"{folder}/style.safetensors"
    case = flux(models, lora=f"{style}:0.8")
    reference = truestep.record(case, floor="none")
    same = truestep.check(case, reference)
    assert same.verdict is Verdict.IDENTICAL
    assert same.notes[0] == f"prepared: lora {style} x 0.8"
    stronger = flux(models, lora=style)
    assert stronger.prepared == f"lora {style} x 1"
    other = truestep.check(stronger, reference)
    assert other.verdict is Verdict.INCOMPARABLE
    assert "(lora differ)" in other.sentence
    changed = truestep.check(case, reference, settings={"lora": f"{style}:1.0"})
    assert changed.sentence.startswith("drifted: transformer.forward (cond) at step 0: output")
    without = truestep.check(case, reference, settings={"lora": None})
    assert without.verdict is Verdict.DRIFTED
    wrong = truestep.check(case, reference, apply=bias)
    assert wrong.sentence.startswith("drifted: transformer.forward (cond) at step 0: output")


@pytest.mark.usefixtures("peft")
def test_a_lora_that_changes_nothing_is_said_to(models: Path, folder: Path) -> None:
    style, zero = folder / "style.safetensors", folder / "zero.safetensors"
    tensors = load_file(style)
    save_file({k: v * 0 if "lora_B" in k else v for k, v in tensors.items()}, zero)

    def said(*loras: str) -> Any:
        case = flux(models, lora=list(loras))
        return truestep.record(case, floor="none").manifest.settings.get("idle")

    assert said(str(style)) is None
    assert said(f"{style}:0") == [f"lora {style} x 0 changes nothing: its scale is 0"]
    assert said(f"{style}:0.5", str(zero)) == [
        f"lora {zero} x 1 changes nothing: its second factor (B, up) is zero everywhere"
    ]


@pytest.mark.usefixtures("peft")
def test_another_lora_under_the_same_name_is_another_case(models: Path, folder: Path) -> None:
    case = flux(models, lora=f"{folder}/style.safetensors:0.8")
    reference = truestep.record(case, floor="none")
    shutil.copy(folder / "other.safetensors", folder / "style.safetensors")
    result = truestep.check(case, reference)
    assert result.verdict is Verdict.INCOMPARABLE
    assert f"(sha256.lora.{folder}/style.safetensors differ)" in result.sentence


@pytest.mark.usefixtures("peft")
def test_two_loras_and_a_fusion_of_them(models: Path, folder: Path) -> None:
    both = [f"{folder}/style.safetensors:0.8", f"{folder}/other.safetensors:0.5"]
    case = flux(models, lora=both)
    reference = truestep.record(case)
    fused = truestep.check(case, reference, settings={"prepare": f"{folder}/port.py:fused"})
    assert fused.verdict is Verdict.EQUIVALENT
    swapped = [both[0].replace("0.8", "0.5"), both[1].replace("0.5", "0.8")]
    assert truestep.check(case, reference, settings={"lora": swapped}).verdict is Verdict.DRIFTED


@pytest.mark.usefixtures("peft")
@pytest.mark.parametrize("modules", [(f"{TARGET}y",), (TARGET, f"{TARGET}y")], ids=["all", "one"])
def test_a_lora_of_modules_that_are_not_there_is_refused(
    modules: tuple[str, ...], models: Path, tmp_path: Path
) -> None:
    path = tmp_path / "strange.safetensors"
    lora(path, *modules)
    with pytest.raises(CaseError, match="names modules that FluxPipeline has not") as caught:
        truestep.record(flux(models, lora=str(path)))
    error = caught.value
    assert error.where == str(path)
    assert error.measured == f"1 of {len(modules)} are not in it: {TARGET}y"
    assert error.likely == f"made for another model; did you mean {TARGET!r}?"
    assert error.hint == f"truestep show {path}  # says what it holds"


@pytest.mark.usefixtures("peft")
def test_a_file_that_is_no_lora_is_refused(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(CaseError, match="the LoRA cannot be loaded"):
        truestep.record(flux(models, lora=str(path)))


def test_lora_files_that_cannot_be_read_are_refused(models: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"no weights")
    (tmp_path / "pickled.bin").write_bytes(b"no weights")
    with pytest.raises(CaseError, match="the file of lora is not there"):
        truestep.record(flux(models, lora=f"{tmp_path}/none.safetensors:0.5"))
    with pytest.raises(CaseError, match="is read from a safetensors file"):
        truestep.record(flux(models, lora=f"{tmp_path}/pickled.bin"))
    with pytest.raises(FileFormatError):
        truestep.record(flux(models, lora=f"{tmp_path}/damaged.safetensors"))


def test_a_lora_needs_its_package(
    models: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match="'peft', which is not installed") as caught:
        truestep.record(flux(models, lora=f"{folder}/style.safetensors"))
    assert caught.value.hint == "pip install 'truestep[lora]'"


# --- nothing changed ---------------------------------------------------------------------------

NOTHING = "the change touched nothing: no weight, buffer, class, hook, configuration or setting"


def test_a_change_that_touches_nothing_says_so(models: Path, folder: Path) -> None:
    case = flux(models)
    reference = truestep.record(case, floor="none")

    def check(**options: Any) -> Comparison:
        return truestep.check(case, reference, **options)

    for options in (
        {"apply": idle},
        {"settings": {"guidance_scale": 3.5}},
        {"settings": {"scheduler": "FlowMatchEulerDiscreteScheduler"}},
        {"settings": {"pipeline": "FluxPipeline"}, "apply": idle},
    ):
        result = check(**options)
        assert result.verdict is Verdict.IDENTICAL
        assert NOTHING in result.sentence
        assert result.actual.label.endswith(": touched nothing")
    assert check(apply=idle, expect="different").verdict is Verdict.UNMET
    assert NOTHING not in check().sentence


def _note(pipe: Any) -> None:
    pipe.transformer.note = "a note"


def _hook(pipe: Any) -> None:
    pipe.vae.decoder.register_forward_hook(lambda *_: None)


def _method(pipe: Any) -> None:
    own = pipe.encode_prompt
    pipe.encode_prompt = lambda *args, **kwargs: own(*args, **kwargs)


def _words(pipe: Any) -> None:
    pipe.tokenizer.add_tokens(["catlike"])


def _shift(pipe: Any) -> None:
    pipe.scheduler._internal_dict = {**pipe.scheduler.config, "shift": 2.0}


def _scale(pipe: Any) -> None:
    pipe.image_processor._internal_dict = {**pipe.image_processor.config, "resample": "area"}


@pytest.mark.parametrize("change", [_note, _hook, _method, _words, _shift, _scale])
def test_a_change_without_effect_that_touches_something_is_not_accused(
    change: Any, models: Path
) -> None:
    pipe = tiny.pipeline("FluxPipeline")
    before = snapshot_of(pipe)
    assert touched(before, snapshot_of(pipe)) == ()
    change(pipe)
    assert touched(before, snapshot_of(pipe))


def test_a_patched_class_of_the_library_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers import transformer_flux

    pipe = tiny.pipeline("FluxPipeline")
    before = snapshot_of(pipe)
    own = transformer_flux.FluxSingleTransformerBlock.forward
    monkeypatch.setattr(
        transformer_flux.FluxSingleTransformerBlock, "forward", lambda *a, **k: own(*a, **k)
    )
    places = touched(before, snapshot_of(pipe))
    assert any("FluxSingleTransformerBlock.forward" in place for place in places)
    monkeypatch.undo()
    assert touched(before, snapshot_of(pipe)) == ()


def test_a_pipeline_object_that_is_not_changed_says_so(models: Path) -> None:
    pipe = tiny.pipeline("FluxPipeline")
    pipe.set_progress_bar_config(disable=True)
    reference = truestep.record(pipe, call={"prompt": "a cat", **SMALL}, floor="none")
    assert NOTHING in truestep.check(pipe, reference, apply=idle).sentence
    assert NOTHING not in truestep.check(pipe, reference, apply=bias).sentence


@pytest.mark.usefixtures("peft")
def test_the_same_lora_under_another_name_changes_nothing(models: Path, folder: Path) -> None:
    case = flux(models, lora=f"{folder}/style.safetensors:0.8")
    reference = truestep.record(case, floor="none")
    shutil.copy(folder / "style.safetensors", folder / "copy.safetensors")
    same = truestep.check(case, reference, settings={"lora": f"{folder}/copy.safetensors:0.8"})
    assert NOTHING in same.sentence
    other = truestep.check(case, reference, settings={"lora": f"{folder}/other.safetensors:0.8"})
    assert other.verdict is Verdict.DRIFTED
    assert NOTHING not in other.sentence
