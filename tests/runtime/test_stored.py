"""Models whose weights stay in their files compute what they compute in memory."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import truestep
from truestep.errors import FileFormatError, UsageError
from truestep.measure.distance import same_bits
from truestep.recording.format import Recording
from truestep.runtime import lent, stored
from truestep.runtime.lent import active, lending
from truestep.runtime.stored import in_files, refuse_compiled
from truestep.testing import tiny

CALL = {"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 4}


@pytest.fixture(autouse=True)
def every_weight_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lent, "LEAST", 1)
    monkeypatch.setattr(stored, "LEAST", 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / name
            tiny.save(name, made[name])
        return made[name]

    return folder


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    import diffusers

    return diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)


def modules_of(pipe: Any) -> dict[str, torch.nn.Module]:
    return {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["WanPipeline", "FluxPipeline", "StableDiffusionXLPipeline"])
@torch.no_grad()
def test_a_model_in_files_is_the_model(name: str, dtype: torch.dtype, folders: Any) -> None:
    plain = loaded(folders(name), dtype)
    with lending() as lender:
        with in_files():
            pipe = loaded(folders(name), dtype)
        assert active() is lender
        for part, module in modules_of(plain).items():
            other = modules_of(pipe)[part]
            ours, theirs = (dict(side.named_parameters()) for side in (other, module))
            assert list(ours) == list(theirs)
            count = sum(lender.lent(weight) is not None for weight in ours.values())
            assert count == sum(w.is_floating_point() for w in theirs.values()), part
            for key, weight in theirs.items():
                assert ours[key].dtype is weight.dtype, f"{part}.{key}"
                assert ours[key].requires_grad == weight.requires_grad
                assert torch.equal(ours[key] + 0, weight), f"{part}.{key}"
            tied = {k for k, v in theirs.items() if v is theirs[next(iter(theirs))]}
            assert tied == {k for k, v in ours.items() if v is ours[next(iter(ours))]}


def test_nothing_is_left_patched(folders: Any) -> None:
    import safetensors.torch
    import transformers.modeling_utils

    before = (safetensors.torch.load_file, transformers.modeling_utils.safe_open, dict(os.environ))
    with lending(), in_files():
        assert safetensors.torch.load_file is not before[0]
    after = (safetensors.torch.load_file, transformers.modeling_utils.safe_open, dict(os.environ))
    assert before == after


def test_without_a_lender_models_are_loaded_as_ever(folders: Any) -> None:
    with in_files():
        pipe = loaded(folders("FluxPipeline"), torch.float32)
    weight = next(pipe.transformer.parameters())
    assert weight.isfinite().all()


@pytest.mark.parametrize("runtime", [True, False], ids=["stages", "calls"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_check_from_disk_says_what_a_check_says(
    runtime: bool, dtype: str, folders: Any, tmp_path: Path
) -> None:
    if runtime:
        size = {"height": 32, "width": 32, "num_frames": 5, "steps": 4, "max_sequence_length": 16}
        case: Any = truestep.Case(
            model=str(folders("WanPipeline")), prompt="a cat", dtype=dtype, **size
        )
        part = "transformer"
    else:
        case = truestep.CallCase(model=str(folders("FluxPipeline")), dtype=dtype, call=CALL)
        part = "transformer"
    path = tmp_path / "reference.safetensors"
    truestep.record(case, path=path)

    recorded, read = Recording.open(path), truestep.record(case, from_disk=True)
    assert set(recorded) == set(read)
    assert all(same_bits(recorded[name], read[name]) for name in recorded)
    floors = [
        {(run.kind, run.detail, run.pair): run for run in recording.manifest.noise_floor.runs}
        for recording in (recorded, read)
        if recording.manifest.noise_floor is not None
    ]
    made = {key for key in floors[0] if key[0] != "instructions"}
    others = {key for key in floors[1] if key[0] == "instructions"}
    assert made == set(floors[1]) - others
    assert runtime or not others, "a tape would hold all weights, and none of it is kept"
    alike = made if not runtime else {key for key in made if key[0] != "repeat"}  # once it is kept
    assert all(floors[0][key] == floors[1][key] for key in alike)

    same = truestep.check(case, path, from_disk=True)
    assert same.verdict.value == "identical", same.sentence
    assert "stayed on disk, and were read whenever they were used" in same.notes[-1]

    def fault(pipe: Any) -> None:
        weight = dict(getattr(pipe, part).named_parameters())[_a_weight(getattr(pipe, part))]
        with torch.no_grad():
            weight.mul_(1.5)

    for depth in ("steps", "modules"):
        here = truestep.check(case, path, apply=fault, depth=depth)
        there = truestep.check(case, path, apply=fault, depth=depth, from_disk=True)
        assert here.verdict.value == "drifted"
        assert there.sentence == here.sentence
        assert there.first_divergence == here.first_divergence
        assert [row.model_dump() for row in there.rows] == [row.model_dump() for row in here.rows]


def _a_weight(model: torch.nn.Module) -> str:
    return next(n for n, p in model.named_parameters() if n.endswith("to_q.weight"))


def test_a_change_that_touches_nothing_is_said_to(folders: Any, tmp_path: Path) -> None:
    case = truestep.CallCase(model=str(folders("FluxPipeline")), call=CALL)
    path = tmp_path / "reference.safetensors"
    truestep.record(case, path=path)
    idle = truestep.check(case, path, apply=lambda pipe: None, from_disk=True)
    assert "touched nothing" in idle.sentence

    def small(pipe: Any) -> None:
        with torch.no_grad():
            next(pipe.vae.parameters())[0].mul_(1)

    assert "touched nothing" in truestep.check(case, path, apply=small, from_disk=True).sentence


def test_compiled_models_are_refused(folders: Any, tmp_path: Path) -> None:
    case = truestep.CallCase(model=str(folders("FluxPipeline")), call=CALL)
    path = tmp_path / "reference.safetensors"
    truestep.record(case, path=path, floor="none")

    def compiled(pipe: Any) -> None:
        pipe.transformer.compile()

    with pytest.raises(UsageError) as refused:
        truestep.check(case, path, apply=compiled, from_disk=True)
    assert "compiled models cannot be run from disk" in str(refused.value)
    assert "leave --from-disk out" in str(refused.value)
    with pytest.raises(UsageError, match="compiled models cannot be run from disk"):
        truestep.record(case, apply=compiled, from_disk=True)
    refuse_compiled([torch.nn.Linear(1, 1)])


def test_an_object_is_in_memory_already(folders: Any, tmp_path: Path) -> None:
    pipe = tiny.pipeline("FluxPipeline")
    recording = truestep.record(pipe, call=CALL, floor="none")
    with pytest.raises(UsageError, match="in memory already"):
        truestep.check(pipe, recording, from_disk=True)
    with pytest.raises(UsageError, match="in memory already"):
        truestep.record(pipe, call=CALL, from_disk=True)


def test_a_file_that_is_cut_meanwhile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(64, 64), "b": torch.ones(64, 64)}, path)
    with lending(), in_files():
        tensors = __import__("safetensors.torch").torch.load_file(path)
        assert torch.equal(tensors["b"] + 0, torch.ones(64, 64))
        os.truncate(path, path.stat().st_size - 100)
        with pytest.raises(FileFormatError) as cut:
            tensors["b"] + 0
        assert "b cannot be read" in str(cut.value)
        assert "it ends 100 bytes too early" in str(cut.value)
        path.unlink()
        with pytest.raises(FileFormatError, match="a cannot be read"):
            tensors["a"] + 0


def test_slices_and_small_parts(tmp_path: Path) -> None:
    from transformers import modeling_utils

    path = tmp_path / "weights.safetensors"
    saved = {"a": torch.randn(4, 6), "ids": torch.arange(5), "empty": torch.empty(0, 3)}
    save_file(saved, path, metadata={"format": "pt"})
    with lending() as lender, in_files():
        with modeling_utils.safe_open(path, framework="pt", device="cpu") as file:
            assert sorted(file.keys()) == sorted(saved)
            assert sorted(file.offset_keys()) == sorted(saved)
            assert file.metadata() == {"format": "pt"}
            part = file.get_slice("a")
            assert part.get_shape() == [4, 6]
            assert part.get_dtype() == "F32"
            assert torch.equal(part[1:3], saved["a"][1:3])
            assert lender.lent(part[...]) is not None
            for name, tensor in saved.items():
                assert torch.equal(file.get_tensor(name) + 0, tensor)
        assert lender.lent(file.get_tensor("ids")) is None


def test_shards_are_read(folders: Any, tmp_path: Path) -> None:
    import diffusers

    model = diffusers.FluxTransformer2DModel.from_pretrained(
        folders("FluxPipeline") / "transformer"
    )
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    with lending(), in_files():
        other = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
        for name, weight in model.named_parameters():
            assert torch.equal(dict(other.named_parameters())[name] + 0, weight)
    assert load_file(sorted(tmp_path.glob("*.safetensors"))[0])


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_a_file_that_is_another_one_meanwhile_is_named(how: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(64, 64)}, path)
    with lending(), in_files():
        tensors = __import__("safetensors.torch").torch.load_file(path)
        assert torch.equal(tensors["a"] + 0, torch.ones(64, 64))
        os.utime(path, ns=(0, path.stat().st_mtime_ns))  # it was read, no more
        assert torch.equal(tensors["a"] + 0, torch.ones(64, 64))
        if how == "written":
            save_file({"a": torch.zeros(64, 64)}, path)
        else:
            save_file({"a": torch.zeros(64, 64)}, tmp_path / "other")
            os.replace(tmp_path / "other", path)
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # clocks may be coarse
        with pytest.raises(FileFormatError, match="it is not the file that was loaded"):
            tensors["a"] + 0


def test_a_folder_that_is_named_from_here_is_read_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.ones(64, 64)}, tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    with lending(), in_files():
        tensors = __import__("safetensors.torch").torch.load_file("weights.safetensors")
        monkeypatch.chdir("/")
        assert torch.equal(tensors["a"] + 0, torch.ones(64, 64))


def test_what_another_thread_loads_meanwhile_is_in_memory(folders: Any) -> None:
    folder = folders("FluxPipeline")
    begun, end = threading.Event(), threading.Event()
    pipes: list[Any] = []

    def load() -> None:
        begun.wait()
        pipes.append(loaded(folder, torch.float32))
        end.set()

    thread = threading.Thread(target=load)
    thread.start()
    with lending() as lender:
        with in_files():
            begun.set()
            end.wait()
            pipes.append(loaded(folder, torch.float32))
        thread.join()
        theirs, ours = (dict(pipe.transformer.named_parameters()) for pipe in pipes)
        assert all(lender.lent(weight) is None for weight in theirs.values())
        assert all(lender.lent(weight) is not None for weight in ours.values())
        assert all(torch.equal(ours[name] + 0, weight) for name, weight in theirs.items())


def test_shards_are_read_by_several_threads(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers
    from diffusers.models import modeling_utils

    folder = folders("FluxPipeline") / "transformer"
    model = diffusers.FluxTransformer2DModel.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    with lending() as lender, in_files():
        other = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        for name, weight in other.named_parameters():
            assert lender.lent(weight) is not None
            assert torch.equal(weight + 0, dict(model.named_parameters())[name].bfloat16())


def test_an_adapter_is_fused_into_weights_in_files(folders: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    case = truestep.CallCase(model=str(folders("FluxPipeline")), dtype="bfloat16", call=CALL)
    path = tmp_path / "reference.safetensors"
    truestep.record(case, path=path)

    def fused(pipe: Any) -> None:
        torch.manual_seed(0)
        adapter = LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False)
        pipe.transformer.add_adapter(adapter)
        pipe.transformer.fuse_lora()

    def unfused(pipe: Any) -> None:
        fused(pipe)
        pipe.transformer.unfuse_lora()
        pipe.transformer.unload_lora()

    for change in (fused, unfused):
        here, there = (
            truestep.check(case, path, apply=change, from_disk=disk) for disk in (False, True)
        )
        assert there.sentence == here.sentence
        assert [row.model_dump() for row in there.rows] == [row.model_dump() for row in here.rows]
    assert truestep.check(case, path, apply=fused).verdict.value == "drifted"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_weights_lie_as_they_do_in_memory(
    dtype: torch.dtype, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "LEAST", 1 << 40)
    plain = loaded(folders("FluxPipeline"), dtype)
    with lending(), in_files():
        pipe = loaded(folders("FluxPipeline"), dtype)
    for part, module in modules_of(plain).items():
        others = dict(modules_of(pipe)[part].named_parameters())
        for name, weight in module.named_parameters():
            assert torch.equal(others[name], weight)
            assert others[name].data_ptr() % 64 == weight.data_ptr() % 64, f"{part}.{name}"
            assert others[name].stride() == weight.stride()


def test_a_model_of_small_weights_is_said_to_be_in_memory(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lent, "LEAST", 1 << 20)
    monkeypatch.setattr(stored, "LEAST", 1 << 20)
    case = truestep.CallCase(model=str(folders("FluxPipeline")), call=CALL)
    path = tmp_path / "reference.safetensors"
    truestep.record(case, path=path, floor="none")
    result = truestep.check(case, path, from_disk=True)
    assert result.notes == ("nothing stayed on disk: no safetensors file has a weight of 1 MiB",)
