"""One model of a pipeline in memory at a time: what was not running is dropped, and the numbers are
those of models that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import truestep
from truestep.errors import UsageError
from truestep.measure.distance import same_bits
from truestep.recording.format import Recording
from truestep.runtime import lent, stored
from truestep.runtime.lent import lending
from truestep.runtime.stored import in_files
from truestep.runtime.weight import Lent, Resident
from truestep.testing import tiny
from truestep.verdict import Verdict

SIZE = {"height": 32, "width": 32, "num_frames": 5}


@pytest.fixture(autouse=True)
def every_weight_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lent, "LEAST", 1)
    monkeypatch.setattr(stored, "LEAST", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resident") / "wan"
    tiny.save("WanPipeline", path)
    return path


def case_of(folder: Path, *, runtime: bool, dtype: str = "float32") -> Any:
    words = {"prompt": "a cat", "max_sequence_length": 16, **SIZE}
    if runtime:
        return truestep.Case(model=str(folder), dtype=dtype, steps=3, **words)
    call = {**words, "num_inference_steps": 3}
    return truestep.CallCase(model=str(folder), dtype=dtype, call=call)


class Watched:
    """What is in memory, whenever a weight is let in."""

    def __init__(self) -> None:
        self.models: list[object] = []
        self.most = 0
        self.left: list[object] = []
        self._storages: dict[object, list[StorageWeakRef]] = {}

    def saw(self, resident: Resident, weight: Lent) -> None:
        if self.models[-1:] != [weight.model]:
            self.models.append(weight.model)
            self.left += [
                model
                for model, held in self._storages.items()
                if model != weight.model and not all(one.expired() for one in held)
            ]
        self.most = max(self.most, sum(one.size for one in resident.weights))
        if weight.resident is not None:
            one = StorageWeakRef(weight.resident.untyped_storage())
            self._storages.setdefault(weight.model, []).append(one)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    found, original = Watched(), Resident.let_in

    def let_in(self: Resident, weight: Lent) -> None:
        original(self, weight)
        found.saw(self, weight)

    monkeypatch.setattr(Resident, "let_in", let_in)
    return found


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each part's weights."""
    return {
        part.name: sum(file.stat().st_size for file in part.glob("*.safetensors"))
        for part in folder.iterdir()
        if part.is_dir()
    }


@pytest.mark.parametrize("runtime", [True, False], ids=["stages", "calls"])
def test_one_model_is_in_memory_at_a_time(runtime: bool, folder: Path, watched: Watched) -> None:
    case = case_of(folder, runtime=runtime)
    recording = truestep.record(case, low_memory=True)
    each = sizes(folder)
    assert 0 < watched.most <= max(each.values()) < 0.8 * sum(each.values())
    assert watched.left == []
    parts = [Path(str(model[1])).name for model in watched.models]  # type: ignore[index]
    assert parts[:3] == ["text_encoder", "transformer", "vae"]
    assert parts.count("text_encoder") > 1  # for the floor, each is read again
    before = len(watched.models)
    assert truestep.check(case, recording, low_memory=True).verdict is Verdict.IDENTICAL
    assert len(watched.models) > before
    assert watched.most <= max(each.values())
    assert watched.left == []


def test_what_stays_is_noticed(folder: Path, watched: Watched) -> None:
    """The guard of the test above: an encoder that somebody holds."""
    held: list[torch.Tensor] = []

    def hold(pipe: Any) -> None:
        encoder = pipe.text_encoder
        encoder.register_forward_pre_hook(lambda *_: held.append(encoder.shared.weight[:1]))

    truestep.record(case_of(folder, runtime=True), low_memory=True, floor="none", apply=hold)
    assert held
    assert watched.left


@pytest.mark.parametrize(
    ("runtime", "dtype"), [(True, "bfloat16"), (False, "float32")], ids=["stages", "calls"]
)
def test_recordings_floors_and_verdicts_are_the_same(
    runtime: bool, dtype: str, folder: Path, tmp_path: Path
) -> None:
    case = case_of(folder, runtime=runtime, dtype=dtype)
    plain = truestep.record(case, path=tmp_path / "plain.safetensors")
    low = truestep.record(case, path=tmp_path / "low.safetensors", low_memory=True)
    assert set(plain) == set(low)
    assert all(same_bits(plain[name], low[name]) for name in plain)
    first, second = (_runs(recording) for recording in (plain, low))
    elsewhere = {key for key in {*first, *second} if key[0] == "instructions"}
    # what is repeated there is taped, or known already, and then repeated in part
    alike = {key for key in first if key not in elsewhere and key[0] != "repeat"}
    assert alike <= set(second) <= set(first) | elsewhere
    assert all(first[key] == second[key] for key in alike)

    def fault(pipe: Any) -> None:
        with torch.no_grad():
            pipe.transformer.blocks[1].attn1.to_q.weight.mul_(1.05)

    for change, depth in ((None, "steps"), (fault, "steps"), (fault, "modules")):
        results = [
            truestep.check(case, plain, apply=change, depth=depth, low_memory=option)  # type: ignore[arg-type]
            for option in (False, True)
        ]
        assert results[0].sentence == results[1].sentence
        assert [row.model_dump() for row in results[0].rows] == [
            row.model_dump() for row in results[1].rows
        ]
        assert results[1].verdict is (Verdict.DRIFTED if change else Verdict.IDENTICAL)
    assert any("read one model at a time" in note for note in results[1].notes)


def _runs(recording: Recording) -> dict[tuple[str, str, str], Any]:
    floor = recording.manifest.noise_floor
    assert floor is not None
    return {(run.kind, run.detail, run.pair): run for run in floor.runs}


def test_a_weight_that_code_changed_is_not_read_again(folder: Path) -> None:
    import diffusers

    with lending() as lender:
        lender.resident = Resident()
        with in_files():
            pipe = diffusers.WanPipeline.from_pretrained(folder, local_files_only=True)
        weight = pipe.transformer.blocks[0].attn1.to_q.weight
        other = pipe.text_encoder.shared.weight
        before = weight.clone()
        with torch.no_grad():
            weight.mul_(2)
            other.sum()  # another model runs
            assert torch.equal(weight + 0, 2 * before)
            weight.t_()
            other.sum()
            assert torch.equal(weight.t() + 0, 2 * before)
            plain = pipe.transformer.blocks[0].attn1.to_k.weight
            value = plain + 0
            plain.t_()  # of which nothing was written
            other.sum()
            assert torch.equal(plain.t() + 0, value)


def test_one_way_is_chosen(folder: Path, tmp_path: Path) -> None:
    case = case_of(folder, runtime=True)
    with pytest.raises(UsageError, match="cannot both stay in memory") as caught:
        truestep.record(case, from_disk=True, low_memory=True)
    assert caught.value.hint == "leave --low-memory out"
    with pytest.raises(UsageError) as caught:
        truestep.record(object(), low_memory=True)
    assert caught.value.hint == "give the case: record(case, ..., low_memory=True)"
